"""ContMix on a CPU: fewer products, and windows that positions share taken once.

Queries times (keys times projection) are a third of the multiplications of (queries times keys) times projection.
And on a map hardly larger than the window, such as all of Focus-Net's at 224 x 224, the window of a position is that of
its whole quarter: the large kernel is attention, one product with the values a window, where the definition lays
weights out. Plain operators, differentiated by PyTorch.
"""

from typing import Iterator, Optional, Tuple

import torch
from torch import Tensor

from ..autocast import no_autocast
from .reference import mix_map, widened, window_biases, window_softmax, window_sum

_WINDOWS = 4  # different ones of a map, up to which they are taken one by one


def refuse(query: Tensor, *others: Tensor) -> Optional[str]:
    """Why this form cannot serve the call, or None."""
    if query.device.type != 'cpu':
        return f'is for CPU tensors, these are on {query.device.type}'
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return 'a graph is being recorded'
    return None


def contmix_cpu(
    query: Tensor, key: Tensor, weight: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, value: Tensor
) -> Tensor:
    """As the definition, up to the order of sums."""
    with no_autocast(query.device.type):
        query, key, weight, bias, rpb1, rpb2, small, large = widened(query, key, weight, bias, rpb1, rpb2, value)
        query = query.permute(0, 1, 3, 4, 2)
        sizes = [((rpb.shape[1] + 1) // 2) ** 2 for rpb in (rpb1, rpb2)]
        window = (rpb2.shape[1] + 1) // 2
        windows = (large.shape[3] - window + 1) * (large.shape[4] - window + 1)
        if windows > _WINDOWS:
            product = torch.matmul(key, weight.t())

            def logits(rows: slice) -> Tensor:
                return _times(query[:, :, rows], product) + bias

            return mix_map(logits, rpb1, rpb2, small, large).to(value.dtype)
        (weight1, weight2), (bias1, bias2) = weight.split(sizes), bias.split(sizes)
        weights = window_softmax(_times(query, torch.matmul(key, weight1.t())) + bias1, rpb1, 0, small.shape[3])
        out1 = window_sum(weights, small, 0)
        out2 = _by_windows(query, torch.matmul(key, weight2.t()), bias2, rpb2, large)
        return torch.cat([out1.flatten(1, 2), out2.flatten(1, 2)], dim=1).to(value.dtype)


def _times(query: Tensor, product: Tensor) -> Tensor:
    """(B, G, h, W, D) times (B, G, D, N): (B, G, h, W, N)."""
    return torch.matmul(query.flatten(2, 3), product).unflatten(2, query.shape[2:4])


def _by_windows(query: Tensor, product: Tensor, bias: Tensor, rpb: Tensor, value: Tensor) -> Tensor:
    """Window by window, the positions that have it attend to its values. Returns (B, G, D, H, W)."""
    height, width = value.shape[3:]
    window = (rpb.shape[1] + 1) // 2
    biases = window_biases(rpb, 0, height, height, width) + bias
    lines = []
    for top, rows in _shares(height, window):
        blocks = []
        for left, columns in _shares(width, window):
            logits = _times(query[:, :, rows, columns], product) + biases[:, rows, columns]
            values = value[..., top : top + window, left : left + window].flatten(3).transpose(2, 3)
            blocks.append(_times(logits.softmax(-1), values))
        lines.append(blocks[0] if len(blocks) == 1 else torch.cat(blocks, 3))
    return (lines[0] if len(lines) == 1 else torch.cat(lines, 2)).permute(0, 1, 4, 2, 3)


def _shares(length: int, window: int) -> Iterator[Tuple[int, slice]]:
    """Where windows begin along an axis, and the positions whose windows begin there."""
    last = length - window
    for start in range(last + 1):
        first = 0 if start == 0 else start + window // 2
        yield start, slice(first, length if start == last else start + window // 2 + 1)
