"""Depthwise convolution in Triton, on tensor cores; forward, input gradient and weight gradient.

``torch.library`` operators, ``mmoverlock::depthwise_conv2d`` and ``mmoverlock::depthwise_conv2d_branches`` with their
gradients: ``torch.compile``, CUDA graphs, checkpointing and export see calls of known shapes. The kernels are in
``triton_kernels``, which is imported at the first call: importing the package must not need Triton.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..triton_common import (
    HALF,
    compute_input,
    definition_gradients,
    differentiated_again,
    on,
    power_of_two,
    refuse_tensors,
)
from .reference import depthwise_conv2d_reference

_MAX_COLUMNS = 128  # of an input window: more would not fit on chip beside their band


@dataclass(frozen=True)
class Tuning:
    """Launch parameters, measured on an H200 with tools/analysis/benchmark_depthwise.py.

    Args:
        areas (tuple[int, int, int]): Pixels of an output tile, columns of the matrix product, to choose from: of the
            first two, or where either makes products of few rows, of all.
        tiles (int): Tiles a program of the convolution: rows of the product.
        depth (int): Pixels of the window that the product runs over at a time.
        whole (tuple[int, int]): Tiles and depth where a window is as wide as the map, 9 to 32 columns.
        warps (int): Warps a program.
        stages (int): Loads in flight.
        vector (int): Bytes a load takes at most.
        grad_area, grad_depth, grad_tiles, grad_warps, grad_stages (int): The same of the weight gradient: pixels of
            an output tile, pixels of the window a program, tiles at a time, warps, stages.
        grad_programs (int): Programs of the weight gradient to aim at, by splitting the tiles.
        grad_few (tuple): Area, depth and tiles of it for few images (fewer than 32) of up to so many pixels together.
    """

    areas: Tuple[int, int, int] = (128, 64, 32)
    tiles: int = 128
    depth: int = 64
    whole: Tuple[int, int] = (64, 32)
    warps: int = 4
    stages: int = 3
    vector: int = 16
    grad_area: int = 64
    grad_depth: int = 128
    grad_tiles: int = 64
    grad_warps: int = 4
    grad_stages: int = 4
    grad_programs: int = 528
    grad_few: Tuple[Tuple[int, int, int, int], ...] = ((8192, 32, 64, 32), (65536, 64, 128, 32))


TUNING = Tuning()


def refuse(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Optional[str]:
    """Why the kernels cannot serve the call, or None."""
    tensors = dict(x=x, weight=weight)
    if bias is not None:
        tensors['bias'] = bias
    reason = refuse_tensors(tensors)
    return reason or _refuse_sizes(x, weight, dilation)


def _refuse_sizes(x: Tensor, weight: Tensor, dilation: int) -> Optional[str]:
    if dilation * (weight.shape[-1] - 1) > _MAX_COLUMNS - 32:
        return f'the kernel spans {dilation * (weight.shape[-1] - 1) + 1} pixels, it takes {_MAX_COLUMNS - 31}'
    if 0 in x.shape:
        return 'a tensor is empty'
    return None


def refuse_branches(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> Optional[str]:
    """Why the kernels cannot serve the call with all these branches, or None."""
    reason = refuse_tensors(dict(x=x, **{f'weight {n}': weight for n, weight in enumerate(weights)}))
    return reason or next(filter(None, (_refuse_sizes(x, w, d) for w, d in zip(weights, dilations))), None)


def depthwise_conv2d_triton(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Tensor:
    """As the reference, but the result is contiguous (NCHW) whatever the memory format of ``x``.

    Computes in the type of ``x``, or in that of autocast, with sums in float32; ``weight`` and ``bias`` may be of
    another type and are rounded on the way. A value that is not finite may reach all outputs within 32 pixels of it.
    """
    return torch.ops.mmoverlock.depthwise_conv2d(
        compute_input(x, torch.contiguous_format), weight, bias, dilation, False
    )


def depthwise_conv2d_branches_triton(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> List[Tensor]:
    """As :func:`depthwise_conv2d_triton` with every kernel, without bias, in one operator.

    One call from Python each way instead of one a branch, and the gradients of ``x`` are added up in the kernels.
    """
    x = compute_input(x, torch.contiguous_format)
    return torch.ops.mmoverlock.depthwise_conv2d_branches(x, list(weights), list(dilations))


@dataclass(frozen=True)
class _Plan:
    """How a map is cut into tiles; the names are those of ``triton_kernels``."""

    dilation: int
    reach: int  # column of the window, relative to that of the tile, which the kernel's first tap is in
    vectors: Tuple[int, int]  # V, VO
    tile: Tuple[int, int]  # HS, BN
    window: Tuple[int, int]  # R, BU
    before: Tuple[int, int]  # UP, LEFT
    strips: int
    across: int  # SW
    together: int  # L
    lanes: int
    flat: bool

    @classmethod
    def of(cls, shape, dtype: torch.dtype, size: int, dilation: int, area: int, lanes: int) -> '_Plan':
        """Plans a convolution.

        Args:
            shape (torch.Size): Of the map, (B, C, H, W).
            dtype (torch.dtype): Of the map.
            size (int): K.
            dilation (int): DIL.
            area (int): Pixels that a tile may have.
            lanes (int): Tiles that a program would like to have.
        """
        batch, _, height, width = shape
        reach = size // 2 * dilation
        most = max(1, TUNING.vector // dtype.itemsize)
        row = math.gcd(width, most)
        left = -(-reach // row) * row
        # A narrow map is its own window: nothing beyond its borders is multiplied.
        narrow = max(8, power_of_two(width))
        choices = [(narrow, narrow, 0)] if width <= 64 else []
        choices += [(power_of_two(left + n + reach), n, left) for n in (16, 32, 64)]
        choices = [c for c in choices if c[0] <= _MAX_COLUMNS]
        columns, across, left = min(choices, key=lambda c: -(-width // c[1]) * c[0] * c[1])
        rows = -(-height // dilation)
        down = max(16 // across, 1, min(area // across, power_of_two(rows)))  # a product has 16 columns at least
        flat = left == 0 and across >= width and dilation == 1
        up, vector = size // 2, row
        window = down + size - 1
        if down >= rows:
            up, window = 0, rows
        if flat:
            # Up to three rows more above, if that lets wider loads begin there.
            vector = math.gcd(height * width, most)
            if up:
                spare = max(range(4), key=lambda n: (math.gcd((up + n) * width, down * width, vector), -n))
                vector = math.gcd((up + spare) * width, down * width, vector)
                up, window = up + spare, window + spare
        count = -(-width // across)
        strips = dilation * -(-rows // down)
        together = 1
        if batch * count < min(64, lanes):
            together = min(strips, dilation * max(1, lanes // (batch * count * dilation)))
            # Groups of about the same size.
            together = dilation * -(-strips // (dilation * -(-strips // together)))
        return cls(
            dilation, left - reach, (vector, row), (down, across), (window, columns), (up, left), strips, count,
            together, batch * count * together, flat,
        )  # fmt: skip

    @property
    def groups(self) -> int:
        return -(-self.strips // self.together)

    def rows(self, tiles: int) -> int:
        """Tiles of a program, BM, of which there are ``tiles`` at most."""
        return min(tiles, max(16, power_of_two(self.lanes)))

    def filled(self, shape, tiles: int) -> float:
        """How much of the products is of pixels of the map."""
        rows = self.rows(tiles)
        programs = self.groups * -(-self.lanes // rows)
        return shape[0] * shape[2] * shape[3] / (programs * rows * math.prod(self.tile))

    def columns(self, width: int) -> Tuple[int, int]:
        """Columns of a window and of a tile of the gradient, as they are counted in a map of this width."""
        return (width, width) if self.flat else (self.window[1], self.tile[1])

    def length(self, width: int) -> int:
        """Pixels of a window."""
        return self.window[0] * self.columns(width)[0]

    def sizes(self, *kernel: int) -> Tuple[int, ...]:
        left = self.before[1] // self.vectors[0]
        return (
            *kernel, self.dilation, self.window[0], self.before[0], left, self.strips, self.across, self.together,
            self.lanes,
        )  # fmt: skip

    def maps(self, x: Tensor) -> Tuple[int, ...]:
        _, channels, height, width = x.shape
        return channels, height, width // self.vectors[1], height * width // self.vectors[0]

    def constants(self, dtype: torch.dtype, tiles: int, stages: int) -> dict:
        """Constants and options that all kernels share."""
        if self.vectors[0] * dtype.itemsize < 4:  # too little for an asynchronous copy: every load holds registers
            tiles, stages = min(tiles, 64), 1
        return dict(
            num_stages=stages,
            V=self.vectors[0],
            VO=self.vectors[1],
            BM=self.rows(tiles),
            HS=self.tile[0],
            BN=self.tile[1],
            BU=self.window[1],
            FLAT=self.flat,
            ONE=self.together == 1,
            PRECISION='ieee' if dtype in HALF else 'tf32x3',
        )


def forward_launch(x: Tensor, size: int, dilation: int) -> Tuple[_Plan, dict]:
    """Plan, and constants and options of ``depthwise_forward_kernel``."""
    return _forward_launch(x.shape, x.dtype, size, dilation, TUNING)


def grad_launch(x: Tensor, size: int, dilation: int) -> Tuple[_Plan, dict]:
    """Plan, and constants and options of ``depthwise_weight_grad_kernel``."""
    return _grad_launch(x.shape, x.dtype, size, dilation, TUNING)


# A network has few sizes, and calls come by the hundred a step: planning each anew would take longer than the kernels.
@lru_cache(maxsize=1024)
def _forward_launch(shape, dtype: torch.dtype, size: int, dilation: int, tuning: Tuning) -> Tuple[_Plan, dict]:
    plans = [_Plan.of(shape, dtype, size, dilation, area, tuning.tiles) for area in tuning.areas]
    # Products with rows for the largest instruction, if there can be, and as much of the map in them as possible.
    plans = [p for p in plans[:2] if p.rows(tuning.tiles) >= 64] or plans
    plan = max(plans, key=lambda p: p.filled(shape, tuning.tiles))
    whole = plan.before[1] == 0 and 8 < plan.window[1] <= 32
    tiles, depth = tuning.whole if whole else (tuning.tiles, tuning.depth)
    constants = plan.constants(dtype, tiles, tuning.stages)
    depth = min(depth, max(16, power_of_two(plan.length(shape[3]))))
    return plan, dict(constants, BK=depth if plan.flat else max(depth, plan.window[1]), num_warps=tuning.warps)


@lru_cache(maxsize=1024)
def _grad_launch(shape, dtype: torch.dtype, size: int, dilation: int, tuning: Tuning) -> Tuple[_Plan, dict]:
    batch, _, height, width = shape
    area, depth, tiles = tuning.grad_area, tuning.grad_depth, tuning.grad_tiles
    if batch < 32:
        area, depth, tiles = next((t for n, *t in tuning.grad_few if batch * height * width <= n), (area, depth, tiles))
    tiles = tiles if dtype in HALF else tiles // 2
    plan = _Plan.of(shape, dtype, size, dilation, area, tiles)
    constants = plan.constants(dtype, tiles, tuning.grad_stages)
    depth = min(depth, max(16, power_of_two(plan.length(width))))
    pixels = max(16, power_of_two(plan.tile[0] * plan.columns(width)[1]))
    return plan, dict(constants, BK=depth, NP=pixels, num_warps=tuning.grad_warps)


@torch.library.custom_op('mmoverlock::depthwise_conv2d', mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int, flip: bool) -> Tensor:
    """The convolution of a contiguous map; with ``flip`` the kernel is turned by half a turn."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch_conv(x, weight, bias, dilation, flip, out)
    return out


def _launch_conv(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int, flip: bool, out: Tensor, add=False):
    """Writes the convolution of a contiguous map to ``out``, or adds it."""
    size = weight.shape[-1]
    (band,) = _bands(x, weight.contiguous(), [size], [dilation], flip)
    _launch_product(x, band, size, dilation, out, bias, add)


def _bands(x: Tensor, weights: Tensor, sizes: Sequence[int], dilations: Sequence[int], flip: bool) -> List[Tensor]:
    """Kernels as the matrices that windows of ``x`` are multiplied with; ``weights`` one after another in memory."""
    plans = [forward_launch(x, size, dilation)[0] for size, dilation in zip(sizes, dilations)]
    specs = [(k, p.dilation, p.reach, p.window[1], p.tile[1]) for k, p in zip(sizes, plans)]
    return _launch_bands(x, weights, specs, flip)


def _launch_bands(x: Tensor, weights: Tensor, specs: Sequence[Tuple[int, ...]], flip: bool) -> List[Tensor]:
    """As ``depthwise_band_kernel``, in the type of ``x``: (C, K, BU, BN) of every spec, (K, DIL, REACH, BU, BN)."""
    from .triton_kernels import depthwise_band_kernel

    channels = x.shape[1]
    shapes = [(channels, size, columns, across) for size, _, _, columns, across in specs]
    counts = [math.prod(shape) for shape in shapes]
    bands = x.new_empty((sum(counts),))
    with on(x.device):
        depthwise_band_kernel[(sum(-(-count // 1024) for count in counts),)](
            weights, bands, channels, SPECS=tuple(specs), FLIP=flip, BLOCK=1024
        )
    return [band.view(shape) for band, shape in zip(bands.split(counts), shapes)]


def _launch_product(
    x: Tensor, band: Tensor, size: int, dilation: int, out: Tensor, bias: Optional[Tensor] = None, add: bool = False
) -> None:
    """The convolution, once the band is made."""
    from .triton_kernels import depthwise_forward_kernel

    channels = x.shape[1]
    plan, constants = forward_launch(x, size, dilation)
    with on(x.device):
        depthwise_forward_kernel[(channels * plan.groups * -(-plan.lanes // constants['BM']),)](
            x, band, band if bias is None else bias, out, *plan.maps(x), *plan.sizes(size), **constants,
            BIAS=bias is not None, ADD=add,
        )  # fmt: skip


@_conv.register_fake
def _(x, weight, bias, dilation, flip):
    return x.new_empty(x.shape)


@torch.library.custom_op('mmoverlock::depthwise_conv2d_weight_grad', mutates_args=())
def _weight_grad(grad: Tensor, x: Tensor, size: int, dilation: int) -> Tensor:
    """Gradient (C, 1, size, size) of the weight, in float32."""
    return _launch_weight_grad(grad.contiguous(), x.contiguous(), size, dilation)


def _launch_weight_grad(grad: Tensor, x: Tensor, size: int, dilation: int) -> Tensor:
    from .triton_kernels import depthwise_diagonal_kernel, depthwise_weight_grad_kernel

    channels, width = x.shape[1], x.shape[3]
    plan, constants = grad_launch(x, size, dilation)
    pixels, length = constants['NP'], plan.length(width)
    # Splits fill the GPU, but each adds its products to memory.
    blocks, slices = -(-plan.lanes // constants['BM']), -(-length // constants['BK'])
    parts = max(1, min(TUNING.grad_programs // (channels * slices * blocks), plan.groups // 4))
    part = -(-plan.groups // parts)
    splits = blocks * -(-plan.groups // part)
    products = x.new_empty((channels, splits, length, pixels), dtype=torch.float32)
    out = x.new_empty((channels, 1, size, size), dtype=torch.float32)
    with on(x.device):
        depthwise_weight_grad_kernel[(channels * slices * splits,)](
            x, grad, products, *plan.maps(x), *plan.sizes(), splits, part, **constants
        )  # fmt: skip
        depthwise_diagonal_kernel[(channels * size,)](
            products, out, size, dilation, plan.window[0], plan.before[0], plan.reach, splits, *plan.columns(width),
            NP=pixels, HS=plan.tile[0], BN=plan.tile[1], BK=power_of_two(size), BW=min(16, plan.tile[1]),
        )  # fmt: skip
    return out


@_weight_grad.register_fake
def _(grad, x, size, dilation):
    return x.new_empty((x.shape[1], 1, size, size), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, dilation, flip = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.dilation, ctx.flip = dilation, flip


def _backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    x, weight, bias = ctx.saved_tensors
    dilation, needed = ctx.dilation, ctx.needs_input_grad[:3]
    if differentiated_again():
        out = depthwise_conv2d_reference(x, weight.flip(2, 3) if ctx.flip else weight, bias, dilation)
        return (*definition_gradients(out, (x, weight, bias), grad), None, None)
    dx = dweight = dbias = None
    if needed[0]:
        dx = torch.ops.mmoverlock.depthwise_conv2d(grad.contiguous(), weight, None, dilation, not ctx.flip)
    if needed[1]:
        dweight = torch.ops.mmoverlock.depthwise_conv2d_weight_grad(grad, x, weight.shape[-1], dilation)
        dweight = (dweight.flip(2, 3) if ctx.flip else dweight).to(weight.dtype)
    if needed[2]:
        dbias = grad.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
    return dx, dweight, dbias, None, None


_conv.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op('mmoverlock::depthwise_conv2d_branches', mutates_args=())
def _branches(x: Tensor, weights: List[Tensor], dilations: List[int]) -> List[Tensor]:
    """The convolutions of one map with several kernels."""
    x = x.contiguous()
    outs = [torch.empty_like(x) for _ in weights]
    for out, weight, dilation in zip(outs, weights, dilations):
        _launch_conv(x, weight, None, dilation, False, out)
    return outs


@_branches.register_fake
def _(x, weights, dilations):
    return [x.new_empty(x.shape) for _ in weights]


@torch.library.custom_op('mmoverlock::depthwise_conv2d_branches_backward', mutates_args=())
def _branches_grad(
    grads: List[Tensor], x: Tensor, weights: List[Tensor], dilations: List[int], input_grad: bool, weight_grads: bool
) -> List[Tensor]:
    """Of what is asked for: the gradient of the map, then those of the weights."""
    x, grads = x.contiguous(), [grad.contiguous() for grad in grads]
    found = []
    if input_grad:
        dx = torch.empty_like(x)
        for n, (grad, weight, dilation) in enumerate(zip(grads, weights, dilations)):
            _launch_conv(grad, weight, None, dilation, True, dx, add=n > 0)
        found.append(dx)
    if weight_grads:
        for grad, weight, dilation in zip(grads, weights, dilations):
            found.append(_launch_weight_grad(grad, x, weight.shape[-1], dilation).to(weight.dtype))
    return found


@_branches_grad.register_fake
def _(grads, x, weights, dilations, input_grad, weight_grads):
    found = [x.new_empty(x.shape)] if input_grad else []
    return found + [w.new_empty(w.shape) for w in weights] if weight_grads else found


def _save_branches(ctx, inputs, output) -> None:
    x, weights, dilations = inputs
    ctx.save_for_backward(x, *weights)
    ctx.dilations = dilations
    # The weights of a network are frozen together; one that needs a gradient makes all of them have one.
    ctx.needed = x.requires_grad, any(w.requires_grad for w in weights)


def _branches_backward(ctx, grads: List[Optional[Tensor]]):
    x, *weights = ctx.saved_tensors
    input_grad, weight_grads = ctx.needed
    grads = [torch.zeros_like(x) if grad is None else grad for grad in grads]
    if differentiated_again():
        outs = [depthwise_conv2d_reference(x, w, None, d) for w, d in zip(weights, ctx.dilations)]
        dx, *dweights = definition_gradients(outs, (x, *weights), grads)
        return dx, dweights, None
    found = torch.ops.mmoverlock.depthwise_conv2d_branches_backward(
        [grad.contiguous() for grad in grads], x, weights, ctx.dilations, input_grad, weight_grads
    )
    dx = found.pop(0) if input_grad else None
    return dx, found if weight_grads else [None] * len(weights), None


_branches.register_autograd(_branches_backward, setup_context=_save_branches)
