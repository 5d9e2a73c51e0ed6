# UPerNet with OverLoCK-B on ADE20K, 512x512, 160k iterations.
# Published: 51.7 mIoU, single scale (arXiv 2502.20087, official release). Cost: not published.
#   tools/dist_train.sh configs/segmentation/overlock-b_upernet_8xb2-160k_ade20k-512x512.py 8
_base_ = [
    '../_base_/models/upernet_overlock.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_160k.py',
    '../_base_/variants/overlock-b.py',
]
model = dict(
    backbone=dict(arch='b', drop_path_rate=0.5, init_cfg=dict(checkpoint=_base_.pretrained)),
    decode_head=dict(in_channels=_base_.dense_channels),
    auxiliary_head=dict(in_channels=_base_.dense_channels[2]),
)
