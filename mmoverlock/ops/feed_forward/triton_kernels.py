"""Triton kernels of the feed-forward half: matrix products with what stands before and after them in the block.

Maps are channels-last: a map is a matrix with a row a position. The depthwise 3x3 between the products is in
``depthwise.small_kernels``.

Names: M rows (positions of all images), or PIXELS rows of one image; C channels in, E hidden, F out, in vectors of V;
BM, BN, BK rows, columns and depth of a product's tile.
"""

import triton
import triton.language as tl

from ..depthwise.small_kernels import gelu

_SIZES = ('M', 'PIXELS', 'C', 'E', 'F', 'PARTS', 'TILES', 'ONE', 'TWO')


@triton.jit(do_not_specialize=_SIZES)
def cast_kernel(one, two, first, second, ONE, TWO, V: tl.constexpr, BLOCK: tl.constexpr):
    """first = one and second = two, in their types; ONE and TWO count vectors of V numbers."""
    block = tl.program_id(0)
    blocks = tl.cdiv(ONE * V, BLOCK)
    source, target, count = one, first, ONE * V
    if block >= blocks:
        source, target, count = two, second, TWO * V
        block -= blocks
    at = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + at, mask=at < count, other=0.0)
    tl.store(target + at, value.to(target.dtype.element_ty), mask=at < count)


@triton.jit(do_not_specialize=_SIZES)
def ffn_expand_kernel(
    x, weight, bias, hidden, active, M, C, E,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """active = GELU(x weightᵀ + bias); KEEP: what GELU was given goes to ``hidden``."""
    C, E = C * V, E * V
    columns = tl.cdiv(E, BN)
    pid = tl.program_id(0)
    m = pid // columns * BM + tl.arange(0, BM)
    n = pid % columns * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    rows = m.to(tl.int64)[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, C, BK):
        depth = first + k
        a = tl.load(x + rows * C + depth[None, :], mask=(m < M)[:, None] & (depth < C)[None, :], other=0.0)
        b = tl.load(weight + n[None, :] * C + depth[:, None], mask=(n < E)[None, :] & (depth < C)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    acc += tl.load(bias + n, mask=n < E, other=0.0).to(tl.float32)[None, :]
    mask = (m < M)[:, None] & (n < E)[None, :]
    h = acc.to(active.dtype.element_ty)
    if KEEP:
        tl.store(hidden + rows * E + n[None, :], h, mask=mask)
    h = h.to(tl.float32)
    tl.store(active + rows * E + n[None, :], gelu(h).to(active.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def grn_scale_kernel(
    squares, gamma, scale, rounded, norm, arrived, PARTS, E, eps, TILES,
    V: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """From the shares of the sums of squares, [B, PARTS, E], the norm of every channel and what it is scaled with.

    ``rounded`` gets the latter in its own type. BP shares are taken at once. An image's TILES numbers of ``arrived``,
    BE at most, become 0 for ``ffn_project_kernel``.
    """
    E = E * V
    image = tl.program_id(0)
    e = tl.arange(0, BE)
    p = tl.arange(0, BP)
    at = squares + image.to(tl.int64) * PARTS * E + p[:, None] * E + e[None, :]
    total = tl.zeros((BP, BE), dtype=tl.float32)
    for part in range(0, PARTS, BP):
        total += tl.load(at + part * E, mask=(part + p < PARTS)[:, None] & (e < E)[None, :], other=0.0)
    response = tl.sqrt(tl.sum(total, 0))
    mean = tl.sum(response, 0) / E
    factor = tl.load(gamma + e, mask=e < E, other=0.0).to(tl.float32) * (response / (mean + eps)) + 1.0
    tl.store(scale + image * E + e, factor, mask=e < E)
    tl.store(rounded + image * E + e, factor.to(rounded.dtype.element_ty), mask=e < E)
    tl.store(norm + image * E + e, response, mask=e < E)
    tl.store(arrived + image * TILES + e, tl.zeros((BE,), dtype=tl.int32), mask=e < TILES)


@triton.jit(do_not_specialize=_SIZES)
def ffn_project_kernel(
    y, scale, shift, weight, bias, shortcut, gain, offset, out, parts, arrived, PIXELS, E, F,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr, SPLITS: tl.constexpr, SHORTCUT: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """out = (scale[image] y + shift) weightᵀ + bias; a program's rows are of one image.

    SHORTCUT: + shortcut; GAIN: + gain * shortcut + offset in its place.

    Scale and shift are of the type of y, as the definition rounds them: half precision is scaled in pairs. What is
    beyond the last row or column is another one again, which is not stored and needs no mask. WHOLE: BK divides E.

    SPLITS programs share the depth of a tile. Each leaves its sums in parts[tiles, SPLITS, BM, BN], and the one that
    comes last, which it knows from ``arrived``, 0 before, adds them up: in their order, whichever that was.
    """
    E, F = E * V, F * V
    columns, tiles = tl.cdiv(F, BN), tl.cdiv(PIXELS, BM)
    tile = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    depth = tl.cdiv(tl.cdiv(E, BK), SPLITS) * BK
    n = tile % columns * BN + tl.arange(0, BN)
    pid = tile // columns
    image = pid // tiles
    m = pid % tiles * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    first_row = image.to(tl.int64) * PIXELS
    a_at = y + (first_row + tl.minimum(m, PIXELS - 1))[:, None] * E + k[None, :]
    # Columns beyond the last are the first ones, as all programs would ask for the last one's at once.
    b_at = weight + tl.where(n < F, n, n - F)[None, :] * E + k[:, None]
    s_at = scale + image * E + k
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(part * depth, tl.minimum(part * depth + depth, E), BK):
        if WHOLE:
            a = tl.load(a_at + first)
            b = tl.load(b_at + first)
            s = tl.load(s_at + first)
            t = tl.load(shift + first + k)
        else:
            known = first + k < E
            a = tl.load(a_at + first, mask=known[None, :], other=0.0)
            b = tl.load(b_at + first, mask=known[:, None], other=0.0)
            s = tl.load(s_at + first, mask=known, other=0.0)
            t = tl.load(shift + first + k, mask=known, other=0.0)
        a = a * s[None, :] + t[None, :]
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    mask = (m < PIXELS)[:, None] & (n < F)[None, :]
    if SPLITS > 1:
        inner = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        parts += tile.to(tl.int64) * (SPLITS * BM * BN) + inner
        tl.store(parts + part * (BM * BN), acc)
        tl.debug_barrier()  # every thread has written before one of them says so
        last = tl.atomic_add(arrived + tile, 1, sem='acq_rel') == SPLITS - 1
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for other in tl.static_range(SPLITS):  # past the first cache, which does not see what other programs write
            acc += tl.load(parts + other * (BM * BN), mask=last, other=0.0, cache_modifier='.cg')
        mask &= last
    acc += tl.load(bias + n, mask=n < F, other=0.0).to(tl.float32)[None, :]
    at = (first_row + m)[:, None] * F + n[None, :]
    if SHORTCUT:
        more = tl.load(shortcut + at, mask=mask, other=0.0).to(tl.float32)
        if GAIN:
            more *= tl.load(gain + n, mask=n < F, other=0.0).to(tl.float32)[None, :]
            more += tl.load(offset + n, mask=n < F, other=0.0).to(tl.float32)[None, :]
        acc += more
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def ffn_project_grad_kernel(
    grad, weight, y, scale, shift, z, dz, sums, PIXELS, E, F,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz = grad weight, beside it z = scale[image] y + shift, which the weight's gradient needs.

    The tile's sums over its rows of dz y, of dz and of grad go to sums[B, tiles, E + E + F].
    """
    E, F = E * V, F * V
    columns, tiles = tl.cdiv(E, BN), tl.cdiv(PIXELS, BM)
    pid = tl.program_id(0)
    n = pid % columns * BN + tl.arange(0, BN)
    tile = pid // columns
    image = tile // tiles
    m = tile % tiles * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    rows = (image.to(tl.int64) * PIXELS + m)[:, None]
    inside = (m < PIXELS)[:, None]
    place = sums + tile.to(tl.int64) * (2 * E + F)
    # The programs of a tile share grad's columns out among them; all of them read all of it below.
    for first in range(pid % columns * BK, F, columns * BK):
        f = first + k
        a = tl.load(grad + rows * F + f[None, :], mask=inside & (f < F)[None, :], other=0.0).to(tl.float32)
        tl.store(place + 2 * E + f, tl.sum(a, 0), mask=f < F)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, F, BK):
        f = first + k
        a = tl.load(grad + rows * F + f[None, :], mask=inside & (f < F)[None, :], other=0.0)
        b = tl.load(weight + f[:, None] * E + n[None, :], mask=(f < F)[:, None] & (n < E)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    known = n < E
    mask = inside & known[None, :]
    at = rows * E + n[None, :]
    map_ = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(scale + image * E + n, mask=known, other=0.0)
    t = tl.load(shift + n, mask=known, other=0.0).to(tl.float32)
    tl.store(z + at, (map_ * s[None, :] + t[None, :]).to(z.dtype.element_ty), mask=mask)
    tl.store(dz + at, acc.to(dz.dtype.element_ty), mask=mask)
    tl.store(place + n, tl.sum(acc * map_, 0), mask=known)
    tl.store(place + E + n, tl.sum(acc, 0), mask=known)


@triton.jit(do_not_specialize=_SIZES)
def grn_grad_kernel(
    sums, gamma, norm, slope, grads, TILES, E, F, eps, V: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr
):
    """From the sums of ``ffn_project_grad_kernel``: the slope by which y adds to its gradient, and an image's share of
    the gradients of gamma, beta and the second bias, grads[B, E + E + F]. The last two, the rest, are the sums."""
    E, F = E * V, F * V
    image = tl.program_id(0)
    e = tl.arange(0, BE)
    r = tl.arange(0, BR)
    product = tl.zeros((BE,), dtype=tl.float32)
    rest = tl.zeros((BR,), dtype=tl.float32)
    for tile in range(0, TILES):
        place = sums + (image * TILES + tile).to(tl.int64) * (2 * E + F)
        product += tl.load(place + e, mask=e < E, other=0.0)
        rest += tl.load(place + E + r, mask=r < E + F, other=0.0)
    g = tl.load(norm + image * E + e, mask=e < E, other=0.0)
    mean = tl.sum(g, 0) / E + eps
    dresponse = tl.load(gamma + e, mask=e < E, other=0.0).to(tl.float32) * product
    dnorm = dresponse / mean - tl.sum(dresponse * g, 0) / (mean * mean * E)
    tl.store(slope + image * E + e, tl.where(g > 0, dnorm / tl.where(g > 0, g, 1.0), 0.0), mask=e < E)
    place = grads + image * (2 * E + F)
    tl.store(place + e, product * (g / mean), mask=e < E)
    tl.store(place + E + r, rest, mask=r < E + F)
