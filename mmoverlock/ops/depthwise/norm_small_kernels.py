"""Triton kernels of batch-normalised parallel depthwise convolutions on small maps: no branch's map is ever made.

Of a channel, all that the norms and the weights' gradients ask of the batch are sums of products of two pixels,
gram[r, s] = Σ_b x[b, r] x[b, s], which is one matrix product. With t, u taps and y[p] = Σ_u w[u] x[p + u]:

    windows[t, u] = Σ_p gram[p + t, p + u],   moments[t] = Σ x[p + t] y[p] = Σ_u windows[t, u] w[u]
    Σ y² = Σ_t w[t] moments[t],   sums[t] = Σ x[p + t],   Σ y = Σ_t w[t] sums[t]

With means and variances known, all branches together are one convolution, with the merged kernel. Backward, a map's
gradient is p grad + q y + r. The first part is again one convolution, turned; the second, convolved back, is a
product with a matrix over the pixels, which is made of products of two taps as windows is made of those of two pixels:

    pairs[t, u] = Σ_n q_n w_n[t] w_n[u],   own[r, s] = Σ_p pairs[r - p, s - p]

Names: B, C, H, W sizes of the map; H * W = HWV * V pixels, V of which may be loaded at once; FIRST channel of those
worked on, ``local`` counts from it; K side of the window that the taps of all branches lie in, P = K // 2; SIZES,
DILATIONS and EPS of the N branches. ``pack`` holds the weights of all branches one after another, (C, k, k) each,
then, from NORMS on, gammas and betas.

BW, KB, NB: powers of two no less than W, K, N. Where pixels r = (r1, r2) and taps t = (t1, t2) number the rows and
columns of matrices they are counted r1 * BW + r2, t1 * KB + t2, so that offsets are constants; only ``own`` and
``direct`` count pixels as the map does, with LINE from row to row. ``dense``, (C, N, K, KB), is zero where a branch
has no tap. Pairs (r2, s2) of columns lie in tiles as (r2, e), s2 = r2 + e: sums over pairs at the same distance run
down a tile's column.
"""

import triton
import triton.language as tl

_SIZES = ('B', 'C', 'FIRST', 'H', 'W', 'HWV', 'K', 'BLOCKS', 'COUNT', 'NORMS')


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
def _places(
    c, t, C, K, SIZES: tl.constexpr, DILATIONS: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, KB: tl.constexpr
):
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
    a = (t // KB - K // 2)[None, :] + size // 2 * step
    b = (t % KB - K // 2)[None, :] + size // 2 * step
    known = _within(a, size * step) & _within(b, size * step) & (a % step + b % step == 0)
    return start + c * size * size + a // step * size + b // step, known


@triton.jit(do_not_specialize=_SIZES)
def spread_kernel(
    pack, dense, C, K,
    SIZES: tl.constexpr, DILATIONS: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """dense[c, n, t], a channel of it."""
    c = tl.program_id(0)
    n = tl.arange(0, NB)[:, None]
    t = tl.arange(0, KB * KB)
    place, known = _places(c, t, C, K, SIZES, DILATIONS, N, NB, KB)
    value = tl.load(pack + place, mask=known, other=0.0)
    tl.store(dense + (c * N + n) * (K * KB) + t[None, :], value, mask=(n < N) & (t < K * KB)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def gram_kernel(
    x, gram, pixel_sums, B, C, FIRST, H, W, HWV, BLOCKS,
    V: tl.constexpr, BB: tl.constexpr, BG: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """gram[local, r, s] = Σ_b x[b, c, r] x[b, c, s] and pixel_sums[local, r] = Σ_b x[b, c, r].

    Where s is of a row of the map above that of r, it may be left unwritten.
    """
    HW = HWV * V
    pid = tl.program_id(0)
    local = pid // (BLOCKS * BLOCKS)
    i = pid // BLOCKS % BLOCKS * BG
    j = pid % BLOCKS * BG
    if j + BG > i // W * W:
        r = i + tl.arange(0, BG)
        s = j + tl.arange(0, BG)
        b = tl.arange(0, BB)
        acc = tl.zeros((BG, BG), dtype=tl.float32)
        for first in range(0, B, BB):
            image = ((first + b) * C + FIRST + local).to(tl.int64) * HWV * V
            inside = (first + b < B)[:, None]
            left = tl.load(x + image[:, None] + r[None, :], mask=inside & (r < HW)[None, :], other=0.0)
            right = tl.load(x + image[:, None] + s[None, :], mask=inside & (s < HW)[None, :], other=0.0)
            # A pixel more, which is always one.
            right = tl.where((s == HW)[None, :], tl.full((), 1.0, right.dtype), right)
            acc = tl.dot(tl.trans(left), right, acc)
        row, column = r // W * BW + r % W, s // W * BW + s % W
        at = (local * (H * BW) + row).to(tl.int64)[:, None] * (BW * BW) + column[None, :]
        tl.store(gram + at, acc, mask=(r < HW)[:, None] & (s < HW)[None, :])
        if j + BG > HW:
            total = tl.sum(tl.where((s == HW)[None, :], acc, 0.0), 1)
            tl.store(pixel_sums + local * (BW * BW) + row, total, mask=r < HW)


@triton.jit(do_not_specialize=_SIZES)
def window_sums_kernel(gram, windows, H, W, K, BW: tl.constexpr, KB: tl.constexpr):
    """windows[local, t, u] for u1 - t1 = delta >= 0, of the taps t in one half of the window.

    Of t1 >= P the pixels p + t are those from a row on; of t1 < P, those up to a row.
    """
    P = K // 2
    pid = tl.program_id(0)
    deltas = tl.minimum(K, H)
    local = (pid // (2 * deltas)).to(tl.int64)
    upper = pid // deltas % 2 == 0
    delta = pid % deltas
    e = tl.arange(0, 2 * BW) - BW
    r2 = tl.arange(0, BW)
    inside = (r2 < W)[:, None] & _within(r2[:, None] + e[None, :], W)
    source = gram + local * H * (BW * BW * BW) + delta * BW + (r2[:, None] * (BW * BW + 1) + e[None, :])
    t2 = tl.arange(0, KB)
    # All of KB columns are written: those past the window's are numbers, too, and meet weights that are zero.
    u2 = t2[:, None] + e[None, :]
    keep = (u2 >= 0) & (u2 < KB)
    box = _within(r2[None, :] - t2[:, None] + P, W).to(tl.float32)
    target = windows + local * K * (KB * KB * KB) + delta * KB + (t2[:, None] * (KB * KB + 1) + e[None, :])
    acc = tl.zeros((BW, 2 * BW), dtype=tl.float32)
    for n in range(0, H):
        r1 = n
        t1 = n - (H - 1) + P
        if not upper:
            r1 = H - 1 - n
            t1 = r1 + P
        acc += tl.load(source + r1 * (BW * BW * BW + BW), mask=inside & (r1 + delta < H), other=0.0)
        if ((t1 < P) == upper) & _within(t1, K) & (t1 + delta < K):
            tl.store(target + t1 * (KB * KB * KB + KB), _box_sums(box, acc), mask=keep)


@triton.jit(do_not_specialize=_SIZES)
def moments_kernel(
    pixel_sums, windows, dense, moments, sums, C, FIRST, H, W, K,
    N: tl.constexpr, BW: tl.constexpr, KB: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """moments[c, n, t] of BT taps t; the first program of a channel also sums[c, t]."""
    P = K // 2
    blocks = tl.cdiv(K * KB, BT)
    pid = tl.program_id(0)
    local = pid // blocks
    c = FIRST + local
    block = pid % blocks
    t = block * BT + tl.arange(0, BT)
    t1 = t // KB
    n = tl.arange(0, 16)
    windows += local.to(tl.int64) * K * (KB * KB * KB)
    weights = dense + (c * N + n)[None, :] * (K * KB)
    # What no two pixels see is not written: taps further apart than the map is wide, or further from the centre.
    seen = _within(t1 - P + H - 1, 2 * H - 1) & (t1 < K)
    acc = tl.zeros((BT, 16), dtype=tl.float32)
    for start in range(block * BT, K * KB, BT):
        u = start + tl.arange(0, BT)
        u1 = u // KB
        also = _within(u1 - P + H - 1, 2 * H - 1) & (u1 < K)
        known = seen[:, None] & also[None, :] & _within(u1[None, :] - t1[:, None], H)
        a = tl.load(windows + t[:, None] * (KB * KB) + u[None, :], mask=known, other=0.0)
        w = tl.load(weights + u[:, None], mask=(u < K * KB)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision='tf32x3')
    for start in range(0, (block + 1) * BT, BT):
        u = start + tl.arange(0, BT)
        u1 = u // KB
        also = _within(u1 - P + H - 1, 2 * H - 1) & (u1 < K)
        known = seen[None, :] & also[:, None] & _within(t1[None, :] - u1[:, None] - 1, H - 1)
        a = tl.load(windows + u[:, None] * (KB * KB) + t[None, :], mask=known, other=0.0)
        w = tl.load(weights + u[:, None], mask=(u < K * KB)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), w, acc, input_precision='tf32x3')
    tl.store(moments + (c * N + n)[None, :] * (K * KB) + t[:, None], acc, mask=(t < K * KB)[:, None] & (n < N)[None, :])
    if block == 0:
        r = tl.arange(0, BW)
        inside = (r < H)[:, None] & (r < W)[None, :]
        rows = tl.load(pixel_sums + local * (BW * BW) + r[:, None] * BW + r[None, :], mask=inside, other=0.0)
        k = tl.arange(0, KB)
        down = _within(r[None, :] - (k - P)[:, None], H).to(tl.float32)
        across = _within(r[:, None] - (k - P)[None, :], W).to(tl.float32)
        total = tl.dot(tl.dot(down, rows, input_precision='ieee'), across, input_precision='ieee')
        tl.store(sums + c * (K * KB) + k[:, None] * KB + k[None, :], total, mask=(k < K)[:, None])


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
    EPS: tl.constexpr, N: tl.constexpr, NB: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """Of a channel, mean and variance of every branch, and the merged kernel, (C, 1, K, K), with its bias."""
    c = tl.program_id(0)
    n = tl.arange(0, NB)
    t = tl.arange(0, KB * KB)
    known = t < K * KB
    place = (c * N + n)[:, None] * (K * KB) + t[None, :]
    inside = (n < N)[:, None] & known[None, :]
    w = tl.load(dense + place, mask=inside, other=0.0)
    plain = tl.load(sums + c * (K * KB) + t, mask=known, other=0.0)
    centre = tl.sum(w * plain[None, :], 1) / COUNT
    square = tl.sum(w * tl.load(moments + place, mask=inside, other=0.0), 1) / COUNT
    spread = tl.maximum(square - centre * centre, 0.0)
    at = n * C + c
    tl.store(mean + at, centre, mask=n < N)
    tl.store(var + at, spread, mask=n < N)
    factor = tl.load(pack + NORMS + at, mask=n < N, other=0.0) / tl.sqrt(spread + _eps(EPS, N, NB))
    rest = tl.load(pack + NORMS + N * C + at, mask=n < N, other=0.0) - centre * factor
    tl.store(shift + c, tl.sum(rest))
    at = merged + c * (K * K) + t // KB * K + t % KB
    tl.store(at, tl.sum(w * factor[:, None], 0), mask=known & (t % KB < K))


@triton.jit(do_not_specialize=_SIZES)
def slopes_kernel(
    cross, total, sums, moments, pack, dense, mean, var, slopes, scale, rest, dweights, dgamma, dbeta,
    C, H, W, K, COUNT, NORMS,
    SIZES: tl.constexpr, DILATIONS: tl.constexpr, EPS: tl.constexpr, N: tl.constexpr, NB: tl.constexpr,
    BW: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """Gradients of the weights and norms of a channel, from cross[c, t] = Σ x[p + t] grad[p] and total[c] = Σ grad.

    And for the gradient of the map: slopes[n, c] = q / scale[c], by which entries of ``own`` are up to 64, so that the
    small ones are not lost in float16; and rest[c, s], what all r together give the pixels.
    """
    P = K // 2
    c = tl.program_id(0)
    n = tl.arange(0, NB)
    t = tl.arange(0, KB * KB)
    t1, t2 = t // KB, t % KB
    known = t < K * KB
    inside = (n < N)[:, None] & known[None, :]
    place = (c * N + n)[:, None] * (K * KB) + t[None, :]
    at = n * C + c
    w = tl.load(dense + place, mask=inside, other=0.0)
    pair = tl.load(cross + c * (K * K) + t1 * K + t2, mask=known & (t2 < K), other=0.0)[None, :]
    one = tl.load(total + c)
    centre = tl.load(mean + at, mask=n < N, other=0.0)
    inverse = 1.0 / tl.sqrt(tl.load(var + at, mask=n < N, other=0.0) + _eps(EPS, N, NB))
    two = tl.sum(w * pair, 1) - centre * one
    p = tl.load(pack + NORMS + at, mask=n < N, other=0.0) * inverse
    q = -p * inverse * inverse * two / COUNT
    r = -p * one / COUNT - q * centre
    tl.store(dgamma + at, two * inverse, mask=n < N)
    tl.store(dbeta + at, tl.zeros((NB,), tl.float32) + one, mask=n < N)
    found = p[:, None] * pair + q[:, None] * tl.load(moments + place, mask=inside, other=0.0)
    found += r[:, None] * tl.load(sums + c * (K * KB) + t, mask=known, other=0.0)[None, :]
    target, taken = _places(c, t, C, K, SIZES, DILATIONS, N, NB, KB)
    tl.store(dweights + target, found, mask=taken)
    most = tl.sum(tl.abs(q) * tl.sum(w * w, 1)) / 64
    most = tl.where(most > 0.0, most, 1.0)
    tl.store(scale + c, most)
    tl.store(slopes + at, q / most, mask=n < N)
    k = tl.arange(0, KB)
    window = tl.zeros((KB, KB), dtype=tl.float32)
    for m in tl.static_range(N):
        spot = (c * N + m) * (K * KB) + k[:, None] * KB + k[None, :]
        window += tl.sum(tl.where(n == m, r, 0.0)) * tl.load(dense + spot, mask=(k < K)[:, None], other=0.0)
    s = tl.arange(0, BW)
    down = _within(s[:, None] - (k - P)[None, :], H).to(tl.float32)
    across = _within(s[None, :] - (k - P)[:, None], W).to(tl.float32)
    pixels = tl.dot(tl.dot(down, window, input_precision='ieee'), across, input_precision='ieee')
    tl.store(rest + c * (H * W) + s[:, None] * W + s[None, :], pixels, mask=(s < H)[:, None] & (s < W)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def pairs_kernel(dense, slopes, pairs, C, FIRST, K, N: tl.constexpr, KB: tl.constexpr, BT: tl.constexpr):
    """pairs[local, t, u] = Σ_n slope_n w_n[t] w_n[u], BT x BT of them."""
    blocks = tl.cdiv(K * KB, BT)
    pid = tl.program_id(0)
    local = pid // (blocks * blocks)
    c = FIRST + local
    t = pid // blocks % blocks * BT + tl.arange(0, BT)
    u = pid % blocks * BT + tl.arange(0, BT)
    n = tl.arange(0, 16)
    slope = tl.load(slopes + n * C + c, mask=n < N, other=0.0)
    start = dense + c * N * (K * KB)
    left = tl.load(start + n[None, :] * (K * KB) + t[:, None], mask=(n < N)[None, :] & (t < K * KB)[:, None], other=0.0)
    right = tl.load(
        start + n[:, None] * (K * KB) + u[None, :], mask=(n < N)[:, None] & (u < K * KB)[None, :], other=0.0
    )
    acc = tl.dot(left * slope[None, :], right, input_precision='tf32x3')
    at = local.to(tl.int64) * K * (KB * KB * KB) + t[:, None] * (KB * KB) + u[None, :]
    tl.store(pairs + at, acc.to(pairs.dtype.element_ty), mask=(t < K * KB)[:, None] & (u < K * KB)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def matrices_kernel(pairs, merged, own, direct, FIRST, H, W, K, BW: tl.constexpr, KB: tl.constexpr, LINE: tl.constexpr):
    """own[local, r, s] = Σ_p pairs[r - p, s - p] and direct[local, r, s] = merged[s - r], where s1 - r1 = delta."""
    P = K // 2
    pid = tl.program_id(0)
    local = pid // (2 * H - 1)
    delta = pid % (2 * H - 1) - (H - 1)
    t2 = tl.arange(0, KB)
    e = tl.arange(0, 2 * BW) - BW
    r2 = tl.arange(0, BW)
    inside = (r2 < W)[:, None] & _within(r2[:, None] + e[None, :], W)
    u2 = t2[:, None] + e[None, :]
    seen = (u2 >= 0) & (u2 < KB)
    box = _within(r2[:, None] - t2[None, :] + P, W).to(tl.float16)
    tap = tl.load(
        merged + (FIRST + local) * (K * K) + (delta + P) * K + e + P,
        mask=_within(e + P, K) & _within(delta + P, K), other=0.0,
    )  # fmt: skip
    tap = tl.broadcast_to(tap[None, :], (BW, 2 * BW)).to(direct.dtype.element_ty)
    target = local.to(tl.int64) * H * W * LINE + delta * W + (r2[:, None] * (LINE + 1) + e[None, :])
    source = pairs + local.to(tl.int64) * K * (KB * KB * KB) + delta * KB + (t2[:, None] * (KB * KB + 1) + e[None, :])
    # Row r1 is made of the rows t1 of taps for which r1 - t1 is in the map: at each row one comes, and one goes.
    acc = tl.zeros((KB, 2 * BW), dtype=tl.float32)
    for r1 in range(-tl.minimum(P, H - 1), tl.minimum(H, H - delta)):
        t1 = r1 + P
        if (t1 < K) & _within(t1 + delta, K):
            acc += tl.load(source + t1 * (KB * KB * KB + KB), mask=seen, other=0.0).to(tl.float32)
        t1 = r1 - H + P
        if (r1 > 0) & (t1 >= 0) & _within(t1 + delta, K):
            acc -= tl.load(source + t1 * (KB * KB * KB + KB), mask=seen, other=0.0).to(tl.float32)
        if (r1 >= 0) & (r1 + delta >= 0):
            place = target + r1 * W * (LINE + 1)
            entries = tl.dot(box, acc.to(tl.float16))
            tl.store(own + place, entries.to(own.dtype.element_ty), mask=inside)
            tl.store(direct + place, tap, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def input_grad_kernel(
    x, grad, own, direct, scale, rest, out, B, C, FIRST, HWV,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """out = scale (x own) + grad direct + rest, BM images and BN pixels of one channel."""
    HW = HWV * V
    pid = tl.program_id(0)
    columns, rows = tl.cdiv(HW, BN), tl.cdiv(B, BM)
    local = pid // (columns * rows)
    c = FIRST + local
    b = pid // columns % rows * BM + tl.arange(0, BM)
    s = pid % columns * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    image = (b * C + c).to(tl.int64) * HWV * V
    start = local.to(tl.int64) * HW * LINE
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, HW, BK):
        r = first + k
        a = tl.load(x + image[:, None] + r[None, :], mask=(b < B)[:, None] & (r < HW)[None, :], other=0.0)
        place = start + r[:, None] * LINE + s[None, :]
        # Past the map's last pixel a row is unwritten, and what it gives is not stored.
        acc = tl.dot(a, tl.load(own + place, mask=(r < HW)[:, None], other=0.0), acc)
    acc *= tl.load(scale + c)
    for first in range(0, HW, BK):
        r = first + k
        a = tl.load(grad + image[:, None] + r[None, :], mask=(b < B)[:, None] & (r < HW)[None, :], other=0.0)
        place = start + r[:, None] * LINE + s[None, :]
        acc = tl.dot(a, tl.load(direct + place, mask=(r < HW)[:, None], other=0.0), acc)
    acc += tl.load(rest + c * HW + s, mask=s < HW, other=0.0)[None, :]
    tl.store(out + image[:, None] + s[None, :], acc.to(out.dtype.element_ty), mask=(b < B)[:, None] & (s < HW)[None, :])
