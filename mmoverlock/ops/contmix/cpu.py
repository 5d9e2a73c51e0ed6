"""ContMix on a CPU: fewer products, and windows that positions share taken once.

Queries times (keys times projection) are a third of the multiplications of (queries times keys) times projection.
And on a map hardly larger than the window, such as all of Focus-Net's at 224 x 224, the window of a position is that of
its whole quarter: the large kernel is attention, one product with the values a window, where the definition lays
weights out. It is taken sample by sample, whose weights stay in the cache; everything else is plain operators,
differentiated by PyTorch.
"""

from typing import Iterator, Optional, Tuple

import torch
from torch import Tensor

from ..autocast import no_autocast
from ..backends import refuse_but_on_cpu
from ..triton_common import definition_gradients, differentiated_again
from .reference import mix_map, widened, window_biases, window_softmax, window_sum

_WINDOWS = 4  # different ones of a map, up to which they are taken one by one


def refuse(query: Tensor, *others: Tensor) -> Optional[str]:
    """Why this form cannot serve the call, or None."""
    return refuse_but_on_cpu(query)


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
            queries = query[:, :, rows, columns]
            values = value[..., top : top + window, left : left + window].flatten(3).transpose(2, 3)
            out = _Attention.apply(queries.flatten(2, 3), product, biases[:, rows, columns].flatten(1, 2), values)
            blocks.append(out.unflatten(2, queries.shape[2:4]))
        lines.append(blocks[0] if len(blocks) == 1 else torch.cat(blocks, 3))
    return (lines[0] if len(lines) == 1 else torch.cat(lines, 2)).permute(0, 1, 4, 2, 3)


class _Attention(torch.autograd.Function):
    """:func:`_attention` sample by sample: their weights, a square of the map's size, are gone through in the cache."""

    @staticmethod
    def forward(ctx, query: Tensor, product: Tensor, bias: Tensor, value: Tensor) -> Tensor:
        weights = [torch.baddbmm(bias, *sample).softmax(-1) for sample in zip(query, product)]
        ctx.save_for_backward(query, product, bias, value, *weights)
        return torch.stack([torch.bmm(*sample) for sample in zip(weights, value)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        query, product, bias, value, *weights = ctx.saved_tensors
        if differentiated_again():
            inputs = (query, product, bias, value)
            return tuple(definition_gradients(_attention(*inputs), inputs, grad))
        dquery, dproduct, dvalue = (torch.empty_like(t) for t in (query, product, value))
        dbias = torch.zeros_like(bias)
        for n, sample in enumerate(weights):
            torch.bmm(sample.transpose(1, 2), grad[n], out=dvalue[n])
            dweights = torch.bmm(grad[n], value[n].transpose(1, 2))
            dlogits = torch._softmax_backward_data(dweights, sample, -1, sample.dtype)
            torch.bmm(dlogits, product[n].transpose(1, 2), out=dquery[n])
            torch.bmm(query[n].transpose(1, 2), dlogits, out=dproduct[n])
            dbias += dlogits
        return dquery, dproduct, dbias, dvalue


def _attention(query: Tensor, product: Tensor, bias: Tensor, value: Tensor) -> Tensor:
    """(B, G, P, D), (B, G, D, N), (G, P, N) and (B, G, N, D) to (B, G, P, D)."""
    return torch.matmul((torch.matmul(query, product) + bias).softmax(-1), value)


def _shares(length: int, window: int) -> Iterator[Tuple[int, slice]]:
    """Where windows begin along an axis, and the positions whose windows begin there."""
    last = length - window
    for start in range(last + 1):
        first = 0 if start == 0 else start + window // 2
        yield start, slice(first, length if start == last else start + window // 2 + 1)
