# A config on top of it fills in arch, drop_path_rate, checkpoint and the neck's in_channels.
_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmoverlock.OverLoCK',
        fuse_overview=True,
        # RetinaNet starts at stride 8. The stride 4 output is not asked for, so that no parameter
        # goes without a gradient, which distributed training would refuse.
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained'),
    ),
    neck=dict(start_level=0),
)
