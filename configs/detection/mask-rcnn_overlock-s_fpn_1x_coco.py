# Mask R-CNN with OverLoCK-S on COCO, 1x.
# Published: 49.4 box AP, 44.0 mask AP (arXiv 2502.20087, official release). Cost: not published.
#   tools/dist_train.sh configs/detection/mask-rcnn_overlock-s_fpn_1x_coco.py 8
_base_ = [
    '../_base_/models/mask-rcnn_overlock_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/variants/overlock-s.py',
]
model = dict(
    backbone=dict(arch='s', drop_path_rate=0.4, init_cfg=dict(checkpoint=_base_.pretrained)),
    neck=dict(in_channels=_base_.dense_channels),
)
