"""Triton kernels of batch-normalised parallel depthwise convolutions on small maps: no branch's map is ever made.

Of a channel, all that the norms and the weights' gradients ask of the batch are sums of products of two pixels,
gram[r, s] = Σ_b x[b, r] x[b, s], which is one matrix product. With t, u taps and y[p] = Σ_u w[u] x[p + u]:

    windows[t, u] = Σ_p gram[p + t, p + u],   moments[t] = Σ x[p + t] y[p] = Σ_u windows[t, u] w[u]
    Σ y² = Σ_t w[t] moments[t],   sums[t] = Σ x[p + t],   Σ y = Σ_t w[t] sums[t]

With means and variances known, all branches together are one convolution, with the merged kernel. Backward, a map's
gradient is p grad + q y + r. The first part is again one convolution, turned; the second, convolved back, is a
product with a matrix over the pixels:

    own[r, s] = Σ_n q_n Σ_p w_n[r - p] w_n[s - p]

Names: B, C, H, W sizes of the map; W = WV * VW, VW columns of which may be loaded at once; K side of the window that
the taps of all branches lie in, P = K // 2; SIZES, DILATIONS and EPS of the N branches, 8 at most, NB a power of two
no less than N. ``pack`` holds the weights of all branches one after another, (C, k, k) each, then, from NORMS on,
gammas and betas.

H, W and K are 16 at most, and wherever pixels r = (r1, r2) or taps t = (t1, t2) number rows or columns they are
counted r1 * 16 + r2, t1 * 16 + t2, so that offsets are constants; in ``dense``, (C, N, K, 16), too, which is zero
where a branch has no tap.
"""

import triton
import triton.language as tl

_SIZES = ('B', 'C', 'H', 'W', 'WV', 'K', 'BLOCKS', 'COUNT', 'NORMS')


@triton.jit
def _within(x, size):
    """0 <= x < size in one comparison."""
    return x.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def _box_sums(box, x):
    """The product with a matrix of zeros and ones, as exact as sums in float32 are, in two of tf32."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    low = tl.dot(box, x - high, input_precision='tf32')
    return tl.dot(box, high, low, input_precision='tf32')


@triton.jit
def _places(c, t, C, K, SIZES: tl.constexpr, DILATIONS: tl.constexpr, N: tl.constexpr, NB: tl.constexpr):
    """Where in ``pack`` every branch's weight of every tap is, (NB, taps), and whether it has one."""
    n = tl.arange(0, NB)
    start, size, step = tl.zeros((NB,), tl.int32), tl.zeros((NB,), tl.int32), tl.full((NB,), 1, tl.int32)
    before = 0
    for m in tl.static_range(N):
        start = tl.where(n == m, before, start)
        size = tl.where(n == m, SIZES[m], size)
        step = tl.where(n == m, DILATIONS[m], step)
        before += C * (SIZES[m] * SIZES[m])
    start, size, step = start[:, None], size[:, None], step[:, None]
    a = (t // 16 - K // 2)[None, :] + size // 2 * step
    b = (t % 16 - K // 2)[None, :] + size // 2 * step
    known = _within(a, size * step) & _within(b, size * step) & (a % step + b % step == 0)
    return start + c * size * size + a // step * size + b // step, known


@triton.jit(do_not_specialize=_SIZES)
def spread_kernel(
    pack, dense, C, K,
    SIZES: tl.constexpr, DILATIONS: tl.constexpr, N: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """dense[c, n, t], a channel of it."""
    c = tl.program_id(0)
    n = tl.arange(0, NB)[:, None]
    t = tl.arange(0, 256)
    place, known = _places(c, t, C, K, SIZES, DILATIONS, N, NB)
    value = tl.load(pack + place, mask=known, other=0.0)
    tl.store(dense + (c * N + n) * (K * 16) + t[None, :], value, mask=(n < N) & (t < K * 16)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def gram_kernel(
    x, gram, pixel_sums, B, C, H, WV, BLOCKS, VW: tl.constexpr, BB: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """gram[c, r, s] = Σ_b x[b, c, r] x[b, c, s] where s1 >= r1, and pixel_sums[c, r] = Σ_b x[b, c, r]."""
    W = WV * VW
    pid = tl.program_id(0)
    c = pid // (BLOCKS * BLOCKS)
    i = pid // BLOCKS % BLOCKS * BG
    j = pid % BLOCKS * BG
    if j >= i:
        r = i + tl.arange(0, BG)
        s = j + tl.arange(0, BG)
        b = tl.arange(0, BB)
        from_left, left_there = r // 16 * W + r % 16, (r // 16 < H) & (r % 16 < W)
        from_right, right_there = s // 16 * W + s % 16, (s // 16 < H) & (s % 16 < W)
        acc = tl.zeros((BG, BG), dtype=tl.float32)
        for first in range(0, B, BB):
            image = ((first + b) * C + c).to(tl.int64) * H * W
            inside = (first + b < B)[:, None]
            left = tl.load(x + image[:, None] + from_left[None, :], mask=inside & left_there[None, :], other=0.0)
            right = tl.load(x + image[:, None] + from_right[None, :], mask=inside & right_there[None, :], other=0.0)
            acc = tl.dot(tl.trans(left), right, acc)
        tl.store(gram + c.to(tl.int64) * H * 4096 + r[:, None] * 256 + s[None, :], acc, mask=(r // 16 < H)[:, None])
        if i == j:
            total = tl.zeros((BG,), dtype=tl.float32)
            for first in range(0, B, BB):
                image = ((first + b) * C + c).to(tl.int64) * H * W
                there = (first + b < B)[:, None] & left_there[None, :]
                left = tl.load(x + image[:, None] + from_left[None, :], mask=there, other=0.0)
                total += tl.sum(left.to(tl.float32), 0)
            tl.store(pixel_sums + c * 256 + r, total)


@triton.jit(do_not_specialize=_SIZES)
def window_sums_kernel(gram, windows, H, W, K):
    """windows[c, t, u] for u1 - t1 = delta >= 0, of the taps t in one half of the window.

    Of t1 >= P the pixels p + t are those from a row on; of t1 < P, those up to a row. Pairs (r2, s2) of columns lie in
    tiles as (r2, e), s2 = r2 + e, so that sums over pairs at the same distance run down a tile's column.
    """
    P = K // 2
    pid = tl.program_id(0)
    deltas = tl.minimum(K, H)
    c = (pid // (2 * deltas)).to(tl.int64)
    upper = pid // deltas % 2 == 0
    delta = pid % deltas
    line = tl.arange(0, 16)[:, None]
    e = tl.arange(0, 32)[None, :] - 16
    inside = (line + e >= 0) & (line + e < 16)
    source = gram + c * H * 4096 + delta * 16 + (line * 257 + e)
    box = _within(tl.arange(0, 16)[None, :] - line + P, W).to(tl.float32)
    target = windows + c * K * 4096 + delta * 16 + (line * 257 + e)
    acc = tl.zeros((16, 32), dtype=tl.float32)
    for n in range(0, H):
        r1 = n
        t1 = n - (H - 1) + P
        if not upper:
            r1 = H - 1 - n
            t1 = r1 + P
        acc += tl.load(source + r1 * 4112, mask=inside & (r1 + delta < H), other=0.0)
        if ((t1 < P) == upper) & _within(t1, K) & (t1 + delta < K):
            # All 16 columns are written: those past the window's are numbers, too, and meet weights that are zero.
            tl.store(target + t1 * 4112, _box_sums(box, acc), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def moments_kernel(pixel_sums, windows, dense, moments, sums, H, W, K, N: tl.constexpr, BU: tl.constexpr):
    """moments[c, n, t] of a row of taps t; the first program of a channel also sums[c, t]."""
    P = K // 2
    pid = tl.program_id(0)
    c = pid // K
    t1 = pid % K
    t2 = tl.arange(0, 16)
    n = tl.arange(0, 16)
    windows += c.to(tl.int64) * K * 4096
    acc = tl.zeros((16, 16), dtype=tl.float32)
    for start in range(0, K * 16, BU):
        u = start + tl.arange(0, BU)
        u1 = u // 16
        # What no two pixels see is not written: taps further apart than the map is wide, or further from the centre.
        seen = (u1 < K) & _within(u1 - P + H - 1, 2 * H - 1) & _within(t1 - P + H - 1, 2 * H - 1)
        after = seen & _within(u1 - t1, H)
        a = tl.load(windows + (t1 * 16 + t2)[:, None] * 256 + u[None, :], mask=after[None, :], other=0.0)
        before = seen & _within(t1 - u1 - 1, H - 1)
        a += tl.trans(tl.load(windows + u[:, None] * 256 + (t1 * 16 + t2)[None, :], mask=before[:, None], other=0.0))
        inside = (u1 < K)[:, None] & (n < N)[None, :]
        w = tl.load(dense + (c * N + n)[None, :] * (K * 16) + u[:, None], mask=inside, other=0.0)
        acc = tl.dot(a, w, acc, input_precision='tf32x3')
    tl.store(moments + ((c * N + n)[None, :] * K + t1) * 16 + t2[:, None], acc, mask=(n < N)[None, :])
    if t1 == 0:
        rows = tl.load(pixel_sums + c * 256 + t2[:, None] * 16 + t2[None, :], mask=(t2 < H)[:, None], other=0.0)
        down = _within(t2[None, :] - t2[:, None] + P, H).to(tl.float32)
        across = _within(t2[:, None] - t2[None, :] + P, W).to(tl.float32)
        total = tl.dot(tl.dot(down, rows, input_precision='ieee'), across, input_precision='ieee')
        tl.store(sums + c * (K * 16) + t2[:, None] * 16 + t2[None, :], total, mask=(t2 < K)[:, None])


@triton.jit
def _eps(EPS: tl.constexpr, N: tl.constexpr, NB: tl.constexpr):
    n = tl.arange(0, NB)
    eps = tl.full((NB,), 1.0, dtype=tl.float32)
    for m in tl.static_range(N):
        eps = tl.where(n == m, EPS[m], eps)
    return eps


@triton.jit(do_not_specialize=_SIZES)
def statistics_kernel(
    pack, dense, moments, sums, mean, var, merged, shift, C, K, COUNT, NORMS,
    EPS: tl.constexpr, N: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Of a channel, mean and variance of every branch, and the merged kernel, (C, 1, K, K), with its bias."""
    c = tl.program_id(0)
    n = tl.arange(0, NB)
    t = tl.arange(0, 256)
    known = t < K * 16
    place = (c * N + n)[:, None] * (K * 16) + t[None, :]
    inside = (n < N)[:, None] & known[None, :]
    w = tl.load(dense + place, mask=inside, other=0.0)
    plain = tl.load(sums + c * (K * 16) + t, mask=known, other=0.0)
    centre = tl.sum(w * plain[None, :], 1) / COUNT
    square = tl.sum(w * tl.load(moments + place, mask=inside, other=0.0), 1) / COUNT
    spread = tl.maximum(square - centre * centre, 0.0)
    at = n * C + c
    tl.store(mean + at, centre, mask=n < N)
    tl.store(var + at, spread, mask=n < N)
    factor = tl.load(pack + NORMS + at, mask=n < N, other=0.0) / tl.sqrt(spread + _eps(EPS, N, NB))
    rest = tl.load(pack + NORMS + N * C + at, mask=n < N, other=0.0) - centre * factor
    tl.store(shift + c, tl.sum(rest))
    at = merged + c * (K * K) + t // 16 * K + t % 16
    tl.store(at, tl.sum(w * factor[:, None], 0), mask=known & (t % 16 < K))


@triton.jit(do_not_specialize=_SIZES)
def slopes_kernel(
    grad, cross, sums, moments, pack, dense, mean, var, scale, rest, left, right, dweights, dgamma, dbeta,
    B, C, H, WV, K, COUNT, NORMS,
    SIZES: tl.constexpr, DILATIONS: tl.constexpr, EPS: tl.constexpr, N: tl.constexpr, NB: tl.constexpr,
    VW: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Gradients of the weights and norms of a channel, from cross[c, t] = Σ x[p + t] grad[p].

    And for the gradient of the map: rest[c, s], what all r together give the pixels; and what ``own`` / scale is made
    of, left[c, 0, t1, 15 + d, n] = sign(q_n) f_n w_n[t1, P + d], left[c, 1] the opposite, right[c, t1, 15 + d, n] =
    f_n w_n[t1, P + d], with |q_n| = scale f_n²: numbers that float16 holds, whatever q is.
    """
    W = WV * VW
    P = K // 2
    c = tl.program_id(0)
    n = tl.arange(0, NB)
    t = tl.arange(0, 256)
    t1, t2 = t // 16, t % 16
    known = t < K * 16
    inside = (n < N)[:, None] & known[None, :]
    place = (c * N + n)[:, None] * (K * 16) + t[None, :]
    at = n * C + c
    w = tl.load(dense + place, mask=inside, other=0.0)
    pair = tl.load(cross + c * (K * K) + t1 * K + t2, mask=known & (t2 < K), other=0.0)[None, :]
    b = tl.arange(0, BB)
    added = tl.zeros((BB, 256), dtype=tl.float32)
    for first in range(0, B, BB):
        image = ((first + b) * C + c).to(tl.int64) * H * W
        there = (first + b < B)[:, None] & ((t1 < H) & (t2 < W))[None, :]
        added += tl.load(grad + image[:, None] + (t1 * W + t2)[None, :], mask=there, other=0.0).to(tl.float32)
    one = tl.sum(added)
    centre = tl.load(mean + at, mask=n < N, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.load(var + at, mask=n < N, other=0.0) + _eps(EPS, N, NB))
    two = tl.sum(w * pair, 1) - centre * one
    p = tl.load(pack + NORMS + at, mask=n < N, other=0.0) * inverse
    q = -p * inverse * inverse * two / COUNT
    r = -p * one / COUNT - q * centre
    tl.store(dgamma + at, two * inverse, mask=n < N)
    tl.store(dbeta + at, tl.zeros((NB,), tl.float32) + one, mask=n < N)
    found = p[:, None] * pair + q[:, None] * tl.load(moments + place, mask=inside, other=0.0)
    found += r[:, None] * tl.load(sums + c * (K * 16) + t, mask=known, other=0.0)[None, :]
    target, taken = _places(c, t, C, K, SIZES, DILATIONS, N, NB)
    tl.store(dweights + target, found, mask=taken)
    most = tl.sum(tl.abs(q) * tl.sum(w * w, 1)) / 64
    most = tl.where(most > 0.0, most, 1.0)
    tl.store(scale + c, most)
    k = tl.arange(0, 16)
    window = tl.zeros((16, 16), dtype=tl.float32)
    for m in tl.static_range(N):
        spot = (c * N + m) * (K * 16) + k[:, None] * 16 + k[None, :]
        window += tl.sum(tl.where(n == m, r, 0.0)) * tl.load(dense + spot, mask=(k < K)[:, None], other=0.0)
    down = _within(k[:, None] - k[None, :] + P, H).to(tl.float32)
    across = _within(k[None, :] - k[:, None] + P, W).to(tl.float32)
    pixels = tl.dot(tl.dot(down, window, input_precision='ieee'), across, input_precision='ieee')
    tl.store(rest + c * 256 + k[:, None] * 16 + k[None, :], pixels)
    share = tl.sqrt(tl.abs(q) / most)
    sign = tl.where(q < 0.0, -1.0, 1.0)
    i = tl.arange(0, 512)[:, None]
    n = tl.arange(0, 8)[None, :]
    row, tap = i // 32, i % 32 - 15 + P
    there = (row < K) & (tap >= 0) & (tap < K) & (n < N)
    value = tl.load(dense + ((c * N + n) * K + row) * 16 + tap, mask=there, other=0.0)
    # Branches are along another axis here.
    same = tl.arange(0, 8)[:, None] == tl.arange(0, NB)[None, :]
    share_of = tl.sum(tl.where(same, share[None, :], 0.0), 1)[None, :]
    sign_of = tl.sum(tl.where(same, sign[None, :], 0.0), 1)[None, :]
    value = (value * share_of).to(tl.float16)
    tl.store(right + c * (K * 256) + i * 8 + n, value, mask=row < K)
    value = (value * sign_of).to(tl.float16)
    tl.store(left + c * (K * 512) + i * 8 + n, value, mask=row < K)
    tl.store(left + c * (K * 512) + K * 256 + i * 8 + n, -value, mask=row < K)


@triton.jit(do_not_specialize=_SIZES)
def matrices_kernel(left, right, own, H, W, K, BD: tl.constexpr):
    """own[c, r, s] / scale where s1 - r1 is one of BD numbers following each other, and own[c, s, r], the same.

    Of the two one is computed, so no distance is negative.
    """
    P = K // 2
    pid = tl.program_id(0)
    groups = tl.cdiv(H, BD)
    c = pid // groups
    j = tl.arange(0, BD * 16)
    delta = pid % groups * BD + j // 16
    r2 = tl.arange(0, 16)
    # The product runs over the columns p2 = 15 - k // 8 of p and the branches: a row of it is one piece of ``left``,
    # a column one of ``right``.
    k = tl.arange(0, 128)
    a_at = left + c * (K * 512) + r2[:, None] * 8 + k[None, :]
    b_at = right + c * (K * 256) + (delta * 256 + j % 16 * 8)[:, None] + k[None, :]
    inside = (15 - k // 8 < W)[None, :]
    own += c.to(tl.int64) * H * 4096
    at = own + r2[:, None] * 256 + (delta * 16 + j % 16)[None, :]
    across = own + (delta * 4096 + j % 16 * 256)[:, None] + r2[None, :]
    # Row r1 is made of the rows t1 of taps for which r1 - t1 is in the map: from row to row one comes, one goes.
    acc = tl.zeros((16, BD * 16), dtype=tl.float32)
    for r1 in range(-tl.minimum(P, H - 1), H):
        comes = r1 <= P
        t1 = r1 + P
        sign = 0
        if not comes:
            t1 = r1 + P - H
            sign = K * 256
        a = tl.load(a_at + sign + t1 * 256, mask=inside & (t1 >= 0), other=0.0)
        b = tl.load(b_at + t1 * 256, mask=_within(t1 + delta, K)[:, None], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
        if comes & (r1 > 0) & (r1 - H >= -P):  # in a map smaller than the window both happen
            t1 = r1 + P - H
            a = tl.load(a_at + K * 256 + t1 * 256, mask=inside, other=0.0)
            b = tl.load(b_at + t1 * 256, mask=_within(t1 + delta, K)[:, None], other=0.0)
            acc = tl.dot(a, tl.trans(b), acc)
        there = (r1 >= 0) & _within(r1 + delta, H)
        found = acc.to(own.dtype.element_ty)
        tl.store(at + r1 * 4112, found, mask=there[None, :])
        tl.store(across + r1 * 4112, tl.trans(found), mask=(there & (delta > 0))[:, None])


@triton.jit(do_not_specialize=_SIZES)
def input_grad_kernel(
    x, grad, own, band, scale, rest, out, B, C, H, WV, K,
    VW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM images and BN pixels of out = scale (x own) + rest + grad convolved with the merged kernel, turned.

    ``band`` is that of ``depthwise_band_kernel``, with 16 x 16 entries a row of the kernel.
    """
    W = WV * VW
    P = K // 2
    pid = tl.program_id(0)
    columns, rows = tl.cdiv(H * 16, BN), tl.cdiv(B, BM)
    c = pid // (columns * rows)
    b = pid // columns % rows * BM + tl.arange(0, BM)
    s = pid % columns * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    image = (b * C + c).to(tl.int64) * H * W
    from_pixel = image[:, None] + (k // 16 * W + k % 16)[None, :]
    matrix = own + c.to(tl.int64) * H * 4096 + k[:, None] * 256 + s[None, :]
    distance = (k // 16)[:, None] - (s // 16)[None, :] + P
    bands = band + c * (K * 256) + distance * 256 + (k % 16)[:, None] * 16 + (s % 16)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for row in range(0, H, BK // 16):
        inside = (k % 16 < W) & (row + k // 16 < H)
        a = tl.load(x + from_pixel + row * W, mask=(b < B)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(a, tl.load(matrix + row * 4096, mask=inside[:, None], other=0.0), acc)
    acc *= tl.load(scale + c)
    for row in range(0, H, BK // 16):
        inside = (k % 16 < W) & (row + k // 16 < H)
        a = tl.load(grad + from_pixel + row * W, mask=(b < B)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(a, tl.load(bands + row * 256, mask=_within(distance + row, K), other=0.0), acc)
    there = (s // 16 < H) & (s % 16 < W)
    acc += tl.load(rest + c * 256 + s)[None, :]
    target = out + image[:, None] + (s // 16 * W + s % 16)[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(b < B)[:, None] & there[None, :])
