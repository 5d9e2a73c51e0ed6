# A config on top of it fills in arch, drop_path_rate, checkpoint and the neck's in_channels.
_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmoverlock.OverLoCK',
        fuse_overview=True,
        init_cfg=dict(type='Pretrained'),
    ),
)
