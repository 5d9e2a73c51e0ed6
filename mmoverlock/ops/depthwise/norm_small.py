"""Batch-normalised parallel depthwise convolutions on small maps, without making the branches' maps.

How it is computed is said in ``norm_small_kernels``, where the names are explained, too.
"""

from functools import lru_cache
from typing import List, Sequence, Tuple

import torch
from torch import Tensor

from ..triton_common import HALF, on, power_of_two, vector_of
from .triton import _launch_bands, _launch_conv, _launch_weight_grad

_MOST = 16  # rows and columns of a map, and of the window: matrices over the pixels grow with the fourth power
_BRANCHES = 8
_IMAGES = 32  # at least: the matrices cost the same for any batch, the branches' maps do not


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
    batch, channels, _, width = shape
    vector = vector_of(width)
    images = min(64, max(16, power_of_two(batch)))
    count = dict(N=len(sizes), NB=power_of_two(len(sizes)))
    kernels = dict(SIZES=sizes, DILATIONS=dilations)
    return dict(
        side=window(sizes, dilations),
        vectors=width // vector,
        weights=sum(channels * k * k for k in sizes),
        spread=dict(**count, **kernels),
        gram=dict(VW=vector, BB=images, BG=64, num_stages=2),
        windows=dict(num_warps=1),
        moments=dict(N=len(sizes), BU=32, num_warps=1),
        statistics=dict(**count, EPS=eps),
        slopes=dict(**count, **kernels, EPS=eps, VW=vector, BB=16),
        matrices=dict(BD=4, num_warps=1, num_stages=1),
        product=dict(VW=vector, BM=images, BN=128, BK=32, num_stages=4),
    )


def _plan(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], eps: Sequence[float]) -> dict:
    return plan(x.shape, tuple(w.shape[-1] for w in weights), tuple(dilations), tuple(eps))


def kept(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> List[Tensor]:
    """Room in float32 for what the backward pass needs beside the packed parameters: dense, merged, moments, sums."""
    sizes, channels = [w.shape[-1] for w in weights], x.shape[1]
    branches, side = len(sizes), window(sizes, dilations)
    shapes = (
        (channels, branches, side, 16), (channels, 1, side, side), (channels, branches, side, 16), (channels, side, 16),
    )  # fmt: skip
    return [x.new_empty(shape, dtype=torch.float32) for shape in shapes]


def forward(x: Tensor, pack: Tensor, weights, dilations, eps) -> List[Tensor]:
    """Output, mean and variance, and what the backward pass needs: see ``kept``. Of the weights the sizes count."""
    from .norm_small_kernels import gram_kernel, moments_kernel, spread_kernel, statistics_kernel, window_sums_kernel

    batch, channels, height, width = x.shape
    p, branches = _plan(x, weights, dilations, eps), len(weights)
    side = p['side']
    mean, var = (x.new_empty((branches, channels), dtype=torch.float32) for _ in range(2))
    shift, out = x.new_empty((channels,), dtype=torch.float32), torch.empty_like(x)
    dense, merged, moments, sums = found = kept(x, weights, dilations)
    gram = x.new_empty((channels, height * 16, 256), dtype=torch.float32)
    pixel_sums = x.new_empty((channels, 256), dtype=torch.float32)
    windows = x.new_empty((channels, side * 16, 256), dtype=torch.float32)
    blocks = -(-height * 16 // p['gram']['BG'])
    with on(x.device):
        spread_kernel[(channels,)](pack, dense, channels, side, **p['spread'])
        gram_kernel[(channels * blocks**2,)](
            x, gram, pixel_sums, batch, channels, height, p['vectors'], blocks, **p['gram']
        )
        window_sums_kernel[(channels * 2 * min(side, height),)](gram, windows, height, width, side, **p['windows'])
        moments_kernel[(channels * side,)](
            pixel_sums, windows, dense, moments, sums, height, width, side, **p['moments']
        )
        statistics_kernel[(channels,)](
            pack, dense, moments, sums, mean, var, merged, shift, channels, side, batch * height * width, p['weights'],
            **p['statistics'],
        )  # fmt: skip
    _launch_conv(x, merged, shift, 1, False, out)
    return [out, mean, var, *found]


def backward(
    grad: Tensor, x: Tensor, saved: Sequence[Tensor], mean: Tensor, var: Tensor, weights, dilations, eps,
    input_grad: bool,
) -> List[Tensor]:  # fmt: skip
    """Gradients of all weights one after another; of gammas and betas, (2, n, C); of the map if wanted."""
    from .norm_small_kernels import input_grad_kernel, matrices_kernel, slopes_kernel

    pack, dense, merged, moments, sums = saved
    batch, channels, height, width = x.shape
    p, branches = _plan(x, weights, dilations, eps), len(weights)
    side = p['side']
    cross = _launch_weight_grad(grad, x, side, 1)
    dweights = x.new_empty((p['weights'],), dtype=torch.float32)
    dnorms = x.new_empty((2, branches, channels), dtype=torch.float32)
    scale, rest = x.new_empty((channels,), dtype=torch.float32), x.new_empty((channels, 256), dtype=torch.float32)
    left, right = (x.new_empty((channels, n, side, 32, 8), dtype=torch.float16) for n in (2, 1))
    with on(x.device):
        slopes_kernel[(channels,)](
            grad, cross, sums, moments, pack, dense, mean, var, scale, rest, left, right, dweights, dnorms[0],
            dnorms[1], batch, channels, height, p['vectors'], side, batch * height * width, p['weights'], **p['slopes'],
        )  # fmt: skip
        if not input_grad:
            return [dweights, dnorms]
        dx, own = torch.empty_like(x), x.new_empty((channels, height * 16, 256))
        matrices_kernel[(channels * -(-height // p['matrices']['BD']),)](
            left, right, own, height, width, side, **p['matrices']
        )
        (band,) = _launch_bands(x, merged, [(side, 1, -(side // 2), 16, 16)], True)
        tiles = -(-height * 16 // p['product']['BN']) * -(-batch // p['product']['BM'])
        input_grad_kernel[(channels * tiles,)](
            x, grad, own, band, scale, rest, dx, batch, channels, height, p['vectors'], side, **p['product']
        )
    return [dweights, dnorms, dx]
