# UPerNet on 128x128 scenes of shapes, from the backbone of the demo classifier.
# Expected: mIoU about 66 on held-out scenes, in 4 to 7 minutes on 2 CPU cores (target: 60).
#   python tools/train.py configs/demo/overlock-demo_upernet_shapes-128x128.py \
#       --cfg-options model.backbone.init_cfg.checkpoint=work_dirs/overlock-demo_shapes/CLASSIFIER.pth
_base_ = ['../segmentation/overlock-xt_upernet_8xb2-160k_ade20k-512x512.py', './_base_/shapes.py']

# The background counts as a class, as in ADE20K most of what is behind things does.
classes = ('background', *_base_.demo_classes)
palette = [(203, 208, 217), *_base_.demo_palette]

data_preprocessor = dict(size=(128, 128))
norm_cfg = dict(type='BN')  # one process: nothing to synchronise
# Most of a scene is background: with equal weights, a short training ends in calling everything that.
loss_decode = dict(class_weight=[0.25, 1, 1, 1, 1, 1, 1])
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        arch=dict(_delete_=True, **_base_.demo_arch),
        drop_path_rate=0.0,
        init_cfg=dict(checkpoint='CLASSIFIER.pth', prefix='backbone.'),
    ),
    decode_head=dict(
        in_channels=_base_.demo_dense_channels,
        channels=64,
        num_classes=7,
        norm_cfg=norm_cfg,
        loss_decode=loss_decode,
    ),
    auxiliary_head=dict(
        in_channels=_base_.demo_dense_channels[2],
        channels=32,
        num_classes=7,
        norm_cfg=norm_cfg,
        loss_decode=loss_decode,
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackSegInputs'),
]
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = (128, 128)  # as they are
dataset = dict(
    _delete_=True,
    type='BaseSegDataset',  # ADE20KDataset takes no other classes than its own 150
    data_root=_base_.demo_data_root + '/ade',
    img_suffix='.jpg',
    seg_map_suffix='.png',
    reduce_zero_label=True,
    metainfo=dict(classes=classes, palette=palette),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    dataset=dict(
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=1.5e-3), clip_grad=dict(_delete_=True, max_norm=5.0))
max_iters = 600
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=1e-5, power=1.0, begin=50, end=max_iters, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=150)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=150, max_keep_ckpts=1, save_best=None))
randomness = dict(seed=0)
