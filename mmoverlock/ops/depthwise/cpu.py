"""Depthwise convolution on a CPU, around what PyTorch's library there is slow at.

Dilated kernels take it ten times as long as dense ones of as many taps, and gradients of large kernels up to fifteen
times as long as the convolution. So a dilated 3 x 3 kernel is summed tap by tap, a larger one made dense, on the maps
of every d-th row and column, and gradients of large kernels are matrix products. In float32, OverLoCK-XT, 96 x 96,
batch 8.
"""

from functools import lru_cache
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..triton_common import definition_gradients, differentiated_again
from .reference import depthwise_conv2d_reference

_TINY = 64  # pixels of a map whose matrix of pixel products is worth making
_FEW = 5  # taps along a side from which on it is
_MANY = 15  # taps along a side from which on the library's gradients are slow on any map


def refuse(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Optional[str]:
    """Why this form cannot serve the call, or None."""
    if x.device.type != 'cpu':
        return f'is for CPU tensors, these are on {x.device.type}'
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return 'a graph is being recorded'
    return 'a tensor is empty' if 0 in x.shape else None


def depthwise_conv2d_cpu(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Tensor:
    """As the reference, up to the order of sums."""
    if torch.is_autocast_enabled('cpu'):
        x = x.to(torch.get_autocast_dtype('cpu'))
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    batch, _, height, width = x.shape
    if dilation > 1 and weight.shape[-1] == 3:
        out = _Shifts.apply(x, weight, dilation)
        return out if bias is None else out + bias.view(-1, 1, 1)
    if dilation == 1:
        return _conv(x, weight, bias)
    out = _together(_conv(_apart(x, dilation), weight, bias), batch, dilation)[..., :height, :width]
    last = x.stride(1) == 1  # also of some channels of a map in that format
    return out.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _apart(x: Tensor, d: int) -> Tensor:
    """(B, C, H, W) as d * d maps of every d-th row and column, (B * d * d, C, ceil(H / d), ceil(W / d))."""
    x = F.pad(x, (0, -x.shape[3] % d, 0, -x.shape[2] % d)).permute(0, 2, 3, 1)
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // d, d, width // d, d, channels).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch * d * d, height // d, width // d, channels).permute(0, 3, 1, 2)


def _together(x: Tensor, batch: int, d: int) -> Tensor:
    """The way back of :func:`_apart`."""
    _, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(batch, d, d, height, width, channels).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(batch, height * d, width * d, channels).permute(0, 3, 1, 2)


def _conv(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    size, pixels = weight.shape[-1], x.shape[2] * x.shape[3]
    slow = size >= _MANY or (size >= _FEW and pixels <= _TINY)
    if slow and torch.is_grad_enabled() and weight.requires_grad:
        return _LargeConv.apply(x, weight, bias)
    return depthwise_conv2d_reference(x, weight, bias, 1)


class _Shifts(torch.autograd.Function):
    """A dilated 3 x 3 convolution as the sum of its taps: one pass over the map each."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _shifted(x, weight, dilation)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        if differentiated_again():
            out = depthwise_conv2d_reference(x, weight, None, ctx.dilation)
            return *definition_gradients(out, (x, weight), grad), None
        dx = _shifted(grad, weight.flip(2, 3), ctx.dilation) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        wide = torch.promote_types(x.dtype, torch.float32)
        x, grad, dweight = x.to(wide), grad.to(wide), torch.zeros(weight.shape, dtype=wide)
        for tap, there, here in _shifts(x.shape[2], x.shape[3], ctx.dilation):
            dweight[:, 0, tap[0], tap[1]] = (x[there] * grad[here]).sum((0, 2, 3))
        return dx, dweight.to(weight.dtype), None


def _shifted(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """The convolution, summed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    taps = weight.to(wide.dtype).permute(2, 3, 1, 0).unsqueeze(-1).unsqueeze(-1).contiguous()
    out = wide * taps[1, 1]
    for tap, there, here in _shifts(x.shape[2], x.shape[3], dilation):
        if tap != (1, 1):
            out[here].addcmul_(wide[there], taps[tap])
    return out.to(x.dtype)


def _shifts(height: int, width: int, dilation: int) -> Iterator[Tuple[Tuple[int, int], tuple, tuple]]:
    """The taps of a 3 x 3 kernel that touch the map: row and column, what they read, and where to."""

    def along(length: int) -> list:
        pairs = [(tap, (tap - 1) * dilation) for tap in range(3)]
        return [
            (tap, slice(max(d, 0), length + min(d, 0)), slice(max(-d, 0), length - max(d, 0)))
            for tap, d in pairs
            if abs(d) < length
        ]

    for row, from_rows, to_rows in along(height):
        for column, from_columns, to_columns in along(width):
            yield (row, column), (..., from_rows, from_columns), (..., to_rows, to_columns)


class _LargeConv(torch.autograd.Function):
    """A dense convolution, whose weight's gradient is a matrix product."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return depthwise_conv2d_reference(x, weight, bias, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight, bias = ctx.saved_tensors
        if differentiated_again():
            return tuple(
                definition_gradients(depthwise_conv2d_reference(*ctx.saved_tensors, 1), (x, weight, bias), grad)
            )
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = depthwise_conv2d_reference(grad, weight.flip(2, 3), None, 1)
        tiny = x.shape[2] * x.shape[3] <= _TINY
        wide = torch.promote_types(x.dtype, torch.float32)
        dweight = (_by_pixels if tiny else _by_rows)(x.to(wide), grad.to(wide), weight.shape[-1]).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = grad.sum((0, 2, 3))
        return dx, dweight, dbias


def _by_rows(x: Tensor, grad: Tensor, size: int) -> Tensor:
    """(C, 1, size, size): row by row of the kernel, products of the map's columns with the gradient's, of which taps
    are the diagonals."""
    batch, channels, height, width = x.shape
    columns = width + size - 1
    padded = F.pad(x.transpose(0, 1), [size // 2] * 4).contiguous()
    grad = grad.transpose(0, 1).contiguous().view(channels, batch * height, width)  # bmm copies others one by one
    out = x.new_empty((channels, size, size))
    for row in range(size):
        part = padded[:, :, row : row + height].reshape(channels, batch * height, columns)
        product = torch.bmm(part.transpose(1, 2), grad)
        out[:, row] = product.as_strided((channels, size, width), (columns * width, width, width + 1)).sum(2)
    return out.unsqueeze(1)


def _by_pixels(x: Tensor, grad: Tensor, size: int) -> Tensor:
    """(C, 1, size, size): products of every pixel with every other's gradient, added up by their distance."""
    batch, channels, height, width = x.shape
    pixels = height * width
    x = x.permute(1, 2, 3, 0).contiguous().view(channels, pixels, batch)
    grad = grad.transpose(0, 1).contiguous().view(channels, batch, pixels)
    product = torch.bmm(x, grad).view(channels, -1)
    out = x.new_zeros((channels, size * size + 1))
    return out.index_add_(1, _taps(height, width, size), product)[:, :-1].reshape(channels, 1, size, size)


@lru_cache(maxsize=64)
def _taps(height: int, width: int, size: int) -> Tensor:
    """The tap by which a pixel is part of another's output, ``size * size`` if by none, for all pairs in a row."""

    def along(length: int) -> Tensor:
        place = torch.arange(length)
        return place[:, None] - place[None, :] + size // 2

    rows, columns = along(height)[:, None, :, None], along(width)[None, :, None, :]
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    return torch.where(inside, rows * size + columns, size * size).flatten()
