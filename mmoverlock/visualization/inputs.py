"""What every view needs: the backbone in a model, a picture as the model takes it, and the outputs of layers."""

from contextlib import contextmanager
from typing import Dict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.structures import BaseDataElement
from torch import Tensor

from ..models import OverLoCK
from ..models.blocks import BaseBlock, ContMixBlock, FocusBlock

# Of a backbone alone: what the ImageNet weights were trained with.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BLOCKS = (BaseBlock, FocusBlock, ContMixBlock)


def find_backbone(model: nn.Module) -> OverLoCK:
    """The OverLoCK in a model.

    Args:
        model (nn.Module): An :class:`mmoverlock.OverLoCK`, or a classifier, detector, segmentor or wrapper with one.

    Returns:
        OverLoCK: The backbone itself, not a copy.

    Raises:
        ValueError: There is none, or more than one.
    """
    found = [m for m in model.modules() if isinstance(m, OverLoCK)]
    if len(found) != 1:
        raise ValueError(f'{type(model).__name__} holds {len(found) or "no"} OverLoCK backbone{"s" * (len(found) > 1)}')
    return found[0]


def normalize(model: nn.Module, picture: np.ndarray) -> Tensor:
    """A picture as the model takes it, without resizing.

    Args:
        model (nn.Module): Its ``data_preprocessor`` is used where it has one that normalises, and ImageNet's mean and
            standard deviation otherwise.
        picture (np.ndarray): (H, W, 3), uint8, RGB.

    Returns:
        Tensor: (1, 3, H, W), on the model's device.

    Raises:
        ValueError: The picture is none.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f'a picture is (H, W, 3) of uint8, got {picture.shape} of {picture.dtype}')
    height, width = picture.shape[:2]
    preprocessor = getattr(model, 'data_preprocessor', None)
    if getattr(preprocessor, '_enable_normalize', False):
        bgr = torch.from_numpy(np.ascontiguousarray(picture[:, :, ::-1].transpose(2, 0, 1)))
        image = preprocessor(dict(inputs=[bgr], data_samples=[BaseDataElement()]), False)['inputs']
        image = image[:, :, :height, :width]  # without the padding to a multiple of 32, which OverLoCK does not need
    else:
        normalised = (picture - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
        image = torch.from_numpy(normalised.transpose(2, 0, 1)[None]).float()
    return like_weights(model, image)


def like_weights(model: nn.Module, image: Tensor) -> Tensor:
    """The image on the device and in the type of the model's weights."""
    weight = next(model.parameters(), image)
    return image.to(weight.device, weight.dtype)


def check_image(image: Tensor) -> None:
    """Raises ValueError unless ``image`` is one image, (1, 3, H, W)."""
    if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[0] != 1:
        shape = tuple(image.shape) if hasattr(image, 'shape') else type(image).__name__
        raise ValueError(f'one normalised image (1, 3, H, W) is needed, got {shape}; see normalize()')


@contextmanager
def inspecting(model: nn.Module):
    """Evaluation mode, and every block run once by its own code: compiled or recomputed ones would pass hooks by."""
    modes = {m: m.training for m in model.modules()}
    compiled = {m: vars(m).pop('forward') for m in modes if isinstance(m, BLOCKS) and 'forward' in vars(m)}
    recomputed = {m: m.with_cp for m in modes if isinstance(m, OverLoCK)}
    model.eval()
    for backbone in recomputed:
        backbone.with_cp = {}
    try:
        yield
    finally:
        for backbone, stages in recomputed.items():
            backbone.with_cp = stages
        for block, forward in compiled.items():
            block.forward = forward
        for module, training in modes.items():
            module.training = training


@contextmanager
def outputs_of(modules: Dict[str, nn.Module]):
    """Keeps what modules return.

    Args:
        modules (dict[str, nn.Module]): By the names that the outputs are to have.

    Yields:
        dict[str, Tensor | tuple]: Filled as the modules run.
    """
    outputs = {}
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: outputs.__setitem__(name, output))
        for name, module in modules.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def to_picture(values: Tensor, size, mode: str = 'bilinear') -> np.ndarray:
    """A map (h, w) at the size (H, W) of the picture, float32."""
    corners = False if mode == 'bilinear' else None
    return (
        F.interpolate(values.detach().float()[None, None], tuple(size), mode=mode, align_corners=corners)[0, 0]
        .cpu()
        .numpy()
    )


def resized(values: Tensor, size) -> np.ndarray:
    """A map as a heat map over a picture.

    Args:
        values (Tensor): (h, w).
        size (tuple[int, int]): Height and width of the picture.

    Returns:
        np.ndarray: (H, W) float32, resized bilinearly; 0 is the least and 1 the greatest value.
    """
    return unit_range(to_picture(values, size))


def unit_range(values: np.ndarray) -> np.ndarray:
    """Least value to 0, greatest to 1; zeros where all are the same."""
    values = values - values.min()
    greatest = values.max()
    return values / greatest if greatest > 0 else values
