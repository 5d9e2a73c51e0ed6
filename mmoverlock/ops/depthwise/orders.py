"""From one order of memory to the other: channels-last maps, which the network has, and planes, one channel each.

A convolution with a large kernel multiplies a plane's rows and columns with matrices, which wants planes; what comes
before and after it wants channels-last maps. PyTorch's own copy takes five times as long as these kernels.
"""

from typing import Optional

import torch
from torch import Tensor

from ..triton_common import cdiv, on, power_of_two, vector_of

_PIXELS, _CHANNELS, _WARPS = 64, 32, 4  # of a tile, and of a program


def _tiles(x: Tensor):
    """Programs for all tiles; sizes that ``orders_kernels`` says, C, HWV, TILES and FAR; constants."""
    (batch, channels), pixels = x.shape[:2], x.shape[2] * x.shape[3]
    row, column = (vector_of(n) for n in (channels, pixels))
    across = min(_CHANNELS, power_of_two(channels))
    tiles = cdiv(pixels, _PIXELS)
    sizes = (channels // row, pixels // column, tiles, x.numel() // (row * column))
    constants = dict(V=row, VP=column, BP=_PIXELS, BC=across, num_warps=_WARPS)
    return batch * tiles * cdiv(channels, across), sizes, constants


def planes(x: Tensor, other: Optional[Tensor] = None) -> Tensor:
    """One or two channels-last maps (B, C, H, W), of one type, as planes (1 or 2, B, C, H, W)."""
    from .orders_kernels import planes_kernel

    programs, sizes, constants = _tiles(x)
    out = x.new_empty((1 if other is None else 2, *x.shape))
    with on(x.device):
        planes_kernel[(programs * len(out),)](x, x if other is None else other, out, *sizes, len(out), **constants)
    return out


def add(
    planes: Tensor, lines: Optional[Tensor] = None, factor: Optional[Tensor] = None, shift: Optional[Tensor] = None
) -> Tensor:
    """The sum of maps in both orders, (B, C, H, W), channels-last.

    Args:
        planes (Tensor): (M, B, C, H, W), contiguous.
        lines (Tensor, optional): (T, B, H, W, C), contiguous.
        factor (Tensor, optional): (M + T, C), what the planes and then the lines are multiplied by.
        shift (Tensor, optional): (C,), what all together are shifted by.
    """
    from .orders_kernels import sum_kernel

    out = torch.empty_like(planes[0], memory_format=torch.channels_last)
    programs, sizes, constants = _tiles(out)
    scaled, given = factor is not None, 0 if lines is None else len(lines)
    with on(out.device):
        sum_kernel[(programs,)](
            planes, lines if given else planes, factor if scaled else planes, shift if scaled else planes, out, *sizes,
            **constants, M=len(planes), T=given, SCALED=scaled,
        )  # fmt: skip
    return out
