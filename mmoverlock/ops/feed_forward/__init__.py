"""The feed-forward half of a block: 1x1, GELU, residual depthwise 3x3, global response normalisation, 1x1."""

from typing import Optional

from torch import Tensor

from ..backends import Backend, dispatch, register
from .reference import feed_forward_reference
from .triton import feed_forward_triton, refuse

register(
    'feed_forward',
    [
        Backend('triton', feed_forward_triton, refuse),
        Backend('reference', feed_forward_reference, lambda *args: None),
    ],
)


def feed_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float = 1e-6,
    residual: bool = True,
    shortcut: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    shift: Optional[Tensor] = None,
    backend: str = 'auto',
) -> Tensor:
    """``conv1x1(grn(h + dwconv3x3(h)))`` of ``h = gelu(conv1x1(x))``; the feed-forward half of OverLoCK's blocks.

    Source: paper section 3.2; GRN of `ConvNeXt V2 <https://arxiv.org/abs/2301.00808>`_.

    Args:
        x (Tensor): (B, C, H, W).
        weight1 (Tensor): (E, C, 1, 1), to the E hidden channels.
        bias1 (Tensor): (E,).
        dw_weight (Tensor): (E, 1, 3, 3).
        dw_bias (Tensor): (E,).
        gamma, beta (Tensor): (1, E, 1, 1), of the response normalisation.
        weight2 (Tensor): (F, E, 1, 1).
        bias2 (Tensor): (F,).
        eps (float): Of the response normalisation. Defaults to 1e-6.
        residual (bool): False where ``h +`` has been merged into ``dw_weight``. Defaults to True.
        shortcut (Tensor, optional): (B, F, H, W), added to the result. Defaults to None.
        scale, shift (Tensor, optional): (F,), what every channel of ``shortcut`` is multiplied with before, and what is
            added to it; both or neither. Defaults to None.
        backend (str): ``'auto'``, ``'triton'``, ``'reference'``. The environment variable ``MMOVERLOCK_BACKEND``
            overrides ``'auto'``. Defaults to ``'auto'``.

    Returns:
        Tensor: (B, F, H, W); from ``'triton'`` in channels-last format.

    Raises:
        ValueError: The shapes do not fit each other.
        BackendError: The named backend cannot take the call.
    """
    hidden, channels = weight1.shape[:2]
    expected = dict(
        x=(x, (x.shape[0], channels, *x.shape[2:])),
        weight1=(weight1, (hidden, channels, 1, 1)),
        bias1=(bias1, (hidden,)),
        dw_weight=(dw_weight, (hidden, 1, 3, 3)),
        dw_bias=(dw_bias, (hidden,)),
        gamma=(gamma, (1, hidden, 1, 1)),
        beta=(beta, (1, hidden, 1, 1)),
        weight2=(weight2, (weight2.shape[0], hidden, 1, 1)),
        bias2=(bias2, (weight2.shape[0],)),
    )
    if (scale is None) != (shift is None) or (shortcut is None and scale is not None):
        raise ValueError('feed_forward: scale and shift are of a shortcut; give all three, or the shortcut alone')
    if shortcut is not None:
        expected['shortcut'] = (shortcut, (x.shape[0], weight2.shape[0], *x.shape[2:]))
    if scale is not None:
        expected.update(scale=(scale, (weight2.shape[0],)), shift=(shift, (weight2.shape[0],)))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f'feed_forward: {name} has shape {tuple(tensor.shape)}, expected {shape}')
    return dispatch(
        'feed_forward',
        backend,
        *(x, weight1, bias1, dw_weight, dw_bias, gamma, beta, weight2, bias2, eps, residual, shortcut, scale, shift),
    )
