# RetinaNet with ResNet-50 on BCCD, from scratch: docs/real-data.md.
#   python tools/train.py configs/real_data/retinanet_resnet50_fpn_bccd.py
_base_ = './_base_/bccd.py'
model = dict(backbone=dict(frozen_stages=-1, norm_eval=False, init_cfg=None))
