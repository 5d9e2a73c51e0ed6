# AdamW for 160k iterations, for 8 GPUs x 2 pictures.
_base_ = ['mmseg::_base_/schedules/schedule_160k.py', 'mmseg::_base_/default_runtime.py']

optimizer = dict(_delete_=True, type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
# The published rule for weight decay, on our names: see coco_1x.py.
optim_wrapper = dict(
    optimizer=optimizer,
    constructor='mmoverlock.GroupedOptimWrapperConstructor',
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0), '.norm.': dict(decay_mult=1.0)}),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]
train_cfg = dict(val_interval=8000)
default_hooks = dict(
    checkpoint=dict(interval=8000, max_keep_ckpts=1, save_best='mIoU'),
    # A step with infinities leaves no trace; 20 in a row end the run, with the parameter's name.
    non_finite_guard=dict(type='mmoverlock.NonFiniteGuardHook'),
)
sync_bn = 'torch'

auto_scale_lr = dict(enable=False, base_batch_size=16)
