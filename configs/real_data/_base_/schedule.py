# One optimizer and one budget for every backbone; the data set's base file sets the iterations.
optim_wrapper = dict(
    type='AmpOptimWrapper',  # fp16
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5.0),
    # No decay on norms, biases and other 1-D parameters (ConvNeXt's layer scale is one); as in the ImageNet recipe,
    # OverLoCK's position biases, layer scales and GRN are decayed.
    constructor='mmoverlock.GroupedOptimWrapperConstructor',  # for all backbones: the same settings, fewer launches
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# The last weights are the ones reported: picking the best by the validation pictures would flatter.
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=25, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=100000, save_optimizer=False),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    # A step with infinities leaves no trace; 20 in a row end the run, with the parameter's name.
    non_finite_guard=dict(type='mmoverlock.NonFiniteGuardHook'),
)
log_processor = dict(by_epoch=False)
env_cfg = dict(
    cudnn_benchmark=True,  # every batch of a run has one size
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
randomness = dict(seed=0)
log_level = 'INFO'
load_from = None
resume = False
