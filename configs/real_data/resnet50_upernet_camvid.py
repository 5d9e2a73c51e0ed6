# UPerNet with ResNet-50 on CamVid, from scratch: docs/real-data.md.
#   python tools/train.py configs/real_data/resnet50_upernet_camvid.py
_base_ = './_base_/camvid.py'
model = dict(backbone=dict(norm_cfg=dict(type='BN', requires_grad=True)))
