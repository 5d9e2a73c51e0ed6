"""Depthwise convolution in plain PyTorch: the definition that every fast form is tested against."""

from typing import Optional

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d_reference(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Tensor:
    """PyTorch's own convolution with one group a channel; arguments as :func:`mmoverlock.ops.depthwise_conv2d`."""
    padding = dilation * (weight.shape[-1] - 1) // 2
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])


def conv3x3_reference(x: Tensor, weight: Tensor, bias: Optional[Tensor], residual: bool, gelu=False) -> Tensor:
    """Arguments as :func:`mmoverlock.ops.depthwise_conv3x3`."""
    out = F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    out = x + out if residual else out
    return F.gelu(out) if gelu else out
