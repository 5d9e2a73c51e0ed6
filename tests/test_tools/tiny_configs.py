"""A tiny model and config for each task, and what the tests of the tools share."""

import importlib.util
import os.path as osp
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TOOLS = osp.join(osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))), 'tools')

ARCH = dict(
    depths=(1, 1, 1, 1),
    focus_depths=(1, 1),
    widths=(8, 16, 32, 32),
    mlp_ratios=(2, 2, 2, 2),
    focus_mlp_ratio=2,
    focus_heads=(1, 1),
    kernel_sizes=(7, 7, 7, 5),
    small_kernel=3,
)
DENSE_CHANNELS = [8, 16, 40, 40]

COMMON = f"""
arch = {ARCH!r}
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
val_cfg, test_cfg = dict(type='ValLoop'), dict(type='TestLoop')
env_cfg = dict(mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
               dist_cfg=dict(backend='nccl'))
randomness = dict(seed=0)
log_level = 'WARNING'
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', interval=1),
    visualization=dict(type=VISUALIZATION))
"""

CLS = """
default_scope = 'mmpretrain'
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
param_scheduler = dict(type='CosineAnnealingLR', T_max=10, end=10)
auto_scale_lr = dict(base_batch_size=8)
data_preprocessor = dict(num_classes=2, mean=[127.] * 3, std=[60.] * 3, to_rgb=True)
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmoverlock.OverLoCK', arch=arch, out_type='classification'),
    head=dict(type='mmoverlock.OverLoCKClsHead', num_classes=2, in_channels=(32, 40),
              hidden_channels=16, topk=(1, )))
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root=ROOT, data_prefix='train', pipeline=pipeline))
val_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root=ROOT, data_prefix='val', pipeline=pipeline))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1, ))
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
"""

DET = """
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'
default_scope = 'mmdet'
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
model = dict(
    backbone=dict(_delete_=True, type='mmoverlock.OverLoCK', arch=arch, fuse_overview=True),
    neck=dict(in_channels=[8, 16, 40, 40], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8,
                  anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8),
        bbox_head=dict(in_channels=8, fc_out_channels=16, num_classes=1),
        mask_roi_extractor=dict(out_channels=8),
        mask_head=dict(in_channels=8, conv_out_channels=8, num_convs=1, num_classes=1)))
load = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
data = dict(type='CocoDataset', data_root=ROOT, ann_file='annotations/instances_train2017.json',
            data_prefix=dict(img='train2017/'), metainfo=dict(classes=('box', )))
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(pipeline=[load[0], load[2], load[1], dict(type='PackDetInputs')], **data))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(test_mode=True, pipeline=[*load, dict(type='PackDetInputs', meta_keys=meta)],
                 **data))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(
    type='CocoMetric', ann_file=ROOT + '/annotations/instances_train2017.json',
    metric=['bbox', 'segm'])
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
"""

SEG = """
default_scope = 'mmseg'
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
data_preprocessor = dict(type='SegDataPreProcessor', mean=[127.] * 3, std=[60.] * 3, size=(64, 64),
                         bgr_to_rgb=True, pad_val=0, seg_pad_val=255)
model = dict(
    type='EncoderDecoder', data_preprocessor=data_preprocessor,
    backbone=dict(type='mmoverlock.OverLoCK', arch=arch),
    decode_head=dict(
        type='UPerHead', in_channels=[8, 16, 40, 40], in_index=[0, 1, 2, 3], channels=8,
        pool_scales=(1, 2), num_classes=2, norm_cfg=dict(type='BN'), align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
data = dict(type='BaseSegDataset', data_root=ROOT, metainfo=dict(
    classes=('left', 'right'), palette=[[255, 0, 0], [0, 0, 255]]), pipeline=pipeline)
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(data_prefix=dict(
        img_path='images/training', seg_map_path='annotations/training'), **data))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(data_prefix=dict(
        img_path='images/validation', seg_map_path='annotations/validation'), **data))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
"""

TASKS = dict(cls=(CLS, 'VisualizationHook'), det=(DET, 'DetVisualizationHook'), seg=(SEG, 'SegVisualizationHook'))


def load_tool(path):
    """Import a script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location('tool_' + path.replace('/', '_')[:-3], osp.join(TOOLS, path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_config(path, task, root, extra=''):
    """Write the tiny config of a task."""
    text, visualization = TASKS[task]
    common = COMMON.replace('VISUALIZATION', repr(visualization))
    path.write_text(f'ROOT = {str(root)!r}\n{textwrap.dedent(common)}{text}\n{extra}\n')
    return str(path)


def picture(path, rng, size=64):
    """Write a noise picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)


def imagenet_folders(root):
    """Two folders a split: 8 pictures to train on, 4 to test."""
    rng = np.random.default_rng(0)
    for split, number in (('train', 4), ('val', 2)):
        for name in ('cat', 'dog'):
            for i in range(number):
                picture(root / split / name / f'{name}{i}.png', rng)
    return root


def last(work):
    """The last checkpoint of a work directory."""
    return (work / 'last_checkpoint').read_text().strip()


def fails(capsys, work, call, *words):
    """A call ends in one line with these words, exit code 2, and no work directory."""
    with pytest.raises(SystemExit) as stop:
        call()
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith('warning')]
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith('error: '), error
    for word in words:
        assert str(word) in lines[0]
    assert not Path(work).exists()
