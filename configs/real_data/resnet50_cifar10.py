# ResNet-50 on a CIFAR-10 subset, from scratch: docs/real-data.md.
#   python tools/train.py configs/real_data/resnet50_cifar10.py
_base_ = './_base_/cifar10.py'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=50),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=2048,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)
