"""The perceptron of squeeze-and-excitation in plain PyTorch: the definition that the fast form is tested against."""

import torch.nn.functional as F
from torch import Tensor


def excite_reference(pooled: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Arguments as :func:`mmoverlock.ops.excite`."""
    return F.conv2d(F.gelu(F.conv2d(pooled, weight1, bias1)), weight2, bias2).sigmoid()
