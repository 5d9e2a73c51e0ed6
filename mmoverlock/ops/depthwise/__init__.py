"""Depthwise convolution with large (5 … 19), dilated small, or plain 3x3 kernels, stride 1, size kept."""

from typing import Callable, List, Optional, Sequence, Tuple

from torch import Tensor

from ..backends import Backend, dispatch, register
from .cpu import depthwise_conv2d_cpu
from .cpu import refuse as refuse_cpu
from .implicit_gemm import depthwise_conv2d_implicit_gemm
from .implicit_gemm import refuse as refuse_implicit_gemm
from .norm import norm_branches_reference, norm_branches_triton
from .norm import refuse as refuse_norm_branches
from .reference import conv3x3_reference, depthwise_conv2d_reference
from .small import conv3x3_triton
from .small import refuse as refuse_small
from .triton import depthwise_conv2d_branches_triton, depthwise_conv2d_triton, refuse_branches
from .triton import refuse as refuse_triton


def _one_by_one(run: Callable) -> Callable:
    """A backend of single convolutions as one of :func:`depthwise_conv2d_branches`."""

    def run_branches(x, weights, dilations):
        return [run(x, weight, None, dilation) for weight, dilation in zip(weights, dilations)]

    return run_branches


def _refuse_one_by_one(refuse: Callable) -> Callable:
    """Why such a backend cannot serve the branches: the first reason for one of them."""

    def refuse_any(x, weights, dilations) -> Optional[str]:
        return next(filter(None, (refuse(x, w, None, d) for w, d in zip(weights, dilations))), None)

    return refuse_any


register(
    'depthwise_conv2d',
    [
        Backend('triton', depthwise_conv2d_triton, refuse_triton),
        Backend('cpu', depthwise_conv2d_cpu, refuse_cpu),
        Backend('reference', depthwise_conv2d_reference, lambda *args: None),
        Backend('implicit_gemm', depthwise_conv2d_implicit_gemm, refuse_implicit_gemm, auto=False),
    ],
)
register(
    'depthwise_conv2d_branches',
    [
        Backend('triton', depthwise_conv2d_branches_triton, refuse_branches),
        Backend('cpu', _one_by_one(depthwise_conv2d_cpu), _refuse_one_by_one(refuse_cpu)),
        Backend('reference', _one_by_one(depthwise_conv2d_reference), lambda *args: None),
        Backend(
            'implicit_gemm',
            _one_by_one(depthwise_conv2d_implicit_gemm),
            _refuse_one_by_one(refuse_implicit_gemm),
            auto=False,
        ),
    ],
)
register(
    'depthwise_conv2d_norm_branches',
    [
        Backend('triton', norm_branches_triton, refuse_norm_branches),
        Backend('reference', norm_branches_reference, lambda *args: None),
    ],
)
register(
    'depthwise_conv3x3',
    [
        Backend('triton', conv3x3_triton, refuse_small),
        Backend('reference', conv3x3_reference, lambda *args: None),
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
        backend (str): ``'auto'``, ``'triton'``, ``'cpu'``, ``'reference'``, ``'implicit_gemm'``. The environment
            variable ``MMOVERLOCK_BACKEND`` overrides ``'auto'``. Defaults to ``'auto'``.

    Returns:
        Tensor: (B, C, H, W). ``'triton'`` gives it contiguous, whatever the memory format of ``x``.

    Raises:
        ValueError: The weight does not fit the channels, or its size is even.
        BackendError: The named backend cannot take the call.
    """
    _check(x, weight)
    return dispatch('depthwise_conv2d', backend, x, weight, bias, dilation)


def depthwise_conv2d_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    backend: str = 'auto',
) -> List[Tensor]:
    """Several convolutions of one map, as :func:`depthwise_conv2d` without bias.

    What a re-parameterised large kernel does while it trains, in one call.

    Args:
        x (Tensor): (B, C, H, W).
        weights (Sequence[Tensor]): (C, 1, k, k) each, k odd.
        dilations (Sequence[int]): One for each of them.
        backend (str): As of :func:`depthwise_conv2d`; it takes all branches or refuses. Defaults to ``'auto'``.

    Returns:
        list[Tensor]: (B, C, H, W) each.

    Raises:
        ValueError: A weight does not fit the channels, or its size is even; or there are not as many dilations.
        BackendError: The named backend cannot take the call.
    """
    if len(weights) != len(dilations):
        raise ValueError(f'depthwise_conv2d_branches: {len(weights)} weights, but {len(dilations)} dilations')
    for weight in weights:
        _check(x, weight)
    return dispatch('depthwise_conv2d_branches', backend, x, weights, dilations)


def depthwise_conv2d_norm_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    backend: str = 'auto',
) -> Tuple[Tensor, Tensor, Tensor]:
    """Several convolutions of one map, a batch norm after each, and their sum.

    The norms are by the statistics of the batch, as in training. Source: `UniRepLKNet
    <https://arxiv.org/abs/2311.15599>`_, the dilated re-parameterised block.

    Args:
        x (Tensor): (B, C, H, W).
        weights (Sequence[Tensor]): (C, 1, k, k) each, k odd.
        dilations (Sequence[int]): One for each of them, and so are the following.
        gammas, betas (Sequence[Tensor]): (C,) each, of the batch norms.
        eps (Sequence[float]): Of the batch norms.
        backend (str): ``'auto'``, ``'triton'``, ``'reference'``. The environment variable ``MMOVERLOCK_BACKEND``
            overrides ``'auto'``. Defaults to ``'auto'``.

    Returns:
        tuple[Tensor, Tensor, Tensor]: The sum, (B, C, H, W), from ``'triton'`` in channels-last format; means and
        (biased) variances of the branches, (n, C) each, in float32 at least, without gradients.

    Raises:
        ValueError: A weight does not fit the channels, or its size is even; or the numbers of branches differ.
        BackendError: The named backend cannot take the call.
    """
    if len({len(weights), len(dilations), len(gammas), len(betas), len(eps)}) != 1:
        raise ValueError(
            f'depthwise_conv2d_norm_branches: {len(weights)} weights, {len(dilations)} dilations, '
            f'{len(gammas)} gammas, {len(betas)} betas, {len(eps)} eps; they must be as many'
        )
    for weight in weights:
        _check(x, weight)
    out, mean, var = dispatch('depthwise_conv2d_norm_branches', backend, *(x, weights, dilations, gammas, betas, eps))
    return out, mean.detach(), var.detach()


def depthwise_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    residual: bool = False,
    gelu: bool = False,
    backend: str = 'auto',
) -> Tensor:
    """Depthwise 3x3 convolution, stride 1, zero-padded so that the size is kept; ``x + conv(x)`` with ``residual``.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (C, 1, 3, 3).
        bias (Tensor, optional): (C,). Defaults to None.
        residual (bool): Add ``x``. Defaults to False.
        gelu (bool): Apply GELU to the result. Defaults to False.
        backend (str): ``'auto'``, ``'triton'``, ``'reference'``. The environment variable ``MMOVERLOCK_BACKEND``
            overrides ``'auto'``. Defaults to ``'auto'``.

    Returns:
        Tensor: (B, C, H, W); from ``'triton'`` in channels-last format.

    Raises:
        ValueError: The weight does not fit the channels, or is not 3x3.
        BackendError: The named backend cannot take the call.
    """
    _check(x, weight)
    if weight.shape[-1] != 3:
        raise ValueError(f'depthwise_conv3x3: weight has shape {tuple(weight.shape)}, expected (C, 1, 3, 3)')
    return dispatch('depthwise_conv3x3', backend, x, weight, bias, residual, gelu)


def _check(x: Tensor, weight: Tensor) -> None:
    channels, size = x.shape[1], weight.shape[-1]
    if weight.dim() != 4 or weight.shape != (channels, 1, size, size) or size % 2 == 0:
        raise ValueError(
            f'depthwise_conv2d: weight has shape {tuple(weight.shape)}, expected ({channels}, 1, k, k) with odd k'
        )
