"""ContMix as one fused operator in Triton; its backward recomputes the logits instead of storing them.

Two ``torch.library`` operators, ``mmoverlock::contmix`` and ``mmoverlock::contmix_backward``: ``torch.compile``, CUDA
graphs, checkpointing and export see a call of known shapes. The kernels are in ``triton_kernels``, which is imported
at the first call: importing the package must not need Triton.
"""

from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ..triton_common import HALF, definition_gradients, differentiated_again, on, power_of_two, refuse_tensors
from . import shared
from .reference import contmix_reference
from .sizes import Sizes

_TILE = 16  # positions of a tile: the fewest rows of a matrix product on tensor cores
_MAX_WINDOW = 15  # a window of 17 would be padded to 32 x 32 logits a position: more than registers hold
_MAX_WIDTH = 64


@dataclass(frozen=True)
class Tuning:
    """Launch parameters, measured on an H200 with tools/analysis/benchmark_contmix.py.

    Args:
        warps (tuple): Warps a program of the forward, the query gradient and the value gradient.
        rows (int): Rows of the map that a program of the value gradient takes at once for the large window.
        columns (int): Columns likewise.
        programs (int): Programs of the query gradient to aim at, by splitting the map into bands of rows.
        share (float): Memory for the products of keys and weight, as a share of one logits tensor. The batch is
            taken in chunks to keep to it, ...
        floor (int): ... except below this many bytes.
    """

    warps: Tuple[int, int, int] = (4, 8, 8)
    rows: int = 16
    columns: int = 32
    programs: int = 512
    share: float = 0.045
    floor: int = 3 * 2**20


TUNING = Tuning()


def refuse(query, key, weight, bias, rpb1, rpb2, value) -> Optional[str]:
    """Why the fused operator cannot serve the call, or None."""
    reason = refuse_tensors(dict(query=query, key=key, weight=weight, bias=bias, rpb1=rpb1, rpb2=rpb2, value=value))
    if reason:
        return reason
    for name, rpb in (('small', rpb1), ('large', rpb2)):
        if (rpb.shape[1] + 1) // 2 > _MAX_WINDOW:
            return f'the {name} window is {(rpb.shape[1] + 1) // 2}, it takes windows up to {_MAX_WINDOW}'
    if query.shape[2] > _MAX_WIDTH or value.shape[1] > 2 * query.shape[1] * _MAX_WIDTH:
        return f'a head is wider than {_MAX_WIDTH} channels'
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        return 'a tensor is empty'
    return None


def contmix_triton(query, key, weight, bias, rpb1, rpb2, value) -> Tensor:
    """As :func:`mmoverlock.ops.contmix.contmix_reference`, fused; see :func:`refuse` for what it takes."""
    args = (query, key, weight, bias, rpb1, rpb2, value)
    train = torch.is_grad_enabled() and any(t.requires_grad for t in args)
    return torch.ops.mmoverlock.contmix(*args, train)[0]


class _Plan(Sizes):
    """What the kernels' constants follow from the sizes of a call."""

    @property
    def tiles(self) -> int:
        return -(-self.width // _TILE)

    @property
    def sizes(self) -> Tuple[int, ...]:
        return self.groups, self.height, self.width, self.dim, self.logits, self.channels

    def columns(self, window: int) -> int:
        """Columns of the map that the windows of one tile cover, padded."""
        return max(16, power_of_two(window), power_of_two(min(_TILE - 1 + window, self.width)))

    def common(self, half: bool, *tensors: Tensor) -> dict:
        far = 64 * max(abs(s) for t in tensors for s in t.stride()[1:])
        return dict(
            BD=max(16, power_of_two(self.dim)),
            BE=max(16, power_of_two(self.channels)),
            BT=_TILE,
            HALF=half,
            WIDE=far >= 2**31,
            num_stages=1,
        )

    def places(self, least: int) -> dict:
        """Constants of the two kernels that lay a window's weights out over the columns of the map.

        Args:
            least (int): Columns of a window at least, in the padding: a product over them needs 16.
        """
        constants = {}
        for n, window in enumerate(self.windows, 1):
            constants[f'K{n}'] = window
            constants[f'BA{n}'] = power_of_two(window)
            constants[f'BK{n}'] = max(least if self.width > window else 16, power_of_two(window))
            constants[f'BC{n}'] = self.columns(window)
            constants[f'SHIFT{n}'] = self.width > window
        return constants

    def diagonals(self) -> dict:
        """Constants of the gradient of the position bias: its padded side."""
        return {f'BU{n}': max(16, power_of_two(2 * window - 1)) for n, window in enumerate(self.windows, 1)}

    def blocks(self) -> dict:
        """Constants of the gradient of the values: how many positions are looked at from one value at once."""
        constants = {}
        for n, window in enumerate(self.windows, 1):
            constants[f'K{n}'] = window
            constants[f'BK{n}'] = max(8, power_of_two(window))
            constants[f'BI{n}'] = min(TUNING.rows, power_of_two(window))
            constants[f'BJ{n}'] = min(TUNING.columns, max(16, power_of_two(self.width)))
        return constants

    def rows(self) -> int:
        """Rows of the map that one program of the query gradient takes.

        More programs fill the GPU, but each adds a (D, N) gradient to memory.
        """
        heads = self.batch * self.groups
        bands = -(-TUNING.programs // (heads * self.tiles))
        memory = max(TUNING.floor / 4, TUNING.share * heads * self.height * self.width * self.logits)
        bands = min(bands, int(memory / (heads * self.tiles * self.dim * self.logits)))
        return -(-self.height // max(1, min(bands, self.height)))

    def chunk(self, train: bool = True) -> int:
        """Batch elements to take at once, so that the products of keys and weight stay small beside the logits."""
        return self._chunk(self.logits, TUNING, train)


def _products(key: Tensor, weight: Tensor) -> Tensor:
    """(B, G, D, N) in fp32: what the queries are multiplied with to get logits, key · weightᵀ."""
    return torch.matmul(key.float(), weight.float().t())


@torch.library.custom_op('mmoverlock::contmix', mutates_args=())
def _contmix(
    query: Tensor, key: Tensor, weight: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, value: Tensor, train: bool
) -> Tuple[Tensor, Tensor]:
    """The mixed values, and the log-sum-exp (B, G, 2, H, W) of every softmax, which the backward needs.

    Memory is saved with ``train`` only: it is what activations kept for the backward pass leave that is short.
    """
    from .triton_kernels import contmix_forward_kernel

    plan = _Plan.of(query, rpb1, rpb2, value)
    out = torch.empty_like(value)
    top = query.new_empty((plan.batch, plan.groups, 2, plan.height, plan.width), dtype=torch.float32)
    if shared.takes(plan.height, plan.width, plan.windows[1]):
        with torch.autocast(query.device.type, enabled=False), on(query.device):
            shared.forward(query, key, weight, bias, rpb1, rpb2, value, out, top, train)
        return out, top
    total = torch.empty_like(top)
    bias, rpb1, rpb2 = (t.contiguous() for t in (bias, rpb1, rpb2))
    step = plan.chunk(train)
    with torch.autocast(query.device.type, enabled=False), on(query.device):
        for first in range(0, plan.batch, step):
            part = slice(first, first + step)
            query_, value_, out_ = query[part], value[part], out[part]
            contmix_forward_kernel[(len(query_) * plan.groups * plan.height * plan.tiles,)](
                query_, _products(key[part], weight), bias, rpb1, rpb2, value_, out_, top[part], total[part],
                *query.stride(), *value.stride(), *out.stride(), *plan.sizes,
                **plan.places(8), **plan.common(query.dtype in HALF, query, value, out), num_warps=TUNING.warps[0],
            )  # fmt: skip
    # The logarithm here, not in the kernel, whose layout would have every thread take it of every position.
    return out, top.add_(total.log_())


@_contmix.register_fake
def _(query, key, weight, bias, rpb1, rpb2, value, train):
    batch, groups, _, height, width = query.shape
    return torch.empty_like(value), query.new_empty((batch, groups, 2, height, width), dtype=torch.float32)


@torch.library.custom_op('mmoverlock::contmix_backward', mutates_args=())
def _contmix_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb1: Tensor,
    rpb2: Tensor,
    value: Tensor,
    lse: Tensor,
) -> List[Tensor]:
    """Gradients of the seven inputs of ``mmoverlock::contmix``."""
    plan = _Plan.of(query, rpb1, rpb2, value)
    dquery, dkey, dvalue = (torch.empty_like(t) for t in (query, key, value))
    inputs = (weight, bias, rpb1, rpb2)
    if shared.takes(plan.height, plan.width, plan.windows[1]):
        with torch.autocast(query.device.type, enabled=False), on(query.device):
            sums = shared.backward(grad, query, key, *inputs, value, lse, dquery, dkey, dvalue)
        return [dquery, dkey, *(total.to(t.dtype) for total, t in zip(sums, inputs)), dvalue]
    weight32 = weight.float()
    bias_, rpb1_, rpb2_ = (t.contiguous() for t in (bias, rpb1, rpb2))
    sums: List[Tensor] = []
    step = plan.chunk()
    with torch.autocast(query.device.type, enabled=False), on(query.device):
        for first in range(0, plan.batch, step):
            part = slice(first, first + step)
            dproducts, *biases = _chunk_backward(
                grad[part], query[part], _products(key[part], weight), bias_, rpb1_, rpb2_, value[part], lse[part],
                dquery[part], dvalue[part],
            )  # fmt: skip
            dkey[part] = torch.matmul(dproducts, weight32)
            dweight = dproducts.flatten(0, 2).t() @ key[part].float().flatten(0, 2)
            del dproducts
            terms = [dweight, *biases]
            sums = [a + b for a, b in zip(sums, terms)] if sums else terms
    return [dquery, dkey, *(total.to(t.dtype) for total, t in zip(sums, inputs)), dvalue]


def _chunk_backward(grad, query, products, bias, rpb1, rpb2, value, lse, dquery, dvalue) -> Tuple[Tensor, ...]:
    """Writes the gradients of queries and values of some batch elements; returns those of M, the bias and both rpb.

    ``products`` (M) may be overwritten with its own gradient.
    """
    from .triton_kernels import contmix_query_grad_kernel, contmix_value_grad_kernel

    plan = _Plan.of(query, rpb1, rpb2, value)
    heads = plan.batch * plan.groups
    half = query.dtype in HALF
    contmix_value_grad_kernel[(heads * plan.height * plan.tiles,)](
        query, products, bias, rpb1, rpb2, lse, grad, dvalue,
        *query.stride(), *grad.stride(), *dvalue.stride(), *plan.sizes,
        **plan.blocks(), **plan.common(half, query, grad, dvalue), num_warps=TUNING.warps[2],
    )  # fmt: skip

    rows = plan.rows()
    parts = -(-plan.height // rows) * plan.tiles
    if parts == 1:
        dproducts = products  # one program a head reads and writes it
    else:
        dproducts = products.new_empty(parts, *products.shape)
    biases = [products.new_empty(plan.batch, plan.groups, parts, plan.logits)]
    for window in plan.windows:
        biases.append(products.new_empty(plan.batch, plan.groups, parts, 2 * window - 1, 2 * window - 1))
    contmix_query_grad_kernel[(heads * parts,)](
        query, products, bias, rpb1, rpb2, value, lse, grad, dquery, dproducts, *biases,
        *query.stride(), *value.stride(), *grad.stride(), *dquery.stride(), *plan.sizes, rows, heads, 0,
        **plan.places(16), **plan.diagonals(), **plan.common(half, query, value, grad, dquery),
        num_warps=TUNING.warps[1],
    )  # fmt: skip
    if parts > 1:
        dproducts = dproducts.sum(0)
    return dproducts, biases[0].sum((0, 1, 2)), *(b.sum((0, 2)) for b in biases[1:])


@_contmix_backward.register_fake
def _(grad, query, key, weight, bias, rpb1, rpb2, value, lse):
    like = [torch.empty_like(t) for t in (query, key)]
    like += [t.new_empty(t.shape) for t in (weight, bias, rpb1, rpb2)]
    return [*like, torch.empty_like(value)]


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp


def _backward(ctx, grad: Tensor, _) -> Tuple[Optional[Tensor], ...]:
    *inputs, lse = ctx.saved_tensors
    if differentiated_again():
        return (*definition_gradients(contmix_reference(*inputs), inputs, grad), None)
    grads = torch.ops.mmoverlock.contmix_backward(grad, *inputs, lse)
    return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), None)


_contmix.register_autograd(_backward, setup_context=_save)
