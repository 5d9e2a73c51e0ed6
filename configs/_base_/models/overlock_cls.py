# A config on top of it fills in arch, drop_path_rate and the head's in_channels.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmoverlock.OverLoCK', out_type='classification'),
    head=dict(
        type='mmoverlock.OverLoCKClsHead',
        num_classes=1000,
        aux_loss_weight=0.4,
        # Smoothing the mixed target, as here, equals mixing smoothed targets, as timm does: both
        # are linear. The head uses this loss for the auxiliary output too.
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    # One of the two for every batch, with equal chance (timm: switch probability 0.5).
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
