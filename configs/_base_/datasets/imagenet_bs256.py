# ImageNet-1K with the augmentation of the published recipe, which was written for timm.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

# timm's 'random' interpolation: each resampling draws bilinear or bicubic anew.
interpolations = ['bilinear', 'bicubic']

# 'rand-m9-mstd0.5-inc1' applies two of 15 operations, drawn with replacement. Here it is twice one
# operation, so that each of the two draws its own interpolation.
rand_augment = dict(
    type='RandomChoice',
    transforms=[
        [
            dict(
                type='RandAugment',
                policies='timm_increasing',
                num_policies=1,
                total_level=10,
                magnitude_level=9,
                magnitude_std=0.5,
                hparams=dict(pad_val=[round(x) for x in _base_.bgr_mean], interpolation=interpolation),
            )
        ]
        for interpolation in interpolations
    ],
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='RandomResizedCrop', scale=224, backend='pillow', interpolation=name)] for name in interpolations
        ],
    ),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    rand_augment,
    rand_augment,
    # timm's 'pixel' mode: each pixel is normal noise with the mean and deviation of ImageNet.
    dict(
        type='RandomErasing',
        erase_prob=0.25,
        mode='rand',
        min_area_ratio=0.02,
        max_area_ratio=1 / 3,
        fill_color=_base_.bgr_mean,
        fill_std=_base_.bgr_std,
    ),
    dict(type='PackInputs'),
]

# The short edge is 224 over the crop ratio, rounded down: each variant sets its own scale.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=235, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=256,
    num_workers=10,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(batch_size=256, num_workers=10, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
