# ImageNet-1K as imagenet_bs256.py has it, with crops resized by torch instead of Pillow: more pictures a core, of the
# same pixels but for rounding (docs/feeding.md).
_base_ = './imagenet_bs256.py'

train_pipeline = [
    _base_.train_pipeline[0],
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='mmoverlock.RandomResizedCrop', scale=224, interpolation=name)] for name in _base_.interpolations
        ],
    ),
    *_base_.train_pipeline[2:],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
