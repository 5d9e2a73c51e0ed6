"""ContMix as one fused operator in Triton; its backward recomputes the logits instead of storing them.

Two ``torch.library`` operators, ``mmoverlock::contmix`` and ``mmoverlock::contmix_backward``: ``torch.compile``, CUDA
graphs, checkpointing and export see a call of known shapes. There are two sets of kernels, launched by ``general`` and
``shared``, and imported at the first call: importing the package must not need Triton.
"""

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ..triton_common import definition_gradients, differentiated_again, gradients_wanted, on, refuse_tensors
from . import general, shared
from .reference import contmix_reference

_MAX_WINDOW = 15  # a row of a window has 16 places in the kernels, the last of them empty
_MAX_WIDTH = 64


def refuse(query, key, weight, bias, rpb1, rpb2, value) -> Optional[str]:
    """Why the fused operator cannot serve the call, or None."""
    reason = refuse_tensors(dict(query=query, key=key, weight=weight, bias=bias, rpb1=rpb1, rpb2=rpb2, value=value))
    if reason:
        return reason
    for name, rpb in (('small', rpb1), ('large', rpb2)):
        if (rpb.shape[1] + 1) // 2 > _MAX_WINDOW:
            return f'the {name} window is {(rpb.shape[1] + 1) // 2}, it takes windows up to {_MAX_WINDOW}'
    if rpb1.shape[1] > rpb2.shape[1]:
        return 'the small window is larger than the large one'
    if query.shape[2] > _MAX_WIDTH or value.shape[1] > 2 * query.shape[1] * _MAX_WIDTH:
        return f'a head is wider than {_MAX_WIDTH} channels'
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        return 'a tensor is empty'
    return None


def contmix_triton(query, key, weight, bias, rpb1, rpb2, value) -> Tensor:
    """As :func:`mmoverlock.ops.contmix.contmix_reference`, fused; see :func:`refuse` for what it takes."""
    args = (query, key, weight, bias, rpb1, rpb2, value)
    train = gradients_wanted(*args)
    return torch.ops.mmoverlock.contmix(*args, train)[0]


def _kernels(query: Tensor, rpb2: Tensor, value: Tensor):
    """The module whose kernels are for this map."""
    _, groups, dim, height, width = query.shape
    channels = max(dim, value.shape[1] // (2 * groups))
    return shared if shared.takes(height, width, (rpb2.shape[1] + 1) // 2, channels) else general


@torch.library.custom_op('mmoverlock::contmix', mutates_args=())
def _contmix(
    query: Tensor, key: Tensor, weight: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, value: Tensor, train: bool
) -> Tuple[Tensor, Tensor]:
    """The mixed values, and the log-sum-exp (B, G, 2, H, W) of every softmax, which the backward needs.

    Memory is saved with ``train`` only: it is what activations kept for the backward pass leave that is short.
    """
    batch, groups, _, height, width = query.shape
    out = torch.empty_like(value)
    lse = query.new_empty((batch, groups, 2, height, width), dtype=torch.float32)
    with torch.autocast(query.device.type, enabled=False), on(query.device):
        _kernels(query, rpb2, value).forward(query, key, weight, bias, rpb1, rpb2, value, out, lse, train)
    return out, lse


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
    out: Tensor,
    lse: Tensor,
) -> List[Tensor]:
    """Gradients of the seven inputs of ``mmoverlock::contmix``."""
    dquery, dkey, dvalue = (torch.empty_like(t) for t in (query, key, value))
    inputs = (weight, bias, rpb1, rpb2)
    with torch.autocast(query.device.type, enabled=False), on(query.device):
        kernels = _kernels(query, rpb2, value)
        sums = kernels.backward(grad, query, key, *inputs, value, out, lse, dquery, dkey, dvalue)
    return [dquery, dkey, *(total.to(t.dtype) for total, t in zip(sums, inputs)), dvalue]


@_contmix_backward.register_fake
def _(grad, query, key, weight, bias, rpb1, rpb2, value, out, lse):
    like = [torch.empty_like(t) for t in (query, key)]
    like += [t.new_empty(t.shape) for t in (weight, bias, rpb1, rpb2)]
    return [*like, torch.empty_like(value)]


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp


def _backward(ctx, grad: Tensor, _) -> Tuple[Optional[Tensor], ...]:
    *inputs, out, lse = ctx.saved_tensors
    if differentiated_again():
        return (*definition_gradients(contmix_reference(*inputs), inputs, grad), None)
    grads = torch.ops.mmoverlock.contmix_backward(grad, *inputs, out, lse)
    return (*(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), None)


_contmix.register_autograd(_backward, setup_context=_save)
