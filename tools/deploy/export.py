"""Export a model and hold the file against PyTorch: ``export.py CONFIG CHECKPOINT FILE.onnx``.

Whole: classifiers, segmentors, and detectors with their non-maximum suppression (RetinaNet, Faster, Mask and Cascade
R-CNN); ``--backbone`` takes the backbone alone. A variant's name (xt, t, s, b) in place of CONFIG takes the backbone
that ``--task`` says, without any OpenMMLab package but mmengine.

The file is run at three sizes beside PyTorch; a difference above 1e-4 (of 1, or of the largest value of an output where
that is more) is an error, and no file is left behind.
"""

import argparse
import glob
import importlib.util
import math
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

import torch  # noqa: E402
from mmengine.config import DictAction  # noqa: E402

from mmoverlock import __version__, checkpoints, cli, compat, deploy  # noqa: E402
from mmoverlock.deploy.exporters import DYNAMIC, example  # noqa: E402

VARIANTS = ('xt', 't', 's', 'b', 'xtiny', 'tiny', 'small', 'base')
TOLERANCE = 1e-4
PICTURES = ('jpg', 'jpeg', 'png', 'bmp')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Export a model')
    parser.add_argument('model', help=f'a config file or a variant ({", ".join(VARIANTS[:4])})')
    parser.add_argument('checkpoint', help='checkpoint, official or ours; "none" for random weights')
    parser.add_argument('out', help='file to write')
    parser.add_argument(
        '--format', choices=deploy.FORMATS, help='default: by the ending: .onnx, .pt (torchscript), .pt2 (export)'
    )
    parser.add_argument('--task', choices=['det', 'seg'], default='seg', help='for a variant: which dense backbone')
    parser.add_argument('--backbone', action='store_true', help="only the config's backbone")
    parser.add_argument(
        '--normalize', action='store_true', help="put the config's normalisation inside: the input is RGB, 0 to 255"
    )
    parser.add_argument(
        '--shape', type=int, nargs='+', metavar='N', help='height and width (one number: square); default: 224 or 512'
    )
    parser.add_argument(
        '--dynamic', choices=DYNAMIC, default='all', help='what may differ later; all: batch, height and width'
    )
    parser.add_argument('--opset', type=int, default=18, help='of ONNX, 17 or newer; default: 18')
    parser.add_argument(
        '--exporter',
        choices=['auto', 'dynamo', 'torchscript'],
        default='auto',
        help="of PyTorch, for ONNX; default: dynamo where onnxscript is installed. torchscript is PyTorch's earlier "
        'one, minutes faster with --dynamic all',
    )
    parser.add_argument('--time', type=int, default=0, metavar='N', help='time N calls of both, on one thread')
    parser.add_argument('--images', nargs='+', metavar='PICTURE', help='files or folders to check with; default: noise')
    parser.add_argument('--no-check', action='store_true', help='do not run the file')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='change settings of the config'
    )
    args = cli.parse(parser, argv)
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error('--shape takes one or two positive numbers')
    if args.format is None:
        endings = {'.onnx': 'onnx', '.pt': 'torchscript', '.pt2': 'export'}
        args.format = endings.get(osp.splitext(args.out)[1])
        if args.format is None:
            parser.error(f'{args.out}: say the --format, or end the name in {", ".join(endings)}')
    return args


def build(args):
    """The model that the command line names, with its weights."""
    if args.model in VARIANTS:
        from mmoverlock import OverLoCK

        init = None if args.checkpoint == 'none' else dict(type='Pretrained', checkpoint=args.checkpoint)
        model = OverLoCK(args.model, fuse_overview=args.task == 'det', init_cfg=init)
        try:
            model.init_weights() if init else None
        except checkpoints.CheckpointError as error:
            raise cli.UserError(str(error)) from error
        return model
    if not osp.isfile(args.model):
        raise cli.UserError(f'{args.model} is neither a variant ({", ".join(VARIANTS[:4])}) nor a config file')
    cfg = cli.load_config(args.model, args.cfg_options)
    cli.check_packages(cfg)
    meta = cli.check_model(cfg)
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.runner import load_state_dict

    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if cfg.get('default_scope') == 'mmpretrain':
        cfg.model.pop('train_cfg', None)
        cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if args.checkpoint != 'none':
        content = cli.check_checkpoint(args.checkpoint)
        cli.check_fit(meta, content, args.checkpoint, strict=True)
        try:
            load_state_dict(model, checkpoints.unwrap(content), strict=True)
        except (RuntimeError, checkpoints.CheckpointError) as error:
            raise cli.UserError(f'{args.checkpoint} does not fit {args.model}: {cli._reason(error)}') from error
    return model


def sizes(model, shape, dynamic: str):
    """Three sizes to check at; the example's alone where they are fixed."""
    if dynamic != 'all':
        return [tuple(shape)]
    least, (height, width) = deploy.smallest_size(model), shape
    return [(height, width), (least, max(least, width - 17)), (height + 13, width + 64)]


def find_pictures(places) -> list:
    """Files, and what is in folders.

    Raises:
        mmoverlock.cli.UserError: There is none.
    """
    found = []
    for place in places:
        inside = sorted(
            file for end in ('jpg', 'jpeg', 'png', 'bmp') for file in glob.glob(osp.join(place, f'*.{end}'))
        )
        if not osp.isfile(place) and not inside:
            raise cli.UserError(f'--images: {place} is neither a picture nor a folder with jpg, png or bmp files')
        found += inside or [place]
    return found


def read_pictures(files, size, statistics) -> torch.Tensor:
    """Pictures as one batch of a size, (B, 3, H, W): normalised, or RGB from 0 to 255 where statistics is None."""
    import numpy as np
    from PIL import Image

    pictures = [np.asarray(Image.open(file).convert('RGB').resize((size[1], size[0]))) for file in files]
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    if statistics is None:
        return batch.contiguous()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in statistics)
    return ((batch - mean) / std).contiguous()


def check(model, args, path, shape, statistics=None) -> list:
    """Run the file beside PyTorch and print what comes out.

    Raises:
        mmoverlock.cli.UserError: If they differ.
    """
    torch.set_num_threads(1)
    batches = [1, 3, 2] if args.dynamic != 'none' else [1]
    images = []
    files = find_pictures(args.images) if args.images else None
    for i, size in enumerate(sizes(model, shape, args.dynamic)):
        if files:
            some = [files[(sum(batches[:i]) + k) % len(files)] for k in range(batches[i])]
            images.append(read_pictures(some, size, None if model.normalizes else statistics))
        else:
            image = example(model, size, 'all', seed=i + 1)
            images.append(torch.cat([image, image.flip(3)])[: batches[i]])
    rows = deploy.compare(model, deploy.load(path, args.format), images, args.time)
    detector = rows[0].detections is not None
    head = f' {"detections":>10}' * detector + f' {"PyTorch":>10} {args.format:>10}' * bool(args.time)
    print(f'{"image":>18} {"difference":>11}{head}')
    for row in rows:
        tail = f' {row.detections:>10}' if detector else ''
        tail += f' {row.torch_ms:7.0f} ms {row.exported_ms:7.0f} ms' * bool(args.time)
        print(f'{"x".join(map(str, row.shape)):>18} {row.error:>11.1e}{tail}')
    if detector and not sum(row.detections for row in rows):
        cli.warn(
            'nothing was detected, so nothing was compared: give pictures (--images), or lower the threshold '
            '(--cfg-options model.test_cfg.rcnn.score_thr=0.01, RetinaNet: model.test_cfg.score_thr=0.01)'
        )
    worst = max(row.error for row in rows)
    if not worst <= TOLERANCE or math.isnan(worst):
        raise cli.UserError(f'{args.out}: differs from PyTorch by {worst:.1e}, more than {TOLERANCE:.0e}; not kept')
    return rows


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    with cli.one_line_errors():
        try:
            whole = build(args)
            model = deploy.deployable(whole, args.backbone, args.normalize)
            default = 224 if isinstance(model, deploy.models.Classifier) else 512
            shape = (args.shape or [default]) * 2 if len(args.shape or [0]) == 1 else args.shape
            statistics = deploy.models.statistics(whole)
            if args.images and not statistics:
                raise cli.UserError('--images needs the mean and std of a config; leave it out for a bare variant')
            options = {}
            if args.format == 'onnx':
                metadata = dict(mmoverlock=__version__, input='RGB 0-255' if args.normalize else 'normalised')
                if statistics and not args.normalize:
                    metadata.update(zip(('mean', 'std'), statistics))
                options = dict(opset=args.opset, exporter=args.exporter, metadata=metadata)
            with cli.replacing(args.out) as partial:
                how = deploy.export(model, partial, args.format, tuple(shape), args.dynamic, **options)
                print(f'{args.format} by {how}; outputs: {", ".join(model.output_names)}')
                rows = None if args.no_check else check(model, args, partial, shape, statistics)
        except (deploy.ExportError, ValueError) as error:
            raise cli.UserError(str(error)) from error
    print(f'{osp.getsize(args.out) / 2**20:.1f} MiB written to {args.out}')
    return rows


if __name__ == '__main__':
    main()
