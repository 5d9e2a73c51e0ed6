# AdamW for 300 epochs and 10 more at the lowest rate, for 8 GPUs x 256 pictures.
_base_ = 'mmpretrain::_base_/default_runtime.py'

optim_wrapper = dict(
    type='AmpOptimWrapper',  # fp16
    optimizer=dict(type='AdamW', lr=1e-3 * 2048 / 1024, betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    # Published: none on biases and other 1-D parameters. The position biases (rpb1, rpb2) are 3-D;
    # here they get none either.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={'rpb': dict(decay_mult=0.0)},
    ),
)

param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-6 / 2e-3,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    # The end is 301: a scheduler stops one step before its end, and the cooldown, epochs 300 to
    # 309, is to run at eta_min itself.
    dict(type='CosineAnnealingLR', T_max=295, eta_min=1e-5, by_epoch=True, begin=5, end=301),
]

train_cfg = dict(by_epoch=True, max_epochs=300 + 10, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# Decay 0.9999 of parameters and buffers; the averaged weights are the ones tested and saved.
custom_hooks = [
    dict(
        type='EMAHook',
        momentum=1e-4,
        update_buffers=True,
        evaluate_on_ema=True,
        evaluate_on_origin=False,
        priority='ABOVE_NORMAL',
    )
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
env_cfg = dict(cudnn_benchmark=True)
sync_bn = 'torch'

auto_scale_lr = dict(enable=False, base_batch_size=2048)
