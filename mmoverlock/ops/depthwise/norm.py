"""Parallel depthwise convolutions with a batch norm each, summed: a re-parameterised large kernel while it trains.

The convolutions are those of ``triton``; the kernels of the norms, for all branches at once, are in ``norm_kernels``.
Dilated 3x3 branches at the end of the list go another way, ``norm_dilated``, and so do all branches of small maps in
half precision, ``norm_small``.
"""

from functools import lru_cache
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..triton_common import Lanes, compute_input, definition_gradients, differentiated_again, on, power_of_two
from . import norm_dilated, norm_small
from .reference import depthwise_conv2d_reference
from .triton import _launch_band, _launch_conv, _launch_product, _launch_weight_grad, refuse_branches

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
    """As the reference, but whatever the memory format of ``x`` the result is contiguous (NCHW), or channels-last.

    Computes in the type of ``x``, or in that of autocast. Sums, statistics and what is between them are float32.
    """
    planes, lines = compute_input(x, torch.contiguous_format), None
    if norm_dilated.count([w.shape[-1] for w in weights]) and not _small(planes, weights, dilations):
        planes, lines = planes.detach(), compute_input(x, torch.channels_last)  # one carries the gradient
    out, mean, var, *_ = torch.ops.mmoverlock.depthwise_conv2d_norm_branches(
        planes, lines, *map(list, (weights, dilations, gammas, betas, eps))
    )
    return out, mean, var


@lru_cache(maxsize=1024)
def plan(shape, branches: int) -> dict:
    """Constants of the kernels and sizes that follow from those of the map; ``branches`` that have maps."""
    batch, channels, height, width = shape
    pixels = height * width
    vector = next(v for v in (8, 4, 2, 1) if pixels % v == 0)
    wide, narrow = min(512, power_of_two(pixels)), min(1024, power_of_two(pixels))
    tiles = -(-batch // (512 // wide)) * -(-pixels // wide)
    part = -(-tiles // max(1, min(-(-_PROGRAMS // channels), tiles // 2)))
    return dict(
        sums=dict(N=branches, NB=power_of_two(branches), V=vector, BX=512, PX=wide),
        planes=dict(N=branches, V=vector, BX=1024, PX=narrow),
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
    return norm_small.takes(x.shape, x.dtype, [w.shape[-1] for w in weights], dilations)


def _made(weights: Sequence[Tensor], lines: Optional[Tensor]) -> int:
    """How many branches have maps."""
    tail = 0 if lines is None else norm_dilated.count([w.shape[-1] for w in weights])
    return len(weights) - tail


@torch.library.custom_op('mmoverlock::depthwise_conv2d_norm_branches', mutates_args=())
def _norm_branches(
    x: Tensor, lines: Optional[Tensor], weights: List[Tensor], dilations: List[int], gammas: List[Tensor],
    betas: List[Tensor], eps: List[float],
) -> List[Tensor]:  # fmt: skip
    """The output, mean and variance of every branch, and what the backward pass needs: the maps, or ``kept``.

    ``x`` is contiguous. ``lines`` is the same channels-last, if the last branches are for ``norm_dilated``; then the
    output is channels-last, too, and those have no maps.
    """
    x = x.contiguous()
    if _small(x, weights, dilations):
        return norm_small.forward(x, weights, dilations, gammas, betas, eps)
    from .norm_kernels import branch_statistics_kernel, branch_sum_kernel

    (batch, channels, *_), branches = x.shape, len(weights)
    made = _made(weights, lines)
    y, rest, tail, first = x.new_empty((made, *x.shape)), None, None, None
    with Lanes(x.device) as lanes:
        for n, (weight, dilation) in enumerate(zip(weights[:made], dilations)):
            with lanes.lane(n):
                _launch_conv(x, weight, None, dilation, False, y[n])
        if lines is not None:
            lines, packed = lines.contiguous(memory_format=torch.channels_last), norm_dilated.pack(weights[made:])
            lanes.hold(1)
            with lanes.lane(1):
                rest, tail, first = norm_dilated.maps(lines, packed, dilations[made:])
    p = plan(x.shape, made)
    mean, var, factor = (x.new_empty((branches, channels), dtype=torch.float32) for _ in range(3))
    shift = x.new_empty((channels,), dtype=torch.float32)
    with on(x.device):
        branch_statistics_kernel[(-(-channels // 16),)](
            y, _sums(y, None, None), first, tail, torch.stack(gammas), torch.stack(betas), _eps(y, eps), mean, var,
            factor, shift, channels, p['vectors'], y.stride(0), p['splits'], x.numel() // channels,
            N=branches, NB=power_of_two(branches), T=branches - made, ROWS=p['sums']['NB'], V=p['sums']['V'], BC=16,
        )  # fmt: skip
        if lines is not None:
            out = norm_dilated.add(lines, rest, y, factor, shift)
            return [out, mean, var, y]
        out = torch.empty_like(x)
        branch_sum_kernel[(p['programs'],)](
            y, factor, shift, out, channels, batch * channels, p['vectors'], y.stride(0), **p['planes']
        )
    return [out, mean, var, y]


@_norm_branches.register_fake
def _(x, lines, weights, dilations, gammas, betas, eps):
    branches, channels = len(weights), x.shape[1]
    statistics = [x.new_empty((branches, channels), dtype=torch.float32) for _ in range(2)]
    small = _small(x, weights, dilations)
    kept = norm_small.kept(x, weights, dilations) if small else [x.new_empty((_made(weights, lines), *x.shape))]
    return [_like(x, lines), *statistics, *kept]


def _like(x: Tensor, lines: Optional[Tensor]) -> Tensor:
    """Room for a map, in the order that the operator gives."""
    return x.new_empty(x.shape) if lines is None else torch.empty_like(lines, memory_format=torch.channels_last)


@torch.library.custom_op('mmoverlock::depthwise_conv2d_norm_branches_backward', mutates_args=())
def _gradients(
    grad: Tensor, grad_lines: Optional[Tensor], x: Tensor, lines: Optional[Tensor], kept: List[Tensor], mean: Tensor,
    var: Tensor, weights: List[Tensor], dilations: List[int], gammas: List[Tensor], betas: List[Tensor],
    eps: List[float], input_grad: bool,
) -> List[Tensor]:  # fmt: skip
    """Gradients of the weights; of gammas and betas, (2, n, C) in float32; and at last that of the map if wanted.

    Those of the weights are one tensor each; but (T, 9, C) for those of ``norm_dilated``, and on small maps one for all
    of them, one after another, in float32. ``grad_lines`` is ``grad`` as ``lines`` is ``x``.
    """
    grad, x = grad.contiguous(), x.contiguous()
    if _small(x, weights, dilations):
        return norm_small.backward(grad, x, kept, mean, var, weights, dilations, eps, input_grad)
    from .norm_kernels import branch_grad_kernel, branch_slopes_kernel

    (y,) = kept
    (batch, channels, *_), branches, made = x.shape, len(weights), _made(weights, lines)
    p = plan(x.shape, made)
    slopes = x.new_empty((3, branches, channels), dtype=torch.float32)
    dnorms = x.new_empty((2, branches, channels), dtype=torch.float32)
    dx, tail = torch.empty_like(x) if input_grad else None, None
    if lines is not None:
        lines, grad_lines = (t.contiguous(memory_format=torch.channels_last) for t in (lines, grad_lines))
        packed, steps = norm_dilated.pack(weights[made:]), dilations[made:]
    with on(x.device), Lanes(x.device, 1) as lanes:
        if lines is not None:
            with lanes.lane(0):
                rest, tail, _ = norm_dilated.maps(lines, packed, steps, grad_lines, mean[made:])
        sums = _sums(y, grad, mean)
        lanes.wait_for(0)
        branch_slopes_kernel[(-(-channels // 16),)](
            sums, tail, mean, var, torch.stack(gammas), _eps(y, eps), slopes, dnorms[0], dnorms[1], channels,
            p['splits'], x.numel() // channels,
            N=branches, NB=power_of_two(branches), T=branches - made, ROWS=p['sums']['NB'], BC=16,
        )  # fmt: skip
    # A few branches at a time: the gradients of all maps at once would be the peak of the network's memory.
    found = []
    with on(x.device), Lanes(x.device, 3) as lanes:
        if lines is not None:
            with lanes.lane(made):
                lanes.keep(rest)  # of another lane, which may write over it once it is nobody's
                rest, taps = norm_dilated.gradients(grad_lines, lines, rest, packed, slopes, steps)
        for n, (weight, dilation) in enumerate(zip(weights[:made], dilations)):
            with lanes.lane(n):
                dy = torch.empty_like(x)
                branch_grad_kernel[(p['programs'],)](
                    grad, y[n], slopes[0, n], dy, channels, batch * channels, p['vectors'], FAR=slopes.stride(0),
                    **p['planes'],
                )  # fmt: skip
                band = _launch_band(dy, weight, dilation, True) if input_grad else None
            if input_grad:
                lanes.wait_for(n)
                _launch_product(dy, band, weight, None, dilation, dx, add=n > 0)
            with lanes.lane(n):
                found.append(_launch_weight_grad(dy, x, weight.shape[-1], dilation).to(weight.dtype))
                del dy, band  # what the lane makes next may be in their place
            lanes.hold(n)
    if lines is not None:
        found.append(taps)
        dx = norm_dilated.add(lines, rest, dx[None]) if input_grad else None
    return [*found, dnorms, dx] if input_grad else [*found, dnorms]


@_gradients.register_fake
def _(grad, grad_lines, x, lines, kept, mean, var, weights, dilations, gammas, betas, eps, input_grad):
    channels, made = x.shape[1], _made(weights, lines)
    if _small(x, weights, dilations):
        found = [x.new_empty((sum(w.numel() for w in weights),), dtype=torch.float32)]
    else:
        found = [w.new_empty(w.shape) for w in weights[:made]]
    if made < len(weights):
        found.append(x.new_empty((len(weights) - made, 9, channels), dtype=torch.float32))
    found.append(x.new_empty((2, len(weights), channels), dtype=torch.float32))
    return [*found, _like(x, lines)] if input_grad else found


def _save(ctx, inputs, output) -> None:
    x, lines, weights, dilations, gammas, betas, eps = inputs
    _, mean, var, *kept = output
    ctx.set_materialize_grads(False)
    # Of a map in two orders one is kept: to copy it anew takes less than its memory is worth.
    given = x if lines is None else lines
    ctx.save_for_backward(given, mean, var, *weights, *gammas, *betas, *kept)
    ctx.dilations, ctx.eps, ctx.lines = dilations, eps, lines is not None
    ctx.input_grad = given.requires_grad


def _backward(ctx, grads: List[Optional[Tensor]]):
    given, mean, var, *parameters = ctx.saved_tensors
    count = len(ctx.dilations)
    parameters, kept = parameters[: 3 * count], parameters[3 * count :]
    weights, gammas, betas = (parameters[i * count : (i + 1) * count] for i in range(3))
    if differentiated_again():
        out, _, _ = norm_branches_reference(given, weights, ctx.dilations, gammas, betas, ctx.eps)
        dx, *rest = definition_gradients(out, (given, *parameters), grads[0])
    else:
        # The layouts are chosen here, where torch.compile can make them part of what computes the gradient.
        grad, x = grads[0].contiguous(), given.contiguous()
        grad_lines = grads[0].contiguous(memory_format=torch.channels_last) if ctx.lines else None
        *rest, last = torch.ops.mmoverlock.depthwise_conv2d_norm_branches_backward(
            grad, grad_lines, x, given if ctx.lines else None, kept, mean, var, weights, ctx.dilations, gammas, betas,
            ctx.eps, ctx.input_grad,
        )  # fmt: skip
        dx, dnorms = (last, rest.pop()) if ctx.input_grad else (None, last)
        if ctx.lines:
            rest[-1:] = rest[-1].transpose(1, 2).contiguous().unbind()
        elif _small(x, weights, ctx.dilations):
            rest = rest[0].split([w.numel() for w in weights])
        rest = [part.reshape(w.shape).to(w.dtype) for part, w in zip(rest, weights)]
        rest += [g.to(t.dtype) for g, t in zip(dnorms.flatten(0, 1), (*gammas, *betas))]
    dx = (None, dx) if ctx.lines else (dx, None)
    return *dx, rest[:count], None, rest[count : 2 * count], rest[2 * count :], None


_norm_branches.register_autograd(_backward, setup_context=_save)
