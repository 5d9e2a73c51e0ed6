# RetinaNet with OverLoCK-T on COCO, 1x.
# Published: none for RetinaNet with OverLoCK-T. Cost: not published.
#   tools/dist_train.sh configs/detection/retinanet_overlock-t_fpn_1x_coco.py 8
_base_ = [
    '../_base_/models/retinanet_overlock_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedules/coco_1x.py',
    '../_base_/variants/overlock-t.py',
]
model = dict(
    backbone=dict(arch='t', drop_path_rate=0.2, init_cfg=dict(checkpoint=_base_.pretrained)),
    neck=dict(in_channels=_base_.dense_channels[1:]),
)
