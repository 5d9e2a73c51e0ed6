"""The kernels that ContMix makes for a place in a picture."""

from dataclasses import dataclass
from typing import Dict, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ..models import OverLoCK
from ..models.blocks import ContMixBlock, FocusBlock
from ..ops.contmix.reference import affinity_logits, window_softmax, window_starts
from .inputs import check_image, inspecting, like_weights, to_picture

WINDOWS = ('small', 'large')


@dataclass(frozen=True)
class ContMixKernels:
    """Both dynamic kernels of every head at one place, as :func:`contmix_kernels` finds them.

    Attributes:
        small (np.ndarray): (G, s, s) float32, each head's weights of the small window; each sums to 1.
        large (np.ndarray): (G, K, K) float32, the same of the large window.
        block (str): Name of the block.
        cell (tuple[int, int]): Row and column of the place on the map that ContMix works on.
        map_size (tuple[int, int]): Height and width of that map. It covers the whole picture.
        image_size (tuple[int, int]): Height and width of the picture.
    """

    small: np.ndarray
    large: np.ndarray
    block: str
    cell: Tuple[int, int]
    map_size: Tuple[int, int]
    image_size: Tuple[int, int]

    @property
    def heads(self) -> int:
        """int: G."""
        return len(self.small)

    def start(self, window: str) -> Tuple[int, int]:
        """First row and column of a window on the map: centred on the cell, shifted inward at the border.

        Args:
            window (str): ``'small'`` or ``'large'``.
        """
        size = self._weights(window).shape[-1]
        cpu = torch.device('cpu')
        return tuple(int(window_starts(n, size, cpu)[i]) for n, i in zip(self.map_size, self.cell))

    def box(self, window: str) -> Tuple[float, float, float, float]:
        """Where a window lies in the picture: x1, y1, x2, y2 in pixels.

        Args:
            window (str): ``'small'`` or ``'large'``.
        """
        size = self._weights(window).shape[-1]
        (top, left), (rows, cols) = self.start(window), self.map_size
        y, x = self.image_size[0] / rows, self.image_size[1] / cols
        return left * x, top * y, (left + size) * x, (top + size) * y

    def heatmap(self, window: str = 'both', head: Optional[int] = None) -> np.ndarray:
        """The weights over the picture.

        Args:
            window (str): ``'small'``, ``'large'``, or ``'both'`` for their mean: each kernel mixes half of the
                channels, so that is the weight of a place in all of them. Defaults to ``'both'``.
            head (int, optional): One head; None for the mean of all. Defaults to None.

        Returns:
            np.ndarray: (H, W) float32; the greatest weight is 1, and 0 is outside the window.

        Raises:
            ValueError: There is no such window or head.
        """
        values = torch.zeros(self.map_size)
        for name in WINDOWS if window == 'both' else (window,):
            weights = self._weights(name)
            if head is not None and not 0 <= head < self.heads:
                raise ValueError(f'{self.block} has heads 0 to {self.heads - 1}, not {head}')
            kernel = torch.from_numpy(weights.mean(0) if head is None else weights[head])
            (top, left), size = self.start(name), kernel.shape[-1]
            values[top : top + size, left : left + size] += kernel
        return to_picture(values / values.max(), self.image_size, mode='nearest-exact')

    def _weights(self, window: str) -> np.ndarray:
        if window not in WINDOWS:
            raise ValueError(f"the windows are 'small' and 'large', not {window!r}")
        return getattr(self, window)


def contmix_blocks(model: nn.Module) -> Dict[str, nn.Module]:
    """The blocks of a model that use ContMix, in the order of the forward pass.

    Args:
        model (nn.Module): With an OverLoCK or :class:`mmoverlock.ContMixBlock` inside.

    Returns:
        dict[str, nn.Module]: By name; in an OverLoCK ``focus3.0``, ``focus3.1`` ... ``focus4.0`` ...

    Raises:
        ValueError: There is none.
    """
    root = _root(model)
    blocks = {name: m for name, m in root.named_modules() if isinstance(m, (FocusBlock, ContMixBlock))}
    if not blocks:
        raise ValueError(f'{type(model).__name__} has no block with ContMix')
    return blocks


def block_name(model: nn.Module, block: Union[int, str]) -> str:
    """The name of a block given by number or name.

    Raises:
        ValueError: There is no such block.
    """
    blocks = contmix_blocks(model)
    if isinstance(block, int) and not -len(blocks) <= block < len(blocks):
        raise ValueError(f'there are {len(blocks)} blocks with ContMix, no number {block}')
    name = list(blocks)[block] if isinstance(block, int) else block
    if name not in blocks:
        raise ValueError(f'no block {name!r} with ContMix; there are {", ".join(blocks)}')
    return name


def _root(model: nn.Module) -> nn.Module:
    """What to run: the one backbone, or for ContMix blocks in another network the model itself."""
    found = [m for m in model.modules() if isinstance(m, OverLoCK)]
    return found[0] if len(found) == 1 else model


@torch.no_grad()
def contmix_kernels(
    model: nn.Module, image: Tensor, position: Tuple[float, float], block: Union[int, str] = -1
) -> ContMixKernels:
    """The kernels that ContMix makes for a place in a picture, as the network uses them there.

    A map smaller than the large window is enlarged inside the block, as in the network; its cells then are smaller than
    the block's stride.

    Args:
        model (nn.Module): With an OverLoCK or :class:`mmoverlock.ContMixBlock` inside.
        image (Tensor): One normalised image, (1, 3, H, W).
        position (tuple[float, float]): x and y in pixels.
        block (int | str): Which of :func:`contmix_blocks`, by number or name. Defaults to -1, the last.

    Returns:
        ContMixKernels: Weights of the small and of the large window for every head.

    Raises:
        ValueError: There is no such block, the position is outside the picture, or ``image`` is not one image.
    """
    check_image(image)
    height, width = image.shape[2:]
    x, y = position
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f'position {x}, {y} is outside the picture of {width} x {height}')
    name = block_name(model, block)
    root, mixer, seen = _root(model), contmix_blocks(model)[name].mixer, []
    handle = mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    try:
        with inspecting(root):
            root(like_weights(root, image))
            query, key, value = seen[-1]
            operands = mixer.operands(query, key)
    finally:
        handle.remove()
    query, key, weight, bias, rpb1, rpb2 = (t.float() for t in operands)
    rows, cols = value.shape[2:]
    row, col = int(y * rows / height), int(x * cols / width)
    logits = affinity_logits(query[:, :, :, row : row + 1], key, weight, bias)
    split = ((rpb1.shape[1] + 1) // 2) ** 2
    kernels = []
    for part, rpb in ((logits[..., :split], rpb1), (logits[..., split:], rpb2)):
        weights = window_softmax(part, rpb, row, rows)[0, :, 0, col]
        size = (rpb.shape[1] + 1) // 2
        kernels.append(weights.reshape(-1, size, size).cpu().numpy())
    return ContMixKernels(*kernels, name, (row, col), (rows, cols), (height, width))
