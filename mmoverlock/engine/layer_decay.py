"""Layer-wise learning rate decay, in one constructor for classification, detection and segmentation."""

from typing import Callable, Dict, List, Tuple

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS
from .grouped import merge_groups


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """The default constructor, with a learning rate that falls from the last layer of the backbone to the first.

    A parameter of layer ``i`` of ``n`` gets ``lr * decay_rate ** (n - 1 - i)``. The layers are those of
    ``get_layer_depth(name, prefix)`` of the backbone, wherever in the model it stands (``backbone.``,
    ``student.backbone.``, several of them); everything outside, heads and necks, keeps ``lr``. Source: layer-wise
    decay of `BEiT <https://arxiv.org/abs/2106.08254>`_. The constructors of mmdet and mmseg know ConvNeXt only, the
    one of mmpretrain asks the whole model.

    All rules of mmengine's constructor hold as they are (``norm_decay_mult``, ``bias_decay_mult``,
    ``flat_decay_mult``, ``dwconv_decay_mult``, ``custom_keys`` with ``lr_mult`` and ``decay_mult``, ...). Parameters
    with the same settings share a group, which keeps the optimizer's step quick.

    A schedule that ends in an absolute ``eta_min`` would *raise* the rate of early layers once theirs is below it: use
    ``eta_min_ratio``.

    Args:
        optim_wrapper_cfg (dict): The config of the optimizer wrapper; its optimizer needs an ``lr``.
        paramwise_cfg (dict): ``decay_rate`` (also named ``layer_decay_rate``), in (0, 1], and what mmengine's
            constructor takes.

    Raises:
        ValueError: No rate, two rates, one out of range, no ``lr``, or a model without a backbone that knows its
            layers.

    Examples:
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.05),
        ...     constructor='mmoverlock.LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(decay_rate=0.9, norm_decay_mult=0.0))
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        self.paramwise_cfg = dict(self.paramwise_cfg)  # the config is the caller's
        rates = [self.paramwise_cfg.pop(k) for k in ('decay_rate', 'layer_decay_rate') if k in self.paramwise_cfg]
        if len(rates) != 1:
            raise ValueError('layer-wise decay needs one rate: paramwise_cfg=dict(decay_rate=0.9)')
        if not 0 < rates[0] <= 1:
            raise ValueError(f'paramwise_cfg.decay_rate must be in (0, 1], got {rates[0]}')
        if self.base_lr is None:
            raise ValueError('layer-wise decay needs the learning rate in the config: optimizer=dict(lr=...)')
        self.decay_rate = rates[0]
        # The base class asks for parameter groups only if it sees an option.
        self.paramwise_cfg.setdefault('custom_keys', {})

    def add_params(self, params: List[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Adds the groups of all parameters of ``module``; called once by the base class, which then recurses."""
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return
        names = {id(p): n for n, p in module.named_parameters()}
        backbones = _backbones(module)
        for group in params:
            (param,) = group['params']
            layer, layers = _depth(names[id(param)], backbones)
            scale = self.decay_rate ** (layers - 1 - layer)
            group.update(lr=group.get('lr', self.base_lr) * scale, lr_scale=scale)
        params[:] = merge_groups(params)


def _backbones(model: nn.Module) -> Dict[str, Callable[[str, str], Tuple[int, int]]]:
    """Prefix to ``get_layer_depth`` of every innermost module that has one: classifiers have one that asks theirs."""
    having = [name for name, m in model.named_modules() if hasattr(m, 'get_layer_depth')]
    inner = [a for a in having if not any(b != a and b.startswith(f'{a}.' if a else '') for b in having)]
    if not inner:
        raise ValueError(
            f'layer-wise decay: no part of {type(model).__name__} has get_layer_depth(name, prefix), as mmoverlock.'
            'OverLoCK has; leave out constructor= for this model'
        )
    return {f'{a}.' if a else '': model.get_submodule(a).get_layer_depth for a in inner}


def _depth(name: str, backbones: Dict[str, Callable]) -> Tuple[int, int]:
    """Layer and number of layers of a parameter; the last of one outside every backbone."""
    for prefix, depth in backbones.items():
        if name.startswith(prefix):
            return depth(name, prefix)
    return 0, 1
