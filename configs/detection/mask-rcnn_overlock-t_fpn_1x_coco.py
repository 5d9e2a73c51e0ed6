# Mask R-CNN with OverLoCK-T on COCO, 1x.
# Published: 48.3 box AP, 43.3 mask AP (arXiv 2502.20087, official release). Cost: not published.
#   tools/dist_train.sh configs/detection/mask-rcnn_overlock-t_fpn_1x_coco.py 8
_base_ = [
    '../_base_/models/mask-rcnn_overlock_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/variants/overlock-t.py',
]
model = dict(
    backbone=dict(arch='t', drop_path_rate=0.2, init_cfg=dict(checkpoint=_base_.pretrained)),
    neck=dict(in_channels=_base_.dense_channels),
)
