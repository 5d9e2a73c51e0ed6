# RetinaNet with OverLoCK-XT on BCCD, from scratch: docs/real-data.md.
#   python tools/train.py configs/real_data/retinanet_overlock-xt_fpn_bccd.py
_base_ = ['./_base_/bccd.py', '../_base_/variants/overlock-xt.py']
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmoverlock.OverLoCK',
        arch='xt',
        fuse_overview=True,
        out_indices=(1, 2, 3),
        cuda_graphs=True,
    ),
    neck=dict(in_channels=_base_.dense_channels[1:], start_level=0),
)
