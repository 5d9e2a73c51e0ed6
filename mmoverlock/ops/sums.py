"""Sums over what the programs of a kernel have each a share of."""

import torch
from torch import Tensor

from .triton_common import on, power_of_two

_ROWS = 1024  # shares that a program takes at once
_TILE = 8192  # and numbers


def add_up(shares: Tensor) -> Tensor:
    """(B, N, ...) in float32 to (B, ...), the sums over N, always in the same order.

    In place of ``torch.sum``, which zeroes counters before a sum that it spreads over programs: in a CUDA graph what
    comes after such a write waits for ten microseconds, longer than the sum takes.
    """
    from .sums_kernels import sum_shares_kernel

    shares = shares.contiguous()
    batch, parts, *rest = shares.shape
    sums = shares.new_empty((batch, *rest), dtype=torch.float32)
    columns = sums.numel() // batch
    vector = next(v for v in (8, 4, 2, 1) if columns % v == 0)
    rows = min(_ROWS, power_of_two(parts))
    across = max(8, min(256, _TILE // rows))
    with on(shares.device):
        sum_shares_kernel[(batch * -(-columns // across),)](
            shares, sums, parts, columns // vector, V=vector, BP=rows, BE=across, num_warps=8 if rows > 128 else 4
        )
    return sums
