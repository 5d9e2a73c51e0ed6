"""Parameters with the same settings in one group of the optimizer."""

from typing import Dict, List

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with parameters of the same settings in one group.

    mmengine makes a group of every single parameter once ``paramwise_cfg`` is given. PyTorch's optimizers launch a
    dozen kernels a group, so the step of a network with a thousand parameters, as OverLoCK's, takes a hundred times as
    many launches as it needs, and can take longer than the network itself. Which parameter gets what stays the same.

    Examples:
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.05),
        ...     constructor='mmoverlock.GroupedOptimWrapperConstructor',
        ...     paramwise_cfg=dict(norm_decay_mult=0.0))
    """

    def add_params(self, params: List[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Adds the groups of all parameters of ``module``; called once by the base class, which then recurses."""
        super().add_params(params, module, prefix=prefix, **kwargs)
        if not prefix:
            params[:] = merge_groups(params)


def merge_groups(params: List[dict]) -> List[dict]:
    """Groups of parameters with equal settings made one, in the order of their first parameters."""
    groups: Dict[tuple, dict] = {}
    for group in params:
        key = tuple(sorted((k, repr(v)) for k, v in group.items() if k != 'params'))
        groups.setdefault(key, dict(group, params=[]))['params'].extend(group['params'])
    return list(groups.values())
