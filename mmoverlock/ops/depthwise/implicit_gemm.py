"""Depthwise convolution by the CUDA extension ``depthwise_conv2d_implicit_gemm``: optional, used when asked for."""

from typing import Optional

import torch
from torch import Tensor


def _extension():
    import depthwise_conv2d_implicit_gemm as extension

    return extension


def refuse(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Optional[str]:
    """Why the extension cannot serve the call, or None."""
    try:
        _extension()
    except Exception as error:  # an extension built for another torch fails with more than ImportError
        return f"needs the package depthwise_conv2d_implicit_gemm ({type(error).__name__}: {error}); 'auto' does not"
    if x.device.type != 'cuda':
        return f'runs on CUDA tensors only, not on {x.device.type}'
    if x.dtype not in (torch.float16, torch.float32):
        return f'computes float16 and float32 only, not {x.dtype}'
    if dilation != 1:
        return f'has no dilation (asked for {dilation})'
    return None


def depthwise_conv2d_implicit_gemm(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Tensor:
    """As the reference, by the extension's autograd functions (one a float type)."""
    extension = _extension()
    half = x.dtype == torch.float16
    function = extension._DepthWiseConv2dImplicitGEMMFP16 if half else extension._DepthWiseConv2dImplicitGEMMFP32
    out = function.apply(x.contiguous(), weight.to(x.dtype).contiguous())
    return out if bias is None else out + bias.to(out.dtype).view(1, -1, 1, 1)
