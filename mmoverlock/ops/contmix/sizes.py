"""Sizes of one call of ContMix in Triton, from which either set of kernels plans its launches."""

from dataclasses import dataclass
from typing import Optional, Tuple

from torch import Tensor

from ..triton_common import power_of_two

_INFERENCE = 64 * 2**20  # bytes that the products of keys and weight may take where no gradients are wanted


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call."""

    batch: int
    groups: int
    height: int
    width: int
    dim: int
    channels: int  # of the values of one head
    windows: Tuple[int, int]

    @classmethod
    def of(cls, query: Tensor, rpb1: Tensor, rpb2: Tensor, value: Tensor) -> 'Sizes':
        batch, groups, dim, height, width = query.shape
        windows = ((rpb1.shape[1] + 1) // 2, (rpb2.shape[1] + 1) // 2)
        return cls(batch, groups, height, width, dim, value.shape[1] // (2 * groups), windows)

    @property
    def padded_dim(self) -> int:
        """Channels of the queries of a head in the kernels."""
        return max(16, power_of_two(self.dim))

    @property
    def padded_channels(self) -> int:
        """Likewise of the values."""
        return max(16, power_of_two(self.channels))

    @property
    def logits(self) -> int:
        """Logits of a position, of both windows."""
        return sum(k * k for k in self.windows)

    @property
    def logits_bytes(self) -> int:
        """Size of what is never written: the logits of the call in fp32."""
        return 4 * self.batch * self.groups * self.height * self.width * self.logits

    def _chunk(self, columns: int, tuning, train: bool, dim: Optional[int] = None) -> int:
        """Batch elements to take at once, so that the products of keys and weight stay small beside the logits.

        Args:
            columns (int): Columns of a product, one for every logit and padding.
            tuning: With ``share`` of the logits' bytes, and ``floor`` in bytes.
            train (bool): Whether a backward pass follows; without, what it takes is free again at once, and launching
                few kernels is worth more.
            dim (int, optional): Channels of a head in the products, if they are padded.
        """
        product = 4 * self.groups * (dim or self.dim) * columns
        floor = tuning.floor if train else _INFERENCE
        chunks = -(-self.batch * product // int(max(floor, tuning.share * self.logits_bytes)))
        return -(-self.batch // max(1, chunks))
