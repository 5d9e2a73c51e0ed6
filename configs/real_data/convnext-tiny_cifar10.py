# ConvNeXt-T on a CIFAR-10 subset, from scratch: docs/real-data.md.
#   python tools/train.py configs/real_data/convnext-tiny_cifar10.py
_base_ = './_base_/cifar10.py'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ConvNeXt', arch='tiny'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=768,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0),
    ),
)
