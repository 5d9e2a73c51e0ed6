"""Triton kernels of the depthwise convolution: banded matrix products on tensor cores.

A channel's output is cut into tiles of HS rows x BN columns. Laid flat, a tile is one row of a matrix, and so is the
window of the input that it is made of, R rows x BU columns. The convolution is then one matrix product over the
window, out[m, (i, w)] = sum over (t, u) of window[m, (t, u)] * band[t - i, u, w], where band[dy] (BU, BN) holds row dy
of the kernel on its diagonals. Many tiles share a small kernel, which makes the product as large as tensor cores like
it; the zeros in the bands are the price. See docs/depthwise.md.

A dilated kernel looks from every row at rows a multiple of the dilation away only. A tile takes its rows at that
distance, so they are dense; along the columns the zeros are in the band. Tiles with the same first row make a strip.

FLAT: the map is so narrow that the window is as wide as the map. Then it is contiguous in memory, and (t, u) counts
without padding.

Names: B, C, H, W sizes of the map; V elements of a window that may be loaded at once, VO those of a row of the map,
W = WV * VO, H * W = HWV * V; K side of the kernel; STRIPS, and SW tiles beside each other in one; L strips of a group,
taken together if one alone is too few; LANES = B * L * SW tiles of a group; UP rows and LEFT columns by which a window
begins before its tile; BM tiles and BK pixels of their windows at a time.
"""

import triton
import triton.language as tl

# Compiled once for all sizes of map and kernel: training on images of many sizes must not compile at every step.
_SIZES = ('C', 'H', 'WV', 'HWV', 'K', 'DIL', 'R', 'UP', 'LEFTV', 'STRIPS', 'SW', 'L', 'LANES')
_SIZES += ('SPLITS', 'PART', 'REACH', 'FU', 'FN')


@triton.jit
def _within(x, size):
    """0 <= x < size in one comparison."""
    return x.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def _top(strip, DIL, HS: tl.constexpr):
    """First row of the tiles of a strip. Strips of the same row modulo DIL follow each other at distance DIL."""
    return strip % DIL + strip // DIL * (HS * DIL)


@triton.jit
def _write_band(
    weight, band, block, total, K: tl.constexpr, DIL: tl.constexpr, REACH: tl.constexpr, BU: tl.constexpr,
    BN: tl.constexpr, FLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = block * BLOCK + tl.arange(0, BLOCK)
    w = index % BN
    u = index // BN % BU
    row = index // (BN * BU)
    if FLIP:
        row = row // K * K + K - 1 - row % K
    tap = u - w - REACH
    dx = tap // DIL
    mask = (index < total) & (tap >= 0) & (tap % DIL == 0) & (dx < K)
    if FLIP:
        dx = K - 1 - dx
    value = tl.load(weight + row * K + dx, mask=mask, other=0.0)
    tl.store(band + index, value.to(band.dtype.element_ty), mask=index < total)


@triton.jit(do_not_specialize=_SIZES)
def depthwise_band_kernel(weights, bands, C, SPECS: tl.constexpr, FLIP: tl.constexpr, BLOCK: tl.constexpr):
    """Writes rows of kernels on the diagonals: band[c, dy, u, w] = weight[c, dy, (u - w - REACH) / DIL].

    Weights and bands of several kernels follow each other; SPECS says K, DIL, REACH, BU and BN of each. FLIP turns the
    kernels by half a turn, which makes a convolution its own input gradient.
    """
    block = tl.program_id(0)
    for m in tl.static_range(len(SPECS)):
        total = C * (SPECS[m][0] * SPECS[m][3] * SPECS[m][4])
        blocks = tl.cdiv(total, BLOCK)
        if (block >= 0) & (block < blocks):
            _write_band(
                weights, bands, block, total, SPECS[m][0], SPECS[m][1], SPECS[m][2], SPECS[m][3], SPECS[m][4], FLIP,
                BLOCK,
            )  # fmt: skip
        block -= blocks
        weights += C * (SPECS[m][0] * SPECS[m][0])
        bands += total


@triton.jit(do_not_specialize=_SIZES)
def depthwise_forward_kernel(
    x, band, bias, out, C, H, WV, HWV, K, DIL, R, UP, LEFTV, STRIPS, SW, L, LANES,
    V: tl.constexpr, VO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, HS: tl.constexpr, BN: tl.constexpr,
    BU: tl.constexpr, FLAT: tl.constexpr, ONE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM tiles of one channel of the output. ONE says that a group is one strip; ADD, to add to what is there."""
    W = WV * VO
    blocks = tl.cdiv(LANES, BM)
    groups = tl.cdiv(STRIPS, L)
    pid = tl.program_id(0)
    c = pid // (blocks * groups)
    group = pid % groups
    m = pid // groups % blocks * BM + tl.arange(0, BM)
    sw = m % SW
    real = m < LANES
    if ONE:
        image = ((m // SW) * C + c).to(tl.int64) * HWV * V
        strip = group
    else:
        image = ((m // (SW * L)) * C + c).to(tl.int64) * HWV * V
        strip = group * L + m // SW % L
        real = real & (strip < STRIPS)
    top = _top(strip, DIL, HS)

    k = tl.arange(0, BK)
    n = tl.arange(0, HS * BN)
    i, w = n // BN, n % BN
    shift = K // 2 - UP  # a window may begin elsewhere than K // 2 rows above
    bands = band + c.to(tl.int64) * K * (BU * BN) + w[None, :]
    if FLAT:
        place = (strip * HS - UP) * W // V * V
        length = R * W
        t, u = k // W, k % W
        inside = real[:, None]
    else:
        length = R * BU
        column = sw[:, None] * BN + (k % BU - LEFTV * V)[None, :]
        inside = real[:, None] & _within(column, W)
        place = (top - UP * DIL) * W + sw * BN - LEFTV * V
        from_column = k // BU * (DIL * W) + k % BU
    start = image + place

    acc = tl.zeros((BM, HS * BN), dtype=tl.float32)
    for first in range(0, length, BK):
        if FLAT:
            offset = first + k
            if ONE:
                valid = inside & _within(place + offset, HWV * V)[None, :]
            else:
                valid = inside & _within(place[:, None] + offset[None, :], HWV * V)
        else:
            t, u = first // BU + k // BU, k % BU
            offset = first // BU * (DIL * W) + from_column
            if ONE:
                valid = inside & _within(top + (t - UP) * DIL, H)[None, :]
            else:
                valid = inside & _within(top[:, None] + ((t - UP) * DIL)[None, :], H)
        a = tl.load(x + start[:, None] + offset[None, :], mask=valid, other=0.0)
        dy = (t + shift)[:, None] - i[None, :]
        taps = tl.load(bands + dy * (BU * BN) + (u * BN)[:, None], mask=_within(dy, K), other=0.0)
        acc = tl.dot(a, taps, acc, input_precision=PRECISION)
        if FLAT:
            u += BK % W
            carry = (u >= W).to(tl.int32)
            u -= carry * W
            t += BK // W + carry
    if BIAS:
        acc += tl.load(bias + c).to(tl.float32)

    column = sw[:, None] * BN + w[None, :]
    if ONE:
        mask = real[:, None] & (column < W) & (top + i * DIL < H)[None, :]
    else:
        mask = real[:, None] & (column < W) & (top[:, None] + (i * DIL)[None, :] < H)
    image = (m // (SW * L) * C + c).to(tl.int64) * H * WV * VO  # as before, but known to be a multiple of VO
    target = out + (image + top * W)[:, None] + (i * DIL * W)[None, :] + column
    if ADD:
        acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def depthwise_weight_grad_kernel(
    x, grad, products, C, H, WV, HWV, DIL, R, UP, LEFTV, STRIPS, SW, L, LANES, SPLITS, PART,
    V: tl.constexpr, VO: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, HS: tl.constexpr, BN: tl.constexpr,
    BU: tl.constexpr, FLAT: tl.constexpr, ONE: tl.constexpr, NP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """products[c, split, (t, u), (i, w)]: BK pixels of windows times all of the gradient's tiles, summed over tiles.

    A split is BM lanes of PART groups.
    """
    W = WV * VO
    blocks = tl.cdiv(LANES, BM)
    groups = tl.cdiv(STRIPS, L)
    length = R * BU
    if FLAT:
        length = R * W
    slices = tl.cdiv(length, BK)
    pid = tl.program_id(0)
    c = pid // (slices * SPLITS)
    split = pid // slices % SPLITS
    k = pid % slices * BK + tl.arange(0, BK)
    m = split % blocks * BM + tl.arange(0, BM)
    begin = split // blocks * PART
    end = tl.minimum(begin + PART, groups)
    sw = m % SW
    if ONE:
        image = ((m // SW) * C + c).to(tl.int64) * HWV * V
        lane = 0
    else:
        image = ((m // (SW * L)) * C + c).to(tl.int64) * HWV * V
        lane = m // SW % L
    n = tl.arange(0, NP)
    if FLAT:
        from_window, from_tile = k, n
        inside = (m < LANES)[:, None]
        inside_tile = (m < LANES)[:, None] & (n < HS * W)[None, :]
        start, start_tile = image, image
    else:
        t, u = k // BU - UP, k % BU - LEFTV * V
        i, w = n // BN, n % BN
        from_window, from_tile = t * (DIL * W) + u, i * (DIL * W) + w
        column = (sw * BN)[:, None] + u[None, :]
        inside = (m < LANES)[:, None] & _within(column, W)
        column = (sw * BN)[:, None] + w[None, :]
        inside_tile = (m < LANES)[:, None] & (column < W)
        start, start_tile = image + sw * BN, image + sw * BN

    acc = tl.zeros((BK, NP), dtype=tl.float32)
    for group in range(begin, end):
        strip = group * L + lane
        if FLAT:
            tile = strip * HS * W // V * V
            place = (strip * HS - UP) * W // V * V
            if ONE:
                valid = _within(place + k, HWV * V)[None, :]
                valid_tile = (tile + n < HWV * V)[None, :]
            else:
                valid = _within(place[:, None] + k[None, :], HWV * V)
                valid_tile = tile[:, None] + n[None, :] < HWV * V
        else:
            top = _top(strip, DIL, HS)
            tile = top * W
            place = tile
            if ONE:
                valid = _within(top + t * DIL, H)[None, :]
                valid_tile = (top + i * DIL < H)[None, :] & (group < STRIPS)
            else:
                valid = _within(top[:, None] + (t * DIL)[None, :], H)
                valid_tile = (top[:, None] + (i * DIL)[None, :] < H) & (strip < STRIPS)[:, None]
        a = tl.load(x + (start + place)[:, None] + from_window[None, :], mask=inside & valid, other=0.0)
        g = tl.load(grad + (start_tile + tile)[:, None] + from_tile[None, :], mask=inside_tile & valid_tile, other=0.0)
        acc = tl.dot(tl.trans(a), g, acc, input_precision=PRECISION)

    start = (c.to(tl.int64) * SPLITS + split) * length * NP
    tl.store(products + start + k[:, None] * NP + n[None, :], acc, mask=(k < length)[:, None] & (n < NP)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def depthwise_diagonal_kernel(
    products, out, K, DIL, R, UP, REACH, SPLITS, FU, FN,
    NP: tl.constexpr, HS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """One row dy of a channel's weight gradient: the sums of the products' diagonals t - i and u - w.

    FU columns of a window and FN of a tile.
    """
    pid = tl.program_id(0)
    c = pid // K
    dy = pid % K
    dx = tl.arange(0, BK)
    acc = tl.zeros((BK, BW), dtype=tl.float32)
    for split in range(0, SPLITS):
        start = products + (c.to(tl.int64) * SPLITS + split) * R * FU * NP
        for first in tl.static_range(0, BN, BW):
            w = first + tl.arange(0, BW)
            u = (dx * DIL + REACH)[:, None] + w[None, :]
            for i in tl.static_range(HS):
                t = i + dy - (K // 2 - UP)
                mask = (dx < K)[:, None] & _within(u, FU) & (w < FN)[None, :] & (t >= 0) & (t < R)
                acc += tl.load(start + (t * FU + u) * NP + i * FN + w[None, :], mask=mask, other=0.0)
    tl.store(out + pid * K + dx, tl.sum(acc, 1), mask=dx < K)
