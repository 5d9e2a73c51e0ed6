"""Scale and shift of every channel, with gradients that half precision does not spoil."""

from typing import Optional

import torch
from torch import Tensor


class _Affine(torch.autograd.Function):
    """``x * weight + bias`` in half precision, with the gradients of weight and bias summed in float32.

    Autograd multiplies ``grad * x`` and keeps its sum over the map in half precision: under a loss scale that overflows
    long before the result, in float32, would.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return _affine(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = grad * weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = _sum_to(grad.to(torch.float32) * x, weight.shape).to(weight.dtype)
        if ctx.bias is not None and ctx.needs_input_grad[2]:
            grad_bias = _sum_to(grad, ctx.bias[0]).to(ctx.bias[1])
        return grad_x, grad_weight, grad_bias


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum in float32 over the dimensions that ``shape`` has in size 1."""
    return x.sum([i for i, size in enumerate(shape) if size == 1], keepdim=True, dtype=torch.float32)


def affine(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """``x * weight + bias`` for every channel, in the type of ``x``; nothing overflows that does not have to.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (1 or B, C, 1, 1). Float32 beside an ``x`` of half precision gets a gradient of float32.
        bias (Tensor, optional): As ``weight``. Defaults to None.

    Returns:
        Tensor: (B, C, H, W).
    """
    if x.dtype in (torch.float16, torch.bfloat16) and torch.is_grad_enabled():
        return _Affine.apply(x, weight, bias)
    return _affine(x, weight, bias)


def _affine(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    weight = weight.to(x.dtype)
    return x * weight if bias is None else torch.addcmul(bias.to(x.dtype), x, weight)
