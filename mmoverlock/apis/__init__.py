"""Inference in Python, for all three tasks::

    from mmoverlock.apis import Inferencer

    infer = Inferencer('mask-rcnn_overlock-t_fpn_1x_coco', 'maskrcnn1x_overlock_tiny_coco.pth')
    results = infer(['street.jpg', 'clips/*.mp4'], batch_size=4)

``tools/infer.py`` does the same from the command line.
"""

from .configs import find_config, list_configs
from .inferencer import Inferencer
from .inputs import Picture, Source, expand, read
from .outputs import Writer

__all__ = ['Inferencer', 'Picture', 'Source', 'Writer', 'expand', 'find_config', 'list_configs', 'read']
