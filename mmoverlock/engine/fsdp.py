"""Fully sharded training (FSDP) through mmengine's strategy, with what it lacks for this network and this torch."""

import os
from typing import Dict, List, Optional, Union

import torch
from mmengine._strategy import FSDPStrategy as MMEngineFSDPStrategy
from mmengine.optim import BaseOptimWrapper, build_optim_wrapper
from torch import nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from ..models import BaseBlock, ContMixBlock, FocusBlock
from ..registry import STRATEGIES


@STRATEGIES.register_module()
class FSDPStrategy(MMEngineFSDPStrategy):
    """mmengine's FSDPStrategy for OverLoCK: parameters, gradients and optimizer state are spread over the processes.

    Every block of the network is a unit of its own (:func:`blocks_policy`). Of mmengine's strategy it mends:

    * **Parameter groups** are those of the whole parameters. mmengine groups the shards, which all have one dimension:
      ``flat_decay_mult=0`` then leaves no weight decay at all, and layer-wise rates do not find their layers.
    * **Clipping** by norm uses the norm of all gradients; mmengine takes that of the shards in each process.
    * **SyncBN**: ``sync_bn`` is followed; mmengine's ignores it. (Without a GPU batch norms stay as they are.)
    * **Checkpoints** are those of a run without FSDP, optimizer included: one file in plain names, for
      ``tools/test.py``, ``load_from`` and ``--resume``, in both directions and with any number of processes. mmengine's
      do not resume under torch 2.1 and later (the arguments of ``optim_state_dict_to_load`` changed places).
    * **Without a GPU** it runs on the CPU with gloo, for tests.

    Averages of weights would need whole parameters: leave ``EMAHook`` out of ``custom_hooks``.

    Args:
        model_wrapper (dict, optional): Arguments of ``MMFullyShardedDataParallel``, such as ``sharding_strategy=
            'SHARD_GRAD_OP'``. Defaults to None.
        sync_bn (str, optional): ``'torch'`` converts batch norms. Defaults to None.
        **kwargs: As for :class:`mmengine._strategy.FSDPStrategy`. ``state_dict_cfg`` is ``'full'``.

    Raises:
        ValueError: ``state_dict_cfg`` asks for another form.

    Examples:
        >>> runner_type = 'FlexibleRunner'
        >>> strategy = dict(type='mmoverlock.FSDPStrategy', sync_bn='torch')
    """

    def __init__(self, *, model_wrapper: Optional[dict] = None, state_dict_cfg: str = 'full', **kwargs) -> None:
        if state_dict_cfg != 'full':
            raise ValueError(f"mmoverlock.FSDPStrategy writes whole checkpoints (state_dict_cfg='full'), got "
                             f'{state_dict_cfg!r}; for shards take mmengine.FSDPStrategy')  # fmt: skip
        super().__init__(model_wrapper=model_wrapper, state_dict_cfg=state_dict_cfg, **kwargs)
        if not torch.cuda.is_available():
            # Moving to the CPU copies nothing there: values would be freed or overwritten under the state dict.
            self.state_dict_config = FullStateDictConfig(offload_to_cpu=False)
            self.optim_state_dict_config = FullOptimStateDictConfig(offload_to_cpu=False)

    def prepare(self, model: Union[nn.Module, dict], *, optim_wrapper=None, **kwargs):
        """Builds the optimizer on whole parameters, then wraps the model and everything else."""
        if self._prepared:
            return self._prepared_components()
        model = self.build_model(model)
        if isinstance(optim_wrapper, dict):
            optim_wrapper = dict(optim_wrapper)
            if optim_wrapper.get('type') == 'AmpOptimWrapper':
                optim_wrapper.setdefault('use_fsdp', True)
            optim_wrapper = build_optim_wrapper(model, optim_wrapper)
        return super().prepare(model, optim_wrapper=optim_wrapper, **kwargs)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        wrapper = dict(self.model_wrapper or {})
        wrapper.setdefault('type', 'MMFullyShardedDataParallel')
        wrapper.setdefault('auto_wrap_policy', blocks_policy())
        wrapper.setdefault('device_id', int(os.environ['LOCAL_RANK']) if torch.cuda.is_available() else 'cpu')
        self.model_wrapper = wrapper
        if self.sync_bn and not torch.cuda.is_available():
            self.logger.warning('SyncBN runs on GPUs only: every process takes batch statistics of its own')
        else:
            model = self.convert_model(model)
        return super()._wrap_model(model)

    def build_optim_wrapper(self, optim_wrapper: BaseOptimWrapper, model: Optional[nn.Module] = None):
        """Puts the shards where the optimizer has the whole parameters.

        Args:
            optim_wrapper (OptimWrapper): Of the model before it was wrapped, by :meth:`prepare`.
            model (nn.Module): The wrapped model.

        Returns:
            OptimWrapper: The same.
        """
        shards = {_plain(name): parameter for name, parameter in model.named_parameters()}
        for group in optim_wrapper.optimizer.param_groups:
            group['params'] = [shards[self.id_to_name[id(parameter)]] for parameter in group['params']]
        if getattr(optim_wrapper, 'clip_func', None) is nn.utils.clip_grad_norm_:
            optim_wrapper.clip_func = lambda parameters, **kwargs: model.clip_grad_norm_(**kwargs)
        return optim_wrapper

    def optim_state_dict(self) -> dict:
        """The optimizer's state as a run without FSDP has it (whole in the first process only)."""
        wrapper = self.optim_wrapper
        state = FSDP.optim_state_dict(self.model, wrapper.optimizer)
        if state:
            state = _by_number(state)
        rest = {k: v for k, v in wrapper.state_dict().items() if k not in ('state', 'param_groups')}
        return {**state, **rest}

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Loads an optimizer's state of a run with or without FSDP."""
        names = {id(parameter): _plain(name) for name, parameter in self.model.named_parameters()}
        groups = [[names[id(p)] for p in group['params']] for group in self.optim_wrapper.optimizer.param_groups]
        state = {k: state_dict[k] for k in ('state', 'param_groups')}
        state = FSDP.optim_state_dict_to_load(self.model, self.optim_wrapper.optimizer, _by_name(state, groups))
        rest = {k: v for k, v in state_dict.items() if k not in state}
        self.optim_wrapper.load_state_dict({**state, **rest})


def blocks_policy() -> ModuleWrapPolicy:
    """What FSDP gathers and frees as one: each block of Base-Net, Overview-Net and Focus-Net; the rest together."""
    return ModuleWrapPolicy({BaseBlock, FocusBlock, ContMixBlock})


def _plain(name: str) -> str:
    return name.replace('_fsdp_wrapped_module.', '')


def _by_number(state: dict) -> dict:
    """An optimizer's state with parameters by name, as FSDP gives it, to one by number, as optimizers write it."""
    names = [name for group in state['param_groups'] for name in group['params']]
    number = {name: i for i, name in enumerate(names)}
    groups = [dict(group, params=[number[name] for name in group['params']]) for group in state['param_groups']]
    return dict(state={number[name]: value for name, value in state['state'].items()}, param_groups=groups)


def _by_name(state: dict, names: List[List[str]]) -> Dict:
    """The way back; ``names`` are those of the parameters, by group."""
    groups = state['param_groups']
    if [len(group['params']) for group in groups] != [len(group) for group in names]:
        raise ValueError('the checkpoint has other parameter groups than this run: its optimizer cannot be resumed')
    name = {i: n for group, own in zip(groups, names) for i, n in zip(group['params'], own)}
    groups = [dict(group, params=own) for group, own in zip(groups, names)]
    return dict(state={name[i]: value for i, value in state['state'].items()}, param_groups=groups)
