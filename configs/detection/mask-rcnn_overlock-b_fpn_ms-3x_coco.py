# Mask R-CNN with OverLoCK-B on COCO, 3x, multi-scale and crops.
# Published: 51.4 box AP, 45.3 mask AP (arXiv 2502.20087, official release). Cost: not published.
#   tools/dist_train.sh configs/detection/mask-rcnn_overlock-b_fpn_ms-3x_coco.py 8
_base_ = [
    '../_base_/models/mask-rcnn_overlock_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/coco_3x.py',
    '../_base_/variants/overlock-b.py',
]
model = dict(
    backbone=dict(arch='b', drop_path_rate=0.6, init_cfg=dict(checkpoint=_base_.pretrained)),
    neck=dict(in_channels=_base_.dense_channels),
)
