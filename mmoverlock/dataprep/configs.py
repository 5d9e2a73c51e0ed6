"""The config that trains on a converted data set: a few lines on top of this project's own."""

import os
import pprint
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

HERE = Path(__file__).resolve()
#: The configs of a checkout, or those that an installed package brings.
CONFIGS = next(
    (p for p in (HERE.parents[2] / 'configs', HERE.parents[1] / '.mim' / 'configs') if p.is_dir()),
    HERE.parents[2] / 'configs',
)

# How many pictures a training sees in all, and the bounds of that in epochs: small sets are seen more often, up to
# where more of the same shows nothing new.
PICTURES_SEEN = dict(detection=10_000, segmentation=16_000, classification=30_000)
EPOCHS = dict(detection=(12, 100), segmentation=(16, 200), classification=(10, 100))
MIN_STEPS = 200
BATCH = dict(detection=4, segmentation=8, classification=32)
# AdamW's, at these batches: with a backbone from ImageNet, and from scratch.
RATE = dict(detection=(1e-4, 5e-4), segmentation=(1e-4, 5e-4), classification=(1e-4, 5e-4))
#: The small OverLoCK of configs/demo, with small heads: for trying things out on a CPU.
DEMO = 'demo'
LARGEST = (1333, 800)  # the published size of test pictures


@dataclass
class DataSet:
    """What there is to train on.

    Args:
        root (Path): Its folder.
        task (str): 'detection', 'segmentation' or 'classification'.
        classes (list[str]): Class names.
        palette (list[tuple[int, int, int]], optional): A colour for each, to draw with.
        counts (dict[str, int]): Pictures of each split.
        sizes (list[tuple[int, int]]): Width and height of every picture.
        has_masks (bool): Whether every object has an outline. Defaults to False.
        has_empty (bool): Whether a picture shows no object. Defaults to False.
        suffix (str): Ending of the pictures of a segmentation data set. Defaults to '.jpg'.
    """

    root: Path
    task: str
    classes: List[str]
    palette: Optional[List[Tuple[int, int, int]]]
    counts: Dict[str, int]
    sizes: List[Tuple[int, int]]
    has_masks: bool = False
    has_empty: bool = False
    suffix: str = '.jpg'

    @property
    def test_split(self) -> str:
        """Where results are measured."""
        return 'test' if 'test' in self.counts else 'val'

    @property
    def name(self) -> str:
        """The folder's name, as part of a file name."""
        return re.sub(r'[^\w-]+', '-', self.root.resolve().name).strip('-').lower() or 'data'


@dataclass
class Length:
    """How long to train, from how many pictures there are.

    Args:
        batch (int): Pictures a step.
        epochs (int): Times that each picture is seen.
        steps (int): Steps in all.
    """

    batch: int
    epochs: int
    steps: int


def length_of(task: str, pictures: int, epochs: Optional[int] = None) -> Length:
    """Batch, epochs and steps for a number of training pictures.

    Args:
        task (str): 'detection', 'segmentation' or 'classification'.
        pictures (int): Number of training pictures.
        epochs (int, optional): How often each is seen. Defaults to what suits their number.

    Returns:
        Length: The plan.
    """
    batch = min(BATCH[task], max(pictures, 1))
    if epochs is None:
        low, high = EPOCHS[task]
        epochs = min(max(round(PICTURES_SEEN[task] / pictures), low), high)
        epochs = max(epochs, -(-MIN_STEPS * batch // pictures))
    return Length(batch, epochs, max(1, epochs * pictures // batch))


def palette_of(number: int) -> List[Tuple[int, int, int]]:
    """Colours far apart in hue, for ``number`` classes."""
    import colorsys

    golden = 0.618034  # neighbours in the list are far apart
    hues = [(i * golden + 0.02) % 1 for i in range(number)]
    return [
        tuple(round(255 * v) for v in colorsys.hsv_to_rgb(h, (0.85, 0.6)[i % 2], (0.9, 0.75, 1.0)[i % 3]))
        for i, h in enumerate(hues)
    ]


def shown_size(sizes: List[Tuple[int, int]], side: Optional[int] = None) -> Tuple[int, int]:
    """Longer and shorter side to show pictures at: those of most of them, or ``side`` and its part.

    Args:
        sizes (list[tuple[int, int]]): Width and height of every picture.
        side (int, optional): The longer side. Defaults to most pictures' own, but no more than the published test size.

    Returns:
        tuple[int, int]: Pixels.
    """
    long, short = Counter((max(s), min(s)) for s in sizes).most_common(1)[0][0]
    factor = side / long if side else min(1, LARGEST[0] / long, LARGEST[1] / short)
    return max(32, round(long * factor)), max(32, round(short * factor))


def name_of(dataset: DataSet, options) -> str:
    """File name of the config, in OpenMMLab's way."""
    if dataset.task == 'detection':
        return f'{_detector(dataset, options)}_overlock-{options.arch}_fpn_{dataset.name}.py'
    middle = '_upernet' if dataset.task == 'segmentation' else ''
    return f'overlock-{options.arch}{middle}_{dataset.name}.py'


def _detector(dataset: DataSet, options) -> str:
    return options.detector or ('mask-rcnn' if dataset.has_masks else 'retinanet')


def text_of(dataset: DataSet, options, path: Path) -> str:
    """The text of the config.

    Args:
        dataset (DataSet): What to train on.
        options (Options): ``arch``, ``detector``, ``pretrained``, ``side`` and ``epochs``.
        path (Path): Where the file will be: its base config is named relative to that.

    Returns:
        str: Python.
    """
    arch = 'xt' if options.arch == DEMO else options.arch
    plan = length_of(dataset.task, dataset.counts['train'], options.epochs)
    body = dict(detection=_detection, segmentation=_segmentation, classification=_classification)[dataset.task]
    base = dict(
        detection=f'detection/{_detector(dataset, options)}_overlock-{arch}_fpn_1x_coco.py',
        segmentation=f'segmentation/overlock-{arch}_upernet_8xb2-160k_ade20k-512x512.py',
        classification=f'classification/overlock-{arch}_8xb256_in1k.py',
    )[dataset.task]
    folder = os.path.dirname(os.path.abspath(path))
    bases = [base, 'demo/_base_/shapes.py'] if options.arch == DEMO else [base]
    bases = [str(CONFIGS / b) for b in bases]
    # With a link on the way, '..' is one folder to who comes by the link and another to who comes by the disk's path.
    if folder == os.path.realpath(folder):
        bases = [os.path.relpath(b, folder) for b in bases]
    bases = [repr(Path(b).as_posix()) for b in bases]
    bases = bases[0] if len(bases) == 1 else '[\n    ' + ',\n    '.join(bases) + ',\n]'
    pictures = ' + '.join(f'{n} {split}' for split, n in dataset.counts.items())
    head = f"""\
# OverLoCK-{options.arch.upper()} on {dataset.name}: {pictures} pictures, {len(dataset.classes)} classes.
# Written by tools/data/convert.py, yours to change:
#   python tools/train.py {path}
_base_ = {bases}

data_root = {str(dataset.root)!r}
metainfo = dict(
    classes={_literal(tuple(dataset.classes))},
    palette={_literal(dataset.palette or palette_of(len(dataset.classes)))},
)
"""
    return head + body(dataset, options, plan)


def _literal(values) -> str:
    """A tuple or list, over lines of its own where it is long."""
    text = repr(values)
    if len(text) < 100:
        return text
    lines = pprint.pformat(list(values), width=110, compact=True)[1:-1].splitlines()
    start, end = text[0], text[-1]
    return '\n        '.join([start, *(line.strip() for line in lines)]) + f',\n    {end}'


def _from_scratch(options) -> bool:
    """Whether the backbone starts without weights; the authors released none for the small one."""
    return options.pretrained == 'none' or options.arch == DEMO and options.pretrained is None


def _backbone(options) -> str:
    """Settings of the backbone."""
    start = 'init_cfg=None'
    if not _from_scratch(options):
        checkpoint = '_base_.pretrained' if options.pretrained is None else repr(options.pretrained)
        start = f"init_cfg=dict(type='Pretrained', checkpoint={checkpoint})"
    if options.arch != DEMO:
        return f'backbone=dict({start})'
    return f'backbone=dict(arch=dict(_delete_=True, **_base_.demo_arch), drop_path_rate=0.0, {start})'


def _rate(options, task: str) -> float:
    return RATE[task][_from_scratch(options)]


#: Heads of Mask R-CNN, of the usual and of the small width.
ROI_HEADS = (
    'roi_head=dict(bbox_head=dict(num_classes={0}), mask_head=dict(num_classes={0})),',
    """rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes={0}),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_classes={0}),
    ),""",
)


def _detection(dataset: DataSet, options, plan: Length) -> str:
    number = len(dataset.classes)
    small = options.arch == DEMO
    if _detector(dataset, options) == 'mask-rcnn':
        heads = ROI_HEADS[small].format(number)
    else:
        width = ', in_channels=64, feat_channels=64' if small else ''
        heads = f'bbox_head=dict(num_classes={number}{width}),'
    if small:
        first = '[1:]' if _detector(dataset, options) == 'retinanet' else ''
        heads = f'neck=dict(in_channels=_base_.demo_dense_channels{first}, out_channels=64),\n    {heads}'
    empty = 'False' if dataset.has_empty else 'True'
    interval = max(1, plan.epochs // 10)
    test = dataset.test_split
    return f"""\
model = dict(
    {_backbone(options)},
    {heads}
)

scale = {shown_size(dataset.sizes, options.side)}  # longer and shorter side
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2] = dict(type='RandomResize', scale=scale, ratio_range=(0.75, 1.25), keep_ratio=True)
test_pipeline[1]['scale'] = scale
train_dataloader = dict(
    batch_size={plan.batch},
    num_workers=2,
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/train.json',
        data_prefix=dict(img='images/train'),
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt={empty}, min_size=1),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/val.json',
        data_prefix=dict(img='images/val'),
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/{test}.json',
        data_prefix=dict(img='images/{test}'),
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(ann_file=data_root + '/annotations/val.json', classwise=True)
test_evaluator = dict(ann_file=data_root + '/annotations/{test}.json', classwise=True)

# {dataset.counts['train']} pictures to train on: {plan.epochs} epochs of {plan.batch} a step are {plan.steps} steps.
max_epochs = {plan.epochs}
train_cfg = dict(max_epochs=max_epochs, val_interval={interval})
optim_wrapper = dict(optimizer=dict(lr={_rate(options, 'detection')}), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end={max(1, plan.steps // 10)}),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=1e-6, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval={interval}))
auto_scale_lr = dict(base_batch_size={plan.batch})
"""


def _segmentation(dataset: DataSet, options, plan: Length) -> str:
    number = len(dataset.classes)
    long, short = shown_size(dataset.sizes, options.side)
    side = max(32, min(512, short // 32 * 32))
    interval = max(1, plan.steps // 10)
    decode = auxiliary = f'num_classes={number}, norm_cfg=norm_cfg'
    if options.arch == DEMO:
        decode += ', in_channels=_base_.demo_dense_channels, channels=64'
        auxiliary += ', in_channels=_base_.demo_dense_channels[2], channels=32'
    return f"""\
crop_size = ({side}, {side})
norm_cfg = dict(type='BN')  # on several GPUs, sync_bn makes it SyncBN
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    {_backbone(options)},
    decode_head=dict({decode}),
    auxiliary_head=dict({auxiliary}),
)

scale = ({long}, {short})  # longer and shorter side
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=scale, ratio_range=(0.75, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations'),  # after the resizing: the ground truth keeps its size
    dict(type='PackSegInputs'),
]
dataset = dict(
    _delete_=True,
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=metainfo,
    img_suffix={dataset.suffix!r},
    seg_map_suffix='.png',
)
train_dataloader = dict(
    batch_size={max(2, plan.batch)},
    num_workers=2,
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    num_workers=2,
    dataset=dict(
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'),
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = dict(
    num_workers=2,
    dataset=dict(
        data_prefix=dict(img_path='images/{dataset.test_split}', seg_map_path='annotations/{dataset.test_split}'),
        pipeline=test_pipeline,
        **dataset,
    ),
)

# {dataset.counts['train']} pictures to train on: {plan.steps} steps of {plan.batch} see each {plan.epochs} times.
max_iters = {plan.steps}
train_cfg = dict(max_iters=max_iters, val_interval={interval})
optim_wrapper = dict(optimizer=dict(lr={_rate(options, 'segmentation')}), clip_grad=dict(_delete_=True, max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end={max(1, plan.steps // 10)}),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, begin=0, end=max_iters, by_epoch=False),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval={interval}))
auto_scale_lr = dict(base_batch_size={plan.batch})
"""


def _classification(dataset: DataSet, options, plan: Length) -> str:
    number = len(dataset.classes)
    interval = max(1, plan.epochs // 10)
    warmup = max(1, plan.epochs // 10)
    size = options.side or 224
    head = ', in_channels=_base_.demo_cls_channels, hidden_channels=256' if options.arch == DEMO else ''
    return f"""\
data_preprocessor = dict(num_classes={number})
model = dict(
    {_backbone(options)},
    head=dict(num_classes={number}{head}),
    train_cfg=None,  # mixing pictures pays off over hundreds of epochs
)

size = {size}  # width and height
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=size, crop_ratio_range=(0.3, 1.0), backend='pillow', interpolation='bicubic'),
    *_base_.train_pipeline[2:],
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=round(size / 0.925), edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=size),
    dict(type='PackInputs'),
]
dataset = dict(_delete_=True, type='CustomDataset', data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size={plan.batch},
    num_workers=2,
    dataset=dict(data_prefix='train', pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=2,
    dataset=dict(data_prefix='val', pipeline=test_pipeline, **dataset),
)
test_dataloader = dict(
    batch_size=32,
    num_workers=2,
    dataset=dict(data_prefix={dataset.test_split!r}, pipeline=test_pipeline, **dataset),
)
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

# {dataset.counts['train']} pictures to train on: {plan.epochs} epochs of {plan.batch} a step are {plan.steps} steps.
max_epochs = {plan.epochs}
train_cfg = dict(max_epochs=max_epochs, val_interval={interval})
optim_wrapper = dict(optimizer=dict(lr={_rate(options, 'classification')}))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end={warmup}, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=max_epochs, eta_min=1e-6, by_epoch=True, begin=0, end=max_epochs),
]
custom_hooks = []  # the base config's average of the weights is over ten thousand steps
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval={interval}))
auto_scale_lr = dict(base_batch_size={plan.batch})
"""
