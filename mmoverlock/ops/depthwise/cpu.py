"""Depthwise convolution on a CPU, around what PyTorch's library there is slow at.

Dilated kernels take it ten to thirty times as long where it pads the map itself as where it is given a padded one, and
gradients of kernels of 5 x 5 and larger four to forty times as long as the convolution. So maps are padded beforehand,
and the gradient of a kernel is a convolution in its turn: of every channel of every sample, with its gradient as the
kernel. In float32, OverLoCK-XT, 96 x 96, batch 8.
"""

from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import refuse_but_on_cpu
from ..triton_common import definition_gradients, differentiated_again
from .reference import depthwise_conv2d_reference

_FEW = 5  # taps along a side from which on the library's gradients are slow


def refuse(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Optional[str]:
    """Why this form cannot serve the call, or None."""
    return refuse_but_on_cpu(x) or ('a tensor is empty' if 0 in x.shape else None)


def depthwise_conv2d_cpu(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Tensor:
    """As the reference, up to the order of sums."""
    if torch.is_autocast_enabled('cpu'):
        x = x.to(torch.get_autocast_dtype('cpu'))
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if dilation == 1 and weight.shape[-1] < _FEW:
        return depthwise_conv2d_reference(x, weight, bias, 1)
    return _Conv.apply(x, weight, bias, dilation)


class _Conv(torch.autograd.Function):
    """A convolution, whose gradients are convolutions too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.dilation = dilation
        return _conv(x, weight, bias, dilation)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight, bias = ctx.saved_tensors
        if differentiated_again():
            out = depthwise_conv2d_reference(x, weight, bias, ctx.dilation)
            return *definition_gradients(out, (x, weight, bias), grad), None
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _conv(grad, weight.flip(2, 3), None, ctx.dilation)
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(x.dtype, torch.float32)
            find = _weight_grad if weight.shape[-1] > 3 else _weight_grad_by_taps
            dweight = find(x.to(wide), grad.to(wide), weight.shape[-1], ctx.dilation).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = grad.sum((0, 2, 3))
        return dx, dweight, dbias, None


def _conv(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Tensor:
    """The library's convolution; of a dilated kernel without the taps that no pixel reaches, summed in float32."""
    if dilation == 1:
        return depthwise_conv2d_reference(x, weight, bias, 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    size = weight.shape[-1]
    rows, columns = (_reach(length, size, dilation) for length in x.shape[2:])
    weight = weight[:, :, size // 2 - rows : size // 2 + rows + 1, size // 2 - columns : size // 2 + columns + 1]
    padded = _pad(x.to(wide), rows * dilation, columns * dilation)
    bias = None if bias is None else bias.to(wide)
    return F.conv2d(padded, weight.to(wide), bias, dilation=dilation, groups=x.shape[1]).to(x.dtype)


def _reach(length: int, size: int, dilation: int) -> int:
    """Taps to either side of a kernel's centre that are within a map of this length."""
    return min(size // 2, (length - 1) // dilation)


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(x, (columns, columns, rows, rows))


def _weight_grad(x: Tensor, grad: Tensor, size: int, dilation: int) -> Tensor:
    """(C, 1, size, size): the padded maps convolved with their gradients, in steps of the dilation."""
    batch, channels, height, width = x.shape
    rows, columns = (_reach(length, size, dilation) for length in (height, width))
    padded = _pad(x.reshape(1, -1, height, width), rows * dilation, columns * dilation)
    kernels = grad.reshape(-1, 1, height, width)
    taps = F.conv2d(padded, kernels, stride=dilation, groups=batch * channels)
    taps = taps.view(batch, channels, 1, 2 * rows + 1, 2 * columns + 1).sum(0)
    return _pad(taps, size // 2 - rows, size // 2 - columns)


def _weight_grad_by_taps(x: Tensor, grad: Tensor, size: int, dilation: int) -> Tensor:
    """The same tap by tap, each on the pixels that it touches: as fast for nine of them, and much faster in float64."""
    out = x.new_zeros((x.shape[1], 1, size, size))
    for row, to_rows, from_rows in _overlaps(x.shape[2], size, dilation):
        for column, to_columns, from_columns in _overlaps(x.shape[3], size, dilation):
            products = x[:, :, from_rows, from_columns] * grad[:, :, to_rows, to_columns]
            out[:, 0, row, column] = products.sum((0, 2, 3))
    return out


def _overlaps(length: int, size: int, dilation: int) -> Iterator[Tuple[int, slice, slice]]:
    """Along an axis, the taps within the map: which, what of the map they add to, and what they read for it."""
    reach = _reach(length, size, dilation)
    for tap in range(-reach, reach + 1):
        d = tap * dilation
        yield size // 2 + tap, slice(max(-d, 0), length - max(d, 0)), slice(max(d, 0), length + min(d, 0))
