"""Triton kernels of the depthwise 3x3 convolution on channels-last maps, and of what can ride along with it.

A program walks down the rows of a strip and adds every row to the three rows of the output that it is part of; two rows
of sums travel with the loop. Sums are float32.

A thread owns N neighbouring columns of a few channels, so that it loads and converts N + 2 values for N outputs, and a
tap's sum over them takes one register. Columns are separate tensors, in tuples: Triton lets a program choose what a
thread owns in no other way. The next row is on its way while one is added, and what lies above and below the map is
left to the first and the last row, so that the loop's only borders are those of columns.

Names: B, C, H, W sizes of the map; ROWS of a strip; LANES, the tiles beside each other in a row; BC channels of a
program; G groups of N columns, WHOLE: N divides W, so that a group is inside the map or outside it.
"""

import os

import triton
import triton.language as tl

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
def _place(C, H, ROWS, STRIPS, LANES, G: tl.constexpr, BC: tl.constexpr, N: tl.constexpr):
    """What a program works on: image, first row, one after the last, columns, of which every N-th, and channels.

    Channels vary fastest.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BC)
    c = pid % blocks * BC + tl.arange(0, BC)
    pid = pid // blocks
    w = (pid % LANES * G + tl.arange(0, G)) * N
    pid = pid // LANES
    top = pid % STRIPS * ROWS
    return pid // STRIPS, top, tl.minimum(top + ROWS, H), w, c


@triton.jit
def _bell(h):
    """exp(-h² / 2), and the tail of the normal distribution beyond |h| over that.

    The error function would be the dearest part of the feed-forward half. The tail over the bell is a polynomial of
    1 / (1 + 0.297 |h|), within 2.5e-6 of it everywhere (the fit is of the relative error): a hundredth of what half
    precision rounds to.
    """
    denominator = 1.0 + 0.2969848480983500 * tl.minimum(tl.abs(h), 40.0)
    if _INTERPRETED:
        bell = tl.exp(-0.5 * h * h)
        t = 1.0 / denominator
    else:  # one instruction each, which need not be right where they are below 1e-38
        power = (h * -0.72134752044448170) * h
        bell = tl.inline_asm_elementwise('ex2.approx.ftz.f32 $0, $1;', '=f,f', [power], tl.float32, True, 1)
        t = tl.inline_asm_elementwise('rcp.approx.ftz.f32 $0, $1;', '=f,f', [denominator], tl.float32, True, 1)
    tail = 0.245382190 - 0.083610976 * t
    tail = -0.049891734 + tail * t
    tail = 0.160694957 + tail * t
    tail = 0.108126324 + tail * t
    tail = 0.119300437 + tail * t
    return bell, tail * t


@triton.jit
def gelu(h):
    """GELU of float32: h, or nothing of it, less |h| times the tail."""
    bell, tail = _bell(h)
    return tl.maximum(h, 0.0) - tl.minimum(tl.abs(h), 40.0) * (bell * tail)


@triton.jit
def gelu_and_slope(h):
    """GELU of float32 and its derivative: the share that it lets through, and h times the density."""
    bell, tail = _bell(h)
    size = tl.minimum(tl.abs(h), 40.0)
    slope = bell * (tail - 0.3989422804014327 * size)  # on the negative side; on the other 1 less that
    return tl.maximum(h, 0.0) - size * (bell * tail), tl.where(h < 0, slope, 1.0 - slope)


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
def _finish(at, C, sums, total, masks, N: tl.constexpr, WHOLE: tl.constexpr, SQUARES: tl.constexpr, GELU: tl.constexpr):
    """Stores a row; returns ``total`` with its squares, with WHOLE those of groups outside the map, too."""
    for n in tl.static_range(N):
        value = gelu(sums[n]) if GELU else sums[n]
        tl.store(at + n * C, value.to(at.dtype.element_ty), mask=masks[n + 1])
        if SQUARES:
            total += sums[n] * sums[n] if WHOLE else tl.where(masks[n + 1], sums[n] * sums[n], 0.0)
    return total


@triton.jit(do_not_specialize=_SIZES)
def depthwise3_forward_kernel(
    x, weight, bias, out, squares, C, H, W, ROWS, STRIPS, LANES,
    V: tl.constexpr, N: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, SQUARES: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """out = conv(x), RESIDUAL: + x, GELU: of that. C counts vectors of V channels.

    SQUARES: the strip's sum of the squares of ``out``, before it is rounded, for every channel goes to
    squares[B, STRIPS * LANES, C].
    """
    C = C * V
    image, top, bottom, w, c = _place(C, H, ROWS, STRIPS, LANES, G, BC, N)
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
        total = _finish(out + (r - 1) * stride + at, C, above, total, masks, N, WHOLE, SQUARES, GELU)
        above = _add_row(level, b0, b1, b2, values, N)
        level = _add_row(start, a0, a1, a2, values, N)
    # The row below the strip, or nothing.
    values = _floats(ahead, N)
    inside = bottom < H
    c0, c1, c2 = tl.where(inside, c0, 0.0), tl.where(inside, c1, 0.0), tl.where(inside, c2, 0.0)
    above = _add_row(above, c0, c1, c2, values, N)
    total = _finish(out + (bottom - 1) * stride + at, C, above, total, masks, N, WHOLE, SQUARES, GELU)
    if SQUARES:
        if WHOLE:
            total = tl.where(masks[1], total, 0.0)
        part = tl.program_id(0) // tl.cdiv(C, BC)
        tl.store(squares + part.to(tl.int64) * C + c, tl.sum(total, 0), mask=known)


@triton.jit
def _given(at, C, masks, N: tl.constexpr):
    """The N columns of a row."""
    values = ()
    for n in tl.static_range(N):
        values += (tl.load(at + n * C, mask=masks[n + 1], other=0.0),)
    return values


@triton.jit
def _fetch(grad, y, at, C, masks, N: tl.constexpr, GRN: tl.constexpr):
    """A row of what the gradient is made of."""
    raw = _load(grad + at, C, masks, N)
    if GRN:
        raw += _load(y + at, C, masks, N)
    return raw


@triton.jit
def _gradient(raw, s, t, N: tl.constexpr, GRN: tl.constexpr):
    """A row of the gradient."""
    found = ()
    for n in tl.static_range(N + 2):
        g = raw[n].to(tl.float32)
        if GRN:
            g = s * g + t * raw[N + 2 + n].to(tl.float32)
        found += (g,)
    return found


@triton.jit
def _backward_row(out, at, C, masks, taps, sums, above, level, below, given, N: tl.constexpr, WHOLE: tl.constexpr,
                  GELU: tl.constexpr):  # fmt: skip
    """Stores the map's gradient in a row; returns the sums with its share. From three rows of the output's gradient."""
    a0, a1, a2, b0, b1, b2, c0, c1, c2 = taps
    k00, k01, k02, k10, k11, k12, k20, k21, k22, shift, total = sums
    # out[p] = sum of weight[d] u[p + d]: u[q] sees the gradient at q - d, and so does the gradient of that tap.
    for n in tl.static_range(N):
        u = given[n].to(tl.float32)
        slope = 1.0
        if GELU:
            u, slope = gelu_and_slope(u)
        k00 += u * below[n + 2]
        k01 += u * below[n + 1]
        k02 += u * below[n]
        k10 += u * level[n + 2]
        k11 += u * level[n + 1]
        k12 += u * level[n]
        k20 += u * above[n + 2]
        k21 += u * above[n + 1]
        k22 += u * above[n]
        value = a0 * below[n + 2] + a1 * below[n + 1] + a2 * below[n]
        value = value + b0 * level[n + 2] + b1 * level[n + 1] + b2 * level[n]
        value = value + c0 * above[n + 2] + c1 * above[n + 1] + c2 * above[n]
        if GELU:
            value *= slope
        tl.store(out + at + n * C, value.to(out.dtype.element_ty), mask=masks[n + 1])
        shift += level[n + 1]
        total += value if WHOLE else tl.where(masks[n + 1], value, 0.0)
    return k00, k01, k02, k10, k11, k12, k20, k21, k22, shift, total


@triton.jit(do_not_specialize=_SIZES)
def depthwise3_backward_kernel(
    grad, x, weight, y, scale, slope, out, sums, C, H, W, ROWS, STRIPS, LANES,
    V: tl.constexpr, N: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr,
    RESIDUAL: tl.constexpr, GRN: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Gradients of the map, the kernels and the bias; C counts vectors of V channels.

    GRN: ``grad`` is that of the convolution's normalised output y, scale[b] y + ...; the convolution's is
    scale[b] grad + slope[b] y. GELU: the convolution had been given GELU(x), and ``out`` is to be the gradient of x.
    The strip's shares of the gradients go to sums[B, STRIPS * LANES, 11, C]: nine taps, the bias, and the sum of out.
    """
    C = C * V
    image, top, bottom, w, c = _place(C, H, ROWS, STRIPS, LANES, G, BC, N)
    known = c < C
    a0, a1, a2 = _taps(weight, c, known, 0)
    b0, b1, b2 = _taps(weight, c, known, 1)
    c0, c1, c2 = _taps(weight, c, known, 2)
    if RESIDUAL:
        b1 += 1.0
    taps = (a0, a1, a2, b0, b1, b2, c0, c1, c2)
    s, t = 1.0, 0.0
    if GRN:
        s = tl.load(scale + image * C + c, mask=known, other=0.0)[None, :]
        t = tl.load(slope + image * C + c, mask=known, other=0.0)[None, :]
    masks = _masks(w, W, known, N, WHOLE)
    stride = (W * C).to(tl.int64)
    at = w[:, None] * C + c[None, :]
    start = image * H * stride
    grad += start
    x += start
    y += start
    out += start
    last = tl.minimum(bottom, H - 1)

    inside = ()
    for n in tl.static_range(N + 2):
        inside += (masks[n] & (top > 0),)
    above = _fetch(grad, y, (top - 1) * stride + at, C, inside, N, GRN)
    level = _fetch(grad, y, top * stride + at, C, masks, N, GRN)
    raw = _fetch(grad, y, tl.minimum(top + 1, last) * stride + at, C, masks, N, GRN)
    given = _given(x + top * stride + at, C, masks, N)
    above = _gradient(above, s, t, N, GRN)
    level = _gradient(level, s, t, N, GRN)
    zeros = tl.zeros((G, BC), dtype=tl.float32)
    found = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    for row in tl.range(top, bottom - 1, num_stages=1):
        below = _gradient(raw, s, t, N, GRN)
        now = given
        raw = _fetch(grad, y, tl.minimum(row + 2, last) * stride + at, C, masks, N, GRN)
        given = _given(x + (row + 1) * stride + at, C, masks, N)
        found = _backward_row(out, row * stride + at, C, masks, taps, found, above, level, below, now, N, WHOLE, GELU)
        above = level
        level = below
    raw = _gradient(raw, s, t, N, GRN)
    below = ()
    for n in tl.static_range(N + 2):
        below += (tl.where(bottom < H, raw[n], 0.0),)
    place = (bottom - 1) * stride + at
    found = _backward_row(out, place, C, masks, taps, found, above, level, below, given, N, WHOLE, GELU)
    part = tl.program_id(0) // tl.cdiv(C, BC)
    place = sums + part.to(tl.int64) * 11 * C + c
    for n in tl.static_range(11):
        # Groups right of the map have a neighbour in it, and so numbers that are nobody's.
        share = tl.where(masks[1], found[n], 0.0) if n == 10 else found[n]
        tl.store(place + n * C, tl.sum(share, 0), mask=known)
