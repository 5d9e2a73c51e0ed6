# A small OverLoCK that names the dominant shape of a 64x64 picture; the backbone of the other two demo configs.
# Expected: about 97 % top-1 on held-out scenes, in 3 to 4 minutes on 2 CPU cores (target: 90).
#   python tools/demo/make_scenes.py && python tools/train.py configs/demo/overlock-demo_shapes.py
_base_ = ['../classification/overlock-xt_8xb256_in1k.py', './_base_/shapes.py']

data_preprocessor = dict(num_classes=6)
model = dict(
    backbone=dict(arch=dict(_delete_=True, **_base_.demo_arch), drop_path_rate=0.0),
    head=dict(in_channels=_base_.demo_cls_channels, num_classes=6, hidden_channels=256),
    # Mixup and CutMix pay off over hundreds of epochs; here are a few.
    train_cfg=None,
)

# A flipped or a somewhat larger shape is the same shape. Strong augmentation is for long schedules.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.7, 1.0), aspect_ratio_range=(0.8, 1.25)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
metainfo = dict(classes=_base_.demo_classes)
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    dataset=dict(data_root=_base_.demo_data_root + '/imagenet', metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=1,
    dataset=dict(data_root=_base_.demo_data_root + '/imagenet', metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader

# fp32: mixed precision costs time on a CPU.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    clip_grad=_base_.optim_wrapper.clip_grad,
    constructor=_base_.optim_wrapper.constructor,
    paramwise_cfg=_base_.optim_wrapper.paramwise_cfg,
)
max_iters = 600
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=max_iters),
]
train_cfg = dict(_delete_=True, by_epoch=False, max_iters=max_iters, val_interval=100)
# The average of the last 50 steps or so, in place of the last ten thousand.
custom_hooks = _base_.custom_hooks
custom_hooks[0]['momentum'] = 0.02

default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=False),
    # The last weights are the ones tested: choosing the best by the held-out pictures would flatter the result.
    checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=1, save_best=None),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
