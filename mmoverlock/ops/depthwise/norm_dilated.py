"""Batch-normalised dilated 3x3 branches of a large kernel on large maps, channels-last, all in one launch a pass.

The kernels and what the names mean are in ``norm_dilated_kernels``. What the other branches need is in ``norm``. Maps
of these branches are not kept for the backward pass, which makes them anew: nine taps cost no more than a copy.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..sums import add_up
from ..triton_common import cdiv, on, power_of_two, vector_of

_BRANCHES = 4  # at most


@dataclass(frozen=True)
class Tuning:
    """Launch parameters, measured with tools/analysis/benchmark_depthwise.py.

    Args:
        columns (int): Columns that a thread owns.
        tile (int): Groups of columns times channels of a program: with ``warps``, two channels a thread.
        warps (int): Warps a program.
        programs (int): Programs to aim at, by sharing the phases out and, if that is too few, cutting them.
    """

    columns: int = 4
    tile: int = 256
    warps: int = 4
    programs: int = 1056


TUNING = Tuning()


def count(sizes: Sequence[int]) -> int:
    """How many of the last branches these kernels are for; none if that would be one only."""
    found = 0
    while found < min(len(sizes) - 1, _BRANCHES) and sizes[-1 - found] == 3:
        found += 1
    return found if found > 1 else 0


@lru_cache(maxsize=1024)
def plan(shape, dilations: Tuple[int, ...], tuning: Tuning) -> Tuple[Tuple[int, ...], dict, int, int]:
    """Sizes and constants of the kernels that walk, programs to launch, and how many have the same channels."""
    batch, channels, height, width = shape
    branches, columns = len(dilations), tuning.columns
    vector = vector_of(channels)
    groups = max(d * cdiv(cdiv(width, d), columns) for d in dilations)
    across = min(power_of_two(channels), max(64, tuning.tile // power_of_two(groups)))  # 64: a line of the cache
    beside = tuning.tile // across
    lanes, blocks = cdiv(groups, beside), cdiv(channels, across)
    # Strips of whole phases, and programs with several of them, as long as there are enough programs.
    least, longest = min(dilations), cdiv(height, min(dilations))
    wanted = cdiv(tuning.programs, branches * batch * lanes * blocks)
    rows = cdiv(longest, max(1, min(cdiv(wanted, least), longest // 7)))
    shares = min(wanted, least * cdiv(longest, rows))
    steps = (*dilations, *dilations[:1] * (_BRANCHES - branches))
    sizes = (channels // vector, height, width, rows, shares, lanes, *steps)
    constants = dict(V=vector, T=branches, N=columns, G=beside, BC=across, num_warps=tuning.warps)
    parts = batch * shares * lanes
    return sizes, constants, branches * blocks * parts, parts


def maps(
    x: Tensor,
    packed: Tensor,
    dilations: Sequence[int],
    grad: Optional[Tensor] = None,
    mean: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """The branches' maps, (T, B, H, W, C), two sums over each, (2, T, C), and their first values, (T, C).

    The sums are of what exceeds the first values and of its squares; or with the output's gradient and the maps' means
    given, of the gradient and of it times what exceeds the mean (and there are no first values).

    Args:
        x, grad (Tensor): (B, C, H, W), channels-last.
        packed (Tensor): The branches' weights, one after another.
        dilations (Sequence[int]): Of the T branches.
        mean (Tensor): (T, C).
    """
    from .norm_dilated_kernels import dilated_forward_kernel

    batch, channels, height, width = x.shape
    branches = len(dilations)
    sizes, constants, programs, parts = plan(x.shape, tuple(dilations), TUNING)
    y = x.new_empty((branches, batch, height, width, channels))
    shares = x.new_empty((1, parts, 2, branches, channels), dtype=torch.float32)
    first = x.new_empty((branches, channels), dtype=torch.float32) if grad is None else None
    given = (x, packed, shares, first) if grad is None else (grad, packed, mean, shares)
    with on(x.device):
        dilated_forward_kernel[(programs,)](
            x, *given, y, shares, *sizes, y.stride(0) // constants['V'], **constants, GRAD=grad is not None
        )
    return y, add_up(shares)[0], first


def gradients(
    grad: Tensor, x: Tensor, y: Tensor, packed: Tensor, slopes: Tensor, dilations: Sequence[int]
) -> Tuple[Tensor, Tensor]:
    """What the branches add to the map's gradient, (T, B, H, W, C), and the weights' gradients one after another.

    The latter are float32.

    Args:
        grad, x (Tensor): (B, C, H, W), channels-last.
        y (Tensor): (T, B, H, W, C), the branches' maps.
        packed (Tensor): The branches' weights, one after another.
        slopes (Tensor): (3, N, C): what the output's gradient, a branch's map and one are multiplied by.
        dilations (Sequence[int]): Of the T branches.
    """
    from .norm_dilated_kernels import dilated_backward_kernel

    branches, channels = len(dilations), x.shape[1]
    sizes, constants, programs, parts = plan(x.shape, tuple(dilations), TUNING)
    out = torch.empty_like(y)
    shares = x.new_empty((1, parts, branches, 9, channels), dtype=torch.float32)
    with on(x.device):
        dilated_backward_kernel[(programs,)](
            grad, x, y, packed, slopes, out, shares, *sizes, y.stride(0) // constants['V'], slopes.shape[1], **constants
        )
    return out, add_up(shares.view(1, parts, 9 * branches, channels), 9)[0]
