"""Triton kernels of ContMix: one forward and two backward, none of which writes a logit to memory.

A program takes 16 (``BT``) positions of one row of the map, both windows of one head. Their windows begin at the same
row of the map, so everything is a batch of small matrix products over the K rows a of the window, which the warps
share: logits[a] = query (BT, D) · M[a] (D, K), where M = key · weightᵀ belongs to the head. Only along the columns do
the windows differ from position to position: a gather within a warp shifts every position's weights to the columns of
the map (``_to_map``), and the window sum is weights[a] (BT, columns) · values[a] (columns, E). See docs/contmix.md.

Names: K window; BA and BK its rows a and columns b, padded to powers of two; BC padded columns of the map that the
windows of a tile cover; D, E channels of a head's queries and values, BD and BE padded; N = s² + K² logits. Two
windows share every kernel, the suffixes 1 and 2 tell them apart.
"""

import triton
import triton.language as tl

# Compiled once for all sizes of the map: training on images of many sizes must not compile at every step.
_SIZES = ('G', 'H', 'W', 'D', 'N', 'E', 'ROWS', 'HEADS', 'ZERO')


@triton.jit
def _start(i, length, K: tl.constexpr):
    """First index of the window of position i: centred, shifted inward at the borders."""
    return tl.minimum(tl.maximum(i - K // 2, 0), length - K)


@triton.jit
def _split(x):
    """x as the sum of two numbers that tensor cores read without loss: 11 and the next 11 to 12 bits of it."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _logits_dot(q, m, HALF: tl.constexpr):
    """q @ m to fp32 precision. Half precision q is exact in tf32, so two products with a split m are enough."""
    if HALF:
        high, low = _split(m)
        out = tl.dot(q, low, input_precision='tf32')
        return tl.dot(q, high, out, input_precision='tf32')
    else:
        return tl.dot(q, m, input_precision='ieee')


@triton.jit
def _dot(x, y, HALF: tl.constexpr):
    """x @ y of fp32 operands: to the precision of the outputs in half precision, to fp32's otherwise."""
    if HALF:
        return tl.dot(x, y, input_precision='tf32')
    else:
        return tl.dot(x, y, input_precision='tf32x3')


@triton.jit
def _index(N: tl.constexpr, WIDE: tl.constexpr):
    """0 ... N - 1; in int64 when a stride is so large that a tile spans more than 2**31 elements."""
    if WIDE:
        return tl.arange(0, N).to(tl.int64)
    else:
        return tl.arange(0, N)


@triton.jit
def _load_m(m, D, N, FIRST: tl.constexpr, K: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """(BA, BD, BK): the columns of M that make the logits of one window."""
    a = tl.arange(0, BA)
    b = tl.arange(0, BK)
    d = tl.arange(0, BD)
    offsets = (d * N)[None, :, None] + (FIRST + a[:, None] * K + b[None, :])[:, None, :]
    mask = (d < D)[None, :, None] & ((a < K)[:, None] & (b < K)[None, :])[:, None, :]
    return tl.load(m + offsets, mask=mask, other=0.0)


@triton.jit
def _logits(
    q, m, bias, rpb, i, j, H, W,
    FIRST: tl.constexpr, K: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """(BA, BT, BK) logits of the positions (i, j) with their biases, -inf in the padding."""
    a = tl.arange(0, BA)
    b = tl.arange(0, BK)
    inside = (a < K)[:, None] & (b < K)[None, :]
    logits = _logits_dot(tl.broadcast_to(q[None, :, :], (BA, BT, BD)), m, HALF)
    biases = tl.load(bias + FIRST + a[:, None] * K + b[None, :], mask=inside, other=float('-inf'))
    logits += biases.to(tl.float32)[:, None, :]
    row = _start(i, H, K) - i + K - 1
    col = _start(j, W, K) - j + K - 1
    offsets = ((row + a) * (2 * K - 1))[:, None, None] + (col[:, None] + b[None, :])[None, :, :]
    mask = inside[:, None, :] & (col >= 0)[None, :, None]
    return logits + tl.load(rpb + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _by_position(x, BA: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """(BA, BT, BK) as (BT, BA * BK): one reduction over it is cheaper than one over each axis."""
    return tl.reshape(tl.permute(x, (1, 0, 2)), (BT, BA * BK))


@triton.jit
def _move(x, source, low, high, BA: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr):
    """(BA, BT, BX): element source (BT, BX) of the last axis of x where low <= source < high, else 0."""
    inside = tl.broadcast_to(((source >= low) & (source < high))[None, :, :], (BA, BT, BX))
    source = tl.broadcast_to(source[None, :, :], (BA, BT, BX))
    return tl.where(inside, tl.gather(x, tl.where(inside, source, 0), 2), 0.0)


@triton.jit
def _to_map(x, shift, K: tl.constexpr, BA: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, SHIFT: tl.constexpr):
    """(BA, BT, BK) over the window's columns to (BA, BT, BC) over the map's: element b moves to b + shift."""
    if SHIFT:
        x = _move(x, tl.arange(0, BC)[None, :] - shift[:, None], 0, K, BA, BT, BC)
    return x


@triton.jit
def _to_window(x, shift, K: tl.constexpr, BA: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SHIFT: tl.constexpr):
    """The way back of :func:`_to_map`."""
    if SHIFT:
        b = tl.arange(0, BK)[None, :]
        x = _move(x, tl.where(b < K, b + shift[:, None], -1), 0, 2048, BA, BT, BK)
    return x


@triton.jit
def _load_values(
    v, svc, svh, svw, row, col, W, E,
    K: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(BA, BC, BE): the values of the rows row ... row + K - 1 and the columns from col."""
    a = _index(BA, WIDE)
    c = _index(BC, WIDE)
    e = _index(BE, WIDE)
    v += row * svh + col.to(tl.int64) * svw
    offsets = (a * svh)[:, None, None] + (c * svw)[None, :, None] + (e * svc)[None, None, :]
    mask = (a < K)[:, None, None] & (col + c < W)[None, :, None] & (e < E)[None, None, :]
    return tl.load(v + offsets, mask=mask, other=0.0)


@triton.jit
def _window_forward(
    q, m, bias, rpb, top_out, total_out, v, svc, svh, svw, out, soc, sow, i, j0, H, W, D, N, E,
    FIRST: tl.constexpr, K: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, SHIFT: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    j = j0 + tl.arange(0, BT)
    weights = _load_m(m, D, N, FIRST, K, BA, BK, BD)
    col = _start(j0, W, K)
    row = _start(i, H, K).to(tl.int64)
    values = _load_values(v, svc, svh, svw, row, col, W, E, K, BA, BC, BE, WIDE)
    logits = _logits(q, weights, bias, rpb, i, j, H, W, FIRST, K, BA, BK, BD, BT, HALF)
    top = tl.max(_by_position(logits, BA, BT, BK), 1)
    p = tl.exp(logits - top[None, :, None])
    total = tl.sum(_by_position(p, BA, BT, BK), 1)
    tl.store(top_out + j, top, mask=j < W)
    tl.store(total_out + j, total, mask=j < W)
    p = _to_map(p.to(values.dtype), _start(j, W, K) - col, K, BA, BT, BC, SHIFT)
    mixed = tl.sum(tl.dot(p.to(values.dtype), values, input_precision='tf32x3'), 0) / total[:, None]
    e = _index(BE, WIDE)
    offsets = (_index(BT, WIDE) * sow)[:, None] + (e * soc)[None, :]
    tl.store(out + offsets, mixed.to(out.dtype.element_ty), mask=(j < W)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def contmix_forward_kernel(
    q, m, bias, rpb1, rpb2, v, out, top, total,
    sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sob, soc, soh, sow,
    G, H, W, D, N, E,
    K1: tl.constexpr, BA1: tl.constexpr, BK1: tl.constexpr, BC1: tl.constexpr, SHIFT1: tl.constexpr,
    K2: tl.constexpr, BA2: tl.constexpr, BK2: tl.constexpr, BC2: tl.constexpr, SHIFT2: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mixed values of one tile of one head; of both softmaxes the largest logits and the sums, (B, G, 2, H, W) each."""
    tiles = tl.cdiv(W, BT)
    j0 = tl.program_id(0) % tiles * BT
    i = tl.program_id(0) // tiles % H
    head = (tl.program_id(0) // tiles // H).to(tl.int64)
    batch = head // G
    group = head % G
    i_ = i.to(tl.int64)
    j0_ = j0.to(tl.int64)

    q += batch * sqb + group * sqg + i_ * sqh + j0_ * sqw
    t = _index(BT, WIDE)
    d = _index(BD, WIDE)
    mask = (j0 + t < W)[:, None] & (d < D)[None, :]
    query = tl.load(q + (t * sqw)[:, None] + (d * sqd)[None, :], mask=mask, other=0.0).to(tl.float32)
    m += head * D * N
    top += (head * 2 * H + i_) * W
    total += (head * 2 * H + i_) * W
    out += batch * sob + i_ * soh + j0_ * sow
    v += batch * svb
    small = group * E  # first channel of the head among the values of the small window, and of the large one
    large = (group + G) * E
    _window_forward(
        query, m, bias, rpb1 + group * (2 * K1 - 1) * (2 * K1 - 1), top, total, v + small * svc, svc, svh, svw,
        out + small * soc, soc, sow, i, j0, H, W, D, N, E,
        0, K1, BA1, BK1, BC1, SHIFT1, BD, BE, BT, HALF, WIDE,
    )  # fmt: skip
    _window_forward(
        query, m, bias, rpb2 + group * (2 * K2 - 1) * (2 * K2 - 1), top + H * W, total + H * W, v + large * svc, svc,
        svh, svw, out + large * soc, soc, sow, i, j0, H, W, D, N, E,
        K1 * K1, K2, BA2, BK2, BC2, SHIFT2, BD, BE, BT, HALF, WIDE,
    )  # fmt: skip


@triton.jit
def _window_query_grad(
    q, m, bias, rpb, lse, v, svc, svh, svw, g, sgc, sgw, i, j0, H, W, D, N, E, dm, db, diagonals,
    FIRST: tl.constexpr, K: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, SHIFT: tl.constexpr,
    BU: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients through one window at one row: of the queries, of M, of the bias and of the position bias."""
    j = j0 + tl.arange(0, BT)
    e = _index(BE, WIDE)
    offsets = (_index(BT, WIDE) * sgw)[:, None] + (e * sgc)[None, :]
    grad = tl.load(g + offsets, mask=(j < W)[:, None] & (e < E)[None, :], other=0.0)
    col = _start(j0, W, K)
    shift = _start(j, W, K) - col
    row = _start(i, H, K).to(tl.int64)
    values = _load_values(v, svc, svh, svw, row, col, W, E, K, BA, BC, BE, WIDE)
    grad = tl.broadcast_to(grad.to(values.dtype)[None, :, :], (BA, BT, BE))
    dp = tl.dot(grad, tl.permute(values, (0, 2, 1)), input_precision='tf32x3')
    dp = _to_window(dp, shift, K, BA, BT, BK, SHIFT)

    weights = _load_m(m, D, N, FIRST, K, BA, BK, BD)
    logits = _logits(q, weights, bias, rpb, i, j, H, W, FIRST, K, BA, BK, BD, BT, HALF)
    # A position beyond the map gets no weight at all: exp(-inf).
    total = tl.load(lse + j, mask=j < W, other=float('inf'))
    p = tl.exp(logits - total[None, :, None])
    ds = p * (dp - tl.sum(tl.sum(p * dp, 2), 0)[None, :, None])

    dq = tl.sum(_dot(ds, tl.permute(weights, (0, 2, 1)), HALF), 0)
    dm += _dot(tl.broadcast_to(tl.trans(q)[None, :, :], (BA, BD, BT)), ds, HALF)
    db += tl.sum(ds, 1)
    # The position bias at (row + a, col + b): first its columns, which move from position to position, ...
    u = tl.arange(0, BU)
    source = u[None, :] - (_start(j, W, K) - j + K - 1)[:, None]
    moved = tl.sum(_move(ds, source, 0, K, BA, BT, BU), 1)
    # ... then its rows, which are the same for all positions of the tile.
    a = tl.arange(0, BA)
    pick = u[:, None] == (a + _start(i, H, K) - i + K - 1)[None, :]
    if BA >= 16:
        diagonals += _dot(pick.to(tl.float32), moved, HALF)
    else:
        diagonals += tl.sum(tl.where(pick[:, :, None], moved[None, :, :], 0.0), 1)
    return dq, dm, db, diagonals


@triton.jit
def _store_sums(
    dm, sums, dbias, db, drpb, diagonals, D, N,
    FIRST: tl.constexpr, K: tl.constexpr, BA: tl.constexpr, BK: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    a = tl.arange(0, BA)
    b = tl.arange(0, BK)
    d = tl.arange(0, BD)
    u = tl.arange(0, BU)
    n = FIRST + a[:, None] * K + b[None, :]
    inside = (a < K)[:, None] & (b < K)[None, :]
    mask = (d < D)[None, :, None] & inside[:, None, :]
    tl.store(dm + (d * N)[None, :, None] + n[:, None, :], sums, mask=mask)
    tl.store(dbias + n, db, mask=inside)
    mask = (u < 2 * K - 1)[:, None] & (u < 2 * K - 1)[None, :]
    tl.store(drpb + u[:, None] * (2 * K - 1) + u[None, :], diagonals, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def contmix_query_grad_kernel(
    q, m, bias, rpb1, rpb2, v, lse, g, dq, dm, dbias, drpb1, drpb2,
    sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sgb, sgc, sgh, sgw, sdb, sdg, sdd, sdh, sdw,
    G, H, W, D, N, E, ROWS, HEADS, ZERO,
    K1: tl.constexpr, BA1: tl.constexpr, BK1: tl.constexpr, BC1: tl.constexpr, SHIFT1: tl.constexpr, BU1: tl.constexpr,
    K2: tl.constexpr, BA2: tl.constexpr, BK2: tl.constexpr, BC2: tl.constexpr, SHIFT2: tl.constexpr, BU2: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, and what ``ROWS`` rows of one stripe of columns add to those of M and the biases.

    What is added up over programs goes to a place of its own for every program (dm: (parts, heads, D, N), biases:
    (heads, parts, ...)) and is summed outside: no atomics, so the result is the same in every run.
    """
    tiles = tl.cdiv(W, BT)
    parts = tl.cdiv(H, ROWS) * tiles
    part = tl.program_id(0) % parts
    j0 = part % tiles * BT
    first = part // tiles * ROWS
    head = (tl.program_id(0) // parts).to(tl.int64)
    batch = head // G
    group = head % G
    j0_ = j0.to(tl.int64)

    q += batch * sqb + group * sqg + j0_ * sqw
    dq += batch * sdb + group * sdg + j0_ * sdw
    m += head * D * N
    lse += head * 2 * H * W
    v += batch * svb
    g += batch * sgb + j0_ * sgw
    small = group * E
    large = (group + G) * E
    rpb1 += group * (2 * K1 - 1) * (2 * K1 - 1)
    rpb2 += group * (2 * K2 - 1) * (2 * K2 - 1)
    t = _index(BT, WIDE)
    d = _index(BD, WIDE)
    mask = (j0 + t < W)[:, None] & (d < D)[None, :]

    dm1 = tl.zeros((BA1, BD, BK1), tl.float32)
    dm2 = tl.zeros((BA2, BD, BK2), tl.float32)
    db1 = tl.zeros((BA1, BK1), tl.float32)
    db2 = tl.zeros((BA2, BK2), tl.float32)
    diagonals1 = tl.zeros((BU1, BU1), tl.float32)
    diagonals2 = tl.zeros((BU2, BU2), tl.float32)
    for i in tl.range(first, tl.minimum(first + ROWS, H), disable_licm=True):
        # ``ZERO`` is nought, but the compiler must not know: else it computes every offset and mask that depends on
        # the columns before the loop and, for want of registers, keeps them in local memory.
        here = j0 + (i & ZERO)
        m_ = m + (i & ZERO)
        i_ = first.to(tl.int64) + (i - first)
        lse1 = lse + i_ * W
        lse2 = lse + (i_ + H) * W
        v1 = v + small * svc
        v2 = v + large * svc
        g1 = g + small * sgc + i_ * sgh
        g2 = g + large * sgc + i_ * sgh
        offsets = (t * sqw)[:, None] + (d * sqd)[None, :]
        query = tl.load(q + i_ * sqh + offsets, mask=mask, other=0.0).to(tl.float32)
        dq1, dm1, db1, diagonals1 = _window_query_grad(
            query, m_, bias, rpb1, lse1, v1, svc, svh, svw, g1, sgc, sgw, i, here, H, W, D, N, E,
            dm1, db1, diagonals1, 0, K1, BA1, BK1, BC1, SHIFT1, BU1, BD, BE, BT, HALF, WIDE,
        )  # fmt: skip
        dq2, dm2, db2, diagonals2 = _window_query_grad(
            query, m_, bias, rpb2, lse2, v2, svc, svh, svw, g2, sgc, sgw, i, here, H, W, D, N, E,
            dm2, db2, diagonals2, K1 * K1, K2, BA2, BK2, BC2, SHIFT2, BU2, BD, BE, BT, HALF, WIDE,
        )  # fmt: skip
        offsets = (t * sdw)[:, None] + (d * sdd)[None, :]
        tl.store(dq + i_ * sdh + offsets, (dq1 + dq2).to(dq.dtype.element_ty), mask=mask)

    tl.debug_barrier()  # dm may be m itself: every thread must have read it
    dm += part.to(tl.int64) * HEADS * D * N + head * D * N
    place = head * parts + part
    dbias += place * N
    drpb1 += place * (2 * K1 - 1) * (2 * K1 - 1)
    drpb2 += place * (2 * K2 - 1) * (2 * K2 - 1)
    _store_sums(dm, dm1, dbias, db1, drpb1, diagonals1, D, N, 0, K1, BA1, BK1, BU1, BD)
    _store_sums(dm, dm2, dbias, db2, drpb2, diagonals2, D, N, K1 * K1, K2, BA2, BK2, BU2, BD)


@triton.jit
def _window_value_grad(
    q, m, bias, rpb, lse, g, dv, sqd, sqh, sqw, sgc, sgh, sgw, sdc, sdw, r, c0, H, W, D, N, E,
    FIRST: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of BT values of row r: sum over the positions whose windows hold them, BI rows by BJ columns at once."""
    HALF_K: tl.constexpr = K // 2
    first_i = tl.where(r < K, 0, r - HALF_K)
    last_i = tl.where(r >= H - K, H - 1, r + HALF_K)
    first_j = tl.where(c0 < K, 0, c0 - HALF_K)
    last_j = tl.minimum(tl.where(c0 + BT > W - K, W - 1, c0 + BT - 1 + HALF_K), W - 1)
    b = tl.arange(0, BK)
    d = _index(BD, WIDE)
    e = _index(BE, WIDE)
    ii = _index(BI, WIDE)
    jj = _index(BJ, WIDE)
    out = tl.zeros((BI, BT, BE), tl.float32)
    for i0 in range(first_i, last_i + 1, BI):
        for j0 in range(first_j, last_j + 1, BJ):
            i0_ = first_i.to(tl.int64) + (i0 - first_i)
            j0_ = first_j.to(tl.int64) + (j0 - first_j)
            i = i0 + tl.arange(0, BI)
            j = j0 + tl.arange(0, BJ)
            valid = (i <= last_i)[:, None] & (j <= last_j)[None, :]
            offsets = (ii * sqh)[:, None, None] + (jj * sqw)[None, :, None] + (d * sqd)[None, None, :]
            mask = valid[:, :, None] & (d < D)[None, None, :]
            query = tl.load(q + i0_ * sqh + j0_ * sqw + offsets, mask=mask, other=0.0).to(tl.float32)
            # Row of the window in which row r lies, seen from each row of positions; 0 <= a < K where valid.
            a = r - _start(i, H, K)
            n = FIRST + a[:, None] * K + b[None, :]
            inside = (i <= last_i)[:, None] & (b < K)[None, :]
            mask = inside[:, None, :] & (d < D)[None, :, None]
            weights = tl.load(m + (d * N)[None, :, None] + n[:, None, :], mask=mask, other=0.0)
            logits = _logits_dot(query, weights, HALF)
            logits += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None, :]
            col = _start(j, W, K) - j + K - 1
            offsets = ((r - i + K - 1) * (2 * K - 1))[:, None, None] + (col[:, None] + b[None, :])[None, :, :]
            mask = valid[:, :, None] & (b < K)[None, None, :]
            logits += tl.load(rpb + offsets, mask=mask, other=0.0).to(tl.float32)
            offsets = (ii * W)[:, None] + jj[None, :]
            total = tl.load(lse + i0_ * W + j0_ + offsets, mask=valid, other=0.0)
            p = tl.where(mask, tl.exp(logits - total[:, :, None]), 0.0)

            offsets = (ii * sgh)[:, None, None] + (jj * sgw)[None, :, None] + (e * sgc)[None, None, :]
            mask = valid[:, :, None] & (e < E)[None, None, :]
            grad = tl.load(g + i0_ * sgh + j0_ * sgw + offsets, mask=mask, other=0.0)
            source = c0 + tl.arange(0, BT)[None, :] - _start(j, W, K)[:, None]
            p = _move(p.to(grad.dtype), source, 0, K, BI, BJ, BT)
            out += tl.dot(tl.permute(p.to(grad.dtype), (0, 2, 1)), grad, input_precision='tf32x3')
    offsets = (_index(BT, WIDE) * sdw)[:, None] + (e * sdc)[None, :]
    mask = (c0 + tl.arange(0, BT) < W)[:, None] & (e < E)[None, :]
    tl.store(dv + offsets, tl.sum(out, 0).to(dv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def contmix_value_grad_kernel(
    q, m, bias, rpb1, rpb2, lse, g, dv,
    sqb, sqg, sqd, sqh, sqw, sgb, sgc, sgh, sgw, sdb, sdc, sdh, sdw,
    G, H, W, D, N, E,
    K1: tl.constexpr, BK1: tl.constexpr, BI1: tl.constexpr, BJ1: tl.constexpr,
    K2: tl.constexpr, BK2: tl.constexpr, BI2: tl.constexpr, BJ2: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of the values of one tile of one head, in both halves of the channels."""
    tiles = tl.cdiv(W, BT)
    c0 = tl.program_id(0) % tiles * BT
    r = tl.program_id(0) // tiles % H
    head = (tl.program_id(0) // tiles // H).to(tl.int64)
    batch = head // G
    group = head % G

    q += batch * sqb + group * sqg
    m += head * D * N
    lse += head * 2 * H * W
    g += batch * sgb
    small = group * E
    large = (group + G) * E
    dv += batch * sdb + r.to(tl.int64) * sdh + c0.to(tl.int64) * sdw
    _window_value_grad(
        q, m, bias, rpb1 + group * (2 * K1 - 1) * (2 * K1 - 1), lse, g + small * sgc, dv + small * sdc, sqd, sqh, sqw,
        sgc, sgh, sgw, sdc, sdw, r, c0, H, W, D, N, E, 0, K1, BK1, BI1, BJ1, BD, BE, BT, HALF, WIDE,
    )  # fmt: skip
    _window_value_grad(
        q, m, bias, rpb2 + group * (2 * K2 - 1) * (2 * K2 - 1), lse + H * W, g + large * sgc, dv + large * sdc,
        sqd, sqh, sqw, sgc, sgh, sgw, sdc, sdw, r, c0, H, W, D, N, E,
        K1 * K1, K2, BK2, BI2, BJ2, BD, BE, BT, HALF, WIDE,
    )  # fmt: skip
