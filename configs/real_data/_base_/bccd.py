# RetinaNet on BCCD: 205 + 87 photographs of blood cells, 640x480, shown at 416x312.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', './schedule.py']
default_scope = 'mmdet'

# Every batch is padded to one size, for cudnn.benchmark.
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type='BatchFixedSizePad', size=(320, 416))]),
    bbox_head=dict(num_classes=3),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=(416, 312), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(416, 312)),  # width, height
    # Cells have no upright.
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(416, 312), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
dataset = dict(
    type='CocoDataset',
    data_root='data/bccd/',
    data_prefix=dict(img='images/'),
    metainfo=dict(
        classes=('RBC', 'WBC', 'Platelets'),
        palette=[(220, 20, 60), (60, 90, 200), (240, 180, 40)],
    ),
)
train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(ann_file='annotations/train.json', pipeline=train_pipeline, **dataset),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(ann_file='annotations/val.json', pipeline=test_pipeline, test_mode=True, **dataset),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file='data/bccd/annotations/val.json', metric='bbox', classwise=True)
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=5e-4))
max_iters = 1000
warmup = max_iters // 10
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=warmup),
    dict(type='CosineAnnealingLR', eta_min=5e-6, by_epoch=False, begin=warmup, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters // 4)

vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='DetLocalVisualizer', vis_backends=vis_backends, name='visualizer')
