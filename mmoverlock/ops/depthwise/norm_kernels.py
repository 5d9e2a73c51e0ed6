"""Triton kernels of the batch norms behind parallel depthwise convolutions: all branches at once.

The branches' maps lie one behind the other, y[N, B, C, H, W]. A tile is all N branches (NB, a power of two) times BX
positions, PX of one plane and as many planes as are left. In the two kernels that only see sums, the last T of the N
branches have no maps; their sums come from ``norm_dilated_kernels``, as [2, T, C].

Names: N branches; HW positions of a plane, HWV * V; FAR elements from one branch to the next; SPLITS parts that a
channel is summed in, PART tiles each; COUNT values that a channel's statistics are of.
"""

import triton
import triton.language as tl

_SIZES = ('B', 'C', 'HWV', 'FAR', 'SPLITS', 'PART', 'PLANES', 'COUNT')


@triton.jit(do_not_specialize=_SIZES)
def branch_sums_kernel(
    y, grad, mean, sums, B, C, HWV, FAR, SPLITS, PART,
    N: tl.constexpr, NB: tl.constexpr, V: tl.constexpr, BX: tl.constexpr, PX: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """sums[split, 2, NB, C] of d and d², d being y less its first value; GRAD: of grad and grad (y - mean)."""
    HW = HWV * V
    pid = tl.program_id(0)
    c = pid % C
    split = pid // C
    n = tl.arange(0, NB)
    x = tl.arange(0, BX)
    image, place = x // PX, x % PX
    branch = y + n.to(tl.int64)[:, None] * FAR
    if GRAD:
        centre = tl.load(mean + n * C + c, mask=n < N, other=0.0)[:, None]
    else:
        centre = tl.load(y + n.to(tl.int64) * FAR + c * HW, mask=n < N, other=0.0).to(tl.float32)[:, None]
    one = tl.zeros((NB, BX), dtype=tl.float32)
    two = tl.zeros((NB, BX), dtype=tl.float32)
    parts = tl.cdiv(HW, PX)
    tiles = tl.cdiv(B, BX // PX) * parts
    for tile in range(split * PART, tl.minimum((split + 1) * PART, tiles)):
        b = tile // parts * (BX // PX) + image
        position = tile % parts * PX + place
        inside = (b < B) & (position < HW)
        offset = (b * C + c).to(tl.int64) * HW + position
        mask = (n < N)[:, None] & inside[None, :]
        d = tl.load(branch + offset[None, :], mask=mask, other=0.0).to(tl.float32) - centre
        if GRAD:
            g = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)[None, :]
            one += g
            two += g * d
        else:
            d = tl.where(mask, d, 0.0)
            one += d
            two += d * d
    at = sums + (split * 2 * NB + n) * C + c
    tl.store(at, tl.sum(one, 1))
    tl.store(at + NB * C, tl.sum(two, 1))


@triton.jit
def _totals(sums, tail, n, c, C, SPLITS, N: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr):
    """Both sums of these branches and channels, of which ``branch_sums_kernel`` wrote those of ROWS, in splits."""
    at = n[:, None] * C + c[None, :]
    made = (n < N - T)[:, None] & (c < C)[None, :]
    one = tl.zeros(at.shape, dtype=tl.float32)
    two = tl.zeros(at.shape, dtype=tl.float32)
    for split in range(0, SPLITS):
        place = sums + split * 2 * ROWS * C + at
        one += tl.load(place, mask=made, other=0.0)
        two += tl.load(place + ROWS * C, mask=made, other=0.0)
    if T > 0:
        rest = ((n >= N - T) & (n < N))[:, None] & (c < C)[None, :]
        place = tail + at - (N - T) * C
        one += tl.load(place, mask=rest, other=0.0)
        two += tl.load(place + T * C, mask=rest, other=0.0)
    return one, two


@triton.jit(do_not_specialize=_SIZES)
def branch_statistics_kernel(
    y, sums, first, tail, gamma, beta, eps, mean, var, factor, shift, C, HWV, FAR, SPLITS, COUNT,
    N: tl.constexpr, NB: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, V: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Mean and variance of every branch, what its map is multiplied by, and what all together are shifted by.

    first[T, C] are the first values of the maps that are not there.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    n = tl.arange(0, NB)
    known = (n < N)[:, None] & (c < C)[None, :]
    at = n[:, None] * C + c[None, :]
    one, two = _totals(sums, tail, n, c, C, SPLITS, N, T, ROWS)
    made = known & (n < N - T)[:, None]
    centre = tl.load(y + n.to(tl.int64)[:, None] * FAR + c[None, :] * (HWV * V), mask=made, other=0.0).to(tl.float32)
    if T > 0:
        centre += tl.load(first + at - (N - T) * C, mask=known & (n >= N - T)[:, None], other=0.0)
    one /= COUNT
    centre += one
    spread = tl.maximum(two / COUNT - one * one, 0.0)
    tl.store(mean + at, centre, mask=known)
    tl.store(var + at, spread, mask=known)
    scale = tl.load(gamma + at, mask=known, other=0.0).to(tl.float32)
    scale /= tl.sqrt(spread + tl.load(eps + n, mask=n < N, other=1.0)[:, None])
    tl.store(factor + at, scale, mask=known)
    rest = tl.where(known, tl.load(beta + at, mask=known, other=0.0).to(tl.float32) - centre * scale, 0.0)
    tl.store(shift + c, tl.sum(rest, 0), mask=c < C)


@triton.jit
def _planes(C, PLANES, HW, BX: tl.constexpr, PX: tl.constexpr):
    """Offsets of a tile's positions, channels, and whether they are there."""
    parts = tl.cdiv(HW, PX)
    pid = tl.program_id(0)
    x = tl.arange(0, BX)
    plane = pid // parts * (BX // PX) + x // PX
    place = pid % parts * PX + x % PX
    return plane.to(tl.int64) * HW + place, plane % C, (plane < PLANES) & (place < HW)


@triton.jit(do_not_specialize=_SIZES)
def branch_slopes_kernel(
    sums, tail, mean, var, gamma, eps, slopes, dgamma, dbeta, C, SPLITS, COUNT,
    N: tl.constexpr, NB: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """slopes[3, N, C], of which a branch's gradient is slopes[0] grad + slopes[1] y + slopes[2]; gradients [N, C]."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    n = tl.arange(0, NB)
    known = (n < N)[:, None] & (c < C)[None, :]
    at = n[:, None] * C + c[None, :]
    one, two = _totals(sums, tail, n, c, C, SPLITS, N, T, ROWS)
    inverse = 1.0 / tl.sqrt(tl.load(var + at, mask=known, other=1.0) + tl.load(eps + n, mask=n < N, other=1.0)[:, None])
    direct = tl.load(gamma + at, mask=known, other=0.0).to(tl.float32) * inverse
    own = -direct * inverse * inverse * two / COUNT
    tl.store(slopes + at, direct, mask=known)
    tl.store(slopes + N * C + at, own, mask=known)
    tl.store(
        slopes + 2 * N * C + at, -direct * one / COUNT - own * tl.load(mean + at, mask=known, other=0.0), mask=known
    )
    tl.store(dgamma + at, two * inverse, mask=known)
    tl.store(dbeta + at, one, mask=known)


@triton.jit(do_not_specialize=_SIZES)
def branch_grad_kernel(grad, y, slopes, out, C, PLANES, HWV, FAR, V: tl.constexpr, BX: tl.constexpr, PX: tl.constexpr):
    """The gradient of one branch's map; ``y`` and ``slopes`` begin at that branch, whose slopes are FAR apart."""
    at, c, inside = _planes(C, PLANES, HWV * V, BX, PX)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    direct = tl.load(slopes + c, mask=inside, other=0.0)
    own = tl.load(slopes + FAR + c, mask=inside, other=0.0)
    rest = tl.load(slopes + 2 * FAR + c, mask=inside, other=0.0)
    tl.store(out + at, (direct * g + own * value + rest).to(out.dtype.element_ty), mask=inside)
