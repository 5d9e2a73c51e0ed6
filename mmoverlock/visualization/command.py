"""What ``tools/analysis/visualize_*.py`` share: a model and pictures named on the command line, and figures written."""

import argparse
import contextlib
import os
import os.path as osp
from dataclasses import dataclass
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config, DictAction

from .. import checkpoints, cli

VARIANTS = ('xt', 't', 's', 'b', 'xtiny', 'tiny', 'small', 'base')
CELL = 2.2  # inches of a picture in a figure
DPI = 80


@dataclass
class Subject:
    """What is looked into.

    Attributes:
        model (nn.Module): In evaluation mode, on its device.
        cfg (Config | None): Its config; None for a variant.
        classes (tuple[str]): Names of the classes; empty where they are not known.
    """

    model: nn.Module
    cfg: Optional[Config]
    classes: Tuple[str, ...] = ()

    def class_name(self, number: int) -> str:
        """The name of a class, or its number."""
        return self.classes[number] if number < len(self.classes) else f'class {number}'

    def class_number(self, wanted: Optional[str]) -> Optional[int]:
        """The number of a class given by number or name; None stays None.

        Raises:
            UserError: There is no class of that name.
        """
        if wanted is None or wanted.isdigit():
            return None if wanted is None else int(wanted)
        if wanted not in self.classes:
            known = f'; there are {", ".join(self.classes[:20])}' if self.classes else ' by name: give its number'
            raise cli.UserError(f'no class {wanted!r} is known{known}')
        return self.classes.index(wanted)


OUT = 'FILE.png for all pictures, one below the other, or a folder for a PNG of each'
SIZE = (
    "length of the picture's shorter side for the network; default: what the config's test pipeline makes of it, for a "
    'variant 224 (--task cls) or 512'
)


def parser(description: str, out: str = OUT, size: str = SIZE) -> argparse.ArgumentParser:
    """A parser with the arguments that all views share.

    Args:
        description (str): What the command does.
        out (str): Help of ``--out``.
        size (str): Help of ``--size``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        'model', help=f"a config file, the name of one of this package's, or a variant ({', '.join(VARIANTS[:4])})"
    )
    parser.add_argument('checkpoint', help='checkpoint, official or ours; "none" for random weights')
    parser.add_argument(
        'pictures', nargs='+', metavar='PICTURE', help='pictures, folders or globs of them, or https addresses'
    )
    parser.add_argument('--out', required=True, help=out)
    parser.add_argument('--size', type=int, help=size)
    parser.add_argument('--task', choices=['cls', 'det', 'seg'], default='cls', help='for a variant; default: cls')
    parser.add_argument('--device', help='as PyTorch names it; default: the GPU where there is one')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='change settings of the config'
    )
    return parser


@contextlib.contextmanager
def one_line_errors():
    """What is wrong in one line, also where a function of this package found it."""
    with cli.one_line_errors():
        try:
            yield
        except (ValueError, ImportError, checkpoints.CheckpointError) as error:
            raise cli.UserError(str(error)) from error


def build(args, classifier: bool = False) -> Subject:
    """The model that the command line names, with its weights.

    Args:
        args (Namespace): Of :func:`parser`.
        classifier (bool): Build a variant with its head, not its backbone alone. Defaults to False.

    Raises:
        UserError: Model, checkpoint and installed packages do not go together.
    """
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if args.model in VARIANTS and not classifier:
        from ..models import OverLoCK

        init = None if args.checkpoint == 'none' else dict(type='Pretrained', checkpoint=args.checkpoint)
        options = dict(out_type='classification') if args.task == 'cls' else dict(fuse_overview=args.task == 'det')
        model = OverLoCK(args.model, init_cfg=init, **options)
        if init:
            model.init_weights()
        return Subject(model.to(device).eval(), None)
    if args.model in VARIANTS:
        cfg = Config(dict(default_scope='mmpretrain', model=_classifier(args.model)))
    else:
        from ..apis import find_config

        cfg = cli.load_config(find_config(args.model), args.cfg_options)
    model, classes = _build_config(cfg, args)
    return Subject(model.to(device).eval(), None if args.model in VARIANTS else cfg, classes)


def _classifier(arch: str) -> dict:
    from ..models import OverLoCK

    with torch.device('meta'):
        channels = OverLoCK(arch, out_type='classification').out_channels
    return dict(
        type='ImageClassifier',
        backbone=dict(type='mmoverlock.OverLoCK', arch=arch, out_type='classification'),
        head=dict(type='mmoverlock.OverLoCKClsHead', num_classes=1000, in_channels=channels),
    )


def _build_config(cfg: Config, args) -> Tuple[nn.Module, Tuple[str, ...]]:
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.runner import load_state_dict

    cli.check_packages(cfg)
    meta = cli.check_model(cfg)
    content = None
    if args.checkpoint != 'none':
        content = cli.check_checkpoint(args.checkpoint)
        if content is None:
            raise cli.UserError(f'{args.checkpoint} is neither a file nor an https address; fetch it first')
        cli.check_fit(meta, content, args.checkpoint, strict=True)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    settings = cfg.model.copy()
    if cfg.get('default_scope') == 'mmpretrain':
        settings.pop('train_cfg', None)
        if cfg.get('data_preprocessor'):
            settings.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = revert_sync_batchnorm(MODELS.build(settings))
    classes = ()
    if content is not None:
        try:
            load_state_dict(model, checkpoints.unwrap(content), strict=True)
        except RuntimeError as error:
            raise cli.UserError(f'{args.checkpoint} does not fit {args.model}: {cli._reason(error)}') from error
        classes = _classes((content.get('meta') or {}).get('dataset_meta'))
    return model, classes or _classes(_dataset(cfg).get('metainfo'))


def _classes(meta: Optional[dict]) -> Tuple[str, ...]:
    return next((tuple(v) for k, v in (meta or {}).items() if k.lower() == 'classes'), ())


def _dataset(cfg: Config) -> dict:
    """The config of the test data, inside its wrappers."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def pictures(args, subject: Subject) -> Iterator[Tuple[str, np.ndarray]]:
    """The pictures of the command line as the network gets them, but for the normalisation.

    Args:
        args (Namespace): Of :func:`parser`.
        subject (Subject): Whose test pipeline resizes and crops.

    Yields:
        tuple[str, np.ndarray]: Name and picture, (H, W, 3), uint8, RGB.

    Raises:
        UserError: A picture is missing or cannot be read.
    """
    from ..apis import expand, read

    if args.size is not None and args.size < 1:
        raise cli.UserError(f'--size must be positive, got {args.size}')
    sources = expand(args.pictures)
    videos = [source.label for source in sources if source.is_video]
    if videos:
        raise cli.UserError(f'{videos[0]} is a video; these views are of pictures')
    transform = _resize(args) if subject.cfg is None or args.size else _pipeline(subject.cfg)
    for picture in read(sources):
        if picture.error:
            raise cli.UserError(f'{picture.source.label} {picture.error}')
        yield picture.source.name, np.ascontiguousarray(transform(picture.image)[:, :, ::-1])


def _resize(args) -> Callable[[np.ndarray], np.ndarray]:
    import cv2

    shorter = args.size or (224 if args.task == 'cls' else 512)

    def resize(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        scale = shorter / min(height, width)
        size = round(width * scale), round(height * scale)
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)

    return resize


def _pipeline(cfg: Config) -> Callable[[np.ndarray], np.ndarray]:
    """The config's test pipeline between loading and packing."""
    from mmengine.dataset import Compose

    steps = [step for step in _dataset(cfg).get('pipeline') or () if not step['type'].split('.')[-1].startswith(_ENDS)]
    compose = Compose(steps)

    def transform(image: np.ndarray) -> np.ndarray:
        size = image.shape[:2]
        return compose(dict(img=image, img_shape=size, ori_shape=size))['img']

    return transform


_ENDS = ('Load', 'Pack')


def write_figures(
    args, shown: Iterator[Tuple[str, np.ndarray]], draw: Callable, rows: float, columns: float, suffix: str
) -> List[str]:
    """Draw every picture and write what ``--out`` asks for.

    Args:
        args (Namespace): Of :func:`parser`.
        shown (Iterator[tuple[str, np.ndarray]]): Names and pictures.
        draw (Callable): Called with a figure (or a part of one), the name and the picture.
        rows, columns (float): Size of what it draws, counted in pictures.
        suffix (str): Ends the names of files in a folder.

    Returns:
        list[str]: The files.
    """
    if args.out.lower().endswith('.png'):
        all_shown = list(shown)
        height, width = all_shown[0][1].shape[:2]
        figure = new_figure(columns, rows * height / width * len(all_shown))
        parts = figure.subfigures(len(all_shown), 1, squeeze=False)[:, 0]
        for part, (name, picture) in zip(parts, all_shown):
            draw(part, name, picture)
        return [save(figure, args.out)]
    if osp.isfile(args.out):
        raise cli.UserError(f'{args.out} is a file; name a folder or a .png')
    files = []
    for name, picture in shown:
        height, width = picture.shape[:2]
        figure = new_figure(columns, rows * height / width)
        draw(figure, name, picture)
        files.append(save(figure, osp.join(args.out, f'{name}{suffix}.png')))
    return files


def new_figure(columns: float, rows: float):
    """An empty figure, its size counted in pictures.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise cli.UserError(f'drawing needs matplotlib ({error}): pip install matplotlib') from error
    return Figure(figsize=(CELL * columns, CELL * rows + 0.4), dpi=DPI, layout='constrained')


def save(figure, path: str) -> str:
    """Writes a figure as PNG, whole or not at all, and says so; returns the path."""
    os.makedirs(osp.dirname(osp.abspath(path)), exist_ok=True)
    with cli.replacing(path) as partial:
        figure.savefig(partial, format='png', bbox_inches='tight', pad_inches=0.05)  # parts of figures cut titles off
    print(f'written to {path}')
    return path


def show(axes, picture: np.ndarray, title: str = '', **options) -> None:
    """A picture without ticks, and its title."""
    axes.imshow(picture, **options)
    axes.set_title(title, fontsize=8)
    axes.set(xticks=[], yticks=[])  # matplotlib lays out ticks also where it draws none, which takes most of its time
    axes.set_axis_off()


def show_row(figure, panels: Sequence[Tuple[str, np.ndarray]]) -> None:
    """Pictures with their titles, side by side."""
    for axes, (title, picture) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        show(axes, picture, title)
