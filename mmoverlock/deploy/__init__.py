"""Export: a model as one function of a batch of images, in a file that needs none of this code.

:func:`deployable` makes the function, :func:`export` writes it, :func:`load` reads the file back and :func:`compare`
holds it against PyTorch. ``tools/deploy/export.py`` is all four as a command.
"""

from .check import Row, compare, load
from .detectors import paste_masks
from .exporters import FORMATS, ExportError, export, smallest_size
from .models import Deployable, deployable

__all__ = [
    'FORMATS',
    'Deployable',
    'ExportError',
    'Row',
    'compare',
    'deployable',
    'export',
    'load',
    'paste_masks',
    'smallest_size',
]
