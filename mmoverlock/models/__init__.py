"""The model. The head stands in ``mmoverlock.models.heads``: it alone needs mmpretrain."""

from .blocks import BaseBlock, ContMixBlock, FocusBlock
from .overlock import ARCHS, OverLoCK

__all__ = ['ARCHS', 'BaseBlock', 'ContMixBlock', 'FocusBlock', 'OverLoCK']
