"""Launches the kernels of ``general_kernels``: ContMix on maps of any size."""

from dataclasses import dataclass
from typing import List, Tuple

import torch
from torch import Tensor

from ..sums import add_up
from ..triton_common import Lanes, power_of_two
from .sizes import Sizes

_SEGMENT = 16  # positions of one row that a warp takes


@dataclass(frozen=True)
class Tuning:
    """Launch parameters, measured on an H200 with tools/analysis/benchmark_contmix.py.

    Args:
        segments (tuple): Segments of a program, one a warp: of the forward, of the gradients of queries, values, M.
        columns (tuple): Columns of M taken at once, of the first two.
        stages (tuple): Rows that are loaded ahead.
        registers (tuple): Registers of a thread at most, so that more programs fit beside each other, where heads
            have up to 16 channels; 0 for any.
        share (float): Memory for the products of keys and weight, as a share of one logits tensor. The batch is
            taken in chunks to keep to it, ...
        sums (float): Likewise for the shares of the gradients that are summed over positions; it bounds their programs.
        floor (int): Bytes below which no memory is saved.
        programs (int): Programs of these sums to aim at.
    """

    segments: Tuple[int, int, int, int] = (2, 2, 2, 2)
    columns: Tuple[int, int] = (16, 16)
    stages: Tuple[int, int, int, int] = (1, 1, 1, 2)
    registers: Tuple[int, int, int, int] = (0, 128, 128, 128)
    share: float = 0.03
    sums: float = 0.04
    floor: int = 3 * 2**20
    programs: int = 512


TUNING = Tuning()

#: How many numbers of its own type make an M of fp32's precision.
_PARTS = {torch.float16: 2, torch.bfloat16: 3, torch.float32: 1}


class Plan(Sizes):
    """What the kernels' constants follow from the sizes of a call."""

    @property
    def pitches(self) -> Tuple[int, int]:
        """Columns of M for a row of either window: one more than it has at least."""
        return tuple(8 if window < 8 else 16 for window in self.windows)

    @property
    def columns(self) -> Tuple[int, int]:
        """Columns of M for either window, full sixteens."""
        return tuple(-(-w * p // _SEGMENT) * _SEGMENT for w, p in zip(self.windows, self.pitches))

    @property
    def stripes(self) -> int:
        """Segments beside each other in a row of the map."""
        return -(-self.width // _SEGMENT)

    def tiles(self, kernel: int) -> int:
        """Programs a head of one of the kernels, in the order of :class:`Tuning`."""
        return -(-self.height * self.stripes // TUNING.segments[kernel])

    @property
    def window_constants(self) -> dict:
        constants = {}
        for n, (window, pitch, columns) in enumerate(zip(self.windows, self.pitches, self.columns), 1):
            constants.update({f'K{n}': window, f'P{n}': pitch, f'N{n}': columns})
        return constants

    def constants(self, dtype: torch.dtype, *tensors: Tensor) -> dict:
        far = 64 * max(abs(s) for t in tensors for s in t.stride()[1:])
        last = max(abs(t.stride(-2)) * self.height + abs(t.stride(-1)) * self.width for t in tensors)
        return dict(
            self.window_constants,
            D=self.dim,
            E=self.channels,
            BD=self.padded_dim,
            BE=self.padded_channels,
            PARTS=_PARTS[dtype],
            WIDE=max(far, last) >= 2**31,
        )

    def launch(self, kernel: int) -> dict:
        """Constants of one of the kernels."""
        segments, registers = TUNING.segments[kernel], TUNING.registers[kernel]
        known = dict(S=segments, num_warps=segments, num_stages=TUNING.stages[kernel])
        if kernel < len(TUNING.columns):
            known['C'] = TUNING.columns[kernel]
        return dict(known, maxnreg=registers) if registers and max(self.dim, self.channels) <= 16 else known

    def chunk(self, train: bool = True) -> int:
        """Batch elements to take at once, so that the products of keys and weight stay small beside the logits."""
        return self._chunk(sum(self.columns), TUNING, train)

    @property
    def places(self) -> int:
        """Numbers in one share of the position biases' gradients."""
        return sum(window**2 * (2 * window - 1) for window in self.windows)

    def cut(self, batch: int) -> Tuple[int, int]:
        """Splits of the batch and bands of rows that are summed apart: for the programs, as far as there is memory."""
        columns = sum(self.columns)
        programs = self.groups * self.stripes * columns // _SEGMENT
        split = 4 * self.groups * self.stripes * (self.places + columns)
        band = 4 * batch * self.groups * self.stripes * self.dim * columns
        memory = max(TUNING.floor / 2, TUNING.sums * self.logits_bytes)
        splits = max(1, min(batch, -(-TUNING.programs // programs), int((memory - band) / split)))
        bands = max(1, min(-(-self.height // 16), TUNING.programs // (programs * splits)))
        return splits, max(1, min(bands, int(memory / (band + split * splits))))


def _padded(x: Tensor, plan: Plan) -> Tensor:
    """(N, ...) in fp32: the rows of x where the columns of M are, zeros between."""
    out = x.new_zeros((sum(plan.columns), *x.shape[1:]), dtype=torch.float32)
    for place, part in zip(_rows(out, plan), x.split([w * w for w in plan.windows])):
        place.copy_(part.unflatten(0, place.shape[:2]))
    return out


def _unpadded(x: Tensor, plan: Plan) -> Tensor:
    """The way back of :func:`_padded`."""
    return torch.cat([place.flatten(0, 1) for place in _rows(x, plan)])


def _rows(x: Tensor, plan: Plan) -> List[Tensor]:
    """(K, K, ...) views of both windows' places among the columns of M."""
    parts = zip(x.split(plan.columns), plan.pitches, plan.windows)
    return [part.unflatten(0, (-1, pitch))[:window, :window] for part, pitch, window in parts]


def _tables(bias: Tensor, rpb1: Tensor, rpb2: Tensor, plan: Plan) -> List[Tensor]:
    """(G, K, K, columns) in fp32 for either window: bias and position bias of every place in it."""
    from .general_kernels import contmix_table_kernel

    tables, first = [], 0
    for rpb, window, pitch, columns in zip((rpb1, rpb2), plan.windows, plan.pitches, plan.columns):
        table = bias.new_empty((plan.groups, window, window, columns), dtype=torch.float32)
        contmix_table_kernel[(plan.groups * window * window,)](
            bias.contiguous(), rpb.contiguous(), table,
            K=window, P=pitch, NK=columns, FIRST=first, BX=power_of_two(columns), num_warps=1,
        )  # fmt: skip
        tables.append(table)
        first = window * window
    return tables


def _products(key: Tensor, weight: Tensor, dtype: torch.dtype, plan: Plan) -> Tuple[Tensor, Tensor]:
    """M = key · weightᵀ as (B, G, PARTS, D, N) in ``dtype``, and the scales (B, G, N / 16) of its columns."""
    from .general_kernels import contmix_products_kernel

    batch, cells = len(key), key.shape[-1]
    products = key.new_empty((batch, plan.groups, _PARTS[dtype], plan.dim, sum(plan.columns)), dtype=dtype)
    blocks = sum(plan.columns) // _SEGMENT
    scale = key.new_empty((batch, plan.groups, blocks), dtype=torch.float32)
    contmix_products_kernel[(batch * plan.groups * blocks,)](
        key, weight, products, scale, *key.stride(), plan.groups,
        **plan.window_constants, L=cells, BL=max(16, power_of_two(cells)), D=plan.dim,
        BD=plan.padded_dim, PARTS=_PARTS[dtype], num_warps=1, num_stages=1,
    )  # fmt: skip
    return products, scale


def forward(query, key, weight, bias, rpb1, rpb2, value, out, lse, train) -> None:
    """Writes the mixed values, and the log-sum-exp (B, G, 2, H, W) of every softmax, which the backward needs."""
    from .general_kernels import contmix_forward_kernel

    plan = Plan.of(query, rpb1, rpb2, value)
    weight, tables = weight.contiguous(), _tables(bias, rpb1, rpb2, plan)
    constants = plan.constants(query.dtype, query, value, out)
    step = plan.chunk(train)
    for first in range(0, plan.batch, step):
        part = slice(first, first + step)
        products, scale = _products(key[part], weight, query.dtype, plan)
        contmix_forward_kernel[(len(products) * plan.groups * 2 * plan.tiles(0),)](
            query[part], products, scale, *tables, value[part], out[part], lse[part],
            *query.stride(), *value.stride(), *out.stride(), plan.groups, plan.height, plan.width, plan.tiles(0),
            **constants, **plan.launch(0),
        )  # fmt: skip
        del products  # before the next chunk's are made


def backward(grad, query, key, weight, bias, rpb1, rpb2, value, out, lse, dquery, dkey, dvalue) -> List[Tensor]:
    """Writes the gradients of queries, keys and values; returns those of weight, bias and position biases, in fp32."""
    plan = Plan.of(query, rpb1, rpb2, value)
    weight, tables = weight.contiguous(), _tables(bias, rpb1, rpb2, plan)
    sums: List[Tensor] = []
    step = plan.chunk()
    for first in range(0, plan.batch, step):
        part = slice(first, first + step)
        products = _products(key[part], weight, query.dtype, plan)
        dproducts, *biases = _chunk_backward(
            plan, grad[part], query[part], *products, tables, value[part], out[part], lse[part], dquery[part],
            dvalue[part],
        )  # fmt: skip
        del products
        dkey[part] = torch.matmul(dproducts, _padded(weight, plan))
        dweight = dproducts.flatten(0, 2).t() @ key[part].float().flatten(0, 2)
        del dproducts  # before the next chunk's are made
        terms = [_unpadded(dweight, plan), *biases]
        sums = [a + b for a, b in zip(sums, terms)] if sums else terms
    return sums


def _chunk_backward(plan, grad, query, products, scale, tables, value, out, lse, dquery, dvalue) -> List[Tensor]:
    """Writes gradients of queries and values of some batch elements; returns those of M, bias and position biases."""
    from . import general_kernels as kernels

    batch = len(query)
    heads = batch * plan.groups
    shape = plan.groups, plan.height, plan.width
    constants = plan.constants(query.dtype, query, value, grad, out, dquery, dvalue)
    delta = torch.empty_like(lse)
    splits, bands = plan.cut(batch)
    step, rows = -(-batch // splits), -(-plan.height // bands)
    splits, bands = -(-batch // step), -(-plan.height // rows)
    columns, partials = sum(plan.columns), plan.stripes * bands
    dproducts = scale.new_empty(partials, batch, plan.groups, plan.dim, columns)
    dbias = scale.new_empty(splits, plan.groups, partials, columns)
    shares = scale.new_empty(splits, plan.groups, partials, plan.places)
    with Lanes(query.device, 1) as lanes:
        with lanes.lane(0):
            kernels.contmix_value_grad_kernel[(heads * 2 * plan.tiles(2),)](
                query, products, scale, *tables, lse, grad, dvalue,
                *query.stride(), *grad.stride(), *dvalue.stride(), *shape, plan.tiles(2), **constants, **plan.launch(2),
            )  # fmt: skip
        kernels.contmix_query_grad_kernel[(heads * plan.tiles(1),)](
            query, products, scale, *tables, value, out, lse, grad, dquery, delta,
            *query.stride(), *value.stride(), *out.stride(), *grad.stride(), *dquery.stride(), *shape, plan.tiles(1),
            **constants, **plan.launch(1),
        )  # fmt: skip
        kernels.contmix_product_grad_kernel[(splits * plan.groups * partials * (columns // _SEGMENT),)](
            query, products, scale, *tables, value, lse, delta, grad, dproducts, dbias, shares,
            *query.stride(), *value.stride(), *grad.stride(), *shape, batch, step, plan.stripes, bands, rows, heads,
            **constants, **plan.launch(3),
        )  # fmt: skip
    bias_grad = _unpadded(add_up(dbias.view(1, -1, columns))[0], plan)
    del dbias, delta  # before more is made
    drpb = [scale.new_empty(plan.groups, 2 * window - 1, 2 * window - 1) for window in plan.windows]
    small, large = plan.windows
    kernels.contmix_position_bias_grad_kernel[(plan.groups * (2 * small + 2 * large - 2),)](
        shares, *drpb, plan.groups, partials, splits, K1=small, K2=large, BS=16, num_warps=2,
    )  # fmt: skip
    del shares
    dproducts = dproducts[0] if partials == 1 else add_up(dproducts[None])[0]
    return [dproducts, bias_grad, *drpb]
