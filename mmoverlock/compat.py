"""The few patches that current packages need of the OpenMMLab line in use.

Each is a function whose docstring gives its reason; it looks whether the reason holds here, and does nothing where it
does not. The tools call :func:`apply` first thing. Importing ``mmoverlock`` never does: a program that uses the
backbone decides for itself, and calls ``mmoverlock.compat.apply()`` before it loads configs or builds models.

Resuming under torch >= 2.6 needs no patch: ``mmoverlock.checkpoints`` registers a loader with mmengine instead.
"""

import importlib
import sys
from importlib import metadata, util
from typing import Optional, Tuple

import torch


def major_version(distribution: str) -> Optional[int]:
    """The major version of an installed distribution, or None where it is not installed."""
    try:
        return int(metadata.version(distribution).split('.')[0])
    except metadata.PackageNotFoundError:
        return None


def beside_transformers_5() -> bool:
    """Whether transformers 5 or newer is installed, beside which mmpretrain's models do not import unpatched."""
    return (major_version('transformers') or 0) >= 5


def skip_multimodal_models() -> bool:
    """Keep mmpretrain from importing its multimodal models beside transformers >= 5.

    mmpretrain 1.2.0 imports them when it finds transformers (of any version from 4.28) and pycocotools, which mmdet
    brings. They subclass what transformers 5 no longer has, so ``import mmpretrain.models`` fails, and with it
    ``mmdet.models`` and ``mmseg.models``. mmpretrain's own switch leaves them out; nothing here uses them.

    Returns:
        bool: Whether the switch was thrown.
    """
    if not beside_transformers_5() or util.find_spec('mmpretrain') is None:
        return False
    from mmpretrain.utils import dependency

    if not dependency.WITH_MULTIMODAL or 'mmpretrain.models' in sys.modules:
        return False
    dependency.WITH_MULTIMODAL = False
    return True


def find_mmseg_configs() -> bool:
    """Let ``_base_ = 'mmseg::...'`` find the configs of the fork onedl-mmsegmentation.

    mmengine maps the package ``mmseg`` to the distribution ``mmsegmentation`` and says that it is not installed when
    only the fork is there. (mmdet and mmpretrain are named as their modules, for which mmengine falls back to the
    module.) Naming the module for mmseg too gives it the same way out.

    Returns:
        bool: Whether the map was changed.
    """
    if major_version('mmsegmentation') is not None or major_version('onedl-mmsegmentation') is None:
        return False
    from mmengine.config.utils import MODULE2PACKAGE

    if MODULE2PACKAGE.get('mmseg') == 'mmseg':
        return False
    MODULE2PACKAGE['mmseg'] = 'mmseg'
    return True


def refuse_unsafe_checkpoints() -> bool:
    """Keep onedl-mmengine from executing a downloaded checkpoint that torch refused to load safely.

    Its ``_safe_torch_load`` tries ``weights_only=True`` and, when that is refused, loads the file again without, which
    runs whatever is pickled in it. The replacement takes the same allow-list and lets torch's refusal stand; torch's
    variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD still overrides it. (For local files and official ones,
    ``mmoverlock.checkpoints`` has a loader of its own.)

    Returns:
        bool: Whether the function was replaced.
    """
    from mmengine.runner import checkpoint

    original = getattr(checkpoint, '_safe_torch_load', None)
    if original is None or getattr(original, '_mmoverlock', False):
        return False
    if not hasattr(torch.serialization, 'safe_globals'):  # torch < 2.5, which refuses nothing
        return False

    def load(file, map_location=None, weights_only=None):
        with torch.serialization.safe_globals(checkpoint.get_torch_safe_globals()):
            return torch.load(file, map_location=map_location, weights_only=weights_only)

    load._mmoverlock = True
    checkpoint._safe_torch_load = load
    return True


def refuse_unsafe_downloads() -> bool:
    """Have the short names of model zoos (``torchvision://``, ``open-mmlab://``, ...) loaded as safely as addresses.

    mmengine turns such a name into an address and calls its ``load_from_http`` directly, past the loader that
    ``mmoverlock.checkpoints`` registers; that function lets ``torch.hub`` execute what is pickled in the file.

    Returns:
        bool: Whether the function was replaced.
    """
    from mmengine.runner import checkpoint

    from .checkpoints import register_loader

    register_loader()
    safe = checkpoint.CheckpointLoader._schemes['https://']
    if checkpoint.load_from_http is safe or not getattr(safe, '_mmoverlock', False):
        return False
    checkpoint.load_from_http = safe
    return True


def focal_loss_in_float32() -> bool:
    """Have mmcv's focal loss (RetinaNet's) computed in float32 under autocast.

    Its CUDA kernel keeps a probability from zero with ``(T)FLT_MIN``, which is zero in float16: a logit beyond about 17
    gives zero times log(0), NaN, and a RetinaNet of any backbone stops learning once it is sure of something. It has no
    kernel for bfloat16 at all. Who imported the function has a name of his own for it, so each is replaced.

    Returns:
        bool: Whether the function was replaced.
    """
    if util.find_spec('mmcv') is None:
        return False
    try:
        ops = importlib.import_module('mmcv.ops')
    except ImportError:  # an mmcv without operators has no focal loss; the tools say what to do about it
        return False
    original = ops.sigmoid_focal_loss
    if getattr(original, '_mmoverlock', False):
        return False

    def sigmoid_focal_loss(input, target, *args):
        return original(input.float(), target, *args)

    sigmoid_focal_loss._mmoverlock = True
    ops.sigmoid_focal_loss = ops.focal_loss.sigmoid_focal_loss = sigmoid_focal_loss
    losses = sys.modules.get('mmdet.models.losses.focal_loss')
    if losses is not None:
        losses._sigmoid_focal_loss = sigmoid_focal_loss
    return True


PATCHES = (
    skip_multimodal_models,
    find_mmseg_configs,
    refuse_unsafe_checkpoints,
    refuse_unsafe_downloads,
    focal_loss_in_float32,
)


def apply() -> Tuple[str, ...]:
    """Apply every patch whose reason holds here. Applying twice is the same as once.

    Call it before ``mmpretrain.models``, ``mmdet.models`` or ``mmseg.models`` is imported.

    Returns:
        tuple[str]: The names of the patches that changed something in this call.
    """
    return tuple(patch.__name__ for patch in PATCHES if patch())
