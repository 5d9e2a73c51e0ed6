"""Depthwise 3x3 convolution in Triton on channels-last maps; the kernels are in ``small_kernels``."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sums import add_up
from ..triton_common import (
    cdiv,
    compute_input,
    definition_gradients,
    differentiated_again,
    gradients_wanted,
    on,
    power_of_two,
    refuse_tensors,
    vector_of,
)
from .reference import conv3x3_reference


@dataclass(frozen=True)
class Tuning:
    """Launch parameters, measured on an H200 with tools/analysis/benchmark_feed_forward.py.

    Args:
        columns, grad_columns (tuple[int, ...]): Columns that a thread may own, forward and backward;
            taken is what wastes least. Maps of pictures of 224 x 224 are multiples of seven.
        tile (int): Groups of columns times channels of a program: with ``warps``, two channels a thread.
        warps (int): Warps a program.
        programs, grad_programs (int): Programs to aim at, by cutting the rows into strips of seven and more.
        few (int): Programs to aim at by strips of two rows and more; where those of seven would be fewer, ...
        few_columns (int): ... this is how many columns a thread owns.
    """

    columns: Tuple[int, ...] = (7, 4)
    grad_columns: Tuple[int, ...] = (4,)
    tile: int = 256
    warps: int = 4
    programs: int = 2112
    grad_programs: int = 1056
    few: int = 112
    few_columns: int = 2


TUNING = Tuning()


def refuse(x: Tensor, weight: Tensor, bias: Optional[Tensor], residual: bool, gelu: bool) -> Optional[str]:
    """Why the kernels cannot serve the call, or None."""
    tensors = dict(x=x, weight=weight)
    if bias is not None:
        tensors['bias'] = bias
    return refuse_tensors(tensors) or ('a tensor is empty' if 0 in x.shape else None)


def conv3x3_triton(x: Tensor, weight: Tensor, bias: Optional[Tensor], residual: bool, gelu: bool) -> Tensor:
    """As the reference, but the result is channels-last whatever the memory format of ``x``.

    Computes in the type of ``x``, or in that of autocast, with sums in float32.
    ``weight`` and ``bias`` are not rounded.
    """
    x = compute_input(x, torch.channels_last)
    if gelu and not gradients_wanted(x, weight, bias):
        return torch.ops.mmoverlock.depthwise_conv3x3_gelu(x, weight, bias, residual)
    out = torch.ops.mmoverlock.depthwise_conv3x3(x, weight, bias, residual)
    return F.gelu(out) if gelu else out


def _beside(shape, columns: int, tuning: Tuning) -> Tuple[int, int, int, int]:
    """Of a program, groups of columns and channels; programs beside each other in a row; and those of all channels."""
    batch, channels, _, width = shape
    groups = cdiv(width, columns)
    across = min(power_of_two(channels), max(64, tuning.tile // power_of_two(groups)))  # 64: a line of the cache
    together = tuning.tile // across
    lanes = cdiv(groups, together)
    return together, across, lanes, batch * lanes * cdiv(channels, across)


@lru_cache(maxsize=1024)
def plan(shape, own: Tuple[int, ...], programs: int, tuning: Tuning) -> Tuple[Tuple[int, ...], dict, int, int]:
    """Sizes and constants of the kernels, programs to launch, and shares an image is summed in.

    Args:
        shape (tuple[int, int, int, int]): B, C, H, W.
        own (tuple[int, ...]): Columns that a thread may own.
        programs (int): To aim at.
        tuning (Tuning): Tile and warps.
    """
    batch, channels, height, width = shape
    vector = vector_of(channels)
    columns = min(own, key=lambda n: -(-width // n) * n)
    together, across, lanes, beside = _beside(shape, columns, tuning)
    strips = max(1, min(cdiv(programs, beside), height // 7))
    if beside * strips < tuning.few:
        columns = tuning.few_columns
        together, across, lanes, beside = _beside(shape, columns, tuning)
        strips = max(strips, min(cdiv(tuning.few, beside), height // 2))
    rows = cdiv(height, strips)
    strips = cdiv(height, rows)
    sizes = (channels // vector, height, width, rows, strips, lanes)
    constants = dict(V=vector, N=columns, G=together, BC=across, WHOLE=width % columns == 0, num_warps=tuning.warps)
    return sizes, constants, strips * beside, strips * lanes


def launch_forward(x: Tensor, weight: Tensor, bias: Optional[Tensor], residual: bool, squares=False, gelu=False):
    """The convolution of a channels-last map, and the shares [B, PARTS, C] of the sums of its squares, or None."""
    from .small_kernels import depthwise3_forward_kernel

    sizes, constants, programs, parts = plan(x.shape, TUNING.columns, TUNING.programs, TUNING)
    weight, out = weight.contiguous(), torch.empty_like(x)
    shares = x.new_empty((x.shape[0], parts, x.shape[1]), dtype=torch.float32) if squares else None
    with on(x.device):
        depthwise3_forward_kernel[(programs,)](
            x, weight, weight if bias is None else bias, out, shares if squares else x, *sizes, **constants,
            RESIDUAL=residual, BIAS=bias is not None, SQUARES=squares, GELU=gelu,
        )  # fmt: skip
    return out, shares


def launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: bool,
    grn: Optional[Tuple[Tensor, Tensor, Tensor]] = None,
    gelu: bool = False,
) -> Tuple[Tensor, Tensor]:
    """Gradient of the map, and shares (N, 11, C) in float32 of those of the nine taps and the bias and of its sum.

    Args:
        grad, x (Tensor): (B, C, H, W), channels-last.
        weight (Tensor): (C, 1, 3, 3).
        residual (bool): As in the forward pass.
        grn (tuple[Tensor, Tensor, Tensor], optional): The map y that was normalised, its scale and slope.
        gelu (bool): The convolution had been given GELU(x).
    """
    from .small_kernels import depthwise3_backward_kernel

    batch, channels = x.shape[:2]
    sizes, constants, programs, parts = plan(x.shape, TUNING.grad_columns, TUNING.grad_programs, TUNING)
    out = torch.empty_like(x)
    sums = x.new_empty((batch * parts, 11, channels), dtype=torch.float32)
    y, scale, slope = grn or (x, sums, sums)
    with on(x.device):
        depthwise3_backward_kernel[(programs,)](
            grad, x, weight.contiguous(), y, scale, slope, out, sums, *sizes, **constants,
            RESIDUAL=residual, GRN=grn is not None, GELU=gelu,
        )  # fmt: skip
    return out, sums


def add_up_taps(shares: Tensor) -> Tensor:
    """Sums of the shares that :func:`launch_backward` gives: of the weight, in its order, of the bias, of the map's."""
    return add_up(shares[None], 9)[0]


@torch.library.custom_op('mmoverlock::depthwise_conv3x3', mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Optional[Tensor], residual: bool) -> Tensor:
    """The convolution of a channels-last map."""
    return launch_forward(x.contiguous(memory_format=torch.channels_last), weight, bias, residual)[0]


@torch.library.custom_op('mmoverlock::depthwise_conv3x3_gelu', mutates_args=())
def _conv_gelu(x: Tensor, weight: Tensor, bias: Optional[Tensor], residual: bool) -> Tensor:
    """GELU of the convolution, without gradients."""
    return launch_forward(x.contiguous(memory_format=torch.channels_last), weight, bias, residual, gelu=True)[0]


@_conv_gelu.register_fake
@_conv.register_fake
def _(x, weight, bias, residual):
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.custom_op('mmoverlock::depthwise_conv3x3_backward', mutates_args=())
def _gradients(grad: Tensor, x: Tensor, weight: Tensor, residual: bool) -> Tuple[Tensor, Tensor]:
    """Gradient of the map, and :func:`add_up_taps`."""
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    dx, shares = launch_backward(grad, x, weight, residual)
    return dx, add_up_taps(shares)


@_gradients.register_fake
def _(grad, x, weight, residual):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, x.new_empty((11 * x.shape[1],), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, residual = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.residual = residual


def _backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    x, weight, bias = ctx.saved_tensors
    if differentiated_again():
        given = x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return (*definition_gradients(conv3x3_reference(*given, ctx.residual), (x, weight, bias), grad), None)
    # The layout is chosen here, where torch.compile can make it part of what computes the gradient.
    grad = grad.contiguous(memory_format=torch.channels_last)
    dx, taps = torch.ops.mmoverlock.depthwise_conv3x3_backward(grad, x, weight, ctx.residual)
    dweight, dbias, _ = taps.split((weight.numel(), len(weight), len(weight)))
    dweight = dweight.to(weight.dtype).view(weight.shape)
    return dx, dweight, None if bias is None else dbias.to(bias.dtype), None


_conv.register_autograd(_backward, setup_context=_save)
