"""Triton kernels of the perceptron of squeeze-and-excitation.

All of it is a few thousand numbers an image: what takes time is a launch and how often a program waits for memory.
So one image's first product is done whole by every program of that image, as each needs the hidden values, and the
programs have shares of the second one. The next tile of weights is on its way while one is used. Sums are float32.

Names: B images; C channels, in vectors of V; E hidden values, of W; BC, BE, BB a tile's channels, hidden values (of the
kernels of an image all of them), images; SHARES programs an image.

What the backward pass needs of an image is a row of ``kept``: E hidden values, E slopes of GELU, C slopes of the
sigmoid. A row of ``deltas``: E gradients of what GELU was given, C of what the sigmoid was given.
"""

import triton
import triton.language as tl

_SIZES = ('B', 'C', 'E', 'SHARES')


@triton.jit
def _gelu_and_slope(h):
    """GELU by the error function, and its derivative: the share that it lets through, and h times the density."""
    share = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
    return h * share, share + h * (0.3989422804014327 * tl.exp(-0.5 * h * h))


@triton.jit
def _tile(matrix, row, column, ROWS, COLUMNS, STRIDE):
    """A tile of a matrix, zero beyond its borders."""
    mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(matrix + row[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def excite_forward_kernel(
    pooled, weight1, bias1, weight2, bias2, gates, kept, C, E, SHARES,
    V: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """gates = sigmoid(weight2 GELU(weight1 pooled + bias1) + bias2); KEEP: and a row of ``kept``."""
    C, E = C * V, E * W
    image, share = (tl.program_id(0) // SHARES).to(tl.int64), tl.program_id(0) % SHARES
    pooled += image * C
    gates += image * C
    kept += image * (2 * E + C)
    e = tl.arange(0, BE)
    k = tl.arange(0, BC)
    shift = tl.load(bias1 + e, mask=e < E, other=0.0).to(tl.float32)
    next_w = _tile(weight1, e, k, E, C, C)
    next_x = tl.load(pooled + k, mask=k < C, other=0.0)
    acc = tl.zeros((BE, BC), dtype=tl.float32)
    for first in range(BC, C + BC, BC):
        w, x = next_w.to(tl.float32), next_x.to(tl.float32)
        c = first + k
        next_w = _tile(weight1, e, c, E, C, C)
        next_x = tl.load(pooled + c, mask=c < C, other=0.0)
        acc += w * x[None, :]
    next_w = _tile(weight2, share * BC + k, e, C, E, E)
    # Nothing in a tile's padding, which an infinite value would make NaN, and with it every gate.
    h, slope = _gelu_and_slope(tl.where(e < E, tl.sum(acc, 1) + shift, 0.0))
    if KEEP:
        tl.store(kept + e, h, mask=(e < E) & (share == 0))
        tl.store(kept + E + e, slope, mask=(e < E) & (share == 0))
    for first in range(share * BC, C, SHARES * BC):
        c = first + k
        w = next_w.to(tl.float32)
        next_w = _tile(weight2, c + SHARES * BC, e, C, E, E)
        z = tl.sum(w * h[None, :], 1) + tl.load(bias2 + c, mask=c < C, other=0.0).to(tl.float32)
        gate = tl.sigmoid(z)
        tl.store(gates + c, gate.to(gates.dtype.element_ty), mask=c < C)
        if KEEP:
            tl.store(kept + 2 * E + c, gate * tl.sigmoid(-z), mask=c < C)


@triton.jit(do_not_specialize=_SIZES)
def excite_grad_kernel(
    grad, weight1, weight2, kept, deltas, dpooled, C, E, SHARES,
    V: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The gradient of ``pooled``, and a row of ``deltas``."""
    C, E = C * V, E * W
    image, share = (tl.program_id(0) // SHARES).to(tl.int64), tl.program_id(0) % SHARES
    grad += image * C
    dpooled += image * C
    kept += image * (2 * E + C)
    deltas += image * (E + C)
    e = tl.arange(0, BE)
    k = tl.arange(0, BC)
    slope = tl.load(kept + E + e, mask=e < E, other=0.0)
    next_w = _tile(weight2, k, e, C, E, E)
    next_g = tl.load(grad + k, mask=k < C, other=0.0)
    next_s = tl.load(kept + 2 * E + k, mask=k < C, other=0.0)
    acc = tl.zeros((BC, BE), dtype=tl.float32)
    for first in range(0, C, BC):
        w, d = next_w.to(tl.float32), next_g.to(tl.float32) * next_s
        c = first + k
        after = c + BC
        next_w = _tile(weight2, after, e, C, E, E)
        next_g = tl.load(grad + after, mask=after < C, other=0.0)
        next_s = tl.load(kept + 2 * E + after, mask=after < C, other=0.0)
        acc += w * d[:, None]
        tl.store(deltas + E + c, d, mask=(c < C) & (share == 0))
    next_w = _tile(weight1, e, share * BC + k, E, C, C)
    delta = tl.where(e < E, tl.sum(acc, 0) * slope, 0.0)  # see above
    tl.store(deltas + e, delta, mask=(e < E) & (share == 0))
    for first in range(share * BC, C, SHARES * BC):
        c = first + k
        w = next_w.to(tl.float32)
        next_w = _tile(weight1, e, c + SHARES * BC, E, C, C)
        tl.store(dpooled + c, tl.sum(w * delta[:, None], 0).to(dpooled.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=_SIZES)
def excite_weight_grad_kernel(
    pooled, kept, deltas, dweight1, dbias1, dweight2, dbias2, B, C, E,
    V: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Gradients of both weights in a tile of theirs, summed over the images in their order, and of the biases."""
    C, E = C * V, E * W
    columns = tl.cdiv(E, BE)
    block, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    c = block * BC + tl.arange(0, BC)
    e = column * BE + tl.arange(0, BE)
    n = tl.arange(0, BB).to(tl.int64)
    acc1, acc2 = tl.zeros((BE, BC), dtype=tl.float32), tl.zeros((BC, BE), dtype=tl.float32)
    sum1, sum2 = tl.zeros((BE,), dtype=tl.float32), tl.zeros((BC,), dtype=tl.float32)
    for first in range(0, B, BB):
        b = first + n
        x = _tile(pooled, b, c, B, C, C).to(tl.float32)
        h = _tile(kept, b, e, B, E, 2 * E + C)
        delta1 = _tile(deltas, b, e, B, E, E + C)
        delta2 = _tile(deltas + E, b, c, B, C, E + C)
        acc1 = tl.dot(tl.trans(delta1), x, acc1, input_precision='ieee')
        acc2 = tl.dot(tl.trans(delta2), h, acc2, input_precision='ieee')
        sum1 += tl.sum(delta1, 0)
        sum2 += tl.sum(delta2, 0)
    mask1, mask2 = (e < E)[:, None] & (c < C)[None, :], (c < C)[:, None] & (e < E)[None, :]
    tl.store(dweight1 + e[:, None] * C + c[None, :], acc1.to(dweight1.dtype.element_ty), mask=mask1)
    tl.store(dweight2 + c[:, None] * E + e[None, :], acc2.to(dweight2.dtype.element_ty), mask=mask2)
    tl.store(dbias1 + e, sum1.to(dbias1.dtype.element_ty), mask=(e < E) & (block == 0))
    tl.store(dbias2 + c, sum2.to(dbias2.dtype.element_ty), mask=(c < C) & (column == 0))
