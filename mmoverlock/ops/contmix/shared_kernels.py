"""Triton kernels of ContMix for maps little larger than the large window, as all maps of 224² images are.

On such a map the large window has few different places (four on 14 x 14 with K = 13, one on 7 x 7 with K = 7), and all
positions whose window is at the same place weigh the same K² values. A tile is ``BT`` such positions, so that all is
plain matrix products, as in attention: logits (BT, K²) = queries · M and mix = weights · values. M = key · weightᵀ
belongs to the head. No program needs more than ``BN`` of the K² columns at once, and none writes what another writes
or adds to: sums over tiles or over the batch are each in the loop of one program, which computes the logits anew. See
docs/contmix.md.

The small window moves from position to position. Its logits are a product likewise; its weights are then laid out over
the cells of the map that the tile's windows reach, by a gather through shared memory, for which a tensor is flattened:
along an axis Triton would shuffle registers, at several times the cost.

Names: i, j rows and columns of positions; a cell is a place in the map that is looked at; n a place in a window. K1, K2
the windows; N1, N2 their logits, padded, in M (columns 0 ... N1 - 1 and N1 ... N1 + N2 - 1) and in the table, which
holds the bias and the position bias of every position and -inf in the padding. D, E channels of a head's queries and
values, BD and BE padded. Tiles past the last position repeat it, with no weight: loads need no mask. What is named
``..._t`` has channels along its rows.
"""

import triton
import triton.language as tl

from .general_kernels import _exp, _gather, _start

# Compiled once for all batches and heads; but for each of the four maps that a window has, where this saves divisions.
_SIZES = ('G', 'D', 'E', 'BATCH', 'SPLITS1', 'SPLITS2', 'ADD', 'ROWS', 'L', 'PARTS', 'STEP', 'PRODUCTS')


@triton.jit
def _split(x):
    """x as the sum of two numbers that tensor cores read without loss: 11 and the next 11 to 12 bits of it."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


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
def _logits(q_t, m, bias, HALF: tl.constexpr):
    """(positions, n) from queries (BD, positions), M (BD, n) and the table's entries, to fp32 precision.

    Half precision is exact in tf32. The table goes in as what the product is added to, to stay in its layout.
    """
    q = tl.trans(q_t)
    if HALF:
        high, low = _split(m)
        return tl.dot(q, high, tl.dot(q, low, bias, input_precision='tf32'), input_precision='tf32')
    else:
        return tl.dot(q, m, input_precision='ieee') + bias


@triton.jit
def _tile(tile, W: tl.constexpr, K: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, BT: tl.constexpr):
    """A tile: rows and columns of its positions, which of them are real, row and column of their window.

    The positions that share a window are SH x SW; a tile takes whole rows of them, padded to a power of two.
    """
    pitch: tl.constexpr = 4 if SW <= 4 else 8 if SW <= 8 else 16
    height: tl.constexpr = BT // pitch
    parts: tl.constexpr = (SH + height - 1) // height
    row = tile // parts // (W - K + 1)
    col = tile // parts % (W - K + 1)
    t = tl.arange(0, BT)
    i = tile % parts * height + t // pitch
    j = t % pitch
    return row * SH + tl.minimum(i, SH - 1), col * SW + tl.minimum(j, SW - 1), (i < SH) & (j < SW), row, col


@triton.jit
def _load(x, i, j, sc, sh, sw, C, BC: tl.constexpr, WIDE: tl.constexpr):
    """(BC, places): channels of x at the places (i, j).

    Loaded with places first: where Triton knows of no axis that is contiguous in memory, it lays the lanes of a warp
    along the first, and a warp that reads one channel at 32 places touches an eighth of the cache lines.
    """
    c = _index(BC, WIDE)
    if WIDE:
        i = i.to(tl.int64)
        j = j.to(tl.int64)
    return tl.trans(tl.load(x + (i * sh + j * sw)[:, None] + (c * sc)[None, :], mask=(c < C)[None, :], other=0.0))


@triton.jit
def _store(x, y, i, j, sc, sh, sw, C, mask, BC: tl.constexpr, WIDE: tl.constexpr):
    """Stores y (places, BC)."""
    c = _index(BC, WIDE)
    if WIDE:
        i = i.to(tl.int64)
        j = j.to(tl.int64)
    offsets = (i * sh + j * sw)[:, None] + (c * sc)[None, :]
    tl.store(x + offsets, y.to(x.dtype.element_ty), mask=mask[:, None] & (c < C)[None, :])


@triton.jit
def _load_rows_of_m(m, n, BD: tl.constexpr):
    """(BD, n) of M as it is kept here: (N1 + N2, BD), channels along the rows, which tensor cores read in tf32."""
    return tl.trans(tl.load(m + (n * BD)[:, None] + tl.arange(0, BD)[None, :]))


@triton.jit
def _window_cells(n, row, col, K: tl.constexpr):
    """Rows and columns of the places n of the window at (row, col); those of the padding are somewhere in it."""
    return row + tl.minimum(n // K, K - 1), col + n % K


@triton.jit
def _pick(x, index, inside):
    """x's element ``index`` where inside, else 0."""
    return tl.where(inside, _gather(x, tl.where(inside, index, 0)), 0.0)


@triton.jit
def _to_cells(p, i, j, r, c, H, W, K: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Weights (BT, BN) over each position's window, 0 in the padding, laid out over the cells (r, c): (BT, BC)."""
    a = r[None, :] - _start(i, H, K)[:, None]
    b = c[None, :] - _start(j, W, K)[:, None]
    inside = (a >= 0) & (a < K) & (b >= 0) & (b < K)
    # K is odd and BN a power of two: there is padding, whose weight is 0, to pick where a cell is outside the window.
    index = (tl.arange(0, BT) * BN)[:, None] + tl.where(inside, a * K + b, BN - 1)
    return _gather(p, index)


@triton.jit
def _mix_small(
    q_t, m, table, v, out, lse, position, i, j, real, row, col, svc, svh, svw, soc, soh, sow, E,
    H: tl.constexpr, W: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mixed values of a tile by the small window, which moves; (row, col) is the tile's first position."""
    n = tl.arange(0, N)
    logits = _logits(q_t, _load_rows_of_m(m, n, BD), tl.load(table + n[None, :]), HALF)
    top = tl.max(logits, 1)
    p = _exp(logits - top[:, None])
    total = tl.sum(p, 1)
    tl.store(lse + position, top + tl.log(total), mask=real)
    p = p.to(v.dtype.element_ty)
    row = _start(row, H, K)
    col = _start(col, W, K)
    # Channels along the rows: of the other way round, ptxas of CUDA 12.8 makes code that reads a register before it is
    # written, for half precision. tools/analysis/benchmark_contmix.py --only resources looks for that.
    mixed_t = tl.zeros((BE, BT), tl.float32)
    for first in range(0, RH * RW, BC):
        cell = first + tl.arange(0, BC)
        r = row + cell // RW
        c = col + cell % RW
        values = _load(v, tl.minimum(r, H - 1), c, svc, svh, svw, E, BE, WIDE)
        spread = _to_cells(p, i, j, r, c, H, W, K, N, BT, BC)
        mixed_t = tl.dot(values, tl.trans(spread.to(values.dtype)), mixed_t, input_precision='tf32x3')
    _store(out, tl.trans(mixed_t / total[None, :]), i, j, soc, soh, sow, E, real, BE, WIDE)


@triton.jit
def _mix_large(
    q_t, m, table, v, out, lse, position, i, j, real, row, col, svc, svh, svw, soc, soh, sow, E,
    K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
    HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mixed values of a tile by the large window, at (row, col) for all of it; the softmax is flash attention's."""
    top = tl.full((BT,), float('-inf'), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    mixed = tl.zeros((BT, BE), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        logits = _logits(q_t, _load_rows_of_m(m, n, BD), tl.load(table + n[None, :]), HALF)
        r, c = _window_cells(n, row, col, K)
        values = _load(v, r, c, svc, svh, svw, E, BE, WIDE)
        higher = tl.maximum(top, tl.max(logits, 1))
        p = _exp(logits - higher[:, None])
        scale = _exp(top - higher)
        total = total * scale + tl.sum(p, 1)
        mixed = tl.dot(p.to(values.dtype), tl.trans(values), mixed * scale[:, None], input_precision='tf32x3')
        top = higher
    tl.store(lse + position, top + tl.log(total), mask=real)
    _store(out, mixed / total[:, None], i, j, soc, soh, sow, E, real, BE, WIDE)


@triton.jit(do_not_specialize=_SIZES)
def contmix_shared_forward_kernel(
    q, m, table, v, out, lse,
    sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sob, soc, soh, sow,
    G, D, E,
    H: tl.constexpr, W: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr,
    TILES: tl.constexpr, K1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, N2: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Mixed values of one tile of one head, and the log-sum-exp (B, G, 2, H, W) of both softmaxes.

    APART: either window by a program of its own.
    """
    N: tl.constexpr = N1 + N2
    program = tl.program_id(0)
    large = 0
    if APART:
        large = program % 2
        program = program // 2
    head = (program // TILES).to(tl.int64)
    batch = head // G
    group = head % G
    i, j, real, row, col = _tile(program % TILES, W, K2, SH, SW, BT)
    position = i * W + j
    q_t = _load(q + batch * sqb + group * sqg, i, j, sqd, sqh, sqw, D, BD, WIDE).to(tl.float32)
    m += head * N * BD
    lse += head * 2 * H * W
    table += (group * H * W + position[:, None]) * N
    v += batch * svb
    out += batch * sob
    v1 = v + group * E * svc
    v2 = v + (group + G) * E * svc
    out1 = out + group * E * soc
    out2 = out + (group + G) * E * soc
    if APART:
        if large == 0:
            _mix_small(
                q_t, m, table, v1, out1, lse, position, i, j, real, row * SH, col * SW, svc, svh, svw, soc, soh, sow, E,
                H, W, RH, RW, K1, N1, BD, BE, BT, BC, HALF, WIDE,
            )  # fmt: skip
        else:
            _mix_large(
                q_t, m + N1 * BD, table + N1, v2, out2, lse + H * W, position, i, j, real, row, col, svc, svh, svw, soc,
                soh, sow, E, K2, N2, BN, BD, BE, BT, HALF, WIDE,
            )  # fmt: skip
    else:
        _mix_small(
            q_t, m, table, v1, out1, lse, position, i, j, real, row * SH, col * SW, svc, svh, svw, soc, soh, sow, E,
            H, W, RH, RW, K1, N1, BD, BE, BT, BC, HALF, WIDE,
        )  # fmt: skip
        _mix_large(
            q_t, m + N1 * BD, table + N1, v2, out2, lse + H * W, position, i, j, real, row, col, svc, svh, svw, soc,
            soh, sow, E, K2, N2, BN, BD, BE, BT, HALF, WIDE,
        )  # fmt: skip


@triton.jit
def _moved_weight_grad(
    g_t, v, i, j, row, col, svc, svh, svw, E,
    H: tl.constexpr, W: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr,
    K: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(BT, BN): gradients of the weights of windows that move: g · v over all cells, picked for every window.

    Where the cells are few enough, all products are in registers at once; the padding is then some number, not 0.
    """
    n = tl.arange(0, BN)
    row = _start(row * SH, H, K)
    col = _start(col * SW, W, K)
    first_cell = ((_start(i, H, K) - row) * RW + _start(j, W, K) - col)[:, None]
    if RH * RW <= 128:
        CELLS: tl.constexpr = 64 if RH * RW <= 64 else 128
        places = tl.arange(0, CELLS)
        values = _load(v, tl.minimum(row + places // RW, H - 1), col + places % RW, svc, svh, svw, E, BE, WIDE)
        products = tl.dot(tl.trans(g_t.to(values.dtype)), values, input_precision='tf32x3')
        inner = tl.minimum(n // K, K - 1) * RW + n % K
        dp = _gather(products, (tl.arange(0, BT) * CELLS)[:, None] + first_cell + inner[None, :])
    else:
        cell = first_cell + (n // K * RW + n % K)[None, :]
        dp = tl.zeros((BT, BN), tl.float32)
        for first in range(0, RH * RW, BC):
            places = first + tl.arange(0, BC)
            r = tl.minimum(row + places // RW, H - 1)
            values = _load(v, r, col + places % RW, svc, svh, svw, E, BE, WIDE)
            products = tl.dot(tl.trans(g_t.to(values.dtype)), values, input_precision='tf32x3')
            inside = (cell >= first) & (cell < first + BC) & (n < K * K)[None, :]
            dp += _pick(products, (tl.arange(0, BT) * BC - first)[:, None] + cell, inside)
    return dp


@triton.jit
def _shared_weight_grad(
    g_t, v, n, row, col, svc, svh, svw, E,
    K: tl.constexpr, BE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(BT, n): gradients of the weights of the places n of a window that all positions share."""
    r, c = _window_cells(n, row, col, K)
    values = _load(v, r, c, svc, svh, svw, E, BE, WIDE)
    return tl.dot(tl.trans(g_t.to(values.dtype)), values, input_precision='tf32x3')


@triton.jit
def _weights(q_t, m, table, n, lse, HALF: tl.constexpr):
    """(BT, n): softmax of the logits, whose log-sum-exp is known."""
    return _exp(_logits(q_t, m, tl.load(table + n[None, :]), HALF) - lse[:, None])


@triton.jit
def _query_grad(ds, m, HALF: tl.constexpr):
    if HALF:
        return tl.dot(ds, tl.trans(m), input_precision='tf32')
    else:  # Triton 3.6 does not compile tf32x3 beside the product of the logits
        return tl.dot(ds, tl.trans(m), input_precision='ieee')


@triton.jit(do_not_specialize=_SIZES)
def contmix_shared_query_grad_kernel(
    q, m, table, v, out, lse, g, dq, delta,
    sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sob, soc, soh, sow, sgb, sgc, sgh, sgw, sdb, sdg, sdd, sdh, sdw,
    G, D, E,
    H: tl.constexpr, W: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr,
    TILES: tl.constexpr, K1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, N2: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of one tile of a head; delta (B, G, 2, H, W): weights times their gradients, summed."""
    N: tl.constexpr = N1 + N2
    head = (tl.program_id(0) // TILES).to(tl.int64)
    batch = head // G
    group = head % G
    i, j, real, row, col = _tile(tl.program_id(0) % TILES, W, K2, SH, SW, BT)
    position = i * W + j
    q_t = _load(q + batch * sqb + group * sqg, i, j, sqd, sqh, sqw, D, BD, WIDE).to(tl.float32)
    m += head * N * BD
    lse += head * 2 * H * W
    delta += head * 2 * H * W
    table += (group * H * W + position[:, None]) * N
    v += batch * svb
    g += batch * sgb

    n1 = tl.arange(0, N1)
    m1 = _load_rows_of_m(m, n1, BD)
    g1_t = _load(g + group * E * sgc, i, j, sgc, sgh, sgw, E, BE, WIDE)
    dp1 = _moved_weight_grad(
        g1_t, v + group * E * svc, i, j, row, col, svc, svh, svw, E, H, W, SH, SW, RH, RW, K1, N1, BE, BT, BC, WIDE
    )
    p1 = _weights(q_t, m1, table, n1, tl.load(lse + position), HALF)
    sums = tl.sum(p1 * dp1, 1)
    tl.store(delta + position, sums, mask=real)
    query_grad = _query_grad(p1 * (dp1 - sums[:, None]), m1, HALF)

    # A softmax needs delta before its gradient. Instead of computing the logits twice, the products of M with weights
    # times their gradients and with the weights are summed apart. Delta is also the sum of the output times its
    # gradient, but the output has been rounded: taken off first, this leaves a difference that loses nothing.
    v += (group + G) * E * svc
    g_t = _load(g + (group + G) * E * sgc, i, j, sgc, sgh, sgw, E, BE, WIDE)
    out_t = _load(out + batch * sob + (group + G) * E * soc, i, j, soc, soh, sow, E, BE, WIDE)
    total = tl.load(lse + H * W + position)
    guess = tl.sum(g_t.to(tl.float32) * out_t.to(tl.float32), 0)
    sums = tl.zeros((BT,), tl.float32)
    weighted = tl.zeros((BT, BD), tl.float32)
    for first in range(0, N2, BN):
        n = first + tl.arange(0, BN)
        dp = _shared_weight_grad(g_t, v, n, row, col, svc, svh, svw, E, K2, BE, WIDE) - guess[:, None]
        m2 = _load_rows_of_m(m + N1 * BD, n, BD)
        p = _weights(q_t, m2, table + N1, n, total, HALF)
        sums += tl.sum(p * dp, 1)
        weighted += _query_grad(p, m2, HALF)
        query_grad += _query_grad(p * dp, m2, HALF)
    query_grad -= sums[:, None] * weighted
    tl.store(delta + H * W + position, sums + guess, mask=real)
    _store(dq + batch * sdb + group * sdg, query_grad, i, j, sdd, sdh, sdw, D, real, BD, WIDE)


@triton.jit
def _logit_grad(
    q_t, m, table, v, lse, delta, g, tile, n, batch, group, svb, svc, svh, svw, sgb, sgc, sgh, sgw,
    G, E,
    H: tl.constexpr, W: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr,
    K: tl.constexpr, K2: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    HALF: tl.constexpr, WIDE: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """(BT, BN): gradients of the logits at n of one tile, 0 where it has no position."""
    i, j, real, row, col = _tile(tile, W, K2, SH, SW, BT)
    position = LARGE * H * W + i * W + j
    channel = (group + LARGE * G) * E
    g_t = _load(g + batch * sgb + channel * sgc, i, j, sgc, sgh, sgw, E, BE, WIDE)
    v += batch * svb + channel * svc
    if LARGE:
        dp = _shared_weight_grad(g_t, v, n, row, col, svc, svh, svw, E, K, BE, WIDE)
    else:
        dp = _moved_weight_grad(g_t, v, i, j, row, col, svc, svh, svw, E, H, W, SH, SW, RH, RW, K, BN, BE, BT, BC, WIDE)
    place = (batch * G + group) * 2 * H * W + position
    total = tl.where(real, tl.load(lse + place), float('inf'))
    return _weights(q_t, m, table, n, total, HALF) * (dp - tl.load(delta + place)[:, None])


@triton.jit
def _product_grad(
    q, m, table, v, lse, delta, g, first, head, sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sgb, sgc, sgh, sgw,
    G, D, E,
    H: tl.constexpr, W: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr,
    TILES: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Replaces BN columns of a head's M by their gradient, dM = Σ over tiles of q · dS."""
    batch = head // G
    group = head % G
    n = first + tl.arange(0, BN)
    m += head * N * BD
    part = _load_rows_of_m(m, n, BD)
    dm = tl.zeros((BD, BN), tl.float32)
    for tile in range(0, TILES):
        i, j, _, _, _ = _tile(tile, W, K2, SH, SW, BT)
        q_t = _load(q + batch * sqb + group * sqg, i, j, sqd, sqh, sqw, D, BD, WIDE).to(tl.float32)
        ds = _logit_grad(
            q_t, part, table + (group * H * W + i * W + j)[:, None] * N, v, lse, delta, g, tile, n, batch, group,
            svb, svc, svh, svw, sgb, sgc, sgh, sgw, G, E, H, W, SH, SW, RH, RW, K, K2, BN, BE, BT, BC, HALF, WIDE,
            LARGE,
        )  # fmt: skip
        dm += _dot(q_t, ds, HALF)
    tl.debug_barrier()  # every thread must have read M
    tl.store(m + tl.arange(0, BD)[:, None] + (n * BD)[None, :], dm)


@triton.jit(do_not_specialize=_SIZES)
def contmix_shared_product_grad_kernel(
    q, m, table, v, lse, delta, g,
    sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sgb, sgc, sgh, sgw,
    G, D, E,
    H: tl.constexpr, W: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr,
    TILES: tl.constexpr, K1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, N2: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of M, in its place: a program the columns of the small window, or BN of the large one's."""
    N: tl.constexpr = N1 + N2
    CHUNKS: tl.constexpr = 1 + N2 // BN
    chunk = tl.program_id(0) % CHUNKS
    head = (tl.program_id(0) // CHUNKS).to(tl.int64)
    if chunk == 0:
        _product_grad(
            q, m, table, v, lse, delta, g, 0, head, sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sgb, sgc, sgh, sgw,
            G, D, E, H, W, SH, SW, RH, RW, TILES, K1, K2, N, N1, BD, BE, BT, BC, HALF, WIDE, 0,
        )  # fmt: skip
    else:
        _product_grad(
            q, m + N1 * BD, table + N1, v, lse, delta, g, (chunk - 1) * BN, head, sqb, sqg, sqd, sqh, sqw,
            svb, svc, svh, svw, sgb, sgc, sgh, sgw,
            G, D, E, H, W, SH, SW, RH, RW, TILES, K2, K2, N, BN, BD, BE, BT, BC, HALF, WIDE, 1,
        )  # fmt: skip


@triton.jit
def _table_grad(
    q, m, table, v, lse, delta, g, dtable, program, first, SPLITS, ADD,
    sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sgb, sgc, sgh, sgw,
    G, D, E, BATCH,
    H: tl.constexpr, W: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr,
    TILES: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, NM: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """BN columns of the sums for one window, which has N of them; M and the table have NM for both."""
    split = program % SPLITS
    tile = program // SPLITS % TILES
    group = (program // SPLITS // TILES).to(tl.int64)
    n = first + tl.arange(0, BN)
    i, j, real, _, _ = _tile(tile, W, K2, SH, SW, BT)
    position = (group * H * W + i * W + j)[:, None]
    places = split.to(tl.int64) * G * H * W * N + position * N + n[None, :]
    sums = tl.load(dtable + places, mask=real[:, None] & (ADD != 0), other=0.0)
    step = (BATCH + SPLITS - 1) // SPLITS
    for b in range(split * step, tl.minimum(split * step + step, BATCH)):
        batch = (split * step).to(tl.int64) + (b - split * step)
        part = _load_rows_of_m(m + (batch * G + group) * NM * BD, n, BD)
        q_t = _load(q + batch * sqb + group * sqg, i, j, sqd, sqh, sqw, D, BD, WIDE).to(tl.float32)
        sums += _logit_grad(
            q_t, part, table + position * NM, v, lse, delta, g, tile, n, batch, group,
            svb, svc, svh, svw, sgb, sgc, sgh, sgw, G, E, H, W, SH, SW, RH, RW, K, K2, BN, BE, BT, BC, HALF, WIDE,
            LARGE,
        )  # fmt: skip
    tl.store(dtable + places, sums, mask=real[:, None])


@triton.jit(do_not_specialize=_SIZES)
def contmix_shared_table_grad_kernel(
    q, m, table, v, lse, delta, g, dtable1, dtable2,
    sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sgb, sgc, sgh, sgw,
    G, D, E, BATCH, SPLITS1, SPLITS2, ADD,
    H: tl.constexpr, W: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr,
    TILES: tl.constexpr, K1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, N2: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of the logits, summed over parts of the batch: (SPLITS1, G, H, W, N1) and (SPLITS2, G, H, W, N2).

    They are added to what is there if ADD. The programs of the small window, which take longer, come first.
    """
    CHUNKS: tl.constexpr = N2 // BN
    program = tl.program_id(0)
    small = G * TILES * SPLITS1
    if program < small:
        _table_grad(
            q, m, table, v, lse, delta, g, dtable1, program, 0, SPLITS1, ADD,
            sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sgb, sgc, sgh, sgw,
            G, D, E, BATCH, H, W, SH, SW, RH, RW, TILES, K1, K2, N1 + N2, N1, N1, BD, BE, BT, BC, HALF, WIDE, 0,
        )  # fmt: skip
    else:
        program -= small
        _table_grad(
            q, m + N1 * BD, table + N1, v, lse, delta, g, dtable2, program // CHUNKS, program % CHUNKS * BN, SPLITS2,
            ADD, sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sgb, sgc, sgh, sgw,
            G, D, E, BATCH, H, W, SH, SW, RH, RW, TILES, K2, K2, N1 + N2, N2, BN, BD, BE, BT, BC, HALF, WIDE, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def contmix_shared_value_grad_kernel(
    q, m, table, cells, lse, g, dv,
    sqb, sqg, sqd, sqh, sqw, sgb, sgc, sgh, sgw, sdb, sdc, sdh, sdw,
    G, D, E,
    H: tl.constexpr, W: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, RH: tl.constexpr, RW: tl.constexpr,
    TILES: tl.constexpr, K1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, N2: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of BC values of one half of a head: from all tiles, the weight that every position gives them."""
    N: tl.constexpr = N1 + N2
    chunks: tl.constexpr = (H * W + BC - 1) // BC
    cell = tl.program_id(0) % chunks * BC + tl.arange(0, BC)
    r = cell // W
    c = cell % W
    large = tl.program_id(0) // chunks % 2
    head = (tl.program_id(0) // chunks // 2).to(tl.int64)
    batch = head // G
    group = head % G
    q += batch * sqb + group * sqg
    m += head * N * BD
    lse += head * 2 * H * W + large * H * W
    g += batch * sgb + (group + large * G) * E * sgc
    out = tl.zeros((BC, BE), tl.float32)
    if large:
        for tile in range(0, TILES):
            i, j, real, row, col = _tile(tile, W, K2, SH, SW, BT)
            position = i * W + j
            q_t = _load(q, i, j, sqd, sqh, sqw, D, BD, WIDE).to(tl.float32)
            g_t = _load(g, i, j, sgc, sgh, sgw, E, BE, WIDE)
            total = tl.where(real, tl.load(lse + position), float('inf'))
            # M is read in the order of the cells, and the table is in it: -inf where a cell is not in the window.
            a = r - row
            b = c - col
            n = N1 + tl.where((a >= 0) & (a < K2) & (b >= 0) & (b < K2), a * K2 + b, 0)
            biases = cells + (group * H * W + position[:, None]) * (chunks * BC)
            p = _weights(q_t, _load_rows_of_m(m, n, BD), biases, cell, total, HALF).to(g_t.dtype)
            out = tl.dot(tl.trans(p), tl.trans(g_t), out, input_precision='tf32x3')
    else:
        n = tl.arange(0, N1)
        m1 = _load_rows_of_m(m, n, BD)
        first_row = tl.program_id(0) % chunks * BC // W
        last_row = (tl.program_id(0) % chunks * BC + BC - 1) // W
        for tile in range(0, TILES):
            i, j, real, row, col = _tile(tile, W, K2, SH, SW, BT)
            reach = _start(row * SH, H, K1)
            if (reach <= last_row) & (reach + RH > first_row):  # else no window of the tile reaches the cells
                position = i * W + j
                q_t = _load(q, i, j, sqd, sqh, sqw, D, BD, WIDE).to(tl.float32)
                g_t = _load(g, i, j, sgc, sgh, sgw, E, BE, WIDE)
                total = tl.where(real, tl.load(lse + position), float('inf'))
                biases = table + (group * H * W + position[:, None]) * N
                p = _weights(q_t, m1, biases, n, total, HALF).to(g_t.dtype)
                p = _to_cells(p, i, j, r, c, H, W, K1, N1, BT, BC)
                out = tl.dot(tl.trans(p), tl.trans(g_t), out, input_precision='tf32x3')
    dv += batch * sdb + (group + large * G) * E * sdc
    _store(dv, out, tl.minimum(r, H - 1), c, sdc, sdh, sdw, E, cell < H * W, BE, WIDE)


@triton.jit
def _places_of_keys(row, column, sb, sg, sd, sl, G, BD: tl.constexpr):
    head = (row // BD).to(tl.int64)
    offsets = head // G * sb + head % G * sg + (row % BD).to(tl.int64) * sd
    return offsets[:, None] + (column.to(tl.int64) * sl)[None, :]


@triton.jit
def _load_keys(key, row, column, sb, sg, sd, sl, G, D, ROWS, L, BD: tl.constexpr):
    """(rows, columns) of the keys (B, G, D, L) in fp32: rows are channels of all heads, padded to BD each with 0."""
    mask = ((row < ROWS) & (row % BD < D))[:, None] & (column < L)[None, :]
    offsets = _places_of_keys(row, column, sb, sg, sd, sl, G, BD)
    return tl.load(key + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_weight(weight, n, column, L, K1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr):
    """(n, columns) of the weight in fp32: rows n in the order of those of M, 0 in the padding."""
    place = tl.where(n < N1, n, n - N1 + K1 * K1)
    inside = tl.where(n < N1, n < K1 * K1, n < N1 + K2 * K2)
    mask = inside[:, None] & (column < L)[None, :]
    return tl.load(weight + (place * L)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _places_of_m(row, n, N: tl.constexpr, BD: tl.constexpr):
    """Where M (heads, N, BD) has the rows, channels of all heads, and the columns n."""
    return ((row // BD).to(tl.int64) * (N * BD) + row % BD)[:, None] + (n * BD)[None, :]


@triton.jit
def _write_products(
    program, key, weight, m, skb, skg, skd, skl, G, D, ROWS, L,
    K1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, N2: tl.constexpr, BD: tl.constexpr,
    BR: tl.constexpr, BL: tl.constexpr, BN: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """M = key · weightᵀ to fp32 precision, 0 in the padding: a program BR channels of all heads' and BN columns."""
    N: tl.constexpr = N1 + N2
    CHUNKS: tl.constexpr = (N + BN - 1) // BN
    row = program // CHUNKS * BR + tl.arange(0, BR)
    n = program % CHUNKS * BN + tl.arange(0, BN)
    out = tl.zeros((BR, BN), tl.float32)
    for first in range(0, L, BL):
        column = first + tl.arange(0, BL)
        x = _load_keys(key, row, column, skb, skg, skd, skl, G, D, ROWS, L, BD)
        w = tl.trans(_load_weight(weight, n, column, L, K1, N1, K2))
        if HALF:  # exact in tf32
            high, low = _split(w)
            out = tl.dot(x, high, tl.dot(x, low, out, input_precision='tf32'), input_precision='tf32')
        else:
            out += tl.dot(x, w, input_precision='ieee')
    tl.store(m + _places_of_m(row, n, N, BD), out, mask=(row < ROWS)[:, None] & (n < N)[None, :])


@triton.jit
def _write_table(
    program, bias, rpb1, rpb2, table, G,
    H: tl.constexpr, W: tl.constexpr, K1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, N2: tl.constexpr,
    BX: tl.constexpr,
):  # fmt: skip
    """(G, H, W, N1 + N2): bias plus position bias of every position, -inf in the padding; BX numbers a program."""
    N: tl.constexpr = N1 + N2
    place = program * BX + tl.arange(0, BX)
    position = place // N
    x = place % N
    i = position % (H * W) // W
    j = position % W
    group = position // (H * W)
    large = x >= N1
    n = tl.where(large, x - N1, x)
    k = tl.where(large, K2, K1)
    a = tl.where(large, n // K2, n // K1)
    b = n - a * k
    u = tl.where(large, _start(i, H, K2), _start(i, H, K1)) - i + k - 1 + a
    w = tl.where(large, _start(j, W, K2), _start(j, W, K1)) - j + k - 1 + b
    side = 2 * k - 1
    source = (group * side + u) * side + w
    known = group < G
    inside = (n < k * k) & known
    value = tl.load(bias + tl.where(large, K1 * K1, 0) + n, mask=inside, other=float('-inf')).to(tl.float32)
    value += tl.load(rpb1 + source, mask=inside & (x < N1), other=0.0).to(tl.float32)
    value += tl.load(rpb2 + source, mask=inside & large, other=0.0).to(tl.float32)
    tl.store(table + place, value, mask=known)


@triton.jit(do_not_specialize=_SIZES)
def contmix_shared_prepare_kernel(
    key, weight, m, bias, rpb1, rpb2, table,
    skb, skg, skd, skl, G, D, ROWS, L, PRODUCTS,
    H: tl.constexpr, W: tl.constexpr, K1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, N2: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """What the forward pass reads: M by the first PRODUCTS programs, the table by those that come after them, if any.

    Of one picture either takes hardly longer than a launch.
    """
    program = tl.program_id(0)
    if program < PRODUCTS:
        _write_products(
            program, key, weight, m, skb, skg, skd, skl, G, D, ROWS, L, K1, N1, K2, N2, BD, BR, BL, BN, HALF
        )
    else:
        _write_table(program - PRODUCTS, bias, rpb1, rpb2, table, G, H, W, K1, N1, K2, N2, BX)


@triton.jit(do_not_specialize=_SIZES)
def contmix_shared_key_grad_kernel(
    key, weight, dm, dkey, dweight,
    skb, skg, skd, skl, sdb, sdg, sdd, sdl, G, D, ROWS, L, PARTS, STEP, ADD,
    K1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, N2: tl.constexpr, BD: tl.constexpr,
    BR: tl.constexpr, BL: tl.constexpr, BN: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """From the gradient of M those of the keys and of the weight, either in programs of its own.

    The latter, (PARTS, N1 + N2, L), are sums over STEP channels of all heads' each, to be summed over the parts; they
    are added to what is there if ADD.
    """
    N: tl.constexpr = N1 + N2
    CHUNKS: tl.constexpr = (N + BN - 1) // BN
    program = tl.program_id(0)
    if program < PARTS * CHUNKS:
        n = program % CHUNKS * BN + tl.arange(0, BN)
        part = program // CHUNKS
        for first in range(0, L, BL):
            column = first + tl.arange(0, BL)
            places = (part * N + n)[:, None] * L + column[None, :]
            inside = (n < N)[:, None] & (column < L)[None, :]
            sums = tl.load(dweight + places, mask=inside & (ADD != 0), other=0.0)
            for start in range(part * STEP, tl.minimum(part * STEP + STEP, ROWS), BR):
                row = start + tl.arange(0, BR)
                x = _load_keys(key, row, column, skb, skg, skd, skl, G, D, ROWS, L, BD)
                mask = (row < ROWS)[:, None] & (n < N)[None, :]
                grads = tl.trans(tl.load(dm + _places_of_m(row, n, N, BD), mask=mask, other=0.0))
                if HALF:
                    high, low = _split(grads)
                    sums = tl.dot(high, x, tl.dot(low, x, sums, input_precision='tf32'), input_precision='tf32')
                else:
                    sums = tl.dot(grads, x, sums, input_precision='tf32x3')
            tl.store(dweight + places, sums, mask=inside)
    else:
        channel = (program - PARTS * CHUNKS) * BR + tl.arange(0, BR)
        for start in range(0, L, BL):
            cell = start + tl.arange(0, BL)
            out = tl.zeros((BR, BL), tl.float32)
            for chunk in range(0, CHUNKS):
                place = chunk * BN + tl.arange(0, BN)
                valid = (channel < ROWS)[:, None] & (place < N)[None, :]
                slopes = tl.load(dm + _places_of_m(channel, place, N, BD), mask=valid, other=0.0)
                w = _load_weight(weight, place, cell, L, K1, N1, K2)
                out = tl.dot(slopes, w, out, input_precision='tf32x3')
            real = ((channel < ROWS) & (channel % BD < D))[:, None] & (cell < L)[None, :]
            offsets = _places_of_keys(channel, cell, sdb, sdg, sdd, sdl, G, BD)
            tl.store(dkey + offsets, out.to(dkey.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=_SIZES)
def contmix_shared_cells_kernel(
    bias, rpb, table,
    H: tl.constexpr, W: tl.constexpr, K1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, N2: tl.constexpr,
    CELLS: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """(G, H, W, CELLS): the large window's part of the table, for the cells of the map, -inf outside the window."""
    i = tl.program_id(0) % (H * W) // W
    j = tl.program_id(0) % W
    group = tl.program_id(0) // (H * W)
    x = tl.arange(0, BX)
    a = x // W - _start(i, H, K2)
    b = x % W - _start(j, W, K2)
    inside = (a >= 0) & (a < K2) & (b >= 0) & (b < K2)
    value = tl.load(bias + K1 * K1 + a * K2 + b, mask=inside, other=float('-inf')).to(tl.float32)
    side: tl.constexpr = 2 * K2 - 1
    place = (group * side + x // W - i + K2 - 1) * side + x % W - j + K2 - 1
    value += tl.load(rpb + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(table + tl.program_id(0).to(tl.int64) * CELLS + x, value, mask=x < CELLS)


@triton.jit
def _position_bias_grad(
    dtable, drpb, group, u, SPLITS, G,
    H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BU: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Row u of the gradient of one group's position bias: what lies at (u, w) from every position, summed."""
    w = tl.arange(0, BU)
    sums = tl.zeros((BP, BU), tl.float32)
    for first in range(0, H * W, BP):
        position = first + tl.arange(0, BP)
        i = position // W
        j = position % W
        a = u - (_start(i, H, K) - i + K - 1)
        b = w[None, :] - (_start(j, W, K) - j + K - 1)[:, None]
        inside = ((position < H * W) & (a >= 0) & (a < K))[:, None] & (b >= 0) & (b < K)
        places = (group * H * W + position)[:, None] * N + (a * K)[:, None] + b
        split = dtable
        for _ in range(0, SPLITS):
            sums += tl.load(split + places, mask=inside, other=0.0)
            split += G * H * W * N
    side: tl.constexpr = 2 * K - 1
    tl.store(drpb + (group * side + u) * side + w, tl.sum(sums, 0), mask=w < side)


@triton.jit(do_not_specialize=_SIZES)
def contmix_shared_position_bias_grad_kernel(
    dtable1, dtable2, drpb1, drpb2, SPLITS1, SPLITS2, G,
    H: tl.constexpr, W: tl.constexpr,
    K1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, N2: tl.constexpr, BU: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Gradients of both position biases from those of the table: a program one row of one of them."""
    u = tl.program_id(0) % (2 * K1 + 2 * K2 - 2)
    group = tl.program_id(0) // (2 * K1 + 2 * K2 - 2)
    if u < 2 * K1 - 1:
        _position_bias_grad(dtable1, drpb1, group, u, SPLITS1, G, H, W, N1, K1, BU, BP)
    else:
        _position_bias_grad(dtable2, drpb2, group, u - 2 * K1 + 1, SPLITS2, G, H, W, N2, K2, BU, BP)
