"""Batch-normalised parallel depthwise convolutions on small maps, without making the branches' maps.

How it is computed is said in ``norm_small_kernels``, where the names are explained, too.
"""

from functools import lru_cache
from typing import List, Sequence, Tuple

import torch
from torch import Tensor

from ..triton_common import HALF, on, power_of_two
from .triton import _launch_conv, _launch_weight_grad

_MOST = 16  # rows and columns of a map, and of the window: matrices over the pixels grow with the fourth power
_BRANCHES = 8
_IMAGES = 32  # at least: the matrices cost the same for any batch, the branches' maps do not
_MATRICES = 96 << 20  # bytes of such a matrix of all channels that are worked on together


def window(sizes: Sequence[int], dilations: Sequence[int]) -> int:
    """Side of the window that the taps of all branches lie in."""
    return max(d * (k - 1) + 1 for k, d in zip(sizes, dilations))


def takes(shape, dtype: torch.dtype, sizes: Sequence[int], dilations: Sequence[int]) -> bool:
    """Whether these kernels are for such a map and such branches."""
    small = max(*shape[2:], window(sizes, dilations)) <= _MOST and len(sizes) <= _BRANCHES
    return dtype in HALF and small and shape[0] >= _IMAGES


@lru_cache(maxsize=1024)
def plan(shape, sizes: Tuple[int, ...], dilations: Tuple[int, ...], eps: Tuple[float, ...]) -> dict:
    """Constants of the kernels and sizes that follow from those of the call."""
    batch, channels, height, width = shape
    pixels, side, branches = height * width, window(sizes, dilations), len(sizes)
    vector = next(v for v in (8, 4, 2, 1) if pixels % v == 0)
    # Pairs of taps are told by the distance of their columns as pairs of pixels are: BW is no less than KB.
    columns, taps = max(16, power_of_two(max(height, width, side))), max(16, power_of_two(side))
    line = max(64, power_of_two(pixels))
    images = min(64, max(16, power_of_two(batch)))
    count, kernels = dict(N=branches, NB=power_of_two(branches)), dict(SIZES=sizes, DILATIONS=dilations)
    tile = dict(BW=columns, KB=taps)
    return dict(
        side=side,
        columns=columns,
        taps=taps,
        line=line,
        vectors=pixels // vector,
        weights=sum(channels * k * k for k in sizes),
        together=max(1, min(channels, _MATRICES // (height * columns**3 * 4))),
        spread=dict(**count, **kernels, KB=taps),
        gram=dict(V=vector, BB=images, BG=64, BW=columns),
        windows=dict(**tile, num_warps=1),
        moments=dict(**tile, N=branches, BT=64),
        statistics=dict(**count, EPS=eps, KB=taps),
        slopes=dict(**count, **kernels, **tile, EPS=eps),
        pairs=dict(N=branches, KB=taps, BT=64),
        matrices=dict(**tile, LINE=line, num_warps=1),
        product=dict(V=vector, BM=images, BN=64, BK=64, LINE=line, num_stages=3),
    )


def _plan(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], eps: Sequence[float]) -> dict:
    return plan(x.shape, tuple(w.shape[-1] for w in weights), tuple(dilations), tuple(eps))


def _chunks(channels: int, together: int):
    return ((first, min(together, channels - first)) for first in range(0, channels, together))


def kept(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> List[Tensor]:
    """Room in float32 for what the backward pass needs: pack, dense, merged, moments, sums."""
    sizes, channels = [w.shape[-1] for w in weights], x.shape[1]
    branches, side = len(sizes), window(sizes, dilations)
    taps = max(16, power_of_two(side))
    shapes = (
        (channels * (sum(k * k for k in sizes) + 2 * branches),), (channels, branches, side, taps),
        (channels, 1, side, side), (channels, branches, side, taps), (channels, side, taps),
    )  # fmt: skip
    return [x.new_empty(shape, dtype=torch.float32) for shape in shapes]


def forward(x: Tensor, weights, dilations, gammas, betas, eps) -> List[Tensor]:
    """Output, mean and variance, and what the backward pass needs: see ``kept``."""
    from .norm_small_kernels import gram_kernel, moments_kernel, spread_kernel, statistics_kernel, window_sums_kernel

    batch, channels, height, width = x.shape
    p, branches = _plan(x, weights, dilations, eps), len(weights)
    side, taps, pixels, together = p['side'], p['taps'], height * width, p['together']
    mean, var = (x.new_empty((branches, channels), dtype=torch.float32) for _ in range(2))
    shift, out = x.new_empty((channels,), dtype=torch.float32), torch.empty_like(x)
    pack, dense, merged, moments, sums = found = kept(x, weights, dilations)
    torch.cat([t.reshape(-1) for t in (*weights, *gammas, *betas)], out=pack)
    gram = x.new_empty((together, height * p['columns'], p['columns'] ** 2), dtype=torch.float32)
    pixel_sums = x.new_empty((together, p['columns'] ** 2), dtype=torch.float32)
    windows = x.new_empty((together, side * taps, taps**2), dtype=torch.float32)
    blocks, parts = -(-(pixels + 1) // p['gram']['BG']), -(-side * taps // p['moments']['BT'])
    with on(x.device):
        spread_kernel[(channels,)](pack, dense, channels, side, **p['spread'])
        for first, count in _chunks(channels, together):
            gram_kernel[(count * blocks * blocks,)](
                x, gram, pixel_sums, batch, channels, first, height, width, p['vectors'], blocks, **p['gram']
            )
            window_sums_kernel[(count * 2 * min(side, height),)](gram, windows, height, width, side, **p['windows'])
            moments_kernel[(count * parts,)](
                pixel_sums, windows, dense, moments, sums, channels, first, height, width, side, **p['moments']
            )
        statistics_kernel[(channels,)](
            pack, dense, moments, sums, mean, var, merged, shift, channels, side, batch * pixels, p['weights'],
            **p['statistics'],
        )  # fmt: skip
    _launch_conv(x, merged, shift, 1, False, out)
    return [out, mean, var, *found]


def backward(
    grad: Tensor, x: Tensor, saved: Sequence[Tensor], mean: Tensor, var: Tensor, weights, dilations, eps,
    input_grad: bool,
) -> List[Tensor]:  # fmt: skip
    """Gradients of all weights one after another; of gammas and betas, (2, n, C); of the map if wanted."""
    from .norm_small_kernels import input_grad_kernel, matrices_kernel, pairs_kernel, slopes_kernel

    pack, dense, merged, moments, sums = saved
    batch, channels, height, width = x.shape
    p, branches = _plan(x, weights, dilations, eps), len(weights)
    side, taps, pixels, together = p['side'], p['taps'], height * width, p['together']
    total = grad.sum((0, 2, 3), dtype=torch.float32)
    cross = _launch_weight_grad(grad, x, side, 1)
    dweights = x.new_empty((p['weights'],), dtype=torch.float32)
    dnorms = x.new_empty((2, branches, channels), dtype=torch.float32)
    slopes, scale = torch.empty_like(mean), torch.empty_like(total)
    rest = x.new_empty((channels, pixels), dtype=torch.float32)
    with on(x.device):
        slopes_kernel[(channels,)](
            cross, total, sums, moments, pack, dense, mean, var, slopes, scale, rest, dweights, dnorms[0], dnorms[1],
            channels, height, width, side, batch * pixels, p['weights'], **p['slopes'],
        )  # fmt: skip
        if not input_grad:
            return [dweights, dnorms]
        dx = torch.empty_like(x)
        pairs = x.new_empty((together, side * taps, taps**2), dtype=torch.float16)
        own, direct = x.new_empty((2, together, pixels, p['line'])).unbind(0)
        blocks = -(-side * taps // p['pairs']['BT'])
        programs = -(-pixels // p['product']['BN']) * -(-batch // p['product']['BM'])
        for first, count in _chunks(channels, together):
            pairs_kernel[(count * blocks**2,)](dense, slopes, pairs, channels, first, side, **p['pairs'])
            matrices_kernel[(count * (2 * height - 1),)](
                pairs, merged, own, direct, first, height, width, side, **p['matrices']
            )
            input_grad_kernel[(count * programs,)](
                x, grad, own, direct, scale, rest, dx, batch, channels, first, p['vectors'], **p['product']
            )
    return [dweights, dnorms, dx]
