"""Triton kernels of the depthwise 3x3 convolution on channels-last maps, and of what can ride along with it.

A program walks down the rows of a strip, BW columns of BC channels at a time. Every row is loaded once for each of the
three columns a tap may stand in (the second and third time from the cache) and added to the three rows of the output
that it is part of; two rows of sums travel with the loop. Sums are float32.

Names: B, C, H, W sizes of the map; ROWS of a strip; LANES, the tiles beside each other in a row.
"""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

_INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')
_SIZES = ('C', 'H', 'W', 'ROWS', 'STRIPS', 'LANES')


@triton.jit
def _taps(weight, c, valid, dy: tl.constexpr):
    """One row of the kernels of these channels, in float32."""
    at = weight + c * 9 + dy * 3
    left = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    centre = tl.load(at + 1, mask=valid, other=0.0).to(tl.float32)
    right = tl.load(at + 2, mask=valid, other=0.0).to(tl.float32)
    return left[None, :], centre[None, :], right[None, :]


@triton.jit
def _place(C, H, W, ROWS, STRIPS, LANES, BW: tl.constexpr, BC: tl.constexpr):
    """What a program works on: image, first row, one after the last, columns, channels; channels vary fastest."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BC)
    c = pid % blocks * BC + tl.arange(0, BC)
    pid = pid // blocks
    w = pid % LANES * BW + tl.arange(0, BW)
    pid = pid // LANES
    top = pid % STRIPS * ROWS
    return pid // STRIPS, top, tl.minimum(top + ROWS, H), w, c


@triton.jit
def _columns(w, W, known):
    """Whether the columns left of, at and right of these are in the map, for the channels that are known."""
    here = (w < W)[:, None] & known[None, :]
    left = ((w >= 1) & (w - 1 < W))[:, None] & known[None, :]
    right = (w + 1 < W)[:, None] & known[None, :]
    return left, here, right


@triton.jit
def gelu_parts(h):
    """The share of ``h`` that GELU lets through, and its density: GELU is h p, its derivative p + h d.

    The error function would be the dearest part of the feed-forward half. The tail of the normal distribution is
    exp(-h² / 2) times a polynomial of 1 / (1 + 0.297 |h|), within 2.5e-6 of it everywhere (the fit
    is of the relative error): a hundredth of what half precision rounds to.
    """
    if _INTERPRETED:
        bell = tl.exp(-0.5 * h * h)
        t = 1.0 / (1.0 + 0.2969848480983500 * tl.abs(h))
    else:  # one instruction each, which need not be right where they are below 1e-38
        bell = libdevice.fast_expf(-0.5 * h * h)
        t = libdevice.fast_dividef(1.0, 1.0 + 0.2969848480983500 * tl.abs(h))
    tail = 0.245382190 - 0.083610976 * t
    tail = -0.049891734 + tail * t
    tail = 0.160694957 + tail * t
    tail = 0.108126324 + tail * t
    tail = 0.119300437 + tail * t
    tail *= t * bell
    return tl.where(h < 0, tail, 1.0 - tail), 0.3989422804014327 * bell


@triton.jit(do_not_specialize=_SIZES)
def depthwise3_forward_kernel(
    x, weight, bias, out, squares, C, H, W, ROWS, STRIPS, LANES,
    V: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SQUARES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = conv(x), RESIDUAL: + x. C counts vectors of V channels.

    SQUARES: the strip's sum of the squares of ``out`` for every channel goes to squares[B, STRIPS * LANES, C].
    """
    C = C * V
    image, top, bottom, w, c = _place(C, H, W, ROWS, STRIPS, LANES, BW, BC)
    known = c < C
    a0, a1, a2 = _taps(weight, c, known, 0)
    b0, b1, b2 = _taps(weight, c, known, 1)
    c0, c1, c2 = _taps(weight, c, known, 2)
    if RESIDUAL:
        b1 += 1.0
    shift = tl.zeros((BC,), dtype=tl.float32)
    if BIAS:
        shift = tl.load(bias + c, mask=known, other=0.0).to(tl.float32)
    left, here, right = _columns(w, W, known)
    stride = (W * C).to(tl.int64)
    start = image * H * stride
    at = w[:, None] * C + c[None, :]

    above = tl.zeros((BW, BC), dtype=tl.float32) + shift[None, :]  # sums of the row above the one that is read
    level = above
    total = tl.zeros((BW, BC), dtype=tl.float32)
    for row in tl.range(top - 1, bottom + 1, num_stages=STAGES):
        inside = (row >= 0) & (row < H)
        line = start + row * stride
        x0 = tl.load(x + line + at - C, mask=left & inside, other=0.0).to(tl.float32)
        x1 = tl.load(x + line + at, mask=here & inside, other=0.0).to(tl.float32)
        x2 = tl.load(x + line + at + C, mask=right & inside, other=0.0).to(tl.float32)
        above += c0 * x0 + c1 * x1 + c2 * x2
        value = above.to(out.dtype.element_ty)
        mine = here & (row > top)
        tl.store(out + line - stride + at, value, mask=mine)
        if SQUARES:
            value = tl.where(mine, value.to(tl.float32), 0.0)
            total += value * value
        above = level + b0 * x0 + b1 * x1 + b2 * x2
        level = shift[None, :] + a0 * x0 + a1 * x1 + a2 * x2
    if SQUARES:
        part = tl.program_id(0) // tl.cdiv(C, BC)
        tl.store(squares + part.to(tl.int64) * C + c, tl.sum(total, 0), mask=known)


@triton.jit(do_not_specialize=_SIZES)
def depthwise3_backward_kernel(
    grad, x, weight, y, scale, slope, out, sums, C, H, W, ROWS, STRIPS, LANES,
    V: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    RESIDUAL: tl.constexpr, GRN: tl.constexpr, GELU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the map, the kernels and the bias; C counts vectors of V channels.

    GRN: ``grad`` is that of the convolution's normalised output y, scale[b] y + ...; the convolution's is
    scale[b] grad + slope[b] y. GELU: the convolution had been given GELU(x), and ``out`` is to be the gradient of x.
    The strip's shares of the gradients go to sums[B, STRIPS * LANES, 11, C]: nine taps, the bias, and the sum of out.
    """
    C = C * V
    image, top, bottom, w, c = _place(C, H, W, ROWS, STRIPS, LANES, BW, BC)
    known = c < C
    a0, a1, a2 = _taps(weight, c, known, 0)
    b0, b1, b2 = _taps(weight, c, known, 1)
    c0, c1, c2 = _taps(weight, c, known, 2)
    if RESIDUAL:
        b1 += 1.0
    if GRN:
        s = tl.load(scale + image * C + c, mask=known, other=0.0)[None, :]
        t = tl.load(slope + image * C + c, mask=known, other=0.0)[None, :]
    left, here, right = _columns(w, W, known)
    stride = (W * C).to(tl.int64)
    start = image * H * stride
    at = w[:, None] * C + c[None, :]

    zeros = tl.zeros((BW, BC), dtype=tl.float32)
    above, level = zeros, zeros  # the map's gradient in the row above the one that is read, and in that row
    # What the convolution had been given in these rows, and GELU's slopes there. Zero at first, but that is not for the
    # compiler to know: Triton 3.6 takes a value that follows another a turn later, from the same first one, for fixed.
    nothing = (C < 0).to(tl.float32)
    u0, u1 = zeros + nothing, zeros
    slope0, slope1 = zeros + nothing, zeros
    k00, k01, k02, k10, k11, k12, k20, k21, k22 = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    shift, total = zeros, zeros
    for row in tl.range(top - 1, bottom + 1, num_stages=STAGES):
        inside = (row >= 0) & (row < H)
        line = start + row * stride
        g0 = tl.load(grad + line + at - C, mask=left & inside, other=0.0).to(tl.float32)
        g1 = tl.load(grad + line + at, mask=here & inside, other=0.0).to(tl.float32)
        g2 = tl.load(grad + line + at + C, mask=right & inside, other=0.0).to(tl.float32)
        if GRN:
            g0 = s * g0 + t * tl.load(y + line + at - C, mask=left & inside, other=0.0).to(tl.float32)
            g1 = s * g1 + t * tl.load(y + line + at, mask=here & inside, other=0.0).to(tl.float32)
            g2 = s * g2 + t * tl.load(y + line + at + C, mask=right & inside, other=0.0).to(tl.float32)
        # The next row of what the convolution had been given.
        mine = here & (row + 1 < bottom)
        h = tl.load(x + line + stride + at, mask=mine, other=0.0).to(tl.float32)
        u2 = h
        slope2 = zeros
        if GELU:
            p, d = gelu_parts(h)
            u2 = (h * p).to(out.dtype.element_ty).to(tl.float32)  # as it was rounded
            slope2 = p + h * d
        # out[row] = sum of weight[dy, dx] u[row + dy - 1, . + dx - 1]: a tap's gradient pairs g with u on its other
        # side, and u sees g through the kernel turned by half a turn.
        k00 += u0 * g2
        k01 += u0 * g1
        k02 += u0 * g0
        k10 += u1 * g2
        k11 += u1 * g1
        k12 += u1 * g0
        k20 += u2 * g2
        k21 += u2 * g1
        k22 += u2 * g0
        shift += tl.where((row >= top) & (row < bottom), g1, 0.0)
        above += a2 * g0 + a1 * g1 + a0 * g2
        if GELU:
            above *= slope0
        value = above.to(out.dtype.element_ty)
        mine = here & (row > top)
        tl.store(out + line - stride + at, value, mask=mine)
        total += tl.where(mine, value.to(tl.float32), 0.0)
        above = level + b2 * g0 + b1 * g1 + b0 * g2
        level = c2 * g0 + c1 * g1 + c0 * g2
        u0, u1 = u1, u2
        slope0, slope1 = slope1, slope2
    part = tl.program_id(0) // tl.cdiv(C, BC)
    place = sums + part.to(tl.int64) * 11 * C + c
    tl.store(place, tl.sum(k00, 0), mask=known)
    tl.store(place + C, tl.sum(k01, 0), mask=known)
    tl.store(place + 2 * C, tl.sum(k02, 0), mask=known)
    tl.store(place + 3 * C, tl.sum(k10, 0), mask=known)
    tl.store(place + 4 * C, tl.sum(k11, 0), mask=known)
    tl.store(place + 5 * C, tl.sum(k12, 0), mask=known)
    tl.store(place + 6 * C, tl.sum(k20, 0), mask=known)
    tl.store(place + 7 * C, tl.sum(k21, 0), mask=known)
    tl.store(place + 8 * C, tl.sum(k22, 0), mask=known)
    tl.store(place + 9 * C, tl.sum(shift, 0), mask=known)
    tl.store(place + 10 * C, tl.sum(total, 0), mask=known)
