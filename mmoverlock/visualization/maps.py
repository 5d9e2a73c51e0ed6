"""Feature maps: of every stage, of Overview-Net, and laid over a picture."""

from typing import Dict, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..models.overlock import STAGES
from .inputs import check_image, find_backbone, inspecting, like_weights, outputs_of, resized


@torch.no_grad()
def feature_maps(model: nn.Module, image: Tensor) -> Dict[str, Tensor]:
    """The map that each stage ends in, before any output norm.

    Args:
        model (nn.Module): With an OverLoCK inside.
        image (Tensor): One normalised image, (1, 3, H, W).

    Returns:
        dict[str, Tensor]: (C, h, w) float32 on the CPU for ``stage1``, ``stage2``, ``stage3`` (Base-Net), ``stage4``
        (Overview-Net), ``focus3`` and ``focus4`` (Focus-Net: the channels of the feature, then those of the context).

    Raises:
        ValueError: There is no OverLoCK in the model, or ``image`` is not one image.
    """
    check_image(image)
    backbone = find_backbone(model)
    with inspecting(backbone), outputs_of({name: getattr(backbone, name)[-1] for name in STAGES}) as outputs:
        backbone(like_weights(backbone, image))
    joined = {name: torch.cat(out, dim=1) if isinstance(out, tuple) else out for name, out in outputs.items()}
    return {name: joined[name][0].float().cpu() for name in STAGES}


@torch.no_grad()
def overview_map(model: nn.Module, image: Tensor, target: Optional[int] = None) -> np.ndarray:
    """What Overview-Net, the quick look at the whole, found in a picture.

    Args:
        model (nn.Module): With an OverLoCK inside.
        image (Tensor): One normalised image, (1, 3, H, W).
        target (int, optional): None: at each place the Euclidean norm over the channels of Overview-Net's last map,
            which every model has. A class: its class activation map, the auxiliary head's linear layer applied at each
            place (`CAM <https://arxiv.org/abs/1512.04150>`_), for classifiers that kept that head. Defaults to None.

    Returns:
        np.ndarray: (H, W) float32, resized bilinearly; 0 is the least and 1 the greatest value in this picture.

    Raises:
        ValueError: There is no OverLoCK in the model, ``image`` is not one image, or there is no such class or head.
    """
    overview = feature_maps(model, image)['stage4']
    if target is None:
        values = overview.norm(dim=0)
    else:
        head = next((m for m in model.modules() if hasattr(m, 'aux_fc')), None)
        if head is None:
            raise ValueError(f'{type(model).__name__} has no auxiliary head to say what speaks for a class')
        weight, bias = head.aux_fc.weight.float().cpu(), head.aux_fc.bias.float().cpu()
        if not 0 <= target < weight.shape[0]:
            raise ValueError(f'class {target} is not among the {weight.shape[0]} of the auxiliary head')
        with inspecting(head):
            normed = head.aux_bn(like_weights(head, overview[None])).float().cpu()
        values = F.conv2d(normed, weight, bias)[0, target]
    return resized(values, image.shape[2:])


def overlay(image: np.ndarray, heatmap: np.ndarray, alpha: float = 0.5, colormap: str = 'jet') -> np.ndarray:
    """Lays a heat map over a picture.

    Args:
        image (np.ndarray): (H, W, 3), uint8, RGB.
        heatmap (np.ndarray): (H, W), 0 to 1.
        alpha (float): Share of the heat map, 0 to 1. Defaults to 0.5.
        colormap (str): A name of matplotlib's. Defaults to ``'jet'``, which readers of such pictures know.

    Returns:
        np.ndarray: (H, W, 3), uint8, RGB.

    Raises:
        ValueError: The sizes differ.
        ImportError: matplotlib is not installed.
    """
    if image.shape[:2] != heatmap.shape:
        raise ValueError(f'a heat map of size {heatmap.shape} does not lie on a picture of size {image.shape[:2]}')
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise ImportError(f'overlay() needs matplotlib ({error}): pip install matplotlib') from error
    colours = colormaps[colormap](np.clip(heatmap, 0, 1))[..., :3] * 255
    return np.round((1 - alpha) * image + alpha * colours).astype(np.uint8)
