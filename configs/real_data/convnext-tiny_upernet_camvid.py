# UPerNet with ConvNeXt-T on CamVid, from scratch: docs/real-data.md.
#   python tools/train.py configs/real_data/convnext-tiny_upernet_camvid.py
_base_ = './_base_/camvid.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ConvNeXt',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
