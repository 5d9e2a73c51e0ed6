# RetinaNet with ConvNeXt-T on BCCD, from scratch: docs/real-data.md.
#   python tools/train.py configs/real_data/retinanet_convnext-tiny_fpn_bccd.py
_base_ = './_base_/bccd.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ConvNeXt',
        arch='tiny',
        out_indices=(1, 2, 3),
        gap_before_final_norm=False,
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
