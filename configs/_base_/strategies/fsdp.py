# Fully sharded training (FSDP). Add it to the _base_ of any config of ours:
#   _base_ = ['../segmentation/overlock-b_upernet_8xb2-160k_ade20k-512x512.py', '../_base_/strategies/fsdp.py']
#   custom_hooks = []  # for ImageNet: an average of weights (EMA) is not to be had from shards
# and start it as any other, tools/dist_train.sh CONFIG 8. docs/distributed.md says when it pays.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='mmoverlock.FSDPStrategy',
    sync_bn='torch',
    # FULL_SHARD spreads parameters too; SHARD_GRAD_OP keeps them whole between forward and backward.
    model_wrapper=dict(type='MMFullyShardedDataParallel', sharding_strategy='FULL_SHARD'),
)
