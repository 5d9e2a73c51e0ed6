"""Launches the kernels of ``shared_kernels``: ContMix on maps where many positions share the large window."""

from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ..sums import add_up
from ..triton_common import HALF, Lanes, power_of_two
from .sizes import Sizes


@dataclass(frozen=True)
class Tuning:
    """Launch parameters, measured on an H200 with tools/analysis/benchmark_contmix.py.

    Of each kernel: columns of M taken at once, warps of a program, registers of a thread at most (0 without a bound).

    Args:
        forward (tuple): Of the kernel of the output, ...
        query (tuple): ... of the queries' gradient, ...
        value (tuple): ... of the values' gradient, whose columns are not used, ...
        table (tuple): ... of the gradients of the biases, and ...
        product (tuple): ... of the gradient of M.
        positions (int): Positions of a tile.
        programs (int): Programs of the kernel of the output up to which either window gets programs of its own.
        cells (int): Cells of the map taken at once.
        key_cells (int): Cells of the context taken at once for the products of keys and weight.
        few_rows (int): Rows of the keys up to which a program takes 16 of them, not 64.
        whole (int): Bytes that the products of keys and weight may take of a whole batch. Larger batches are taken in
            chunks, ...
        share (float): ... to keep their products to this share of one logits tensor.
        sums (float): Likewise for the gradients of the position biases, which bounds their programs.
        floor (int): Bytes below which no memory is saved, of a batch in chunks.
    """

    forward: Tuple[int, int, int] = (32, 4, 128)
    query: Tuple[int, int, int] = (32, 4, 128)
    value: Tuple[int, int, int] = (64, 4, 128)
    table: Tuple[int, int, int] = (64, 4, 0)
    product: Tuple[int, int, int] = (64, 4, 168)
    positions: int = 64
    programs: int = 66
    cells: int = 64
    key_cells: int = 32
    few_rows: int = 1024
    whole: int = 13 * 2**20
    share: float = 0.033
    sums: float = 0.02
    floor: int = 3 * 2**20


TUNING = Tuning()

_COLUMNS = 64  # columns of M for the large window are a multiple of this
_ROWS = 64  # rows of the keys that a program takes at once
_FEW_ROWS = 16  # the same where there are few
_NUMBERS = 1024  # of the table, of a program
_PARTS = 20  # parts of the keys that are summed apart for the gradient of the weight

#: False lets the general kernels serve these maps, too: to compare, tools/analysis/benchmark_contmix.py --general.
ENABLED = True


def takes(height: int, width: int, window: int, channels: int) -> bool:
    """Whether the kernels are for this map: so small that windows have at most two places along either axis.

    Heads of more than 32 channels go to the general kernels: here their registers spill, and of one kernel ptxas of
    CUDA 12.8 makes wrong code (it reads a register that nothing wrote; ``benchmark_contmix.py --only resources``).
    """
    return ENABLED and height <= window + 1 and width <= window + 1 and channels <= 32


class Plan(Sizes):
    """What the kernels' constants follow from the sizes of a call."""

    @property
    def padded(self) -> Tuple[int, int]:
        """Columns of M for either window: a power of two, a multiple of what is taken at once."""
        small, large = (k * k for k in self.windows)
        return max(16, power_of_two(small)), -(-large // _COLUMNS) * _COLUMNS

    @property
    def sides(self) -> Tuple[int, int]:
        """Rows and columns of the positions whose large windows are at the same place: all of the map's, or half."""
        return tuple(n if n == self.windows[1] else n // 2 for n in (self.height, self.width))

    @property
    def tiles(self) -> int:
        height, width = self.sides
        parts = -(-height // (TUNING.positions // max(4, power_of_two(width))))
        return self.height // height * (self.width // width) * parts

    def few(self, batch: int) -> bool:
        """Whether so many images have so few tiles that most of a GPU would be empty."""
        return batch * self.groups * self.tiles <= TUNING.programs

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
        if self._whole:
            return self.batch
        step = self._chunk(sum(self.padded), TUNING, train, self.padded_dim)
        # A multiple of 16 heads and tiles fills the GPU in whole waves; the last chunk is then a smaller one.
        return min(self.batch, -(-step // 16) * 16) if step >= 16 else step

    @property
    def _whole(self) -> bool:
        """Whether the batch is small enough for the products of all of it to be there at once."""
        return 4 * self.batch * self.groups * self.padded_dim * sum(self.padded) <= TUNING.whole

    def splits(self) -> int:
        """Parts of the batch that are summed apart for the gradients of the position biases."""
        table = 4 * self.groups * self.height * self.width * sum(self.padded)
        floor = TUNING.whole if self._whole else TUNING.floor
        return max(1, min(self.batch, int(max(floor / 2, TUNING.sums * self.logits_bytes) / table)))

    @property
    def window_constants(self) -> dict:
        (small, large), (first, second) = self.windows, self.padded
        return dict(K1=small, N1=first, K2=large, N2=second)

    @property
    def table_constants(self) -> dict:
        return dict(self.window_constants, H=self.height, W=self.width)

    def key_constants(self, cells: int, half: bool) -> dict:
        """For the kernels of the keys, which take so many cells of the context at once."""
        known = dict(BD=self.padded_dim, BR=_ROWS, BL=cells, BN=64, HALF=half)
        return dict(self.window_constants, **known, num_warps=4, num_stages=1)

    def prepare_constants(self, rows: int, half: bool) -> dict:
        """For the kernel that prepares a forward pass, with so many rows of keys."""
        taken = _FEW_ROWS if rows <= TUNING.few_rows else _ROWS
        known = self.key_constants(TUNING.key_cells, half)
        return dict(known, BR=taken, BX=_NUMBERS, H=self.height, W=self.width)

    def constants(self, kernel: str, half: bool, *tensors: Tensor) -> dict:
        columns, warps, registers = getattr(TUNING, kernel)
        far = 64 * max(abs(s) for t in tensors for s in t.stride()[1:])
        return dict(
            self.table_constants,
            SH=self.sides[0],
            SW=self.sides[1],
            RH=self.reach[0],
            RW=self.reach[1],
            TILES=self.tiles,
            BN=columns,
            BD=self.padded_dim,
            BE=self.padded_channels,
            BT=TUNING.positions,
            BC=TUNING.cells,
            HALF=half,
            WIDE=far >= 2**31,
            num_warps=warps,
            num_stages=1,
            **(dict(maxnreg=registers) if registers else {}),
        )


def _prepare(key, weight, bias, rpb1, rpb2, plan: Plan, table: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """What the kernels read in place of the parameters, in one launch.

    Returns:
        tuple[Tensor, Tensor]: M = key · weightᵀ: (B, G, N1 + N2, padded D) in fp32, 0 in the padding; and the table,
        unless there is one: (G, H, W, N1 + N2) in fp32: bias and position bias of every position, -inf in the padding.
    """
    from .shared_kernels import contmix_shared_prepare_kernel

    columns = sum(plan.padded)
    products = key.new_empty((*key.shape[:2], columns, plan.padded_dim), dtype=torch.float32)
    rows = len(key) * plan.groups * plan.padded_dim
    constants = plan.prepare_constants(rows, key.dtype in HALF)
    programs = -(-rows // constants['BR']) * -(-columns // constants['BN'])
    tables = 0
    if table is None:
        table = key.new_empty((plan.groups, plan.height, plan.width, columns), dtype=torch.float32)
        tables = -(-table.numel() // constants['BX'])
    contmix_shared_prepare_kernel[(programs + tables,)](
        key, weight, products, bias.contiguous(), rpb1.contiguous(), rpb2.contiguous(), table, *key.stride(),
        plan.groups, plan.dim, rows, key.shape[3], programs, **constants,
    )  # fmt: skip
    return products, table


def _key_grad(key: Tensor, weight: Tensor, dproducts: Tensor, dkey: Tensor, dweight: Tensor, add: bool, plan) -> None:
    """Writes the gradient of some keys, and writes or adds to the parts of that of the weight."""
    from .shared_kernels import contmix_shared_key_grad_kernel

    parts, columns, length = dweight.shape
    rows = len(key) * plan.groups * plan.padded_dim
    step = -(-rows // parts // _ROWS) * _ROWS
    contmix_shared_key_grad_kernel[(parts * -(-columns // 64) + -(-rows // _ROWS),)](
        key, weight, dproducts, dkey, dweight, *key.stride(), *dkey.stride(), plan.groups, plan.dim, rows, length,
        parts, step, int(add), **plan.key_constants(32, key.dtype in HALF),
    )  # fmt: skip


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
    weight, table = weight.contiguous(), None
    step = plan.chunk(train)
    few = plan.few(step)
    constants = plan.constants('forward', query.dtype in HALF, query, value, out)
    for first in range(0, plan.batch, step):
        part = slice(first, first + step)
        products, table = _prepare(key[part], weight, bias, rpb1, rpb2, plan, table)
        contmix_shared_forward_kernel[(len(products) * plan.groups * plan.tiles * (1 + few),)](
            query[part], products, table, value[part], out[part], lse[part],
            *query.stride(), *value.stride(), *out.stride(), *plan.sizes, **constants, APART=few,
        )  # fmt: skip
        del products  # before the next chunk's are made


def backward(grad, query, key, weight, bias, rpb1, rpb2, value, out, lse, dquery, dkey, dvalue) -> List[Tensor]:
    """Writes the gradients of queries, keys and values; returns those of weight, bias and position biases, in fp32."""
    from .shared_kernels import contmix_shared_position_bias_grad_kernel

    plan = Plan.of(query, rpb1, rpb2, value)
    weight, table, cells = weight.contiguous(), None, _cells(bias, rpb2, plan)
    rows = plan.batch * plan.groups * plan.padded_dim
    dweight = cells.new_empty(min(_PARTS, -(-rows // _ROWS)), sum(plan.padded), weight.shape[1])
    dtables = [cells.new_empty(plan.splits(), *cells.shape[:3], n) for n in plan.padded]
    step = plan.chunk()
    for first in range(0, plan.batch, step):
        part = slice(first, first + step)
        products, table = _prepare(key[part], weight, bias, rpb1, rpb2, plan, table)
        _chunk_backward(
            plan, grad[part], query[part], products, table, cells, value[part], out[part], lse[part], dquery[part],
            dvalue[part], dtables, first > 0,
        )  # fmt: skip
        _key_grad(key[part], weight, products, dkey[part], dweight, first > 0, plan)
        del products  # before the next chunk's are made
    drpb = [cells.new_empty(plan.groups, 2 * window - 1, 2 * window - 1) for window in plan.windows]
    contmix_shared_position_bias_grad_kernel[(plan.groups * sum(2 * k - 1 for k in plan.windows),)](
        *dtables, *drpb, plan.splits(), plan.splits(), plan.groups,
        **plan.table_constants, BU=power_of_two(2 * plan.windows[1] - 1), BP=32, num_warps=4,
    )  # fmt: skip
    places = [slice(window**2) for window in plan.windows]
    dtables = [add_up(dtable.view(-1, dtable.shape[2] * dtable.shape[3], dtable.shape[4])) for dtable in dtables]
    dbias = torch.cat([add_up(dtable[None])[0, place] for dtable, place in zip(dtables, places)])
    dweight = add_up(dweight[None])[0].split(plan.padded)
    return [torch.cat([rows[place] for rows, place in zip(dweight, places)]), dbias, *drpb]


def _chunk_backward(
    plan, grad, query, products, table, cells, value, out, lse, dquery, dvalue, dtables: List[Tensor], add: bool
) -> None:
    """Gradients for some batch elements; ``products`` is overwritten with its own gradient."""
    from . import shared_kernels as kernels

    batch = len(query)
    heads, tiles = batch * plan.groups, plan.tiles
    delta = torch.empty_like(lse)
    strides = *query.stride(), *value.stride(), *grad.stride()

    def constants(kernel):
        return plan.constants(kernel, query.dtype in HALF, query, value, out, grad, dquery, dvalue)

    with Lanes(query.device, 1) as lanes:
        with lanes.lane(0):
            kernels.contmix_shared_value_grad_kernel[(heads * 2 * (cells.shape[-1] // TUNING.cells),)](
                query, products, table, cells, lse, grad, dvalue,
                *query.stride(), *grad.stride(), *dvalue.stride(), *plan.sizes, **constants('value'),
            )  # fmt: skip
        kernels.contmix_shared_query_grad_kernel[(heads * tiles,)](
            query, products, table, value, out, lse, grad, dquery, delta, *query.stride(), *value.stride(),
            *out.stride(), *grad.stride(), *dquery.stride(), *plan.sizes, **constants('query'),
        )  # fmt: skip
        splits, chunks = plan.splits(), 1 + plan.padded[1] // TUNING.table[0]
        kernels.contmix_shared_table_grad_kernel[(splits * chunks * tiles * plan.groups,)](
            query, products, table, value, lse, delta, grad, *dtables, *strides, *plan.sizes, batch, splits, splits,
            int(add), **constants('table'),
        )  # fmt: skip
    chunks = 1 + plan.padded[1] // TUNING.product[0]
    kernels.contmix_shared_product_grad_kernel[(heads * chunks,)](
        query, products, table, value, lse, delta, grad, *strides, *plan.sizes, **constants('product')
    )
