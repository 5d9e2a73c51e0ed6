"""How fast the pictures come: ``tools/analysis/feeding.py CONFIG [--images FOLDER]``.

Times each step of the training pipeline in one process, the decoders that there are, and, with ``--workers``, whole
data loaders. A step's time is that of the processor, so other programs on the machine disturb it little, and the best
of some rounds. What runs on the training device (normalisation, mixup, CutMix) is not part of the pipeline.
"""

import argparse
import importlib.util
import io
import math
import os.path as osp
import sys
import time
from pathlib import Path

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from mmoverlock import cli, compat  # noqa: E402

JPEG = ('.jpg', '.jpeg')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Time the training pipeline of a config')
    parser.add_argument('config', help='config file')
    parser.add_argument('--images', help="folder of pictures, at any depth; default: the config's own data")
    parser.add_argument('--number', type=int, default=200, help='pictures a round. Defaults to 200')
    parser.add_argument('--rounds', type=int, default=5, help='rounds, the best of which counts. Defaults to 5')
    parser.add_argument('--target', type=float, default=1300, help='pictures a second and GPU. Defaults to 1300')
    parser.add_argument('--workers', type=int, nargs='*', default=[], help='data loaders of so many workers to time')
    args = parser.parse_args(argv)
    if min(args.number, args.rounds) < 1 or args.target <= 0 or min(args.workers, default=1) < 1:
        parser.error('--number, --rounds, --target and --workers must be positive')
    return args


def build(args):
    """The config's training data set, of the pictures in ``--images`` if that is given.

    Args:
        args (argparse.Namespace): ``config``, ``images``.

    Returns:
        BaseDataset: With its pipeline.

    Raises:
        mmoverlock.cli.UserError: There is no such config, folder, or picture in it.
    """
    from mmengine.registry import DATASETS, init_default_scope

    cfg = cli.load_config(args.config)
    dataset = (cfg.get('train_dataloader') or {}).get('dataset')
    if not dataset:
        raise cli.UserError(f'{args.config} has no train_dataloader; is it a base file?')
    if args.images:
        if cfg.get('default_scope') != 'mmpretrain':
            raise cli.UserError('--images is for classifiers: other tasks need annotations, so time their own data')
        if not any(path.suffix.lower() in JPEG for path in Path(args.images).rglob('*')):
            raise cli.UserError(f'{args.images}: no JPEG pictures there')
        cli.check_packages(cfg)
        dataset = dict(type='CustomDataset', data_root=args.images, with_label=False, pipeline=dataset.pipeline)
    else:
        cli.check_packages(cfg)
        cli.check_data(cfg, ('train',))
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    return DATASETS.build(dataset)


def time_steps(dataset, number: int, rounds: int) -> list:
    """Processor time of each step of the pipeline.

    Args:
        dataset (BaseDataset): With its pipeline.
        number (int): Pictures a round.
        rounds (int): Rounds; of each step the best counts.

    Returns:
        list[tuple[str, float]]: Name and milliseconds a picture of every step.
    """
    steps = dataset.pipeline.transforms
    best = [math.inf] * len(steps)
    for _ in range(rounds):
        np.random.seed(0)  # the same crops and operations in every round
        total = [0.0] * len(steps)
        for i in range(number):
            results = dataset.get_data_info(i % len(dataset))
            results.setdefault('gt_label', 0)
            for k, step in enumerate(steps):
                start = time.process_time()
                results = step(results)
                total[k] += time.process_time() - start
        best = [min(a, b) for a, b in zip(best, total)]
    return [(_name(step), seconds / number * 1e3) for step, seconds in zip(steps, best)]


def _name(step) -> str:
    """The type of a transform; of a choice, the one of what it chooses from."""
    inner = getattr(step, 'transforms', None)
    while isinstance(inner, (list, tuple)) and inner and type(step).__name__ in ('RandomChoice', 'Compose'):
        step, inner = inner[0], getattr(inner[0], 'transforms', None)
    return type(step).__name__


def decoders() -> dict:
    """Name to function from JPEG bytes to a BGR picture (H, W, 3), of those that are installed here."""
    import mmcv
    from PIL import Image

    found = dict(
        cv2=lambda data: mmcv.imfrombytes(data, backend='cv2'),
        pillow=lambda data: np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))[..., ::-1],
    )
    try:
        mmcv.use_backend('turbojpeg')
        found['turbojpeg'] = lambda data: mmcv.imfrombytes(data, backend='turbojpeg')
    except (ImportError, RuntimeError):  # the Python part or the library itself
        pass
    finally:
        mmcv.use_backend('cv2')
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        def torchvision(data):
            picture = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            return picture.permute(1, 2, 0).numpy()[..., ::-1]

        torchvision(_grey_jpeg())
        found['torchvision'] = torchvision
    except (ImportError, RuntimeError):  # built without it
        pass
    return found


def _grey_jpeg() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new('RGB', (16, 16), 'grey').save(file, 'jpeg')
    return file.getvalue()


def time_decoders(paths: list, rounds: int) -> list:
    """Processor time of every decoder and how far its pixels are from OpenCV's, which the configs use.

    Args:
        paths (list[str]): JPEG files.
        rounds (int): Rounds, the best of which counts.

    Returns:
        list[tuple[str, float, int]]: Name, milliseconds a picture, largest difference in grey levels.
    """
    contents = [Path(path).read_bytes() for path in paths]
    rows, reference = [], None
    for name, decode in decoders().items():
        best = math.inf
        for _ in range(rounds):
            start = time.process_time()
            pictures = [decode(content) for content in contents]
            best = min(best, time.process_time() - start)
        reference = reference or pictures
        difference = max(int(np.abs(a.astype(np.int16) - b).max()) for a, b in zip(pictures, reference))
        rows.append((name, best / len(contents) * 1e3, difference))
    return rows


def time_loader(dataset, workers: int, number: int) -> float:
    """Pictures a second, by the clock, that a data loader of so many workers gives."""
    from torch.utils.data import DataLoader

    dataset.test_mode = True  # a broken picture is an error, not another picture
    count = max(number, 64 * workers)
    order = [i % len(dataset) for i in range(count + 16 * workers)]
    loader = DataLoader(dataset, batch_size=16, sampler=order, num_workers=workers, collate_fn=len)
    batches = iter(loader)
    for _ in range(workers):  # each worker has started
        next(batches)
    start = time.perf_counter()
    done = sum(batches)
    return done / (time.perf_counter() - start)


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    with cli.one_line_errors():
        dataset = build(args)
    import cv2

    cv2.setNumThreads(0)  # as in the workers of a data loader
    torch.set_num_threads(1)
    steps = time_steps(dataset, args.number, args.rounds)
    total = sum(ms for _, ms in steps)
    print('| step | ms a picture | share |')
    print('|---|---|---|')
    for name, ms in [*steps, ('all', total)]:
        print(f'| {name} | {ms:.2f} | {ms / total:.0%} |')
    rate = 1e3 / total
    cores = math.ceil(args.target / rate)
    print(f'\n{rate:.0f} pictures a second and core; {args.target:.0f} a second need {cores} cores')
    paths = [dataset.get_data_info(i)['img_path'] for i in range(min(args.number, len(dataset)))]
    paths = [path for path in paths if path.lower().endswith(JPEG)]
    if paths:
        print('\n| decoder | ms a picture | largest difference from cv2 |')
        print('|---|---|---|')
        for name, ms, difference in time_decoders(paths, args.rounds):
            print(f'| {name} | {ms:.2f} | {difference} |')
    if args.workers:
        print('\n| workers | pictures a second |')
        print('|---|---|')
        for workers in args.workers:
            print(f'| {workers} | {time_loader(dataset, workers, args.number):.0f} |')


if __name__ == '__main__':
    main()
