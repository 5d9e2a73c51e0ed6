# UPerNet with OverLoCK-XT on ADE20K, 512x512, 160k iterations.
# Published: none for UPerNet with OverLoCK-XT. Cost: not published.
# The drop path rate of XT is ours: no dense recipe was published for it.
#   tools/dist_train.sh configs/segmentation/overlock-xt_upernet_8xb2-160k_ade20k-512x512.py 8
_base_ = [
    '../_base_/models/upernet_overlock.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/ade20k_160k.py',
    '../_base_/variants/overlock-xt.py',
]
model = dict(
    backbone=dict(arch='xt', drop_path_rate=0.1, init_cfg=dict(checkpoint=_base_.pretrained)),
    decode_head=dict(in_channels=_base_.dense_channels),
    auxiliary_head=dict(in_channels=_base_.dense_channels[2]),
)
