"""Triton kernels of dilated 3x3 branches with batch norms, on channels-last maps.

The pixels of a map that are D apart, down and across, make a map of their own, a phase of D * D, on which a 3x3 kernel
of dilation D is a plain one. The kernels are therefore those of ``small_kernels``, whose pieces they are made of: a
program walks down the rows of a phase and adds every row to the three that it is part of. All T branches are done in
one launch; programs that follow each other have the same pixels for different branches, which finds them in the cache.

Names: C, H, W sizes of the map; D the dilation of a branch, D0 ... D3 those of the T branches; ROWS of a strip, into
which phases are cut; SHARES programs that share the strips of all phases; LANES programs beside each other, of G groups
of N columns and BC channels each. ``pack`` holds the T branches' weights, (C, 3, 3) each. N - T branches before them
have maps of their own.
"""

import triton
import triton.language as tl

from .small_kernels import _add_row, _backward_row, _fetch, _floats, _given, _load, _masks, _taps

_SIZES = ('C', 'H', 'W', 'ROWS', 'SHARES', 'LANES', 'FAR', 'BRANCHES', 'D0', 'D1', 'D2', 'D3')


@triton.jit
def _place(
    C, H, W, ROWS, SHARES, LANES, D0, D1, D2, D3,
    T: tl.constexpr, N: tl.constexpr, G: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """What a program works on: branch, its dilation and channels; image; first strip and one after the last.

    Then columns of a phase that every group begins with, how many the phase has, and where they are: elements from the
    beginning of a row.
    """
    pid = tl.program_id(0)
    n = pid % T
    d = tl.where(n == 0, D0, tl.where(n == 1, D1, tl.where(n == 2, D2, D3)))
    pid = pid // T
    blocks = tl.cdiv(C, BC)
    c = pid % blocks * BC + tl.arange(0, BC)
    pid = pid // blocks
    beside = pid % LANES * G
    pid = pid // LANES
    strips = d * tl.cdiv(tl.cdiv(H, d), ROWS)
    part = tl.cdiv(strips, SHARES)
    first = pid % SHARES * part
    # Nothing to do for lanes that only a branch of another dilation has.
    last = tl.where(beside < d * tl.cdiv(tl.cdiv(W, d), N), tl.minimum(first + part, strips), 0)
    lane = beside + tl.arange(0, G)
    across, column = lane % d, lane // d * N
    return n, d, c, pid // SHARES, first, last, column, (W - across + d - 1) // d, (across + column * d) * C


@triton.jit
def _where(masks, condition, N: tl.constexpr):
    """The masks, or none of them."""
    found = ()
    for n in tl.static_range(N + 2):
        found += (masks[n] & condition,)
    return found


@triton.jit
def _rows(strip, image, H, W, C, ROWS, D):
    """First row of a strip and one after the last, in the phase; the rows that it has, and where it begins."""
    down, top = strip % D, strip // D * ROWS
    rows = (H - down + D - 1) // D
    return top, tl.minimum(top + ROWS, rows), rows, (image.to(tl.int64) * H + down) * W * C


@triton.jit
def _first(x, w, c, known, C, H, W, D):
    """The first value of a branch's map, of the first image's first pixel: four taps are in the map."""
    total = tl.zeros(c.shape, tl.float32)
    for m in tl.static_range(4):
        down, right = m // 2 * D, m % 2 * D
        value = tl.load(x + (down * W + right) * C + c, mask=known & (down < H) & (right < W), other=0.0)
        tap = tl.load(w + c * 9 + 4 + m // 2 * 3 + m % 2, mask=known, other=0.0)
        total += value.to(tl.float32) * tap.to(tl.float32)
    return total


@triton.jit
def _finish(y, grad, at, step, sums, one, two, centre, masks, N: tl.constexpr, GRAD: tl.constexpr):
    """Stores a row of a branch's map; returns the two sums with it."""
    for n in tl.static_range(N):
        mask = masks[n + 1]
        tl.store(y + at + n * step, sums[n].to(y.dtype.element_ty), mask=mask)
        value = tl.where(mask, sums[n] - centre, 0.0)
        if GRAD:
            g = tl.load(grad + at + n * step, mask=mask, other=0.0).to(tl.float32)
            one += g
            two += g * value
        else:
            one += value
            two += value * value
    return one, two


@triton.jit(do_not_specialize=_SIZES)
def dilated_forward_kernel(
    x, grad, pack, mean, first, y, shares, C, H, W, ROWS, SHARES, LANES, D0, D1, D2, D3, FAR,
    V: tl.constexpr, T: tl.constexpr, N: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """The T branches' maps, y[T, B, H, W, C], FAR apart; C and FAR count vectors of V channels.

    shares[program, 2, T, C] are of d and d², d being y less its first value, which goes to first[T, C]. GRAD: they are
    of grad and grad (y - mean).
    """
    C, FAR = C * V, FAR.to(tl.int64) * V
    n, D, c, image, begin, end, w, width, column = _place(
        C, H, W, ROWS, SHARES, LANES, D0, D1, D2, D3, T, N, G, BC
    )  # fmt: skip
    weight = pack + n * 9 * C
    known = c < C
    if GRAD:
        centre = tl.load(mean + n * C + c, mask=known, other=0.0)
    else:
        centre = _first(x, weight, c, known, C, H, W, D)
        tl.store(first + n * C + c, centre, mask=known & (tl.program_id(0) < T * tl.cdiv(C, BC)))
    centre = centre[None, :]
    a0, a1, a2 = _taps(weight, c, known, 0)
    b0, b1, b2 = _taps(weight, c, known, 1)
    c0, c1, c2 = _taps(weight, c, known, 2)
    columns = _masks(w, width, known, N, False)
    stride, step = (W * C).to(tl.int64) * D, C * D
    at = column[:, None] + c[None, :]
    zeros = tl.zeros((G, BC), dtype=tl.float32)
    nothing = ()
    for _ in tl.static_range(N):
        nothing += (zeros,)
    one, two = zeros, zeros
    for strip in tl.range(begin, end, num_stages=1):
        top, bottom, rows, start = _rows(strip, image, H, W, C, ROWS, D)
        source, target, cotangent = x + start, y + start + n * FAR, grad + start
        last = tl.minimum(bottom, rows - 1)
        masks = _where(columns, top < rows, N)  # the last strip of a phase may be empty
        inside = _where(masks, top > 0, N)
        before = _load(source + (top - 1) * stride + at, step, inside, N)
        row = _load(source + top * stride + at, step, masks, N)
        ahead = _load(source + tl.minimum(top + 1, last) * stride + at, step, masks, N)
        level = _add_row(nothing, a0, a1, a2, _floats(before, N), N)
        values = _floats(row, N)
        above = _add_row(level, b0, b1, b2, values, N)
        level = _add_row(nothing, a0, a1, a2, values, N)
        for r in tl.range(top + 1, bottom, num_stages=1):
            values = _floats(ahead, N)
            ahead = _load(source + tl.minimum(r + 1, last) * stride + at, step, masks, N)
            above = _add_row(above, c0, c1, c2, values, N)
            place = (r - 1) * stride + at
            one, two = _finish(target, cotangent, place, step, above, one, two, centre, masks, N, GRAD)
            above = _add_row(level, b0, b1, b2, values, N)
            level = _add_row(nothing, a0, a1, a2, values, N)
        values = _floats(ahead, N)
        below = bottom < rows
        l0, l1, l2 = tl.where(below, c0, 0.0), tl.where(below, c1, 0.0), tl.where(below, c2, 0.0)
        above = _add_row(above, l0, l1, l2, values, N)
        place = (bottom - 1) * stride + at
        one, two = _finish(target, cotangent, place, step, above, one, two, centre, masks, N, GRAD)
    part = tl.program_id(0) // (T * tl.cdiv(C, BC))
    place = shares + (part.to(tl.int64) * 2 * T + n) * C + c
    tl.store(place, tl.sum(one, 0), mask=known)
    tl.store(place + T * C, tl.sum(two, 0), mask=known)


@triton.jit
def _slope(raw, masks, p, q, r, N: tl.constexpr):
    """A row of the gradient of a branch's map, and nothing beyond the map."""
    found = ()
    for n in tl.static_range(N + 2):
        value = p * raw[n].to(tl.float32) + q * raw[N + 2 + n].to(tl.float32) + r
        found += (tl.where(masks[n], value, 0.0),)
    return found


@triton.jit(do_not_specialize=_SIZES)
def dilated_backward_kernel(
    grad, x, y, pack, slopes, out, shares, C, H, W, ROWS, SHARES, LANES, D0, D1, D2, D3, FAR, BRANCHES,
    V: tl.constexpr, T: tl.constexpr, N: tl.constexpr, G: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """What every branch adds to the gradient of the map, out[T, B, H, W, C], FAR apart like ``y``.

    The gradient of a branch's map is slopes[0] grad + slopes[1] y + slopes[2], of slopes[3, BRANCHES, C], where the T
    branches are the last. shares[program, T, 9, C] are those of the taps' gradients. C and FAR count vectors.
    """
    C, FAR = C * V, FAR.to(tl.int64) * V
    n, D, c, image, begin, end, w, width, column = _place(
        C, H, W, ROWS, SHARES, LANES, D0, D1, D2, D3, T, N, G, BC
    )  # fmt: skip
    weight = pack + n * 9 * C
    known = c < C
    a0, a1, a2 = _taps(weight, c, known, 0)
    b0, b1, b2 = _taps(weight, c, known, 1)
    c0, c1, c2 = _taps(weight, c, known, 2)
    taps = (a0, a1, a2, b0, b1, b2, c0, c1, c2)
    slopes += (BRANCHES - T + n) * C + c
    p = tl.load(slopes, mask=known, other=0.0)[None, :]
    q = tl.load(slopes + BRANCHES * C, mask=known, other=0.0)[None, :]
    r = tl.load(slopes + 2 * BRANCHES * C, mask=known, other=0.0)[None, :]
    columns = _masks(w, width, known, N, False)
    stride, step = (W * C).to(tl.int64) * D, C * D
    at = column[:, None] + c[None, :]
    zeros = tl.zeros((G, BC), dtype=tl.float32)
    found = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    for strip in tl.range(begin, end, num_stages=1):
        top, bottom, rows, start = _rows(strip, image, H, W, C, ROWS, D)
        g, u, v, target = grad + start, x + start, y + start + n * FAR, out + start + n * FAR
        last = tl.minimum(bottom, rows - 1)
        masks = _where(columns, top < rows, N)  # the last strip of a phase may be empty
        inside = _where(masks, top > 0, N)
        above = _slope(_fetch(g, v, (top - 1) * stride + at, step, inside, N, True), inside, p, q, r, N)
        level = _slope(_fetch(g, v, top * stride + at, step, masks, N, True), masks, p, q, r, N)
        raw = _fetch(g, v, tl.minimum(top + 1, last) * stride + at, step, masks, N, True)
        given = _given(u + top * stride + at, step, masks, N)
        for row in tl.range(top, bottom - 1, num_stages=1):
            below = _slope(raw, masks, p, q, r, N)
            now = given
            raw = _fetch(g, v, tl.minimum(row + 2, last) * stride + at, step, masks, N, True)
            given = _given(u + (row + 1) * stride + at, step, masks, N)
            place = row * stride + at
            found = _backward_row(target, place, step, masks, taps, found, above, level, below, now, N, True, False)
            above = level
            level = below
        final = _slope(raw, masks, p, q, r, N)
        beneath = ()
        for m in tl.static_range(N + 2):
            beneath += (tl.where(bottom < rows, final[m], 0.0),)
        place = (bottom - 1) * stride + at
        found = _backward_row(target, place, step, masks, taps, found, above, level, beneath, given, N, True, False)
    part = tl.program_id(0) // (T * tl.cdiv(C, BC))
    place = shares + (part.to(tl.int64) * T + n) * 9 * C + c
    for m in tl.static_range(9):
        tl.store(place + m * C, tl.sum(found[m], 0), mask=known)
