"""1x1 convolutions."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import records_graph


def conv1x1(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """``F.conv2d`` with a 1x1 kernel, stride 1; of a channels-last map sometimes as the matrix product that it is.

    On a CPU: with one thread and fewer than 16 images PyTorch's convolution brings such a map to the other format and
    back; with more threads its gradients take up to twice the product's time. On a GPU: of some channels of such a map
    the convolution makes a copy.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (E, C, 1, 1).
        bias (Tensor, optional): (E,). Defaults to None.

    Returns:
        Tensor: (B, E, H, W).
    """
    if x.stride(1) != 1 or not (_product_on_cpu(x) or _product_on_gpu(x)):
        return F.conv2d(x, weight, bias)
    pixels = x.permute(0, 2, 3, 1)
    # One row a pixel: of more dimensions PyTorch may add the bias after the product, and not in it.
    rows = F.linear(pixels.flatten(0, 2), weight.flatten(1), bias)
    return rows.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)


def _product_on_cpu(x: Tensor) -> bool:
    return x.device.type == 'cpu' and not records_graph()


def _product_on_gpu(x: Tensor) -> bool:
    whole = x.is_contiguous(memory_format=torch.channels_last)
    return x.device.type == 'cuda' and not whole and (torch.compiler.is_dynamo_compiling() or not records_graph())
