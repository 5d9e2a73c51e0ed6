"""The feed-forward half of a block in plain PyTorch: the definition that the fast form is tested against."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..affine import affine
from ..depthwise.reference import conv3x3_reference
from ..pointwise import conv1x1


def grn(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Global response normalisation of a (B, C, H, W) map; gamma and beta (1, C, 1, 1).

    Source: `ConvNeXt V2 <https://arxiv.org/abs/2301.00808>`_. The squares are summed in float32: over a large map they
    overflow half precision.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == 'cpu':
        # On CPU five to ten times as fast as vector_norm. The clamp stands for its zero gradient at zero.
        squares = x.to(dtype).square().sum((2, 3), keepdim=True)
        response = squares.clamp_min(torch.finfo(dtype).tiny).sqrt()
    else:
        response = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=dtype)
    response = response / (response.mean(dim=1, keepdim=True) + eps)
    return affine(x, gamma * response + 1, beta)


def feed_forward_reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    residual: bool,
    shortcut: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    shift: Optional[Tensor] = None,
) -> Tensor:
    """Arguments as :func:`mmoverlock.ops.feed_forward`."""
    h = F.gelu(conv1x1(x, weight1, bias1))
    y = conv3x3_reference(h, dw_weight, dw_bias, residual)
    return add_shortcut(conv1x1(grn(y, gamma, beta, eps), weight2, bias2), shortcut, scale, shift)


def add_shortcut(x: Tensor, shortcut: Optional[Tensor], scale: Optional[Tensor], shift: Optional[Tensor]) -> Tensor:
    """``x + shortcut``, or ``x + scale * shortcut + shift``, or ``x`` where there is none."""
    if shortcut is None:
        return x
    if scale is None:
        return x + shortcut
    return x + affine(shortcut, scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1))
