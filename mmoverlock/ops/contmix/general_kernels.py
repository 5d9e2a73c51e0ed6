"""Triton kernels of ContMix for maps of any size.

A segment is 16 positions of one row of the map, and a program takes S segments, one a warp. One row of the window at a
time, their logits are a product with the columns of M = key · weightᵀ that belong to that row, which is the same
for all positions. Only along the columns of the map do windows lie differently: a gather through shared memory, the
same for every row, lays a position's weights out over the 32 cells of its segment, and what follows is a product again,
a batch over the segments. See docs/contmix.md.

Columns of M, of the tables and of what is summed are in rows of P1 or P2 places (8 or 16) for each row of a window,
the last of which is beyond the window. A window's table (G, K, K, ...) has bias plus position bias, -inf beyond the
window; positions with the same place in their window share a row of it: ``_place``. Half-precision queries meet M in
PARTS of their own type, high to low, which together have fp32's precision.

Names: i, j rows and columns of positions; r, c of cells; a, b of places in a window; K1, K2 the windows, R = 16 / P
rows of which are taken at once, N1 and N2 their columns of M; D, E channels of a head's queries and values, BD and BE
padded. Positions past the end repeat the last one, with no weight: loads need no mask.
"""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

_INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')
# Compiled once for all sizes of the map: training on images of many sizes must not compile at every step.
_SIZES = ('G', 'H', 'W', 'TILES', 'HEADS', 'BATCH', 'STEP', 'STRIPES', 'BANDS', 'ROWS', 'PARTIALS')
SEGMENT = tl.constexpr(16)  # positions: the rows of a matrix product on tensor cores
REACH = tl.constexpr(32)  # columns of the map that the windows of a segment reach, padded


@triton.jit
def _start(i, length, K: tl.constexpr):
    """First index of the window of position i: centred, shifted inward at the borders."""
    return tl.minimum(tl.maximum(i - K // 2, 0), length - K)


@triton.jit
def _place(i, length, K: tl.constexpr):
    """Where position i is in its window: row or column of the table. All positions away from the borders share one."""
    return tl.minimum(i, K // 2) + tl.maximum(i - (length - 1 - K // 2), 0)


@triton.jit
def _exp(x):
    """The exponential as one instruction: it need not be right where it is below 1e-38, which costs three more."""
    if _INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.fast_expf(x)


@triton.jit
def _far(i, stride, WIDE: tl.constexpr):
    """i * stride; in int64 when the map is so large that it has to be."""
    if WIDE:
        return i.to(tl.int64) * stride
    else:
        return i * stride


@triton.jit
def _segments(first, H, W, S: tl.constexpr):
    """Row and first column of S segments."""
    across = tl.cdiv(W, SEGMENT)
    segment = tl.minimum(first + tl.arange(0, S), H * across - 1)
    return segment // across, segment % across * SEGMENT


@triton.jit
def _positions(first, H, W, S: tl.constexpr):
    """Row, column and first column of the segment of their positions, and which of these are real."""
    across = tl.cdiv(W, SEGMENT)
    t = tl.arange(0, S * SEGMENT)
    segment = first + t // SEGMENT
    real = segment < H * across
    segment = tl.minimum(segment, H * across - 1)
    j0 = segment % across * SEGMENT
    j = j0 + t % SEGMENT
    return segment // across, tl.minimum(j, W - 1), j0, real & (j < W)


@triton.jit
def _entries(group, i, j, H, W, K: tl.constexpr, NK: tl.constexpr):
    """Where a window's table has these positions."""
    return ((group * K + _place(i, H, K)) * K + _place(j, W, K)) * NK


@triton.jit
def _load(x, i, j, sc, sh, sw, C: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr):
    """(places, BC): channels of x at the places (i, j)."""
    c = tl.arange(0, BC)
    at = (_far(i, sh, WIDE) + _far(j, sw, WIDE))[:, None] + _far(c, sc, WIDE)[None, :]
    return tl.load(x + at, mask=(c < C)[None, :], other=0.0)


@triton.jit
def _store(x, y, i, j, sc, sh, sw, real, C: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr):
    """Stores y (places, BC)."""
    c = tl.arange(0, BC)
    at = (_far(i, sh, WIDE) + _far(j, sw, WIDE))[:, None] + _far(c, sc, WIDE)[None, :]
    tl.store(x + at, y.to(x.dtype.element_ty), mask=(c < C)[None, :] & real[:, None])


@triton.jit
def _load_cells(v, r, c0, H, W, sc, sh, sw, E: tl.constexpr, R: tl.constexpr, BE: tl.constexpr, WIDE: tl.constexpr):
    """(S, R * REACH, BE): values of R rows of cells for each segment, from (r, c0)."""
    x = tl.arange(0, R * REACH)
    e = tl.arange(0, BE)
    row = tl.minimum(r[:, None] + (x // REACH)[None, :], H - 1)
    col = tl.minimum(c0[:, None] + (x % REACH)[None, :], W - 1)
    at = (_far(row, sh, WIDE) + _far(col, sw, WIDE))[:, :, None] + _far(e, sc, WIDE)[None, None, :]
    return tl.load(v + at, mask=(e < E)[None, None, :], other=0.0)


@triton.jit
def _load_parts(m, at, known, far: tl.constexpr, PARTS: tl.constexpr):
    """The parts of M at these places that are known, high to low, ``far`` from each other; the last again for want."""
    high = tl.load(m + at, mask=known, other=0.0)
    middle, low = high, high
    if PARTS > 1:
        middle = tl.load(m + far + at, mask=known, other=0.0)
        low = middle
    if PARTS > 2:
        low = tl.load(m + 2 * far + at, mask=known, other=0.0)
    return high, middle, low


@triton.jit
def _product(q, high, middle, low, factor, PARTS: tl.constexpr):
    """(positions, columns): queries times columns of M, whose parts these are, to fp32's precision."""
    if PARTS == 1:
        return tl.dot(q, high, input_precision='ieee')
    else:
        out = tl.dot(q, low)
        if PARTS == 3:
            out = tl.dot(q, middle, out)
        return tl.dot(q, high, out) * factor


@triton.jit
def _logits(
    q, m, scale, table, n, known,
    FIRST: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(positions, n) logits of the columns n of a window that are known, -inf of others; and the columns' scale."""
    d = tl.arange(0, BD)
    at = (d * N)[:, None] + (FIRST + n)[None, :]
    high, middle, low = _load_parts(m, at, (d < D)[:, None] & known[None, :], D * N, PARTS)
    factor = tl.load(scale + (FIRST + n) // SEGMENT, mask=known, other=0.0)
    biases = tl.load(table[:, None] + n[None, :], mask=known[None, :], other=float('-inf'))
    return _product(q, high, middle, low, factor[None, :], PARTS) + biases, factor


@triton.jit
def _gather(x, index):
    """x's elements at these places of it, flattened: the flat form makes Triton go through shared memory."""
    picked = tl.gather(tl.reshape(x, (x.numel,)), tl.reshape(index, (index.numel,)), 0)
    return tl.reshape(picked, index.shape)


@triton.jit
def _to_cells(shift, K: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    """(positions, R * REACH): which of a position's weights, R rows of P, a cell has; that beyond the window is 0."""
    t = tl.arange(0, shift.shape[0])
    x = tl.arange(0, R * REACH)
    b = (x % REACH)[None, :] - shift[:, None]
    return t[:, None] * (R * P) + (x // REACH * P)[None, :] + tl.where((b >= 0) & (b < K), b, P - 1)


@triton.jit
def _to_window(shift, P: tl.constexpr, R: tl.constexpr):
    """(positions, R * P): which of the cells of R rows a place in a position's window is; any, beyond the window."""
    t = tl.arange(0, shift.shape[0])
    n = tl.arange(0, R * P)
    return t[:, None] * (R * REACH) + (n // P * REACH + n % P)[None, :] + shift[:, None]


@triton.jit
def _mix(p, v, mixed, S: tl.constexpr):
    """Adds weights (positions, cells) times values (S, cells, BE) to ``mixed``."""
    cells: tl.constexpr = p.shape[1]
    return tl.dot(tl.reshape(p, (S, SEGMENT, cells)), v, mixed, input_precision='tf32x3')


@triton.jit
def _window_forward(
    q, m, scale, table, v, svc, svh, svw, out, soc, soh, sow, lse, first, H, W,
    FIRST: tl.constexpr, K: tl.constexpr, P: tl.constexpr, NK: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, S: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = C // P
    i, j, j0, real = _positions(first, H, W, S)
    rows, cols = _segments(first, H, W, S)
    rows = _start(rows, H, K)
    cols = _start(cols, W, K)
    index = _to_cells(_start(j, W, K) - _start(j0, W, K), K, P, R)
    top = tl.full((S * SEGMENT,), float('-inf'), tl.float32)
    total = tl.zeros((S * SEGMENT,), tl.float32)
    mixed = tl.zeros((S, SEGMENT, BE), tl.float32)
    for a in range(0, K, R):
        n = a * P + tl.arange(0, C)
        known = n < NK
        values = _load_cells(v, rows + a, cols, H, W, svc, svh, svw, E, R, BE, WIDE)
        logits, _ = _logits(q, m, scale, table, n, known, FIRST, D, N, BD, PARTS)
        higher = tl.maximum(top, tl.max(logits, 1))
        p = _exp(logits - higher[:, None])
        smaller = _exp(top - higher)
        total = total * smaller + tl.sum(p, 1)
        top = higher
        mixed = mixed * tl.reshape(smaller, (S, SEGMENT, 1))
        mixed = _mix(_gather(p.to(values.dtype), index), values, mixed, S)
    tl.store(lse + i * W + j, top + tl.log(total), mask=real)
    mixed = tl.reshape(mixed, (S * SEGMENT, BE)) / total[:, None]
    _store(out, mixed, i, j, soc, soh, sow, real, E, BE, WIDE)


@triton.jit(do_not_specialize=_SIZES)
def contmix_forward_kernel(
    q, m, scale, table1, table2, v, out, lse,
    sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sob, soc, soh, sow,
    G, H, W, TILES,
    K1: tl.constexpr, P1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, S: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mixed values of S segments of one half of a head, and the log-sum-exp (B, G, 2, H, W) of the softmax."""
    N: tl.constexpr = N1 + N2
    first = tl.program_id(0) % TILES * S
    large = tl.program_id(0) // TILES % 2
    head = (tl.program_id(0) // TILES // 2).to(tl.int64)
    batch = head // G
    group = head % G
    channel = (group + large * G) * E
    i, j, _, _ = _positions(first, H, W, S)
    query = _load(q + batch * sqb + group * sqg, i, j, sqd, sqh, sqw, D, BD, WIDE)
    m += head * PARTS * D * N
    scale += head * (N // SEGMENT)
    lse += (head * 2 + large) * H * W
    v += batch * svb + channel * svc
    out += batch * sob + channel * soc
    if large:
        _window_forward(
            query, m, scale, table2 + _entries(group, i, j, H, W, K2, N2), v, svc, svh, svw, out, soc, soh,
            sow, lse, first, H, W, N1, K2, P2, N2, C, D, E, N, BD, BE, S, PARTS, WIDE,
        )  # fmt: skip
    else:
        _window_forward(
            query, m, scale, table1 + _entries(group, i, j, H, W, K1, N1), v, svc, svh, svw, out, soc, soh,
            sow, lse, first, H, W, 0, K1, P1, N1, C, D, E, N, BD, BE, S, PARTS, WIDE,
        )  # fmt: skip


@triton.jit
def _high(m, x, known, factor, D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr):
    """(columns, BD): M's columns x that are known, from the first part; M's rows along the columns."""
    d = tl.arange(0, BD)
    known = known[:, None] & (d < D)[None, :]
    return tl.load(m + (d * N)[None, :] + x[:, None], mask=known, other=0.0).to(tl.float32) * factor[:, None]


@triton.jit
def _dot(x, y, PARTS: tl.constexpr):
    """x @ y of fp32 operands: to the precision of the outputs in half precision, to fp32's otherwise."""
    if PARTS == 1:
        return tl.dot(x, y, input_precision='ieee')
    else:
        return tl.dot(x, y, input_precision='tf32')


@triton.jit
def _weight_grad(g, values, index, S: tl.constexpr):
    """(positions, places): gradients of the weights, g (S, SEGMENT, BE) · values, from those of all cells."""
    products = tl.dot(g, tl.permute(values, (0, 2, 1)), input_precision='tf32x3')
    return _gather(tl.reshape(products, (S * SEGMENT, products.shape[2])), index)


@triton.jit
def _window_query_grad(
    q, m, scale, table, v, svc, svh, svw, o, soc, soh, sow, g, sgc, sgh, sgw, lse, delta, first, H, W,
    FIRST: tl.constexpr, K: tl.constexpr, P: tl.constexpr, NK: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, S: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries through one window.

    A softmax's gradient p (dp - δ) needs δ = Σ p dp, known after all rows only. The output, though rounded, gives
    nearly that number before: with p (dp - δ') summed, the difference can be put right at the end without a loss.
    """
    R: tl.constexpr = C // P
    i, j, j0, real = _positions(first, H, W, S)
    rows, cols = _segments(first, H, W, S)
    rows = _start(rows, H, K)
    cols = _start(cols, W, K)
    index = _to_window(_start(j, W, K) - _start(j0, W, K), P, R)
    grad = _load(g, i, j, sgc, sgh, sgw, E, BE, WIDE)
    nearly = tl.sum(_load(o, i, j, soc, soh, sow, E, BE, WIDE).to(tl.float32) * grad.to(tl.float32), 1)
    grad = tl.reshape(grad.to(v.dtype.element_ty), (S, SEGMENT, BE))
    total = tl.load(lse + i * W + j)
    rests = tl.zeros((S * SEGMENT, C), tl.float32)
    first_sum = tl.zeros((S * SEGMENT, BD), tl.float32)
    second_sum = tl.zeros((S * SEGMENT, BD), tl.float32)
    for a in range(0, K, R):
        n = a * P + tl.arange(0, C)
        known = n < NK
        values = _load_cells(v, rows + a, cols, H, W, svc, svh, svw, E, R, BE, WIDE)
        dp = _weight_grad(grad, values, index, S)
        logits, factor = _logits(q, m, scale, table, n, known, FIRST, D, N, BD, PARTS)
        p = _exp(logits - total[:, None])
        ds = p * (dp - nearly[:, None])
        rests += ds
        high = _high(m, FIRST + n, known, factor, D, N, BD)
        first_sum += _dot(ds, high, PARTS)
        second_sum += _dot(p, high, PARTS)
    rest = tl.sum(rests, 1)
    tl.store(delta + i * W + j, nearly + rest, mask=real)
    return first_sum - rest[:, None] * second_sum


@triton.jit(do_not_specialize=_SIZES)
def contmix_query_grad_kernel(
    q, m, scale, table1, table2, v, out, lse, g, dq, delta,
    sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sob, soc, soh, sow, sgb, sgc, sgh, sgw, sdb, sdg, sdd, sdh, sdw,
    G, H, W, TILES,
    K1: tl.constexpr, P1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, S: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of S segments of one head; delta (B, G, 2, H, W): weights times their gradients."""
    N: tl.constexpr = N1 + N2
    first = tl.program_id(0) % TILES * S
    head = (tl.program_id(0) // TILES).to(tl.int64)
    batch = head // G
    group = head % G
    i, j, _, real = _positions(first, H, W, S)
    query = _load(q + batch * sqb + group * sqg, i, j, sqd, sqh, sqw, D, BD, WIDE)
    m += head * PARTS * D * N
    scale += head * (N // SEGMENT)
    table1 += _entries(group, i, j, H, W, K1, N1)
    table2 += _entries(group, i, j, H, W, K2, N2)
    lse += head * 2 * H * W
    delta += head * 2 * H * W
    v += batch * svb
    out += batch * sob
    g += batch * sgb
    small = group * E  # first channel of the head among the values of the small window, and of the large one
    large = (group + G) * E
    query_grad = _window_query_grad(
        query, m, scale, table1, v + small * svc, svc, svh, svw, out + small * soc, soc, soh, sow,
        g + small * sgc, sgc, sgh, sgw, lse, delta, first, H, W,
        0, K1, P1, N1, C, D, E, N, BD, BE, S, PARTS, WIDE,
    )  # fmt: skip
    query_grad += _window_query_grad(
        query, m, scale, table2, v + large * svc, svc, svh, svw, out + large * soc, soc, soh, sow,
        g + large * sgc, sgc, sgh, sgw, lse + H * W, delta + H * W, first, H, W,
        N1, K2, P2, N2, C, D, E, N, BD, BE, S, PARTS, WIDE,
    )  # fmt: skip
    _store(dq + batch * sdb + group * sdg, query_grad, i, j, sdd, sdh, sdw, real, D, BD, WIDE)


@triton.jit
def _window_value_grad(
    q, m, scale, table, lse, g, dv, sqd, sqh, sqw, sgc, sgh, sgw, sdc, sdh, sdw, first, H, W,
    FIRST: tl.constexpr, K: tl.constexpr, P: tl.constexpr, NK: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, S: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of S segments of values: over the rows of positions that look at them, REACH columns at a time."""
    half: tl.constexpr = K // 2
    r, c0 = _segments(first, H, W, S)
    first_i = tl.where(r < K, 0, r - half)
    last_i = tl.where(r >= H - K, H - 1, r + half)
    first_j = tl.where(c0 < K, 0, c0 - half)
    last_j = tl.where(c0 + SEGMENT > W - K, W - 1, tl.minimum(c0 + SEGMENT - 1 + half, W - 1))
    y = tl.arange(0, REACH)
    b = tl.arange(0, P)
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    s = tl.arange(0, S)
    x = tl.arange(0, SEGMENT)
    grads = tl.zeros((S, SEGMENT, BE), tl.float32)
    for across in range(0, tl.max(last_j - first_j, 0) + 1, REACH):
        j = first_j[:, None] + across + y[None, :]
        there = j <= last_j[:, None]
        j = tl.minimum(j, W - 1)
        column = (c0[:, None] + x[None, :])[:, None, :] - _start(j, W, K)[:, :, None]
        index = ((s[:, None] * REACH + y[None, :]) * P)[:, :, None]
        index += tl.where((column >= 0) & (column < K), column, P - 1)
        places = _place(j, W, K) * NK
        for down in range(0, tl.max(last_i - first_i, 0) + 1):
            i = first_i + down
            real = there & (i <= last_i)[:, None]
            i = tl.minimum(i, last_i)
            query = tl.load(
                q + (_far(i, sqh, WIDE)[:, None] + _far(j, sqw, WIDE))[:, :, None] + _far(d, sqd, WIDE)[None, None, :],
                mask=(d < D)[None, None, :], other=0.0,
            )  # fmt: skip
            # The row of these positions' windows that row r of the map is.
            n = ((r - _start(i, H, K)) * P)[:, None] + b[None, :]
            at = (d * N)[None, :, None] + (FIRST + n)[:, None, :]
            known = (d < D)[None, :, None]
            high, middle, low = _load_parts(m, at, known, D * N, PARTS)
            factor = tl.load(scale + (FIRST + (r - _start(i, H, K)) * P) // SEGMENT)
            logits = _product(query, high, middle, low, factor[:, None, None], PARTS)
            row = _place(i, H, K) * (K * NK)
            logits += tl.load(table + (row[:, None] + places)[:, :, None] + n[:, None, :])
            total = tl.load(lse + i[:, None] * W + j, mask=real, other=float('inf'))
            grad = tl.load(
                g + (_far(i, sgh, WIDE)[:, None] + _far(j, sgw, WIDE))[:, :, None] + _far(e, sgc, WIDE)[None, None, :],
                mask=(e < E)[None, None, :], other=0.0,
            )  # fmt: skip
            p = _gather(_exp(logits - total[:, :, None]).to(grad.dtype), index)
            grads = tl.dot(tl.permute(p, (0, 2, 1)), grad, grads, input_precision='tf32x3')
    i, j, _, real = _positions(first, H, W, S)
    _store(dv, tl.reshape(grads, (S * SEGMENT, BE)), i, j, sdc, sdh, sdw, real, E, BE, WIDE)


@triton.jit(do_not_specialize=_SIZES)
def contmix_value_grad_kernel(
    q, m, scale, table1, table2, lse, g, dv,
    sqb, sqg, sqd, sqh, sqw, sgb, sgc, sgh, sgw, sdb, sdc, sdh, sdw,
    G, H, W, TILES,
    K1: tl.constexpr, P1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, S: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of S segments of values of one half of a head."""
    N: tl.constexpr = N1 + N2
    first = tl.program_id(0) % TILES * S
    large = tl.program_id(0) // TILES % 2
    head = (tl.program_id(0) // TILES // 2).to(tl.int64)
    batch = head // G
    group = head % G
    channel = (group + large * G) * E
    q += batch * sqb + group * sqg
    m += head * PARTS * D * N
    scale += head * (N // SEGMENT)
    lse += (head * 2 + large) * H * W
    g += batch * sgb + channel * sgc
    dv += batch * sdb + channel * sdc
    if large:
        _window_value_grad(
            q, m, scale, table2 + group * K2 * K2 * N2, lse, g, dv, sqd, sqh, sqw, sgc, sgh, sgw, sdc, sdh,
            sdw, first, H, W, N1, K2, P2, N2, D, E, N, BD, BE, S, PARTS, WIDE,
        )  # fmt: skip
    else:
        _window_value_grad(
            q, m, scale, table1 + group * K1 * K1 * N1, lse, g, dv, sqd, sqh, sqw, sgc, sgh, sgw, sdc, sdh,
            sdw, first, H, W, 0, K1, P1, N1, D, E, N, BD, BE, S, PARTS, WIDE,
        )  # fmt: skip


@triton.jit
def _row_sums(
    q, m, scale, table, v, lse, delta, g, dm, dbias, drpb, split, stripe, band, partial, group, FIRST, a,
    sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sgb, sgc, sgh, sgw,
    G, H, W, BATCH, STEP, ROWS, HEADS,
    K: tl.constexpr, P: tl.constexpr, NK: tl.constexpr, LARGE: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, S: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """R rows of one window, from row a, of a stripe of 16 columns: what they give to dM, the biases and drpb."""
    R: tl.constexpr = SEGMENT // P
    half: tl.constexpr = K // 2
    channel = (group + LARGE * G) * E
    j0 = stripe * SEGMENT
    t = tl.arange(0, S * SEGMENT)
    s = tl.arange(0, S)
    d = tl.arange(0, BD)
    u = tl.arange(0, REACH)
    b = tl.arange(0, R * P)
    column = j0 + t % SEGMENT
    j = tl.minimum(column, W - 1)
    c0 = _start(j0, W, K) + tl.zeros((S,), tl.int32)
    index = _to_window(_start(j, W, K) - _start(j0, W, K), P, R)
    # Of a position's gradients, which lies at column u of the position bias; that beyond the window is 0.
    side = u[None, :] - (_start(j, W, K) - j + K - 1)[:, None]
    side = tl.where((side >= 0) & (side < K), side, P - 1)
    n = a * P + b
    first = band * ROWS
    end = tl.minimum(first + ROWS, H)
    biases = tl.zeros((S * SEGMENT, R * P), tl.float32)
    places = tl.zeros((R * SEGMENT, REACH), tl.float32)  # (row of the window, place of the position), column u
    slot = tl.arange(0, R * SEGMENT)
    for image in range(split * STEP, tl.minimum(split * STEP + STEP, BATCH)):
        batch = (split * STEP).to(tl.int64) + (image - split * STEP)
        head = batch * G + group
        m_ = m + head * PARTS * D * N
        scale_ = scale + head * (N // SEGMENT)
        q_ = q + batch * sqb + group * sqg
        v_ = v + batch * svb + channel * svc
        g_ = g + batch * sgb + channel * sgc
        lse_ = lse + (head * 2 + LARGE) * H * W
        delta_ = delta + (head * 2 + LARGE) * H * W
        high, middle, low = _load_parts(m_, (d * N)[:, None] + (FIRST + n)[None, :], (d < D)[:, None], D * N, PARTS)
        factor = tl.load(scale_ + (FIRST + a * P) // SEGMENT)
        products = tl.zeros((S, BD, R * P), tl.float32)
        kept = tl.zeros((S * SEGMENT, R * P), tl.float32)
        for row in range(first, end, S):
            i = row + t // SEGMENT
            real = (i < end) & (column < W)
            i = tl.minimum(i, H - 1)
            query = _load(q_, i, j, sqd, sqh, sqw, D, BD, WIDE)
            grad = _load(g_, i, j, sgc, sgh, sgw, E, BE, WIDE)
            grad = tl.reshape(grad.to(v.dtype.element_ty), (S, SEGMENT, BE))
            r = _start(tl.minimum(row + s, H - 1), H, K) + a
            values = _load_cells(v_, r, c0, H, W, svc, svh, svw, E, R, BE, WIDE)
            dp = _weight_grad(grad, values, index, S)
            entries = _entries(group, i, j, H, W, K, NK)
            logits = _product(query, high, middle, low, factor, PARTS)
            logits += tl.load(table + entries[:, None] + n[None, :])
            total = tl.load(lse_ + i * W + j, mask=real, other=float('inf'))
            ds = _exp(logits - total[:, None]) * (dp - tl.load(delta_ + i * W + j)[:, None])
            turned = tl.permute(tl.reshape(query.to(tl.float32), (S, SEGMENT, BD)), (0, 2, 1))
            products += _dot(turned, tl.reshape(ds, (S, SEGMENT, R * P)), PARTS)
            kept += ds
            # Rows away from the borders give to the same place: they are sorted into it together.
            inner = (row >= half) & (row + 2 * S - 1 < H - half) & (row + S < end)
            if not inner:
                biases += kept
                place = _place(i, H, K)
                for k in tl.static_range(R):
                    mine = (slot // SEGMENT == k)[:, None] & ((slot % SEGMENT)[:, None] == place[None, :])
                    at = _gather(kept, t[:, None] * (R * P) + k * P + side)
                    places += _dot(mine.to(tl.float32), at, PARTS)
                kept = tl.zeros((S * SEGMENT, R * P), tl.float32)
        dm_ = dm + (partial.to(tl.int64) * HEADS + head) * D * N
        tl.store(dm_ + (d * N)[:, None] + (FIRST + n)[None, :], tl.sum(products, 0), mask=(d < D)[:, None])
    tl.store(dbias + FIRST + n, tl.sum(biases, 0))
    line = a + slot // SEGMENT
    place = slot % SEGMENT
    known = ((line < K) & (place < K))[:, None] & (u < 2 * K - 1)[None, :]
    tl.store(drpb + ((line * K + place) * (2 * K - 1))[:, None] + u[None, :], places, mask=known)


@triton.jit(do_not_specialize=_SIZES)
def contmix_product_grad_kernel(
    q, m, scale, table1, table2, v, lse, delta, g, dm, dbias, drpb,
    sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sgb, sgc, sgh, sgw,
    G, H, W, BATCH, STEP, STRIPES, BANDS, ROWS, HEADS,
    K1: tl.constexpr, P1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, S: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What 16 columns of M get from ROWS rows of a stripe of the map, over STEP elements of the batch.

    dm (STRIPES * BANDS, heads, D, N): shares of dM. Of a split, a group, a stripe and a band: dbias (..., N), and drpb
    (..., K1 · K1 · (2 K1 - 1) + the same of K2), shares of the position biases' gradients by the row of the window, by
    the place of the positions along the rows (``_place``), and by column.
    """
    N: tl.constexpr = N1 + N2
    SMALL: tl.constexpr = N1 // SEGMENT
    CHUNKS: tl.constexpr = N // SEGMENT
    chunk = tl.program_id(0) % CHUNKS
    share = tl.program_id(0) // CHUNKS
    partial = share % (STRIPES * BANDS)
    stripe = partial % STRIPES
    band = partial // STRIPES
    group = share // (STRIPES * BANDS) % G
    split = share // (STRIPES * BANDS) // G
    dbias += share.to(tl.int64) * N
    first: tl.constexpr = K1 * K1 * (2 * K1 - 1)
    drpb += share.to(tl.int64) * (first + K2 * K2 * (2 * K2 - 1))
    if chunk < SMALL:
        _row_sums(
            q, m, scale, table1, v, lse, delta, g, dm, dbias, drpb, split, stripe, band, partial, group,
            0, chunk * (SEGMENT // P1), sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sgb, sgc, sgh, sgw,
            G, H, W, BATCH, STEP, ROWS, HEADS, K1, P1, N1, 0, D, E, N, BD, BE, S, PARTS, WIDE,
        )  # fmt: skip
    else:
        _row_sums(
            q, m, scale, table2, v, lse, delta, g, dm, dbias, drpb + first, split, stripe, band,
            partial, group,
            N1, (chunk - SMALL) * (SEGMENT // P2), sqb, sqg, sqd, sqh, sqw, svb, svc, svh, svw, sgb, sgc, sgh, sgw,
            G, H, W, BATCH, STEP, ROWS, HEADS, K2, P2, N2, 1, D, E, N, BD, BE, S, PARTS, WIDE,
        )  # fmt: skip


@triton.jit
def _padded(x, N1: tl.constexpr, P1: tl.constexpr, K1: tl.constexpr, P2: tl.constexpr, K2: tl.constexpr):
    """What columns x of M are: row and column of the window, the logit of all, which window, and whether any."""
    large = x >= N1
    a = tl.where(large, (x - N1) // P2, x // P1)
    b = tl.where(large, (x - N1) % P2, x % P1)
    k = tl.where(large, K2, K1)
    return a, b, tl.where(large, K1 * K1, 0) + a * k + b, large, (a < k) & (b < k)


@triton.jit(do_not_specialize=_SIZES)
def contmix_products_kernel(
    key, weight, m, scale, skb, skg, skd, skl, G,
    K1: tl.constexpr, P1: tl.constexpr, N1: tl.constexpr, K2: tl.constexpr, P2: tl.constexpr, N2: tl.constexpr,
    L: tl.constexpr, BL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """SEGMENT columns of a head's M, in PARTS whose sum times the columns' scale (heads, N / SEGMENT) it is.

    The scale, a power of two, is what lets float16 have small numbers and large ones.
    """
    N: tl.constexpr = N1 + N2
    block = tl.program_id(0) % (N // SEGMENT)
    head = (tl.program_id(0) // (N // SEGMENT)).to(tl.int64)
    d = tl.arange(0, BD)
    cell = tl.arange(0, BL)
    x = block * SEGMENT + tl.arange(0, SEGMENT)
    keys = tl.load(
        key + head // G * skb + head % G * skg + (d * skd)[:, None] + (cell * skl)[None, :],
        mask=(d < D)[:, None] & (cell < L)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    _, _, n, _, known = _padded(x, N1, P1, K1, P2, K2)
    weights = tl.load(weight + (n * L)[None, :] + cell[:, None], mask=known[None, :] & (cell < L)[:, None], other=0.0)
    rest = tl.dot(keys, weights.to(tl.float32), input_precision='tf32x3')
    factor = 1.0
    if m.dtype.element_ty == tl.float16:
        # The power of two in the largest number, less 2**13; not where that would be too small to divide by.
        top = tl.maximum(tl.max(tl.max(tl.abs(rest), 1), 0), 1e-30)
        factor = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) / 8192.0
    tl.store(scale + tl.program_id(0), factor)
    rest /= factor
    m += head * PARTS * D * N
    for part in tl.static_range(PARTS):
        value = rest.to(m.dtype.element_ty)
        tl.store(m + part * D * N + (d * N)[:, None] + x[None, :], value, mask=(d < D)[:, None])
        rest -= value.to(tl.float32)


@triton.jit
def contmix_table_kernel(
    bias, rpb, table, K: tl.constexpr, P: tl.constexpr, NK: tl.constexpr, FIRST: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """One row of a window's table (G, K, K, NK): bias plus position bias at one place, -inf beyond the window."""
    i = tl.program_id(0) // K % K
    j = tl.program_id(0) % K
    group = tl.program_id(0) // (K * K)
    x = tl.arange(0, BX)
    a = x // P
    b = x % P
    inside = (a < K) & (b < K)
    value = tl.load(bias + FIRST + a * K + b, mask=inside, other=float('-inf')).to(tl.float32)
    place = (group * (2 * K - 1) + K - 1 - i + a) * (2 * K - 1) + K - 1 - j + b
    value += tl.load(rpb + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(table + tl.program_id(0) * NK + x, value, mask=x < NK)


@triton.jit(do_not_specialize=_SIZES)
def contmix_position_bias_grad_kernel(
    shares, drpb1, drpb2, G, PARTIALS, BATCH,
    K1: tl.constexpr, K2: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Row u of the gradient of a group's position bias: of row a of the window, the place from which u is a.

    The shares are (BATCH, G, PARTIALS, ...) as ``contmix_product_grad_kernel`` writes them, BATCH the splits of it.
    """
    SIZE: tl.constexpr = K1 * K1 * (2 * K1 - 1)
    row = tl.program_id(0) % (2 * K1 + 2 * K2 - 2)
    group = tl.program_id(0) // (2 * K1 + 2 * K2 - 2)
    large = row >= 2 * K1 - 1
    k = tl.where(large, K2, K1)
    u = tl.where(large, row - (2 * K1 - 1), row)
    side = 2 * k - 1
    w = tl.arange(0, REACH)
    share = tl.arange(0, BS)
    sums = tl.zeros((BS, REACH), tl.float32)
    for first in range(0, BATCH * PARTIALS, BS):
        at = first + share
        split = (at // PARTIALS).to(tl.int64)
        begin = shares + ((split * G + group) * PARTIALS + at % PARTIALS) * (SIZE + K2 * K2 * (2 * K2 - 1))
        for a in range(0, k):
            place = a + k - 1 - u
            there = (at < BATCH * PARTIALS) & (place >= 0) & (place < k)
            line = tl.where(large, SIZE, 0) + (a * k + place) * side
            sums += tl.load((begin + line)[:, None] + w[None, :], mask=there[:, None] & (w < side)[None, :], other=0.0)
    out = tl.sum(sums, 0)
    if large:
        tl.store(drpb2 + (group * side + u) * side + w, out, mask=w < side)
    else:
        tl.store(drpb1 + (group * side + u) * side + w, out, mask=w < side)
