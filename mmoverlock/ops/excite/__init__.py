"""The perceptron of squeeze-and-excitation: from every channel's mean to the factor that it is multiplied with."""

from torch import Tensor

from ..backends import Backend, dispatch, register
from .reference import excite_reference
from .triton import excite_triton, refuse

register(
    'excite',
    [
        Backend('triton', excite_triton, refuse),
        Backend('reference', excite_reference, lambda *args: None),
    ],
)


def excite(
    pooled: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, backend: str = 'auto'
) -> Tensor:
    """``sigmoid(conv1x1(gelu(conv1x1(pooled))))``, the gates of squeeze-and-excitation.

    Source: `Squeeze-and-Excitation Networks <https://arxiv.org/abs/1709.01507>`_, here with a GELU.

    Args:
        pooled (Tensor): (B, C, 1, 1).
        weight1 (Tensor): (E, C, 1, 1), to the E hidden values.
        bias1 (Tensor): (E,).
        weight2 (Tensor): (C, E, 1, 1).
        bias2 (Tensor): (C,).
        backend (str): ``'auto'``, ``'triton'``, ``'reference'``. The environment variable ``MMOVERLOCK_BACKEND``
            overrides ``'auto'``. Defaults to ``'auto'``.

    Returns:
        Tensor: (B, C, 1, 1), in the type of ``pooled``.

    Raises:
        ValueError: The shapes do not fit each other.
        BackendError: The named backend cannot take the call.
    """
    hidden, channels = weight1.shape[:2]
    expected = dict(
        pooled=(pooled, (pooled.shape[0], channels, 1, 1)),
        weight1=(weight1, (hidden, channels, 1, 1)),
        bias1=(bias1, (hidden,)),
        weight2=(weight2, (channels, hidden, 1, 1)),
        bias2=(bias2, (channels,)),
    )
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f'excite: {name} has shape {tuple(tensor.shape)}, expected {shape}')
    return dispatch('excite', backend, pooled, weight1, bias1, weight2, bias2)
