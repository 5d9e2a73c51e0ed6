"""ContMix on a CPU: fewer products, and windows that positions share taken once.

Queries times (keys times projection) are a third of the multiplications of (queries times keys) times projection.
And on a map hardly larger than the window, such as all of Focus-Net's at 224 x 224, the window of a position is that of
its whole quarter: the large kernel is attention, one product with the values a window, where the definition lays
weights out. Without gradients it is PyTorch's, with them it is taken sample by sample, whose weights stay in the cache;
everything else is plain operators, differentiated by PyTorch. All of it is in channels-last order, as the maps are, and
nothing but parameters is brought into another.
"""

import itertools
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import no_autocast
from ..backends import refuse_but_on_cpu
from ..triton_common import definition_gradients, differentiated_again
from .reference import index_tables, mix_map, once_a_size, widened

_WINDOWS = 4  # different ones of a map, up to which they are taken one by one


def refuse(query: Tensor, *others: Tensor) -> Optional[str]:
    """Why this form cannot serve the call, or None."""
    return refuse_but_on_cpu(query)


def contmix_cpu(
    query: Tensor, key: Tensor, weight: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, value: Tensor
) -> Tensor:
    """As the definition, up to the order of sums; of maps hardly larger than the window in channels-last format."""
    with no_autocast(query.device.type):
        query, key, weight, bias, rpb1, rpb2, small, large = widened(query, key, weight, bias, rpb1, rpb2, value)
        height, width = query.shape[3:]
        sizes = [(rpb.shape[1] + 1) // 2 for rpb in (rpb1, rpb2)]
        if (height - sizes[1] + 1) * (width - sizes[1] + 1) > _WINDOWS:
            query, product = query.permute(0, 1, 3, 4, 2), torch.matmul(key, weight.t())

            def logits(rows: slice) -> Tensor:
                return torch.matmul(query[:, :, rows].flatten(2, 3), product).unflatten(2, (-1, width)) + bias

            return mix_map(logits, rpb1, rpb2, small, large).to(value.dtype)
        areas = [size**2 for size in sizes]
        product = torch.bmm(weight.expand(key.shape[0], -1, -1), key.flatten(1, 2).transpose(1, 2))
        query, (product1, product2), (bias1, bias2) = _lines(query), product.split(areas, 1), bias.split(areas)
        out1 = _by_positions(query, product1, bias1, rpb1, small)
        out2 = _by_windows(query, product2, bias2, rpb2, large)
        return torch.cat([out1, out2], 2).to(value.dtype).unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _lines(x: Tensor) -> Tensor:
    """(B, G, D, H, W) to (B, H*W, G*D), of channels-last maps a view."""
    return x.permute(0, 3, 4, 1, 2).flatten(3).flatten(1, 2)


def _heads(lines: Tensor, groups: int) -> Tensor:
    """(B, P, G*D) to (B, G, P, D), a view."""
    return lines.unflatten(2, (groups, -1)).transpose(1, 2)


def _biases(rpb: Tensor, bias: Tensor, places: Tensor) -> Tensor:
    """(G, P, K*K): position bias, by where windows begin in its table, and bias."""
    window = (rpb.shape[1] + 1) // 2
    columns = rpb.unfold(2, window, 1).transpose(1, 2).flatten(2)  # a window then lies in one piece
    return (columns.unfold(2, window**2, window) + bias).flatten(1, 2).index_select(1, places)


def _by_positions(query: Tensor, product: Tensor, bias: Tensor, rpb: Tensor, value: Tensor) -> Tensor:
    """Weights laid out over the whole map, zero outside a position's window: one product with all values.

    Args:
        query, product (Tensor): (B, H*W, G*D) and (B, K*K, G*D).
        bias, rpb (Tensor): (K*K,) and (G, 2K-1, 2K-1).
        value (Tensor): (B, G, D, H, W).

    Returns:
        Tensor: (B, H*W, G*D).
    """
    groups, _, height, width = value.shape[1:]
    places, cells = windows_of(height, width, (rpb.shape[1] + 1) // 2)
    logits = torch.matmul(_heads(query, groups), _heads(product, groups).transpose(2, 3))
    weights = (logits + _biases(rpb, bias, places)).softmax(-1)
    spread = weights.new_zeros(*weights.shape[:3], height * width).scatter_(3, cells.expand(weights.shape), weights)
    return torch.matmul(spread, _heads(_lines(value), groups).contiguous()).transpose(1, 2).flatten(2)


def _by_windows(query: Tensor, product: Tensor, bias: Tensor, rpb: Tensor, value: Tensor) -> Tensor:
    """Arguments and result as of :func:`_by_positions`: the positions that have a window attend to its values."""
    groups, _, height, width = value.shape[1:]
    order, back, places, counts, cells = positions_by_window(height, width, (rpb.shape[1] + 1) // 2)
    attend = _Attention.apply if torch.is_grad_enabled() else _fused_attention
    product, values = _heads(product, groups), _lines(value)
    queries = _heads(query.index_select(1, order), groups).split(counts, 2)
    biases = _biases(rpb, bias, places).split(counts, 1)
    outs = [
        attend(q, product, b, _heads(values.index_select(1, c), groups)).transpose(1, 2).flatten(2)
        for q, b, c in zip(queries, biases, cells)
    ]
    return torch.cat(outs, 1).index_select(1, back)


def _windows_of(height: int, width: int, window: int) -> Tuple[Tensor, Tensor]:
    """Where in the table of position biases the window of a position begins (H*W,), and its places (H*W, K*K)."""
    rows, columns, bias_rows, bias_columns = index_tables(height, width, window, torch.device('cpu'))
    places = bias_columns * window + bias_rows[:, None]
    cells = rows[:, None, :, None] * width + columns[:, None, :]
    return places.flatten(), cells.flatten(2).flatten(0, 1)


def _positions_by_window(height: int, width: int, window: int) -> Tuple[Tensor, Tensor, Tensor, list, list]:
    """Positions in the order of their windows and back, :func:`_windows_of`'s places in this order; and of every window
    how many positions have it, and its places of the map."""
    # As window_starts, but as numbers, which a tensor of a graph that is being traced has none of.
    starts = ([min(max(i - window // 2, 0), length - window) for i in range(length)] for length in (height, width))
    shares = {}
    for position, start in enumerate(itertools.product(*starts)):
        shares.setdefault(start, []).append(position)
    places, cells = _windows_of(height, width, window)
    order = torch.tensor([position for share in shares.values() for position in share], device='cpu')
    counts = [len(share) for share in shares.values()]
    return order, order.argsort(), places[order], counts, [cells[share[0]] for share in shares.values()]


windows_of, positions_by_window = once_a_size(_windows_of), once_a_size(_positions_by_window)


class _Attention(torch.autograd.Function):
    """:func:`_attention` sample by sample: their weights, a square of the map's size, are gone through in the cache."""

    @staticmethod
    def forward(ctx, query: Tensor, product: Tensor, bias: Tensor, value: Tensor) -> Tensor:
        weights = [torch.baddbmm(bias, q, p.transpose(1, 2)).softmax(-1) for q, p in zip(query, product)]
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
            dvalue[n] = torch.bmm(sample.transpose(1, 2), grad[n])
            dweights = torch.bmm(grad[n], value[n].transpose(1, 2))
            dlogits = torch._softmax_backward_data(dweights, sample, -1, sample.dtype)
            dquery[n] = torch.bmm(dlogits, product[n])
            dproduct[n] = torch.bmm(dlogits.transpose(1, 2), query[n])
            dbias += dlogits
        return dquery, dproduct, dbias, dvalue


def _attention(query: Tensor, product: Tensor, bias: Tensor, value: Tensor) -> Tensor:
    """(B, G, P, D), (B, G, N, D), (G, P, N) and (B, G, N, D) to (B, G, P, D)."""
    return torch.matmul((torch.matmul(query, product.transpose(2, 3)) + bias).softmax(-1), value)


def _fused_attention(query: Tensor, product: Tensor, bias: Tensor, value: Tensor) -> Tensor:
    """The same where no gradient is wanted, of which PyTorch's kernel has none for the bias."""
    return F.scaled_dot_product_attention(query, product, value, bias.expand(query.shape[0], -1, -1, -1), scale=1.0)
