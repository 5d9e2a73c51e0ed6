"""What the configs of these tests name: a scaler for the CPU and a record of exact losses."""

import os.path as osp

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module(force=True)
class CPUScalerOptimWrapper(AmpOptimWrapper):
    """AmpOptimWrapper's scaling of the loss, which mmengine allows on a GPU only, in full precision."""

    def __init__(self, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        self.cast_dtype = None
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=4.0, growth_interval=3)

    def optim_context(self, model):
        return OptimWrapper.optim_context(self, model)


@HOOKS.register_module(force=True)
class RecordLosses(Hook):
    """Appends each iteration's loss, to the last digit, to losses.txt (losses_1.txt of the second process)."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        name = f'losses_{get_rank()}.txt' if get_rank() else 'losses.txt'
        with open(osp.join(runner.work_dir, name), 'a') as file:
            file.write(f'{runner.iter + 1} {outputs["loss"].item().hex()}\n')
