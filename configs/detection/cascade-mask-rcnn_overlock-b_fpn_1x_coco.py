# Cascade Mask R-CNN with OverLoCK-B on COCO, 1x.
# Published: none for Cascade Mask R-CNN with OverLoCK-B. Cost: not published.
#   tools/dist_train.sh configs/detection/cascade-mask-rcnn_overlock-b_fpn_1x_coco.py 8
_base_ = [
    '../_base_/models/cascade-mask-rcnn_overlock_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/variants/overlock-b.py',
]
model = dict(
    backbone=dict(arch='b', drop_path_rate=0.6, init_cfg=dict(checkpoint=_base_.pretrained)),
    neck=dict(in_channels=_base_.dense_channels),
)
