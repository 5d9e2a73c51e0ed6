# AdamW for 300 epochs and 10 more at the lowest rate, for 8 GPUs x 256 pictures.
_base_ = 'mmpretrain::_base_/default_runtime.py'

optim_wrapper = dict(
    type='AmpOptimWrapper',  # fp16
    optimizer=dict(type='AdamW', lr=1e-3 * 2048 / 1024, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5.0),
    # Published, timm's rule: none on biases and other 1-D parameters. Position biases (rpb1, rpb2) are
    # 3-D, layer scales and GRN 4-D: they are decayed.
    constructor='mmoverlock.GroupedOptimWrapperConstructor',
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)

# As timm steps it, once an epoch: five epochs of warm-up, over a cosine that counts from epoch 0. A
# scheduler of mmengine stops one step before its end, hence 6 and 301: epoch 5 is the first without
# warm-up, and the cooldown, epochs 300 to 309, runs at eta_min itself.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6 / 2e-3, by_epoch=True, begin=0, end=6),
    dict(type='CosineAnnealingLR', T_max=300, eta_min=1e-5, by_epoch=True, begin=0, end=301),
]

train_cfg = dict(by_epoch=True, max_epochs=300 + 10, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# Decay 0.9999 of parameters and buffers; the averaged weights are the ones tested and saved.
custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='mmoverlock.FiniteEMA',
        momentum=1e-4,
        update_buffers=True,
        evaluate_on_ema=True,
        evaluate_on_origin=False,
        priority='ABOVE_NORMAL',
    )
]
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=3, save_best='auto'),
    # A step with infinities leaves no trace; 20 in a row end the run, with the parameter's name.
    non_finite_guard=dict(type='mmoverlock.NonFiniteGuardHook'),
)
env_cfg = dict(cudnn_benchmark=True)
sync_bn = 'torch'

auto_scale_lr = dict(enable=False, base_batch_size=2048)
