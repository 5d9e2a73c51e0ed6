"""Triton kernels of the depthwise 3x3 convolution on channels-last maps, and of what can ride along with it.

A program walks down the rows of a strip and adds every row to the three rows of the output that it is part of; two rows
of sums travel with the loop. Sums are float32.

Forward, a thread owns N neighbouring columns of a few channels, so that it loads and converts N + 2 values for N
outputs. Columns are separate tensors, in tuples: Triton lets a program choose what a thread owns in no other way. The
next row is on its way while one is added, and what lies above and below the map is left to the first and the last row,
so that the loop's only borders are those of columns. Backward, a tile has BW columns, and every row is loaded once for
each of the three columns a tap may stand in (the second and third time from the cache).

Names: B, C, H, W sizes of the map; ROWS of a strip; LANES, the tiles beside each other in a row; BC channels of a
program; G groups of N columns, WHOLE: N divides W, so that a group is inside the map or outside it.
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
def _place(C, H, W, ROWS, STRIPS, LANES, BW: tl.constexpr, BC: tl.constexpr, N: tl.constexpr = 1):
    """What a program works on: image, first row, one after the last, columns, of which every N-th, and channels.

    Channels vary fastest.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BC)
    c = pid % blocks * BC + tl.arange(0, BC)
    pid = pid // blocks
    w = (pid % LANES * BW + tl.arange(0, BW)) * N
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


@triton.jit
def _masks(w, W, known, N: tl.constexpr, WHOLE: tl.constexpr):
    """Whether the column left of the N, each of them, and the one right of them are in the map."""
    masks = (((w >= 1) & (w - 1 < W))[:, None] & known[None, :],)
    first = (w < W)[:, None] & known[None, :]
    for n in tl.static_range(N):
        masks += (first if WHOLE else (w + n < W)[:, None] & known[None, :],)
    return masks + ((w + N < W)[:, None] & known[None, :],)


@triton.jit
def _load(at, C, masks, N: tl.constexpr):
    """The N columns of a row and one on either side."""
    values = ()
    for n in tl.static_range(N + 2):
        values += (tl.load(at + (n - 1) * C, mask=masks[n], other=0.0),)
    return values


@triton.jit
def _floats(values, N: tl.constexpr):
    found = ()
    for n in tl.static_range(N + 2):
        found += (values[n].to(tl.float32),)
    return found


@triton.jit
def _add_row(sums, left, centre, right, x, N: tl.constexpr):
    """The sums and what one row of the kernel makes of one row of the map."""
    found = ()
    for n in tl.static_range(N):
        found += (sums[n] + left * x[n] + centre * x[n + 1] + right * x[n + 2],)
    return found


@triton.jit
def _finish(at, C, sums, total, masks, N: tl.constexpr, WHOLE: tl.constexpr, SQUARES: tl.constexpr):
    """Stores a row; returns ``total`` with its squares, with WHOLE those of groups outside the map, too."""
    for n in tl.static_range(N):
        tl.store(at + n * C, sums[n].to(at.dtype.element_ty), mask=masks[n + 1])
        if SQUARES:
            total += sums[n] * sums[n] if WHOLE else tl.where(masks[n + 1], sums[n] * sums[n], 0.0)
    return total


@triton.jit(do_not_specialize=_SIZES)
def depthwise3_forward_kernel(
    x, weight, bias, out, squares, C, H, W, ROWS, STRIPS, LANES,
    V: tl.constexpr, N: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """out = conv(x), RESIDUAL: + x. C counts vectors of V channels.

    SQUARES: the strip's sum of the squares of ``out``, before it is rounded, for every channel goes to
    squares[B, STRIPS * LANES, C].
    """
    C = C * V
    image, top, bottom, w, c = _place(C, H, W, ROWS, STRIPS, LANES, G, BC, N)
    known = c < C
    a0, a1, a2 = _taps(weight, c, known, 0)
    b0, b1, b2 = _taps(weight, c, known, 1)
    c0, c1, c2 = _taps(weight, c, known, 2)
    if RESIDUAL:
        b1 += 1.0
    zeros = tl.zeros((G, BC), dtype=tl.float32)
    shift = zeros
    if BIAS:
        shift += tl.load(bias + c, mask=known, other=0.0).to(tl.float32)[None, :]
    masks = _masks(w, W, known, N, WHOLE)
    stride = (W * C).to(tl.int64)
    at = w[:, None] * C + c[None, :]
    x += image * H * stride
    out += image * H * stride
    last = tl.minimum(bottom, H - 1)  # of the rows that are needed

    before = ()
    for n in tl.static_range(N + 2):
        before += (tl.load(x + (top - 1) * stride + at + (n - 1) * C, mask=masks[n] & (top > 0), other=0.0),)
    row = _load(x + top * stride + at, C, masks, N)
    ahead = _load(x + tl.minimum(top + 1, last) * stride + at, C, masks, N)
    start = ()
    for _ in tl.static_range(N):
        start += (shift,)
    level = _add_row(start, a0, a1, a2, _floats(before, N), N)
    values = _floats(row, N)
    above = _add_row(level, b0, b1, b2, values, N)  # sums of the row above the one that comes next
    level = _add_row(start, a0, a1, a2, values, N)  # and of that one
    total = zeros
    for r in tl.range(top + 1, bottom, num_stages=1):
        values = _floats(ahead, N)
        ahead = _load(x + tl.minimum(r + 1, last) * stride + at, C, masks, N)
        above = _add_row(above, c0, c1, c2, values, N)
        total = _finish(out + (r - 1) * stride + at, C, above, total, masks, N, WHOLE, SQUARES)
        above = _add_row(level, b0, b1, b2, values, N)
        level = _add_row(start, a0, a1, a2, values, N)
    # The row below the strip, or nothing.
    values = _floats(ahead, N)
    inside = bottom < H
    c0, c1, c2 = tl.where(inside, c0, 0.0), tl.where(inside, c1, 0.0), tl.where(inside, c2, 0.0)
    above = _add_row(above, c0, c1, c2, values, N)
    total = _finish(out + (bottom - 1) * stride + at, C, above, total, masks, N, WHOLE, SQUARES)
    if SQUARES:
        if WHOLE:
            total = tl.where(masks[1], total, 0.0)
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
