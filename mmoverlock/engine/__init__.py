"""Optimizer constructors and hooks, where :mod:`mmoverlock.registry` looks for them."""

from .grouped import GroupedOptimWrapperConstructor
from .hooks import BadSampleError, ReliableCheckpointHook, ReliableDataHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .non_finite import FiniteEMA, NonFiniteError, NonFiniteGuardHook

__all__ = [
    'FiniteEMA',
    'GroupedOptimWrapperConstructor',
    'LayerDecayOptimWrapperConstructor',
    'NonFiniteError',
    'NonFiniteGuardHook',
]
__all__ += ['BadSampleError', 'ReliableCheckpointHook', 'ReliableDataHook']
