"""Launches the kernels of ``shared_kernels``: ContMix on maps where many positions share the large window."""

from dataclasses import dataclass
from typing import List, Tuple

import torch
from torch import Tensor

from ..triton_common import HALF, power_of_two
from .sizes import Sizes


@dataclass(frozen=True)
class Tuning:
    """Launch parameters, measured on an H200 with tools/analysis/benchmark_contmix.py.

    Args:
        positions (int): Positions of a tile.
        logits (int): Columns of M taken at once.
        narrow (int): The same in the kernels of the output and of the queries' gradient.
        cells (int): Cells of the map taken at once.
        warps (int): Warps of a program.
        share (float): Memory for the products of keys and weight, as a share of one logits tensor. The batch is
            taken in chunks to keep to it, ...
        sums (float): Likewise for the gradients of the position biases, which bounds their programs.
        floor (int): Bytes below which no memory is saved.
    """

    positions: int = 64
    logits: int = 64
    narrow: int = 32
    cells: int = 64
    warps: int = 4
    share: float = 0.033
    sums: float = 0.03
    floor: int = 3 * 2**20


TUNING = Tuning()

#: False lets the general kernels serve these maps, too: to compare, tools/analysis/benchmark_contmix.py --general.
ENABLED = True


def takes(height: int, width: int, window: int) -> bool:
    """Whether the kernels are for this map: so small that windows have at most two places along either axis."""
    return ENABLED and height <= window + 1 and width <= window + 1


class Plan(Sizes):
    """What the kernels' constants follow from the sizes of a call."""

    @property
    def padded(self) -> Tuple[int, int]:
        """Columns of M for either window: a power of two, a multiple of what is taken at once."""
        small, large = (k * k for k in self.windows)
        return max(16, power_of_two(small)), -(-large // TUNING.logits) * TUNING.logits

    @property
    def sides(self) -> Tuple[int, int]:
        """Rows and columns of the positions whose large windows are at the same place: all of the map's, or half."""
        return tuple(n if n == self.windows[1] else n // 2 for n in (self.height, self.width))

    @property
    def tiles(self) -> int:
        height, width = self.sides
        parts = -(-height // (TUNING.positions // max(4, power_of_two(width))))
        return self.height // height * (self.width // width) * parts

    @property
    def reach(self) -> Tuple[int, int]:
        """Rows and columns of the map that the small windows of these positions reach."""
        small = self.windows[0]
        return tuple(min(n, max(small, side + small // 2)) for n, side in zip((self.height, self.width), self.sides))

    @property
    def sizes(self) -> Tuple[int, ...]:
        return self.groups, self.dim, self.channels

    def chunk(self, train: bool = True) -> int:
        """Batch elements to take at once, so that the products of keys and weight stay small beside the logits."""
        return self._chunk(sum(self.padded), TUNING, train)

    def splits(self) -> int:
        """Parts of the batch that are summed apart for the gradients of the position biases."""
        table = 4 * self.groups * self.height * self.width * sum(self.padded)
        return max(1, min(self.batch, int(max(TUNING.floor / 2, TUNING.sums * self.logits_bytes) / table)))

    @property
    def table_constants(self) -> dict:
        (small, large), (first, second) = self.windows, self.padded
        return dict(H=self.height, W=self.width, K1=small, N1=first, K2=large, N2=second)

    def constants(self, half: bool, *tensors: Tensor) -> dict:
        far = 64 * max(abs(s) for t in tensors for s in t.stride()[1:])
        return dict(
            self.table_constants,
            SH=self.sides[0],
            SW=self.sides[1],
            RH=self.reach[0],
            RW=self.reach[1],
            TILES=self.tiles,
            BN=TUNING.logits,
            BD=max(16, power_of_two(self.dim)),
            BE=max(16, power_of_two(self.channels)),
            BT=TUNING.positions,
            BC=TUNING.cells,
            HALF=half,
            WIDE=far >= 2**31,
            num_warps=TUNING.warps,
            num_stages=1,
        )


def _padded_weight(weight: Tensor, plan: Plan) -> Tensor:
    """(N1 + N2, L) in fp32: the rows of either window, then zeros."""
    small, first = plan.windows[0] ** 2, plan.padded[0]
    out = weight.new_zeros((sum(plan.padded), weight.shape[1]), dtype=torch.float32)
    out[:small] = weight[:small]
    out[first : first + plan.windows[1] ** 2] = weight[small:]
    return out


def _table(bias: Tensor, rpb1: Tensor, rpb2: Tensor, plan: Plan) -> Tensor:
    """(G, H, W, N1 + N2) in fp32: bias and position bias of every position, -inf in the padding."""
    from .shared_kernels import contmix_shared_table_kernel

    table = bias.new_empty((plan.groups, plan.height, plan.width, sum(plan.padded)), dtype=torch.float32)
    contmix_shared_table_kernel[(plan.groups * plan.height * plan.width,)](
        bias.contiguous(), rpb1.contiguous(), rpb2.contiguous(), table,
        **plan.table_constants, BX=power_of_two(sum(plan.padded)), num_warps=2,
    )  # fmt: skip
    return table


def _cells(bias: Tensor, rpb2: Tensor, plan: Plan) -> Tensor:
    """(G, H, W, cells) in fp32: the table of the large window for the cells of the map, -inf outside of it."""
    from .shared_kernels import contmix_shared_cells_kernel

    cells = -(-plan.height * plan.width // TUNING.cells) * TUNING.cells
    table = bias.new_empty((plan.groups, plan.height, plan.width, cells), dtype=torch.float32)
    contmix_shared_cells_kernel[(plan.groups * plan.height * plan.width,)](
        bias.contiguous(), rpb2.contiguous(), table,
        **plan.table_constants, CELLS=cells, BX=power_of_two(cells), num_warps=2,
    )  # fmt: skip
    return table


def forward(query, key, weight, bias, rpb1, rpb2, value, out, lse, train) -> None:
    """Writes the mixed values, and the log-sum-exp (B, G, 2, H, W) of every softmax, which the backward needs."""
    from .shared_kernels import contmix_shared_forward_kernel

    plan = Plan.of(query, rpb1, rpb2, value)
    weight, table = _padded_weight(weight, plan).t(), _table(bias, rpb1, rpb2, plan)
    constants = dict(plan.constants(query.dtype in HALF, query, value, out), BN=TUNING.narrow)
    step = plan.chunk(train)
    for first in range(0, plan.batch, step):
        part = slice(first, first + step)
        products = torch.matmul(key[part].float(), weight)
        contmix_shared_forward_kernel[(len(products) * plan.groups * plan.tiles,)](
            query[part], products, table, value[part], out[part], lse[part],
            *query.stride(), *value.stride(), *out.stride(), *plan.sizes, **constants,
        )  # fmt: skip
        del products  # before the next chunk's are made


def backward(grad, query, key, weight, bias, rpb1, rpb2, value, lse, dquery, dkey, dvalue) -> List[Tensor]:
    """Writes the gradients of queries, keys and values; returns those of weight, bias and position biases, in fp32."""
    plan = Plan.of(query, rpb1, rpb2, value)
    weight, table = _padded_weight(weight, plan), _table(bias, rpb1, rpb2, plan)
    cells = _cells(bias, rpb2, plan)
    dweight = torch.zeros_like(weight)
    sums: List[Tensor] = []
    step = plan.chunk()
    for first in range(0, plan.batch, step):
        part = slice(first, first + step)
        products = torch.matmul(key[part].float(), weight.t())
        terms = _chunk_backward(
            plan, grad[part], query[part], products, table, cells, value[part], lse[part], dquery[part], dvalue[part]
        )
        sums = [a + b for a, b in zip(sums, terms)] if sums else terms
        dkey[part] = torch.matmul(products, weight)  # products are their own gradients by now
        dweight.addmm_(products.flatten(0, 2).t(), key[part].float().flatten(0, 2))
        del products  # before the next chunk's are made
    return [_unpadded(dweight, plan), *sums]


def _unpadded(x: Tensor, plan: Plan) -> Tensor:
    small, first = plan.windows[0] ** 2, plan.padded[0]
    return torch.cat([x[:small], x[first : first + plan.windows[1] ** 2]])


def _chunk_backward(plan, grad, query, products, table, cells, value, lse, dquery, dvalue) -> List[Tensor]:
    """Gradients for some batch elements; ``products`` is overwritten with its own gradient."""
    from . import shared_kernels as kernels

    batch = len(query)
    heads = batch * plan.groups
    constants = plan.constants(query.dtype in HALF, query, value, grad, dquery, dvalue)
    chunks = 1 + plan.padded[1] // TUNING.logits
    delta = torch.empty_like(lse)
    kernels.contmix_shared_query_grad_kernel[(heads * plan.tiles,)](
        query, products, table, value, lse, grad, dquery, delta,
        *query.stride(), *value.stride(), *grad.stride(), *dquery.stride(), *plan.sizes,
        **dict(constants, BN=TUNING.narrow),
    )  # fmt: skip
    kernels.contmix_shared_value_grad_kernel[(heads * 2 * (cells.shape[-1] // TUNING.cells),)](
        query, products, table, cells, lse, grad, dvalue,
        *query.stride(), *grad.stride(), *dvalue.stride(), *plan.sizes, **constants,
    )  # fmt: skip
    splits = min(batch, plan.splits())
    step = -(-batch // splits)
    splits = -(-batch // step)
    dtable = table.new_empty(splits, *table.shape)
    strides = *query.stride(), *value.stride(), *grad.stride()
    kernels.contmix_shared_table_grad_kernel[(chunks * splits * plan.tiles * plan.groups,)](
        query, products, table, value, lse, delta, grad, dtable,
        *strides, *plan.sizes, batch, splits, step, **constants,
    )  # fmt: skip
    kernels.contmix_shared_product_grad_kernel[(heads * chunks,)](
        query, products, table, value, lse, delta, grad, *strides, *plan.sizes, **constants
    )
    dbias = _unpadded(dtable.sum((0, 1, 2, 3)), plan)
    drpb = [dtable.new_empty(plan.groups, 2 * window - 1, 2 * window - 1) for window in plan.windows]
    kernels.contmix_shared_position_bias_grad_kernel[(plan.groups * sum(2 * k - 1 for k in plan.windows),)](
        dtable, *drpb, splits, plan.groups,
        **plan.table_constants, BU=power_of_two(2 * plan.windows[1] - 1), BP=32, num_warps=4,
    )  # fmt: skip
    return [dbias, *drpb]
