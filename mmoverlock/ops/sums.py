"""Sums over what the programs of a kernel have each a share of."""

import math

import torch
from torch import Tensor

from .triton_common import on, power_of_two, vector_of

_ROWS = 1024  # shares that a program takes at once
_TILE = 8192  # and numbers


def add_up(shares: Tensor, turn: int = 1) -> Tensor:
    """(B, N, ...) in float32 to (B, ...), the sums over N, always in the same order.

    With ``turn`` the shares are (B, N, R, C), and the sums (B, R * C): every whole group of ``turn`` rows lies there
    column by column, as the gradients of a kernel's taps do in a weight, and rows that are left over follow.

    In place of ``torch.sum``, which zeroes counters before a sum that it spreads over programs: in a CUDA graph what
    comes after such a write waits for ten microseconds, longer than the sum takes.
    """
    from .sums_kernels import sum_shares_kernel

    shares = shares.contiguous()
    batch, parts, *rest = shares.shape
    columns = math.prod(rest)
    sums = shares.new_empty((batch, *rest) if turn == 1 else (batch, columns), dtype=torch.float32)
    whole, width = (0, 1) if turn == 1 else (rest[0] // turn * turn, rest[1])
    vector = vector_of(columns)
    rows = min(_ROWS, power_of_two(parts))
    across = max(8, min(256, _TILE // rows))
    with on(shares.device):
        sum_shares_kernel[(batch * -(-columns // across),)](
            shares, sums, parts, columns // vector, whole * width, width, V=vector, BP=rows, BE=across, TURN=turn,
            num_warps=8 if rows > 128 else 4,
        )  # fmt: skip
    return sums
