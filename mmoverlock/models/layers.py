"""Small layers that the blocks are made of."""

import functools
from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops import (
    depthwise_conv2d,
    depthwise_conv2d_branches,
    depthwise_conv2d_norm_branches,
    depthwise_conv3x3,
    excite,
    feed_forward,
)
from ..ops.affine import affine
from ..ops.autocast import no_autocast
from ..ops.feed_forward.reference import grn
from ..ops.pointwise import conv1x1

# Parallel branches (kernel size, dilation) of the re-parameterised large kernel, per size.
# Source: UniRepLKNet, https://arxiv.org/abs/2311.15599
BRANCHES = {
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


def spatial_mean(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean of every channel over the map, (B, C, H, W) to (B, C, 1, 1), in ``dtype``; summed in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.sum((2, 3), keepdim=True, dtype=wide) / (x.shape[2] * x.shape[3])).to(dtype)


def adaptive_mean(x: Tensor, side: int) -> Tensor:
    """``F.adaptive_avg_pool2d``, (B, C, H, W) to (B, C, side, side), in the type of ``x``.

    PyTorch's kernel for channels-last maps on a GPU takes 270 us for a map of 50 x 80 whose bytes take 2: there large
    maps are averaged by two matrix products, over rows and then columns.
    """
    # With cells of up to 25 pixels torch.compile makes it part of its neighbours.
    if not x.is_cuda or (x.shape[2] // side + 1) * (x.shape[3] // side + 1) <= 25:
        return F.adaptive_avg_pool2d(x, side)
    return mean_by_products(x, side)


def mean_by_products(x: Tensor, side: int) -> Tensor:
    """:func:`adaptive_mean` by matrix products, channels-last."""
    with no_autocast(x.device.type):
        rows, columns = (pooling_matrix(n, side, x) for n in x.shape[2:])
        maps = x.permute(0, 2, 3, 1)
        maps = torch.matmul(rows, maps.flatten(2)).unflatten(2, maps.shape[2:])
        return torch.matmul(columns, maps).permute(0, 3, 1, 2)


def pooling_matrix(length: int, cells: int, like: Tensor) -> Tensor:
    """(cells, length): what adaptive average pooling multiplies a line with, in the type of ``like``."""
    cell, place = (torch.arange(n, device=like.device) for n in (cells, length))
    first, end = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    inside = (place >= first[:, None]) & (place < end[:, None])
    return inside.to(like.dtype) / (end - first)[:, None].to(like.dtype)


def resize(x: Tensor, size: Tuple[int, int]) -> Tensor:
    """Bilinear resizing (``align_corners=False``) of a (B, C, H, W) map, in the type of ``x``.

    In float32 at least: its gradient adds up many small shares, which half precision loses.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode='bilinear', align_corners=False).to(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of whole samples while training.

    Args:
        rate (float): Probability of dropping a sample's branch.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.active = rate > 0
        # A tensor, as torch.compile would compile blocks that differ in a number one by one.
        self.register_buffer('keep', torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.active and self.training):
            return x
        kept = self.keep.to(x.dtype)
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(self.keep).div_(kept)

    def extra_repr(self) -> str:
        return f'rate={self.rate:.3f}'


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map.

    Args:
        channels (int): C.
        eps (float): Defaults to 1e-6.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        keep = x.is_contiguous(memory_format=torch.channels_last)
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        x = x.permute(0, 3, 1, 2)
        return x if keep else x.contiguous()


class OutputNorm(LayerNorm2d):
    """The same before a map leaves the network, which maps do in contiguous (NCHW) order.

    mmcv's RoIAlign and its kind read a map as NCHW without asking.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


class GRN(nn.Module):
    """Global response normalisation of ConvNeXt V2, on a (B, C, H, W) map.

    Source: `ConvNeXt V2 <https://arxiv.org/abs/2301.00808>`_.

    Args:
        channels (int): C.
        eps (float): Defaults to 1e-6.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return grn(x, self.gamma, self.beta, self.eps)


class LayerScale(nn.Module):
    """Scale and shift of every channel, ``weight * x + bias``.

    Args:
        channels (int): C.
        init_value (float): Initial weight. Defaults to 1.
    """

    def __init__(self, channels: int, init_value: float = 1.0) -> None:
        super().__init__()
        # The official code stores it as a 1x1 depthwise convolution; the shape is kept for its checkpoints.
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), float(init_value)))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1))


class SELayer(nn.Module):
    """Squeeze-and-excitation with a GELU and an inner width of max(16, C // 8).

    What happens to the pooled values costs nothing in float32, and in half precision loses small ones.

    Args:
        channels (int): C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(16, channels // 8)
        self.reduce = nn.Conv2d(channels, inner, 1)
        self.expand = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        reduce, expand = self.reduce, self.expand
        with no_autocast(x.device.type):
            pooled = spatial_mean(x, reduce.weight.dtype)
            scale = excite(pooled, reduce.weight, reduce.bias, expand.weight, expand.bias)
        return affine(x, scale)


class Conv1x1(nn.Conv2d):
    """1x1 convolution through :func:`mmoverlock.ops.pointwise.conv1x1`.

    Args:
        in_channels, out_channels (int): Channels in and out.
        bias (bool): Defaults to True.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return conv1x1(x, self.weight, self.bias)


class DWConv(nn.Conv2d):
    """Depthwise 3x3 convolution through :func:`mmoverlock.ops.depthwise_conv3x3`.

    Args:
        channels (int): C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        return depthwise_conv3x3(x, self.weight, self.bias, gelu=gelu)


class ResDWConv(DWConv):
    """The same with a residual connection, ``x + conv(x)``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv3x3(x, self.weight, self.bias, residual=not self.merged)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Adds the residual connection to the centre of the kernel."""
        if not self.merged:
            self.weight[:, :, 1, 1] += 1
            self.merged = True


class SpatialConv(nn.Conv2d):
    """A convolution whose weight may lie in channels-last order; a state dict has it as safetensors asks."""

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[prefix + 'weight'] = destination[prefix + 'weight'].contiguous()


class ConvNorm(nn.Sequential):
    """A convolution without bias and its batch norm; one convolution with a bias after :meth:`switch_to_deploy`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1) -> None:
        super().__init__()
        if kernel_size == stride == 1:
            self.conv = Conv1x1(in_channels, out_channels, bias=False)
        else:
            self.conv = SpatialConv(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def switch_to_deploy(self) -> None:
        """Folds the batch norm into the convolution, and lays a 3x3 weight out as the maps are.

        Otherwise the library does so at every call: for 256 to 336 channels on a CPU 5 of 7 ms.
        """
        if hasattr(self, 'bn'):
            fold_following_bn(self.conv, self.bn)
            del self.bn
            self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)


class ConvFFN(nn.Module):
    """The feed-forward half of every block: 1x1, GELU, residual depthwise 3x3, GRN, 1x1.

    Args:
        channels (int): Channels in and out.
        hidden (int): Channels in between.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.GELU()
        self.dwconv = ResDWConv(hidden)
        self.grn = GRN(hidden)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor, shortcut: Optional[Tensor] = None, layer_scale: Optional[LayerScale] = None) -> Tensor:
        """(B, C, H, W) to the same, with a shortcut of that shape added, after its LayerScale where one is given."""
        fc1, dwconv, grn, fc2 = self.fc1, self.dwconv, self.grn, self.fc2
        scale, shift = (None, None) if layer_scale is None else (layer_scale.weight.flatten(), layer_scale.bias)
        return feed_forward(
            x, fc1.weight, fc1.bias, dwconv.weight, dwconv.bias, grn.gamma, grn.beta, fc2.weight, fc2.bias,
            grn.eps, not dwconv.merged, shortcut, scale, shift,
        )  # fmt: skip


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution through :func:`mmoverlock.ops.depthwise_conv2d`; stride 1, size kept."""

    def __init__(self, channels: int, kernel_size: int, dilation: int = 1, bias: bool = False) -> None:
        padding = dilation * (kernel_size - 1) // 2
        super().__init__(
            channels,
            channels,
            kernel_size,
            padding=padding,
            dilation=dilation,
            groups=channels,
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, self.dilation[0])


class _Branch(nn.Module):
    """A depthwise convolution and its batch norm, parallel to the large kernel."""

    def __init__(self, channels: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.conv = DepthwiseConv(channels, kernel_size, dilation)
        self.bn = nn.BatchNorm2d(channels)


class LargeKernelConv(nn.Module):
    """Dilated re-parameterised large depthwise kernel: a sum of convolutions, each with a batch norm.

    Source: `UniRepLKNet <https://arxiv.org/abs/2311.15599>`_. For inference every branch folds into one kernel.

    Args:
        channels (int): C.
        kernel_size (int): One of 5, 7, 9, 11, 13, 15, 17, 19.
        deploy (bool): Build the merged form, one convolution with a bias. Defaults to False.

    Raises:
        ValueError: No branches are known for ``kernel_size``.
    """

    def __init__(self, channels: int, kernel_size: int, deploy: bool = False) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ValueError(f'large kernel of size {kernel_size}; choose from {sorted(BRANCHES)}')
        self.kernel_size = kernel_size
        self.conv = DepthwiseConv(channels, kernel_size, bias=deploy)
        if not deploy:
            self.bn = nn.BatchNorm2d(channels)
            self.branches = nn.ModuleDict({f'k{k}_r{r}': _Branch(channels, k, r) for k, r in BRANCHES[kernel_size]})

    @property
    def deploy(self) -> bool:
        """bool: Whether the branches have been merged."""
        return self.conv.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.deploy:
            return self.conv(x)
        paths = [self, *self.branches.values()]
        if x.device.type != 'cpu' and _train_plainly([path.bn for path in paths]):
            return self._sum_and_track(x, paths)
        # All convolutions in one call: they read the same map, and a network has hundreds of them.
        maps = depthwise_conv2d_branches(x, [p.conv.weight for p in paths], [p.conv.dilation[0] for p in paths])
        return functools.reduce(torch.add, (path.bn(y) for path, y in zip(paths, maps)))

    def _sum_and_track(self, x: Tensor, paths: list) -> Tensor:
        """Convolutions and norms of all branches in one call, and their running statistics with it."""
        norms = [path.bn for path in paths]
        out, means, variances = depthwise_conv2d_norm_branches(
            x,
            [path.conv.weight for path in paths],
            [path.conv.dilation[0] for path in paths],
            [norm.weight for norm in norms],
            [norm.bias for norm in norms],
            [norm.eps for norm in norms],
        )
        count = x.numel() // x.shape[1]
        momentum = norms[0].momentum
        with torch.no_grad():
            variances = variances * (count / (count - 1))  # a single value a channel has been refused before
            means, variances = (t.to(norms[0].running_mean.dtype) for t in (means, variances))
            torch._foreach_lerp_([norm.running_mean for norm in norms], list(means.unbind()), momentum)
            torch._foreach_lerp_([norm.running_var for norm in norms], list(variances.unbind()), momentum)
            torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
        return out

    @torch.no_grad()
    def merge_branches(self) -> None:
        """Sums every branch into one kernel with a bias, in place."""
        if self.deploy:
            return
        weight, bias = _folded(self.conv, self.bn)
        for branch in self.branches.values():
            branch_weight, branch_bias = _folded(branch.conv, branch.bn)
            weight += _spread(branch_weight, branch.conv.dilation[0], self.kernel_size)
            bias += branch_bias
        self.conv.weight.copy_(weight)
        self.conv.bias = nn.Parameter(bias.to(self.conv.weight.dtype))
        del self.bn, self.branches


def _train_plainly(norms: Sequence[nn.Module]) -> bool:
    """Whether batch norms take the statistics of this process's batch and keep the same moving average of them."""
    plain = all(type(n) is nn.BatchNorm2d and n.training and n.track_running_stats for n in norms)
    return plain and norms[0].momentum is not None and len({n.momentum for n in norms}) == 1


def _spread(weight: Tensor, dilation: int, size: int) -> Tensor:
    """A dilated kernel (C, 1, k, k) written as a dense one of size ``size``."""
    reach = dilation * (weight.shape[-1] - 1) + 1
    first = (size - reach) // 2
    dense = weight.new_zeros(*weight.shape[:2], size, size)
    dense[:, :, first : first + reach : dilation, first : first + reach : dilation] = weight
    return dense


def _bn_affine(bn: nn.BatchNorm2d) -> Tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation, in float64: the fold itself then costs no accuracy."""
    scale = bn.weight.double() * (bn.running_var.double() + bn.eps).rsqrt()
    return scale, bn.bias.double() - bn.running_mean.double() * scale


def _folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tuple[Tensor, Tensor]:
    scale, shift = _bn_affine(bn)
    bias = 0 if conv.bias is None else conv.bias.double()
    return conv.weight.double() * scale.view(-1, 1, 1, 1), bias * scale + shift


@torch.no_grad()
def fold_following_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    """Makes ``conv`` compute ``bn(conv(x))``, in place."""
    weight, bias = _folded(conv, bn)
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype))


@torch.no_grad()
def fold_preceding_bn(bn: nn.BatchNorm2d, conv: nn.Conv2d) -> None:
    """Makes ``conv`` compute ``conv(bn(x))``, in place. Exact for 1x1 convolutions only: others pad after the norm."""
    scale, shift = _bn_affine(bn)
    weight = conv.weight.double()
    bias = (weight * shift.view(1, -1, 1, 1)).sum((1, 2, 3))
    if conv.bias is not None:
        bias = bias + conv.bias.double()
    conv.weight.copy_(weight * scale.view(1, -1, 1, 1))
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
