"""Operators of OverLoCK. This package knows torch (and, for the fast forms, triton); no OpenMMLab package."""

from .backends import BackendError, available_backends
from .contmix import contmix
from .depthwise import (
    depthwise_conv2d,
    depthwise_conv2d_branches,
    depthwise_conv2d_norm_branches,
    depthwise_conv3x3,
)
from .excite import excite
from .feed_forward import feed_forward

__all__ = [
    'BackendError',
    'available_backends',
    'contmix',
    'depthwise_conv2d',
    'depthwise_conv2d_branches',
    'depthwise_conv2d_norm_branches',
    'depthwise_conv3x3',
    'excite',
    'feed_forward',
]
