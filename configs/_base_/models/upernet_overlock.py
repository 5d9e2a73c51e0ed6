# A config on top of it fills in arch, drop_path_rate, checkpoint and the heads' in_channels.
_base_ = 'mmseg::_base_/models/upernet_swin.py'
data_preprocessor = dict(size=(512, 512))
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(_delete_=True, type='mmoverlock.OverLoCK', init_cfg=dict(type='Pretrained')),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(in_index=2, num_classes=150),
)
