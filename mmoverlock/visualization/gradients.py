"""Views that need a gradient: Grad-CAM and the effective receptive field."""

from typing import Dict, Iterable, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ..models.overlock import STAGES
from .inputs import check_image, find_backbone, inspecting, like_weights, outputs_of, to_picture


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """A layer by its name in the backbone: ``focus4``, ``stage4`` (the overview), ``stage3.1``, ``stem`` ...

    Raises:
        ValueError: There is no such layer.
    """
    backbone = find_backbone(model)
    try:
        layer = backbone.get_submodule(name)
    except AttributeError as error:
        stages = ', '.join(child for child, _ in backbone.named_children())
        raise ValueError(f'no layer {name!r} in the backbone; there are {stages}, and what is inside them') from error
    # The network calls the blocks of a stage one by one, never the list.
    return layer[-1] if name in STAGES else layer


def _tensors(output) -> Tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _logits(model: nn.Module, image: Tensor) -> Tensor:
    """Scores before the softmax, (1, classes), of a classifier of mmpretrain, timm or plain PyTorch."""
    mm = hasattr(model, 'data_preprocessor')
    logits = None if mm and not hasattr(model, 'head') else model(image, mode='tensor') if mm else model(image)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(f'{type(model).__name__} is no classifier, which has scores of the shape (batch, classes)')
    return logits


@torch.no_grad()
def class_scores(model: nn.Module, image: Tensor) -> np.ndarray:
    """What a classifier says of a picture.

    Args:
        model (nn.Module): A classifier of mmpretrain, timm or plain PyTorch.
        image (Tensor): One normalised image, (1, 3, H, W).

    Returns:
        np.ndarray: (classes,) float32, the probabilities that its softmax gives.

    Raises:
        ValueError: The model is no classifier.
    """
    check_image(image)
    with inspecting(model):
        return _logits(model, like_weights(model, image))[0].float().softmax(0).cpu().numpy()


def grad_cam(model: nn.Module, image: Tensor, target: Optional[int] = None, layer: str = 'focus4') -> np.ndarray:
    """Grad-CAM: where a layer speaks for a class.

    Every channel of the layer's map is weighted with its gradient's mean over the map; of the sum, what is positive.
    Source: `Grad-CAM <https://arxiv.org/abs/1610.02391>`_, equations 1 and 2.

    Args:
        model (nn.Module): A classifier with an OverLoCK inside.
        image (Tensor): One normalised image, (1, 3, H, W).
        target (int, optional): The class; None for the one with the highest score. Defaults to None.
        layer (str): Name in the backbone. ``'stage4'`` is Overview-Net's map. Defaults to ``'focus4'``, Focus-Net's
            last map, which the classifier reads.

    Returns:
        np.ndarray: (H, W) float32, 0 to 1 (the greatest value in this picture).

    Raises:
        ValueError: The model is no classifier, or there is no such class or layer.
    """
    check_image(image)
    module = layer_of(model, layer)
    image = like_weights(model, image).detach().requires_grad_()  # or a frozen model would have no gradient
    with inspecting(model), outputs_of(dict(layer=module)) as outputs, torch.enable_grad():
        scores = _logits(model, image)[0]
        target = int(scores.argmax()) if target is None else target
        if not 0 <= target < len(scores):
            raise ValueError(f'class {target} is not among the {len(scores)} of this classifier')
        maps = _tensors(outputs['layer'])
        grads = torch.autograd.grad(scores[target], maps)
    values = sum((grad.float().mean((2, 3), keepdim=True) * x.float()).sum(1)[0] for grad, x in zip(grads, maps))
    values = to_picture(values.relu(), image.shape[2:])
    return values / values.max() if values.max() > 0 else values


def effective_receptive_field(
    model: nn.Module, images: Iterable[Tensor], layer: Optional[str] = 'focus4'
) -> np.ndarray:
    """How much each pixel of the input adds to the centre of a layer's map.

    The gradient of the positive values at the map's centre with respect to the image, of which the positive part is
    summed over the colours and averaged over pictures. Sources: `Luo et al. <https://arxiv.org/abs/1701.04128>`_; in
    this form `RepLKNet <https://arxiv.org/abs/2203.06717>`_, whose figure OverLoCK and others have.

    Args:
        model (nn.Module): With an OverLoCK inside; any network if ``layer`` is None.
        images (Iterable[Tensor]): Normalised images (1, 3, H, W) of one size.
        layer (str, optional): Name in the backbone; None for the model's own output, a map (of
            several, the last). Defaults to ``'focus4'``.

    Returns:
        np.ndarray: (H, W) float64, not scaled.

    Raises:
        ValueError: There is no picture, their sizes differ, or there is no such layer.
    """
    root = model if layer is None else find_backbone(model)
    modules: Dict[str, nn.Module] = {} if layer is None else dict(layer=layer_of(model, layer))
    total, number = None, 0
    for image in images:
        check_image(image)
        if total is not None and total.shape != image.shape[2:]:
            raise ValueError(f'images of one size are needed, got {tuple(total.shape)} and {tuple(image.shape[2:])}')
        image = like_weights(root, image).detach().requires_grad_()
        with inspecting(root), outputs_of(modules) as outputs, torch.enable_grad():
            out = root(image)
            maps = _tensors(outputs['layer']) if modules else _tensors(out)[-1:]
            centre = sum(m[:, :, m.shape[2] // 2, m.shape[3] // 2].relu().sum() for m in maps)
            (grad,) = torch.autograd.grad(centre, image)
        scores = grad[0].double().relu().sum(0)
        total = scores if total is None else total + scores
        number += 1
    if total is None:
        raise ValueError('no picture to take the effective receptive field of')
    return (total / number).cpu().numpy()


def contribution_area(
    erf: np.ndarray, thresholds: Sequence[float] = (0.2, 0.3, 0.5, 0.99), log: bool = False
) -> Dict[float, float]:
    """Share of the picture that holds a share of the contribution: the smallest centred box of the picture's shape.

    Source: the high-contribution area ratio of `RepLKNet <https://arxiv.org/abs/2203.06717>`_ (square pictures there).

    Args:
        erf (np.ndarray): (H, W), not negative; see :func:`effective_receptive_field`.
        thresholds (Sequence[float]): Shares of the contribution. Defaults to 20, 30, 50 and 99 per cent.
        log (bool): Take log10(1 + contribution), as RepLKNet does. It changes the figure only where contributions are
            not small against 1. Defaults to False.

    Returns:
        dict[float, float]: Area by threshold, both from 0 to 1.

    Raises:
        ValueError: Nothing contributes.
    """
    erf = np.log10(1 + erf) if log else erf
    height, width = erf.shape
    # A pixel belongs to the box from the half side r on, in units where the picture's half side is 1.
    rows = np.abs(np.arange(height) - height // 2) / height
    cols = np.abs(np.arange(width) - width // 2) / width
    reach = np.maximum(rows[:, None], cols[None, :]).ravel()
    order = np.argsort(reach, kind='stable')
    reach, held = reach[order], np.cumsum(erf.ravel()[order])
    if not held[-1] > 0:
        raise ValueError('nothing in the picture contributes: all outputs at the centre are negative, or do not grow')
    areas = {}
    for threshold in thresholds:
        r = reach[np.searchsorted(held, threshold * held[-1])]
        areas[threshold] = float((reach <= r).mean())
    return areas
