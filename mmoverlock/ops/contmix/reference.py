"""ContMix in plain PyTorch: the definition that every fast form is tested against."""

import math
from functools import lru_cache
from typing import Callable, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import no_autocast

# Elements of the largest temporary of one chunk of rows (2**24 floats are 64 MiB); what keeps memory bounded on large
# maps.
_CHUNK_ELEMENTS = 2**24


def window_starts(length: int, window: int, device: torch.device) -> Tensor:
    """First index of the window of every position along one axis: centred, shifted inward at the borders.

    Returns:
        Tensor: int64, shape (length,): ``clamp(i - window // 2, 0, length - window)``.
    """
    # The lower bound last: where a map is too small after all (an exported graph checks nothing), indices leave the
    # map, which is an error, instead of coming round from its other side.
    return (torch.arange(length, device=device) - window // 2).clamp(max=length - window).clamp(min=0)


def _tables(height: int, width: int, window: int, device: torch.device) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Neighbours of every row (H, K) and column (W, K), and where their windows begin in the position bias."""
    rows, cols = (window_starts(length, window, device) for length in (height, width))
    bias_rows, bias_cols = (start - torch.arange(start.shape[0], device=device) + window - 1 for start in (rows, cols))
    offsets = torch.arange(window, device=device)
    return rows[:, None] + offsets, cols[:, None] + offsets, bias_rows, bias_cols


def once_a_size(tables: Callable) -> Callable:
    """``tables``, kept between calls: a network sees few map sizes. Not while a graph is traced, which a traced tensor
    must not outlive."""
    cached = lru_cache(maxsize=256)(tables)

    def get(*size):
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
            return tables(*size)
        with torch.inference_mode(False):  # an inference tensor in the cache could not serve training later
            return cached(*size)

    return get


index_tables = once_a_size(_tables)


def window_softmax(logits: Tensor, rpb: Tensor, row0: int, height: int) -> Tensor:
    """Softmax over each position's window of ``logits`` plus the relative position bias.

    Args:
        logits (Tensor): (B, G, h, W, K*K), the rows ``row0 .. row0 + h - 1`` of a map of ``height`` rows.
        rpb (Tensor): (G, 2K-1, 2K-1).
        row0 (int): First row of the chunk.
        height (int): Rows of the whole map.

    Returns:
        Tensor: (B, G, h, W, K*K), each window summing to one.
    """
    rows, width = logits.shape[2:4]
    return (logits + window_biases(rpb, row0, rows, height, width)).softmax(-1)


def window_biases(rpb: Tensor, row0: int, rows: int, height: int, width: int) -> Tensor:
    """The position bias of every place of every position's window, (G, rows, W, K*K), for ``rows`` rows from ``row0``
    of a map of ``height`` rows; ``rpb`` is (G, 2K-1, 2K-1)."""
    window = (rpb.shape[1] + 1) // 2
    _, _, bias_rows, bias_cols = index_tables(height, width, window, rpb.device)
    windows = rpb.unfold(1, window, 1).unfold(2, window, 1)  # a view: every window of the table
    return windows.index_select(1, bias_rows[row0 : row0 + rows]).index_select(2, bias_cols).flatten(3)


def window_sum(attn: Tensor, value: Tensor, row0: int) -> Tensor:
    """Sum of the values in each position's window, weighted by ``attn``.

    A row of positions reads K rows of the map. The weights are laid out over the whole width of those rows, zero
    outside the window, so that the sum is a matrix product a row: no window of values is copied.

    Args:
        attn (Tensor): (B, G, h, W, K*K), for the rows from ``row0``.
        value (Tensor): (B, G, D, H, W), the whole map.
        row0 (int): First row of the chunk.

    Returns:
        Tensor: (B, G, D, h, W).
    """
    batch, groups, rows, width, area = attn.shape
    dim, height, window = value.shape[2], value.shape[3], math.isqrt(area)
    neighbour_rows, neighbour_cols, _, _ = index_tables(height, width, window, attn.device)
    index = neighbour_cols[:, None, :].expand(batch, groups, rows, -1, window, -1)
    spread = attn.new_zeros(batch, groups, rows, width, window, width)
    spread = spread.scatter(-1, index, attn.reshape(batch, groups, rows, width, window, window))
    bands = value.permute(0, 1, 3, 4, 2).index_select(2, neighbour_rows[row0 : row0 + rows].flatten())
    bands = bands.reshape(batch, groups, rows, window * width, dim)
    return torch.matmul(spread.flatten(4), bands).permute(0, 1, 4, 2, 3)


def mix_rows(
    logits: Tensor,
    rpb1: Tensor,
    rpb2: Tensor,
    small: Tensor,
    large: Tensor,
    row0: int,
    window_sum: Callable = window_sum,
) -> Tensor:
    """Both kernels applied to the rows that ``logits`` (B, G, h, W, s²+K²) covers; returns (B, C, h, W)."""
    height = small.shape[3]
    split = ((rpb1.shape[1] + 1) // 2) ** 2
    out1 = window_sum(window_softmax(logits[..., :split], rpb1, row0, height), small, row0)
    out2 = window_sum(window_softmax(logits[..., split:], rpb2, row0, height), large, row0)
    return torch.cat([out1.flatten(1, 2), out2.flatten(1, 2)], dim=1)


def _keeps_sizes_open() -> bool:
    """Whether a graph for maps of any size is being recorded, by torch.export or torch.jit.trace."""
    exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)  # torch < 2.7 has no is_exporting
    return torch.jit.is_tracing() or exporting()


def affinity_logits(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Kernel logits of every position: affinities to the key cells, projected to s²+K² numbers.

    Args:
        query (Tensor): (B, G, D, h, W), scaled.
        key (Tensor): (B, G, D, L).
        weight (Tensor): (s²+K², L).
        bias (Tensor): (s²+K²,).

    Returns:
        Tensor: (B, G, h, W, s²+K²).
    """
    batch, groups, _, rows, width = query.shape
    affinity = torch.matmul(query.flatten(3).transpose(-1, -2), key)
    return F.linear(affinity, weight, bias).reshape(batch, groups, rows, width, weight.shape[0])


def contmix_reference(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb1: Tensor,
    rpb2: Tensor,
    value: Tensor,
) -> Tensor:
    """The definition of ContMix (paper section 3.3); arguments as :func:`mmoverlock.ops.contmix`.

    Half precision is computed in float32 and rounded once, at the end. The map is taken a few rows at a time, so that
    memory does not grow with the square of its size.
    """
    with no_autocast(query.device.type):
        query, key, weight, bias, rpb1, rpb2, small, large = widened(query, key, weight, bias, rpb1, rpb2, value)

        def logits(rows: slice) -> Tensor:
            return affinity_logits(query[:, :, :, rows], key, weight, bias)

        return mix_map(logits, rpb1, rpb2, small, large).to(value.dtype)


def widened(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, value: Tensor):
    """The arguments in float32 at least, the values as those of the small and of the large window, (B, G, D, H, W)."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    query, key, weight, bias, rpb1, rpb2, value = (t.to(dtype) for t in (query, key, weight, bias, rpb1, rpb2, value))
    # Sizes are read from the four-dimensional map: ONNX's older exporter loses track of them in an unflatten().
    groups, (batch, _, height, width) = query.shape[1], value.shape
    query = query.reshape(batch, groups, query.shape[2], height, width)
    small, large = value.reshape(batch, 2, groups, value.shape[1] // (2 * groups), height, width).unbind(1)
    return query, key, weight, bias, rpb1, rpb2, small, large


def mix_map(logits: Callable[[slice], Tensor], rpb1: Tensor, rpb2: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """:func:`mix_rows` for a whole map, a few rows at a time; ``logits`` gives those of a slice of rows."""
    batch, groups, _, height, width = large.shape
    window = (rpb2.shape[1] + 1) // 2
    if _keeps_sizes_open():  # in chunks, their number would be fixed in the graph
        return mix_rows(logits(slice(None)), rpb1, rpb2, small, large, 0)
    per_row = batch * groups * width * window * max(width, window)
    step = max(1, min(height, _CHUNK_ELEMENTS // max(per_row, 1)))
    chunks = [
        mix_rows(logits(slice(row0, row0 + step)), rpb1, rpb2, small, large, row0) for row0 in range(0, height, step)
    ]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)
