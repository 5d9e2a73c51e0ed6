"""Looking inside a network: what it saw, where it looked, and how far.

Functions of a model and a normalised picture that give arrays; nothing is drawn but by :func:`overlay`. The model is an
:class:`mmoverlock.OverLoCK` or anything with one inside: a classifier, detector or segmentor. It may be in training,
compiled or merged; it stays as it is. ``tools/analysis/visualize_*.py`` draw what comes out.
"""

from .contmix import ContMixKernels, contmix_blocks, contmix_kernels
from .curves import read_curves, smooth
from .gradients import class_scores, contribution_area, effective_receptive_field, grad_cam
from .inputs import find_backbone, normalize, resized
from .maps import feature_maps, overlay, overview_map

__all__ = [
    'ContMixKernels',
    'class_scores',
    'contmix_blocks',
    'contmix_kernels',
    'contribution_area',
    'effective_receptive_field',
    'feature_maps',
    'find_backbone',
    'grad_cam',
    'normalize',
    'overlay',
    'overview_map',
    'read_curves',
    'resized',
    'smooth',
]
