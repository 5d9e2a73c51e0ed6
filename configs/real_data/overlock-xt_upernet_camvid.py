# UPerNet with OverLoCK-XT on CamVid, from scratch: docs/real-data.md.
#   python tools/train.py configs/real_data/overlock-xt_upernet_camvid.py
_base_ = ['./_base_/camvid.py', '../_base_/variants/overlock-xt.py']
model = dict(
    backbone=dict(_delete_=True, type='mmoverlock.OverLoCK', arch='xt', cuda_graphs=True),
    decode_head=dict(in_channels=_base_.dense_channels),
    auxiliary_head=dict(in_channels=_base_.dense_channels[2]),
)
