"""Parallel depthwise convolutions with a batch norm each, summed: a re-parameterised large kernel while it trains.

Maps come and go channels-last. The convolutions are those of ``triton``, on planes that ``orders`` makes; the kernels
of the norms, for all branches at once, are in ``norm_kernels``. Dilated 3x3 branches at the end of the list go another
way, ``norm_dilated``, and so do all branches of small maps in half precision, ``norm_small``.
"""

from functools import lru_cache
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..triton_common import (
    Lanes,
    compute_input,
    definition_gradients,
    differentiated_again,
    on,
    power_of_two,
    vector_of,
)
from . import norm_dilated, norm_small, orders
from .reference import depthwise_conv2d_reference
from .triton import _bands, _launch_product, _launch_weight_grad, refuse_branches

_PROGRAMS = 1056  # to aim at where a channel is summed in parts


def norm_branches_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
) -> Tuple[Tensor, Tensor, Tensor]:
    """Arguments as :func:`mmoverlock.ops.depthwise_conv2d_norm_branches`."""
    total, means, variances = None, [], []
    for weight, dilation, gamma, beta, e in zip(weights, dilations, gammas, betas, eps):
        y = depthwise_conv2d_reference(x, weight, None, dilation)
        out = torch.nn.functional.batch_norm(y, None, None, gamma, beta, True, 0.0, e)
        total = out if total is None else total + out
        wide = y.detach().to(torch.promote_types(y.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        means.append(mean)
        variances.append(variance)
    return total, torch.stack(means), torch.stack(variances)


def refuse(x, weights, dilations, gammas, betas, eps) -> Optional[str]:
    """Why the kernels cannot serve the call, or None."""
    return refuse_branches(x, [*weights, *gammas, *betas], [*dilations]) if len(weights) <= 16 else 'over 16 branches'


def norm_branches_triton(x, weights, dilations, gammas, betas, eps) -> Tuple[Tensor, Tensor, Tensor]:
    """As the reference, but the result is channels-last whatever the memory format of ``x``.

    Computes in the type of ``x``, or in that of autocast. Sums, statistics and what is between them are float32.
    """
    x = compute_input(x, torch.channels_last)
    out, mean, var, *_ = torch.ops.mmoverlock.depthwise_conv2d_norm_branches(
        x, *map(list, (weights, dilations, gammas, betas, eps))
    )
    return out, mean, var


@lru_cache(maxsize=1024)
def plan(shape, branches: int) -> dict:
    """Constants of the kernels and sizes that follow from those of the map; ``branches`` that have maps."""
    batch, channels, height, width = shape
    pixels = height * width
    vector = vector_of(pixels)
    wide, narrow = min(512, power_of_two(pixels)), min(1024, power_of_two(pixels))
    tiles = -(-batch // (512 // wide)) * -(-pixels // wide)
    part = -(-tiles // max(1, min(-(-_PROGRAMS // channels), tiles // 2)))
    return dict(
        sums=dict(N=branches, NB=power_of_two(branches), V=vector, BX=512, PX=wide),
        planes=dict(V=vector, BX=1024, PX=narrow),
        splits=-(-tiles // part),
        part=part,
        programs=-(-batch * channels // (1024 // narrow)) * -(-pixels // narrow),
        vectors=pixels // vector,
    )


def _sums(y: Tensor, grad: Optional[Tensor], mean: Optional[Tensor]) -> Tensor:
    from .norm_kernels import branch_sums_kernel

    branches, batch, channels = y.shape[:3]
    p = plan(y.shape[1:], branches)
    sums = y.new_empty((p['splits'], 2, p['sums']['NB'], channels), dtype=torch.float32)
    branch_sums_kernel[(channels * p['splits'],)](
        y, y if grad is None else grad, sums if mean is None else mean, sums, batch, channels, p['vectors'],
        y.stride(0), p['splits'], p['part'], **p['sums'], GRAD=grad is not None,
    )  # fmt: skip
    return sums


def _eps(y: Tensor, eps: Sequence[float]) -> Tensor:
    if len(set(eps)) == 1:  # no copy from the host, which a CUDA graph could not record
        return torch.full((len(eps),), eps[0], dtype=torch.float32, device=y.device)
    return torch.stack([torch.full((), e, dtype=torch.float32, device=y.device) for e in eps])


def _small(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> bool:
    return norm_small.takes(x.shape, x.dtype, _sizes(weights), dilations)


def _sizes(weights: Sequence[Tensor]) -> List[int]:
    return [weight.shape[-1] for weight in weights]


def _room_for_all(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Room in float32 for all parameters, one after another: weights, gammas, betas."""
    return x.new_empty((sum(weight.numel() + 2 * len(weight) for weight in weights),), dtype=torch.float32)


def _unpacked(pack: Tensor, weights: Sequence[Tensor], made: int) -> Tuple[Tensor, ...]:
    """Of all parameters one after another: the weights of the branches with maps, the others', gammas and betas."""
    dense, tail = (sum(weight.numel() for weight in part) for part in (weights[:made], weights[made:]))
    norms = len(weights) * len(weights[0])
    return pack.split([dense, tail, norms, norms])


def _made(weights: Sequence[Tensor]) -> int:
    """How many branches have maps."""
    return len(weights) - norm_dilated.count(_sizes(weights))


@torch.library.custom_op('mmoverlock::depthwise_conv2d_norm_branches', mutates_args=())
def _norm_branches(
    x: Tensor, weights: List[Tensor], dilations: List[int], gammas: List[Tensor], betas: List[Tensor], eps: List[float]
) -> List[Tensor]:
    """The output, channels-last as ``x`` is, mean and variance of every branch, and what the backward pass needs.

    The last are all parameters, and the maps of those branches that have one, or what ``norm_small.kept`` says.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    pack = _room_for_all(x, weights)
    torch.cat([t.reshape(-1) for t in (*weights, *gammas, *betas)], out=pack)
    if _small(x, weights, dilations):
        out, mean, var, *kept = norm_small.forward(orders.planes(x)[0], pack, weights, dilations, eps)
        return [orders.add(out[None]), mean, var, pack, *kept]
    from .norm_kernels import branch_statistics_kernel

    channels, branches, made = x.shape[1], len(weights), _made(weights)
    y, rest, tail, first = x.new_empty((made, *x.shape)), None, None, None
    dense, dilated, gamma, beta = _unpacked(pack, weights, made)
    sizes = _sizes(weights)[:made]
    with Lanes(x.device) as lanes:
        if made < branches:
            with lanes.lane(1):
                rest, tail, first = norm_dilated.maps(x, dilated, dilations[made:])
        (planes,), bands = orders.planes(x), _bands(x, dense, sizes, dilations, False)
        for n, (band, size, dilation) in enumerate(zip(bands, sizes, dilations)):
            lanes.hold(n)
            with lanes.lane(n):
                _launch_product(planes, band, size, dilation, y[n])
    p = plan(x.shape, made)
    mean, var, factor = (x.new_empty((branches, channels), dtype=torch.float32) for _ in range(3))
    shift = x.new_empty((channels,), dtype=torch.float32)
    with on(x.device):
        branch_statistics_kernel[(-(-channels // 16),)](
            y, _sums(y, None, None), first, tail, gamma, beta, _eps(y, eps), mean, var, factor, shift, channels,
            p['vectors'], y.stride(0), p['splits'], x.numel() // channels,
            N=branches, NB=power_of_two(branches), T=branches - made, ROWS=p['sums']['NB'], V=p['sums']['V'], BC=16,
        )  # fmt: skip
    return [orders.add(y, rest, factor, shift), mean, var, pack, y]


@_norm_branches.register_fake
def _(x, weights, dilations, gammas, betas, eps):
    branches, channels = len(weights), x.shape[1]
    statistics = [x.new_empty((branches, channels), dtype=torch.float32) for _ in range(2)]
    small = _small(x, weights, dilations)
    kept = norm_small.kept(x, weights, dilations) if small else [x.new_empty((_made(weights), *x.shape))]
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return [out, *statistics, _room_for_all(x, weights), *kept]


@torch.library.custom_op('mmoverlock::depthwise_conv2d_norm_branches_backward', mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, kept: List[Tensor], mean: Tensor, var: Tensor, weights: List[Tensor],
    dilations: List[int], eps: List[float], input_grad: bool,
) -> List[Tensor]:  # fmt: skip
    """Gradients of the weights; of gammas and betas, (2, n, C) in float32; and at last that of the map if wanted.

    Those of the weights are one tensor each; but one in float32 for those of ``norm_dilated`` after one another, and on
    small maps for all of them. Maps are channels-last.
    """
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    if _small(x, weights, dilations):
        grad, x = orders.planes(grad, x)
        found = norm_small.backward(grad, x, kept, mean, var, weights, dilations, eps, input_grad)
        return [*found[:-1], orders.add(found[-1][None])] if input_grad else found
    from .norm_kernels import branch_grad_kernel, branch_slopes_kernel

    pack, y = kept
    (batch, channels, *_), branches, made = x.shape, len(weights), _made(weights)
    p = plan(x.shape, made)
    slopes = x.new_empty((3, branches, channels), dtype=torch.float32)
    dnorms = x.new_empty((2, branches, channels), dtype=torch.float32)
    rest, tail, steps, bands = None, None, dilations[made:], [None] * made
    dense, dilated, gamma, _ = _unpacked(pack, weights, made)
    sizes = _sizes(weights)[:made]
    with on(x.device), Lanes(x.device, 1) as lanes:
        if made < branches:
            with lanes.lane(0):
                rest, tail, _ = norm_dilated.maps(x, dilated, steps, grad, mean[made:])
        if input_grad:
            bands = _bands(x, dense, sizes, dilations, True)
        dout, planes = orders.planes(grad, x)
        sums = _sums(y, dout, mean)
        lanes.wait_for(0)
        branch_slopes_kernel[(-(-channels // 16),)](
            sums, tail, mean, var, gamma, _eps(y, eps), slopes, dnorms[0], dnorms[1], channels,
            p['splits'], x.numel() // channels,
            N=branches, NB=power_of_two(branches), T=branches - made, ROWS=p['sums']['NB'], BC=16,
        )  # fmt: skip
    # A few branches at a time: the gradients of all maps at once would be the peak of the network's memory.
    found, dx = [], torch.empty_like(planes) if input_grad else None
    with on(x.device), Lanes(x.device, 3) as lanes:
        if made < branches:
            with lanes.lane(made):
                lanes.keep(rest)  # of another lane, which may write over it once it is nobody's
                rest, taps = norm_dilated.gradients(grad, x, rest, dilated, slopes, steps)
        for n, (band, size, dilation) in enumerate(zip(bands, sizes, dilations)):
            with lanes.lane(n):
                dy = torch.empty_like(planes)
                branch_grad_kernel[(p['programs'],)](
                    dout, y[n], slopes[0, n], dy, channels, batch * channels, p['vectors'], FAR=slopes.stride(0),
                    **p['planes'],
                )  # fmt: skip
            if input_grad:
                lanes.wait_for(n)
                _launch_product(dy, band, size, dilation, dx, add=n > 0)
            with lanes.lane(n):
                found.append(_launch_weight_grad(dy, planes, size, dilation).to(weights[n].dtype))
                del dy  # what the lane makes next may be in its place
            lanes.hold(n)
    if made < branches:
        found.append(taps)
    return [*found, dnorms, orders.add(dx[None], rest)] if input_grad else [*found, dnorms]


@_gradients.register_fake
def _(grad, x, kept, mean, var, weights, dilations, eps, input_grad):
    channels, made = x.shape[1], _made(weights)
    if _small(x, weights, dilations):
        found = [x.new_empty((sum(w.numel() for w in weights),), dtype=torch.float32)]
    else:
        found = [w.new_empty(w.shape) for w in weights[:made]]
        if made < len(weights):
            found.append(x.new_empty(((len(weights) - made) * 9 * channels,), dtype=torch.float32))
    found.append(x.new_empty((2, len(weights), channels), dtype=torch.float32))
    return [*found, torch.empty_like(x, memory_format=torch.channels_last)] if input_grad else found


def _save(ctx, inputs, output) -> None:
    x, weights, dilations, gammas, betas, eps = inputs
    _, mean, var, *kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, var, *weights, *gammas, *betas, *kept)
    ctx.dilations, ctx.eps = dilations, eps
    ctx.input_grad = x.requires_grad


def _backward(ctx, grads: List[Optional[Tensor]]):
    x, mean, var, *parameters = ctx.saved_tensors
    count = len(ctx.dilations)
    parameters, kept = parameters[: 3 * count], parameters[3 * count :]
    weights, gammas, betas = (parameters[i * count : (i + 1) * count] for i in range(3))
    if differentiated_again():
        out, _, _ = norm_branches_reference(x, weights, ctx.dilations, gammas, betas, ctx.eps)
        dx, *rest = definition_gradients(out, (x, *parameters), grads[0])
    else:
        # The order is chosen here, where torch.compile can make it part of what computes the gradient.
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        *rest, last = torch.ops.mmoverlock.depthwise_conv2d_norm_branches_backward(
            grad, x, kept, mean, var, weights, ctx.dilations, ctx.eps, ctx.input_grad
        )
        dx, dnorms = (last, rest.pop()) if ctx.input_grad else (None, last)
        rest[-1:] = rest[-1].flatten().split([w.numel() for w in weights[len(rest) - 1 :]])
        rest = [part.reshape(w.shape).to(w.dtype) for part, w in zip(rest, weights)]
        rest += [g.to(t.dtype) for g, t in zip(dnorms.flatten(0, 1), (*gammas, *betas))]
    return dx, rest[:count], None, rest[count : 2 * count], rest[2 * count :], None


_norm_branches.register_autograd(_backward, setup_context=_save)
