# OverLoCK-XT on a CIFAR-10 subset, from scratch: docs/real-data.md.
#   python tools/train.py configs/real_data/overlock-xt_cifar10.py
_base_ = ['./_base_/cifar10.py', '../_base_/variants/overlock-xt.py']
loss = dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmoverlock.OverLoCK', arch='xt', out_type='classification', cuda_graphs=True),
    head=dict(type='mmoverlock.OverLoCKClsHead', num_classes=10, in_channels=_base_.cls_channels, loss=loss),
)
