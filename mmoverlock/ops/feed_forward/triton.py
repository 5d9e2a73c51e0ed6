"""The feed-forward half of a block in Triton; the kernels are in ``triton_kernels`` and ``depthwise.small_kernels``.

Forward: product and GELU; 3x3 and sums of squares; scale, shift and product. The hidden map, the largest of the
network, is written and read twice. For the backward pass two of it are kept, what GELU and what the response
normalisation were given; everything else is computed again.
"""

from dataclasses import dataclass
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ..depthwise.small import add_up_taps, launch_backward, launch_forward
from ..sums import add_up
from ..triton_common import (
    HALF,
    Lanes,
    compute_input,
    definition_gradients,
    differentiated_again,
    gradients_wanted,
    on,
    power_of_two,
    refuse_tensors,
)
from .reference import add_shortcut, feed_forward_reference


@dataclass(frozen=True)
class Tuning:
    """Launch parameters of the products: rows, columns and depth of a tile, warps, loads in flight, registers at most.

    Measured on an H200 with tools/analysis/benchmark_feed_forward.py.

    Args:
        expand, project, project_grad (tuple): Of the three kernels.
        small_expand, small_project (tuple): Of the first two where large tiles would leave most of a GPU empty, ...
        programs (int): ... with fewer programs than this.
        splits (int): Programs at most that share the depth of a tile of the second product, ...
        split_programs (int): ... while all together are not more than this, ...
        split_depth (int): ... and each has so much of the depth.
        shares (int): Shares of an image's sums from which on they are summed by many programs.
    """

    expand: Tuple[int, ...] = (128, 128, 64, 8, 3, 128)
    project: Tuple[int, ...] = (128, 128, 64, 4, 3, 255)
    project_grad: Tuple[int, ...] = (128, 64, 64, 4, 3, 255)
    small_expand: Tuple[int, ...] = (64, 32, 64, 4, 4, 255)
    small_project: Tuple[int, ...] = (16, 64, 64, 4, 4, 255)
    programs: int = 66
    splits: int = 4
    split_programs: int = 132
    split_depth: int = 256
    shares: int = 64


TUNING = Tuning()
_NAMES = ('x', 'weight1', 'bias1', 'dw_weight', 'dw_bias', 'gamma', 'beta', 'weight2', 'bias2')
_MORE = ('shortcut', 'scale', 'shift')
_MOST = 16384  # hidden channels, which the normalisation takes at once


def refuse(x: Tensor, *args) -> Optional[str]:
    """Why the kernels cannot serve the call, or None."""
    *parameters, _, _, shortcut, scale, shift = args
    more = {name: t for name, t in zip(_MORE, (shortcut, scale, shift)) if t is not None}
    reason = refuse_tensors(dict(zip(_NAMES, (x, *parameters)), **more))
    if reason:
        return reason
    channels, (hidden, out) = x.shape[1], (args[0].shape[0], args[6].shape[0])
    if channels % 8 or hidden % 8 or out % 8:
        return f'channels must be multiples of 8, they are {channels}, {hidden} and {out}'
    if hidden > _MOST:
        return f'it takes {_MOST} hidden channels, not {hidden}'
    return 'a tensor is empty' if 0 in x.shape else None


def feed_forward_triton(x: Tensor, *args) -> Tensor:
    """As the reference, but the result is channels-last whatever the memory format of ``x``.

    Computes in the type of ``x``, or in that of autocast, with sums in float32.
    """
    *parameters, eps, residual, shortcut, scale, shift = args
    x = compute_input(x, torch.channels_last)
    keep = gradients_wanted(x, *parameters, shortcut, scale, shift)
    if shortcut is not None and not keep and shortcut.dtype == x.dtype:
        return torch.ops.mmoverlock.feed_forward_shortcut(x, *parameters, eps, residual, shortcut, scale, shift)
    out = torch.ops.mmoverlock.feed_forward(x, *parameters, eps, residual, keep)[0]
    return add_shortcut(out, shortcut, scale, shift)


def _tiles(tuning: Tuple[int, ...], rows: int, columns: int, dtype: torch.dtype) -> dict:
    """Tile of a product and how to run it; float32 as three tf32 products, to fp32 accuracy."""
    half, (most_rows, most_columns, depth, warps, stages, registers) = dtype in HALF, tuning
    options = dict(maxnreg=registers) if half and registers < 255 else {}
    return dict(
        V=8,
        BM=min(most_rows, max(16, power_of_two(rows))),
        BN=min(most_columns, max(16, power_of_two(columns))),
        BK=depth if half else depth // 2,
        PRECISION='ieee' if half else 'tf32x3',
        num_warps=warps,
        num_stages=stages,
        **options,
    )


def _tuning(large: Tuple[int, ...], small: Tuple[int, ...], images: int, rows: int, columns: int) -> Tuple[int, ...]:
    """Which of two tiles, for products of ``rows`` by ``columns`` apart for so many images."""
    programs = images * -(-rows // large[0]) * -(-columns // large[1])
    return small if programs < TUNING.programs else large


def _splits(programs: int, depth: int) -> int:
    """By how many programs the depth of a tile is shared, a power of two, where so many would not fill a GPU."""
    splits = 1
    while (
        2 * splits <= TUNING.splits
        and 2 * splits * programs <= TUNING.split_programs
        and depth >= 2 * splits * TUNING.split_depth
    ):
        splits *= 2
    return splits


def _channels_last(x: Tensor, channels: int) -> Tensor:
    batch, _, height, width = x.shape
    return x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


def _fewer_shares(shares: Tensor) -> Tensor:
    """Shares [B, PARTS, E] of sums; if they are many, their sums [B, 1, E].

    They are read by kernels with one program an image, which are slow at it where a few large images leave a GPU empty.
    """
    return shares if shares.shape[1] < TUNING.shares else add_up(shares).unsqueeze(1)


def _cast(dtype: torch.dtype, weight1: Tensor, weight2: Tensor) -> Tuple[Tensor, Tensor]:
    """Both weights in this type, contiguous; copies are made in one launch."""
    from .triton_kernels import cast_kernel

    weights = weight1.contiguous(), weight2.contiguous()
    if weight1.dtype == weight2.dtype == dtype:
        return weights
    copies = tuple(torch.empty_like(w, dtype=dtype) for w in weights)
    one, two = (w.numel() for w in weights)
    with on(weight1.device):
        cast_kernel[(-(-one // 1024) + -(-two // 1024),)](*weights, *copies, one // 8, two // 8, V=8, BLOCK=1024)
    return copies


@torch.library.custom_op('mmoverlock::feed_forward', mutates_args=())
def _feed_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor, dw_weight: Tensor, dw_bias: Tensor, gamma: Tensor, beta: Tensor,
    weight2: Tensor, bias2: Tensor, eps: float, residual: bool, keep: bool,
) -> List[Tensor]:  # fmt: skip
    """The output and, with ``keep``, what GELU was given, the map before the normalisation, its scale and norm."""
    return _launch(x, weight1, bias1, dw_weight, dw_bias, gamma, beta, weight2, bias2, eps, residual, keep)


@torch.library.custom_op('mmoverlock::feed_forward_shortcut', mutates_args=())
def _with_shortcut(
    x: Tensor, weight1: Tensor, bias1: Tensor, dw_weight: Tensor, dw_bias: Tensor, gamma: Tensor, beta: Tensor,
    weight2: Tensor, bias2: Tensor, eps: float, residual: bool, shortcut: Tensor, scale: Optional[Tensor],
    shift: Optional[Tensor],
) -> Tensor:  # fmt: skip
    """The output and a shortcut of its own type, scaled and shifted where asked for; without gradients."""
    shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    if scale is not None:
        scale, shift = scale.contiguous(), shift.contiguous()
    return _launch(
        x, weight1, bias1, dw_weight, dw_bias, gamma, beta, weight2, bias2, eps, residual, False, shortcut, scale, shift
    )[0]


@_with_shortcut.register_fake
def _(x, weight1, bias1, dw_weight, dw_bias, gamma, beta, weight2, bias2, eps, residual, shortcut, scale, shift):
    return _channels_last(x, weight2.shape[0])


def _launch(
    x: Tensor, weight1: Tensor, bias1: Tensor, dw_weight: Tensor, dw_bias: Tensor, gamma: Tensor, beta: Tensor,
    weight2: Tensor, bias2: Tensor, eps: float, residual: bool, keep: bool, shortcut: Optional[Tensor] = None,
    gain: Optional[Tensor] = None, offset: Optional[Tensor] = None,
) -> List[Tensor]:  # fmt: skip
    """The forward pass of both operators."""
    from .triton_kernels import ffn_expand_kernel, ffn_project_kernel, grn_scale_kernel

    x = x.contiguous(memory_format=torch.channels_last)
    weight1, weight2 = _cast(x.dtype, weight1, weight2)
    (batch, channels, height, width), hidden, channels_out = x.shape, weight1.shape[0], weight2.shape[0]
    pixels = height * width
    active = _channels_last(x, hidden)
    given = torch.empty_like(active) if keep else active
    with on(x.device):
        tuning = _tuning(TUNING.expand, TUNING.small_expand, 1, batch * pixels, hidden)
        tiles = _tiles(tuning, batch * pixels, hidden, x.dtype)
        ffn_expand_kernel[(-(-batch * pixels // tiles['BM']) * -(-hidden // tiles['BN']),)](
            x, weight1, bias1, given, active, batch * pixels, channels // 8, hidden // 8, **tiles, KEEP=keep
        )
        y, squares = launch_forward(active, dw_weight, dw_bias, residual, True)
        squares = _fewer_shares(squares)
        scale, norm = (x.new_empty((batch, hidden), dtype=torch.float32) for _ in range(2))
        rounded = x.new_empty((batch, hidden))
        parts, across = squares.shape[1], power_of_two(hidden)
        out = _channels_last(x, channels_out)
        tuning = _tuning(TUNING.project, TUNING.small_project, batch, pixels, channels_out)
        tiles = _tiles(tuning, pixels, channels_out, x.dtype)
        per_image = -(-pixels // tiles['BM']) * -(-channels_out // tiles['BN'])
        splits = _splits(batch * per_image, hidden) if per_image <= across else 1
        partial, arrived = squares, rounded
        if splits > 1:
            partial = x.new_empty((batch * per_image, splits, tiles['BM'], tiles['BN']), dtype=torch.float32)
            arrived = x.new_empty((batch, per_image), dtype=torch.int32)
        grn_scale_kernel[(batch,)](
            squares, gamma, scale, rounded, norm, arrived, parts, hidden // 8, eps, per_image if splits > 1 else 0,
            V=8, BP=min(32, power_of_two(parts), max(1, 8192 // across)), BE=across,
        )  # fmt: skip
        ffn_project_kernel[(batch * per_image * splits,)](
            y, rounded, beta.to(x.dtype), weight2, bias2, *(y if t is None else t for t in (shortcut, gain, offset)),
            out, partial, arrived, pixels, hidden // 8, channels_out // 8, **tiles,
            WHOLE=hidden % tiles['BK'] == 0, SPLITS=splits, SHORTCUT=shortcut is not None, GAIN=gain is not None,
        )  # fmt: skip
    return [out, given, y, scale, norm] if keep else [out]


@_feed_forward.register_fake
def _(x, weight1, bias1, dw_weight, dw_bias, gamma, beta, weight2, bias2, eps, residual, keep):
    hidden = weight1.shape[0]
    out = _channels_last(x, weight2.shape[0])
    if not keep:
        return [out]
    maps = [_channels_last(x, hidden) for _ in range(2)]
    return [out, *maps, *(x.new_empty((x.shape[0], hidden), dtype=torch.float32) for _ in range(2))]


def _product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """aᵀ b, summed and returned in float32 and then in the type and shape of ``like``."""
    if a.device.type == 'cuda' and a.dtype in HALF:
        out = torch.mm(a.t(), b, out_dtype=torch.float32)
    else:
        out = torch.mm(a.t().float(), b.float())
    return out.to(like.dtype).view(like.shape)


@torch.library.custom_op('mmoverlock::feed_forward_backward', mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor, dw_weight: Tensor, dw_bias: Tensor, gamma: Tensor,
    beta: Tensor, weight2: Tensor, bias2: Tensor, given: Tensor, y: Tensor, scale: Tensor, norm: Tensor, eps: float,
    residual: bool, input_grad: bool,
) -> List[Tensor]:  # fmt: skip
    """Gradients of both products' weights; of the 3x3's weight, its bias and the first bias, one after another; so of
    gamma, beta and the second bias; and at last that of x if it is wanted. But for the first two they are float32."""
    from .triton_kernels import ffn_project_grad_kernel, grn_grad_kernel

    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    (batch, channels, height, width), hidden, channels_out = x.shape, weight1.shape[0], weight2.shape[0]
    pixels = height * width
    half1, half2 = _cast(x.dtype, weight1, weight2)

    def rows(t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).reshape(batch * pixels, -1)

    with on(x.device):
        tiles = _tiles(TUNING.project_grad, pixels, hidden, x.dtype)
        per_image = -(-pixels // tiles['BM'])
        z, dz = torch.empty_like(y), torch.empty_like(y)
        sums = x.new_empty((batch, per_image, 2 * hidden + channels_out), dtype=torch.float32)
        ffn_project_grad_kernel[(batch * per_image * -(-hidden // tiles['BN']),)](
            grad, half2, y, scale, beta, z, dz, sums, pixels, hidden // 8, channels_out // 8, **tiles,
        )  # fmt: skip
        slope = x.new_empty((batch, hidden), dtype=torch.float32)
        with Lanes(x.device, 1) as lanes:  # weights' gradients, for which nothing waits, beside the rest
            with lanes.lane(0):
                dweight2 = _product(rows(grad), rows(z), weight2)
            lanes.keep(z)
            del z
            sums = _fewer_shares(sums)
            grads = x.new_empty((batch, sums.shape[2]), dtype=torch.float32)
            grn_grad_kernel[(batch,)](
                sums, gamma, norm, slope, grads, sums.shape[1], hidden // 8, channels_out // 8, eps,
                V=8, BE=power_of_two(hidden), BR=power_of_two(hidden + channels_out),
            )  # fmt: skip
            dgiven, taps = launch_backward(dz, given, dw_weight, residual, (y, scale, slope), True)
            del dz
            lanes.hold(0)
            with lanes.lane(0):
                dweight1 = _product(rows(dgiven), rows(x), weight1)
                found = [dweight1, dweight2, add_up_taps(taps), add_up(grads[None])[0]]
            lanes.keep(taps, grads)
            if input_grad:
                dx = torch.mm(rows(dgiven), half1.view(hidden, channels))
                found.append(dx.view(batch, height, width, channels).permute(0, 3, 1, 2))
    return found


@_gradients.register_fake
def _(grad, x, weight1, bias1, dw_weight, dw_bias, gamma, beta, weight2, bias2, given, y, scale, norm, eps, residual,
      input_grad):  # fmt: skip
    shapes = ((11 * weight1.shape[0],), (2 * weight1.shape[0] + weight2.shape[0],))
    found = [w.new_empty(w.shape) for w in (weight1, weight2)]
    found += [x.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return [*found, _channels_last(x, x.shape[1])] if input_grad else found


def _save(ctx, inputs, output) -> None:
    *tensors, eps, residual, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.eps, ctx.residual = eps, residual


def _backward(ctx, grads: List[Optional[Tensor]]) -> Tuple[Optional[Tensor], ...]:
    *inputs, given, y, scale, norm = ctx.saved_tensors
    nothing = (None, None, None)
    if differentiated_again():
        out = feed_forward_reference(*(t.to(inputs[0].dtype) for t in inputs), ctx.eps, ctx.residual)
        return (*definition_gradients(out, inputs, grads[0]), *nothing)
    # The layout is chosen here, where torch.compile can make it part of what computes the gradient.
    grad = grads[0].contiguous(memory_format=torch.channels_last)
    input_grad = ctx.needs_input_grad[0]
    dweight1, dweight2, taps, row, *dx = torch.ops.mmoverlock.feed_forward_backward(
        grad, *inputs, given, y, scale, norm, ctx.eps, ctx.residual, input_grad
    )
    hidden, out = inputs[1].shape[0], inputs[7].shape[0]
    dw_weight, dw_bias, bias1 = taps.split((9 * hidden, hidden, hidden))
    small = (bias1, dw_weight, dw_bias, *row.split((hidden, hidden, out)))
    places = (2, 3, 4, 5, 6, 8)  # of biases, 3x3, gamma and beta among the inputs
    small = {n: g.to(inputs[n].dtype).reshape(inputs[n].shape) for n, g in zip(places, small)}
    return (dx[0] if dx else None, dweight1, *(small[n] for n in (2, 3, 4, 5, 6)), dweight2, small[8], *nothing)


_feed_forward.register_autograd(_backward, setup_context=_save)
