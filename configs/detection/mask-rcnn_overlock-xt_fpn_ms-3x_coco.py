# Mask R-CNN with OverLoCK-XT on COCO, 3x, multi-scale and crops.
# Published: none for Mask R-CNN with OverLoCK-XT. Cost: not published.
# The drop path rate of XT is ours: no dense recipe was published for it.
#   tools/dist_train.sh configs/detection/mask-rcnn_overlock-xt_fpn_ms-3x_coco.py 8
_base_ = [
    '../_base_/models/mask-rcnn_overlock_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/coco_3x.py',
    '../_base_/variants/overlock-xt.py',
]
model = dict(
    backbone=dict(arch='xt', drop_path_rate=0.1, init_cfg=dict(checkpoint=_base_.pretrained)),
    neck=dict(in_channels=_base_.dense_channels),
)
