"""mmoverlock: OverLoCK for mmpretrain, mmdetection, mmsegmentation and plain PyTorch."""

from .checkpoints import register_loader
from .models import ContMixBlock, OverLoCK
from .version import __version__

register_loader()

__all__ = ['ContMixBlock', 'OverLoCK', 'OverLoCKClsHead', '__version__']


def __getattr__(name: str):
    # The head imports mmpretrain, which takes seconds: only for those who ask for it.
    if name == 'OverLoCKClsHead':
        from .models.heads import OverLoCKClsHead

        return OverLoCKClsHead
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
