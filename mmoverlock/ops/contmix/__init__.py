"""ContMix, the context-mixing dynamic convolution of OverLoCK."""

from torch import Tensor

from ..backends import Backend, dispatch, register
from .cpu import contmix_cpu
from .cpu import refuse as refuse_cpu
from .natten import contmix_natten
from .natten import refuse as refuse_natten
from .reference import contmix_reference
from .triton import contmix_triton
from .triton import refuse as refuse_triton

register(
    'contmix',
    [
        Backend('triton', contmix_triton, refuse_triton),
        Backend('cpu', contmix_cpu, refuse_cpu),
        Backend('reference', contmix_reference, lambda *args: None),
        Backend('natten', contmix_natten, refuse_natten, auto=False),
    ],
)


def contmix(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb1: Tensor,
    rpb2: Tensor,
    value: Tensor,
    backend: str = 'auto',
) -> Tensor:
    """Mixes every position's neighbourhood with a small and a large kernel made from its affinity to the context.

    The affinities ``queryᵀ key`` of a position to the L context cells are projected to s² + K² logits. With a relative
    position bias and a softmax, the first s² weigh the s x s window of the first half of the value channels, the others
    the K x K window of the second half. Windows are shifted inward at the border, never padded: each has all its
    neighbours. Paper: `OverLoCK <https://arxiv.org/abs/2502.20087>`_, section 3.3.

    Args:
        query (Tensor): (B, G, D, H, W), already scaled. G heads.
        key (Tensor): (B, G, D, L), the context cells (7 x 7 in OverLoCK: L = 49).
        weight (Tensor): (s²+K², L), one projection for all heads.
        bias (Tensor): (s²+K²,).
        rpb1 (Tensor): (G, 2s-1, 2s-1) position bias of the small window. Its shape says s, which is odd.
        rpb2 (Tensor): (G, 2K-1, 2K-1) position bias of the large window.
        value (Tensor): (B, C, H, W); C a multiple of 2 G. Any float type; the result has the same.
        backend (str): ``'auto'`` (the fastest that accepts the call), ``'triton'``, ``'cpu'``, ``'reference'``,
            ``'natten'``. The environment variable ``MMOVERLOCK_BACKEND`` overrides ``'auto'``. Defaults to ``'auto'``.

    Returns:
        Tensor: (B, C, H, W): first the channels of the small kernel, then those of the large one.

    Raises:
        ValueError: Shapes do not fit each other, or the map is smaller than a window.
        BackendError: The named backend cannot take the call.
    """
    check_arguments(query, key, weight, bias, rpb1, rpb2, value)
    return dispatch('contmix', backend, query, key, weight, bias, rpb1, rpb2, value)


def check_arguments(query, key, weight, bias, rpb1, rpb2, value) -> None:
    """Raises ValueError, naming the argument, unless the shapes of :func:`contmix`'s arguments fit each other."""

    def need(fits: bool, name: str, tensor: Tensor, expected: str) -> None:
        if not fits:
            raise ValueError(f'contmix: {name} has shape {tuple(tensor.shape)}, expected {expected}')

    need(query.dim() == 5, 'query', query, '(batch, heads, channels, H, W)')
    batch, groups, dim, height, width = query.shape
    need(
        key.dim() == 4 and key.shape[:3] == query.shape[:3],
        'key',
        key,
        f'({batch}, {groups}, {dim}, cells)',
    )
    windows = []
    for name, rpb in (('rpb1', rpb1), ('rpb2', rpb2)):
        fits = rpb.dim() == 3 and rpb.shape[0] == groups and rpb.shape[1] == rpb.shape[2] and rpb.shape[1] % 4 == 1
        need(fits, name, rpb, f'({groups}, 2k-1, 2k-1) with an odd window k')
        windows.append((rpb.shape[1] + 1) // 2)
    logits, cells = sum(k * k for k in windows), key.shape[3]
    need(weight.shape == (logits, cells), 'weight', weight, f'({logits}, {cells})')
    need(bias.shape == (logits,), 'bias', bias, f'({logits},)')
    fits = value.dim() == 4 and value.shape[0] == batch and value.shape[2:] == query.shape[3:]
    need(
        fits and value.shape[1] % (2 * groups) == 0,
        'value',
        value,
        f'({batch}, n*{2 * groups}, {height}, {width})',
    )
    if min(height, width) < max(windows):
        raise ValueError(
            f'contmix: a {height}x{width} map is smaller than the {max(windows)}x{max(windows)} window; resize it first'
        )
