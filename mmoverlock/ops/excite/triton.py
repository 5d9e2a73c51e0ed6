"""The perceptron of squeeze-and-excitation in Triton; the kernels are in ``triton_kernels``.

One launch forward, two backward: an image's gradients, and those of the parameters, which need all images. PyTorch
launches some fourteen kernels, all of them too small to take longer than a launch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ..triton_common import (
    definition_gradients,
    differentiated_again,
    gradients_wanted,
    on,
    power_of_two,
    refuse_tensors,
    vector_of,
)
from .reference import excite_reference


@dataclass(frozen=True)
class Tuning:
    """Launch parameters.

    Args:
        tile (int): Weights of a tile, ...
        values (int): ... of which a thread owns as many as this, with ...
        warps (tuple[int, int]): ... so many warps at least and at most.
        programs (int): To aim at, by sharing an image's second product out.
        block (tuple[int, int]): Channels and hidden values of a tile of the weights' gradients, ...
        images (tuple[int, int]): ... and images that it adds up at once, in small and in larger batches.
    """

    tile: int = 16384
    values: int = 32
    warps: Tuple[int, int] = (4, 16)
    programs: int = 132
    block: Tuple[int, int] = (16, 32)
    images: Tuple[int, int] = (16, 64)


TUNING = Tuning()
_NAMES = ('pooled', 'weight1', 'bias1', 'weight2', 'bias2')
_MOST = (4096, 512)  # channels, and hidden values, which a tile has all of


def refuse(*args: Tensor) -> Optional[str]:
    """Why the kernels cannot serve the call, or None."""
    reason = refuse_tensors(dict(zip(_NAMES, args)))
    if reason:
        return reason
    hidden, channels = args[1].shape[:2]
    if channels > _MOST[0] or hidden > _MOST[1]:
        return f'it takes {_MOST[0]} channels and {_MOST[1]} hidden values, not {channels} and {hidden}'
    return 'a tensor is empty' if 0 in (args[0].shape[0], channels, hidden) else None


def excite_triton(*args: Tensor) -> Tensor:
    """As the reference, with float32 for everything within it, under autocast, too."""
    keep = gradients_wanted(*args)
    return torch.ops.mmoverlock.excite(*args, keep)[0]


@lru_cache(maxsize=1024)
def plan(batch: int, channels: int, hidden: int, tuning: Tuning) -> Tuple[Tuple[int, int, int], dict, dict]:
    """Sizes C, E, SHARES of the kernels of images, their constants, and those of the weights' gradients."""
    vectors = dict(zip('VW', (vector_of(size) for size in (channels, hidden))))
    across = max(16, power_of_two(hidden))
    block = max(16, min(power_of_two(channels), tuning.tile // across))
    least, most = tuning.warps
    warps = max(least, min(most, across * block // (32 * tuning.values)))
    shares = max(1, min(-(-channels // block), tuning.programs // batch))
    images = dict(**vectors, BC=block, BE=across, num_warps=warps)
    together = tuning.images[batch > tuning.images[0]]
    weights = dict(**vectors, BC=tuning.block[0], BE=min(across, tuning.block[1]), BB=together, num_stages=1)
    return (channels // vectors['V'], hidden // vectors['W'], shares), images, weights


@torch.library.custom_op('mmoverlock::excite', mutates_args=())
def _excite(pooled: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, keep: bool) -> List[Tensor]:
    """The gates and, with ``keep``, what the backward pass needs: see ``triton_kernels``."""
    from .triton_kernels import excite_forward_kernel

    pooled, weight1, bias1, weight2, bias2 = (t.contiguous() for t in (pooled, weight1, bias1, weight2, bias2))
    hidden, channels = weight1.shape[:2]
    batch = pooled.shape[0]
    sizes, constants, _ = plan(batch, channels, hidden, TUNING)
    found = [pooled.new_empty(pooled.shape)]
    if keep:
        found.append(pooled.new_empty((batch, 2 * hidden + channels), dtype=torch.float32))
    with on(pooled.device):
        excite_forward_kernel[(batch * sizes[2],)](
            pooled, weight1, bias1, weight2, bias2, found[0], found[-1], *sizes, **constants, KEEP=keep
        )
    return found


@_excite.register_fake
def _(pooled, weight1, bias1, weight2, bias2, keep):
    gates = pooled.new_empty(pooled.shape)
    if not keep:
        return [gates]
    return [gates, pooled.new_empty((pooled.shape[0], 2 * weight1.shape[0] + pooled.shape[1]), dtype=torch.float32)]


@torch.library.custom_op('mmoverlock::excite_backward', mutates_args=())
def _gradients(
    grad: Tensor, pooled: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, kept: Tensor
) -> List[Tensor]:
    """Gradients of the five arguments, each in the type of its own."""
    from .triton_kernels import excite_grad_kernel, excite_weight_grad_kernel

    grad, pooled, weight1, weight2 = (t.contiguous() for t in (grad, pooled, weight1, weight2))
    hidden, channels = weight1.shape[:2]
    batch = pooled.shape[0]
    sizes, images, weights = plan(batch, channels, hidden, TUNING)
    found = [t.new_empty(t.shape) for t in (pooled, weight1, bias1, weight2, bias2)]
    deltas = pooled.new_empty((batch, hidden + channels), dtype=torch.float32)
    with on(pooled.device):
        excite_grad_kernel[(batch * sizes[2],)](grad, weight1, weight2, kept, deltas, found[0], *sizes, **images)
        programs = -(-channels // weights['BC']) * -(-hidden // weights['BE'])
        excite_weight_grad_kernel[(programs,)](pooled, kept, deltas, *found[1:], batch, *sizes[:2], **weights)
    return found


@_gradients.register_fake
def _(grad, pooled, weight1, bias1, weight2, bias2, kept):
    return [t.new_empty(t.shape) for t in (pooled, weight1, bias1, weight2, bias2)]


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1], *output[1:])


def _backward(ctx, grads: List[Optional[Tensor]]) -> Tuple[Optional[Tensor], ...]:
    *inputs, kept = ctx.saved_tensors
    if differentiated_again():
        out = excite_reference(*(t.to(inputs[0].dtype) for t in inputs))
        return (*definition_gradients(out, inputs, grads[0]), None)
    # Made contiguous here, where torch.compile can make it part of what computes the gradient.
    return (*torch.ops.mmoverlock.excite_backward(grads[0].contiguous(), *inputs, kept), None)


_excite.register_autograd(_backward, setup_context=_save)
