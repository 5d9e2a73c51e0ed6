# AdamW for 12 epochs, for 8 GPUs x 2 pictures. Warm-up (500 iterations) and steps (8, 11) are
# those of mmdet's 1x.
_base_ = ['mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py']

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    # The published rule exempts the parameters whose official name contains 'norm': norm1 and
    # norm2 of the focus blocks and the norms of the outputs. Everything else is decayed, biases,
    # batch norms and the base blocks' layer norms too. The latter are officially 'proj.0' and here
    # 'norm', so a longer key, which mmengine tries first, takes them out again.
    constructor='mmoverlock.GroupedOptimWrapperConstructor',
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0), '.norm.': dict(decay_mult=1.0)}),
)
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=1, save_best='auto'),
    # A step with infinities leaves no trace; 20 in a row end the run, with the parameter's name.
    non_finite_guard=dict(type='mmoverlock.NonFiniteGuardHook'),
)
# The batch statistics of two pictures are too noisy.
sync_bn = 'torch'
