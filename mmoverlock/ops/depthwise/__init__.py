"""Depthwise convolution with large (5 … 19) or dilated small kernels, stride 1, size kept."""

from typing import Optional

from torch import Tensor

from ..backends import Backend, dispatch, register
from .implicit_gemm import depthwise_conv2d_implicit_gemm
from .implicit_gemm import refuse as refuse_implicit_gemm
from .reference import depthwise_conv2d_reference
from .triton import depthwise_conv2d_triton
from .triton import refuse as refuse_triton

register(
    'depthwise_conv2d',
    [
        Backend('triton', depthwise_conv2d_triton, refuse_triton),
        Backend('reference', depthwise_conv2d_reference, lambda *args: None),
        Backend('implicit_gemm', depthwise_conv2d_implicit_gemm, refuse_implicit_gemm, auto=False),
    ],
)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    dilation: int = 1,
    backend: str = 'auto',
) -> Tensor:
    """Convolves every channel with a kernel of its own; stride 1, zero-padded so that the size is kept.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (C, 1, k, k), k odd. It and ``bias`` are rounded to the type of ``x``, or of autocast.
        bias (Tensor, optional): (C,). Defaults to None.
        dilation (int): Distance of the kernel's taps in pixels. Defaults to 1.
        backend (str): ``'auto'``, ``'triton'``, ``'reference'``, ``'implicit_gemm'``. The environment variable
            ``MMOVERLOCK_BACKEND`` overrides ``'auto'``. Defaults to ``'auto'``.

    Returns:
        Tensor: (B, C, H, W). ``'triton'`` gives it contiguous, whatever the memory format of ``x``.

    Raises:
        ValueError: The weight does not fit the channels, or its size is even.
        BackendError: The named backend cannot take the call.
    """
    channels, size = x.shape[1], weight.shape[-1]
    if weight.dim() != 4 or weight.shape != (channels, 1, size, size) or size % 2 == 0:
        raise ValueError(
            f'depthwise_conv2d: weight has shape {tuple(weight.shape)}, expected ({channels}, 1, k, k) with odd k'
        )
    return dispatch('depthwise_conv2d', backend, x, weight, bias, dilation)
