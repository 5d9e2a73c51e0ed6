"""The blocks of OverLoCK: the base block, the focus block and the stand-alone ContMix block."""

from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm  # of every kind: SyncBatchNorm is no BatchNorm2d

from ..checkpoints import adapt_block_state_dict
from ..ops import contmix
from .layers import (
    GRN,
    Conv1x1,
    ConvFFN,
    ConvNorm,
    DropPath,
    DWConv,
    LargeKernelConv,
    LayerNorm2d,
    LayerScale,
    ResDWConv,
    SELayer,
    adaptive_mean,
    fold_following_bn,
    fold_preceding_bn,
    resize,
)

#: Context cells along each side of the map that the keys are pooled to.
CONTEXT_SIZE = 7


class _ResidualBlock(nn.Module):
    """The shortcuts of a block, which has ``res_scale``, ``drop_path`` and ``ffn``."""

    def residual(self, x: Tensor, y: Tensor, layer_scale: nn.Module) -> Tensor:
        """Shortcut ``x`` plus branch ``y``, the LayerScale on the one that ``res_scale`` says."""
        if self.res_scale:
            return layer_scale(x) + self.drop_path(y)
        return x + self.drop_path(layer_scale(y))

    def feed_forward(self, x: Tensor, y: Tensor, layer_scale: nn.Module) -> Tensor:
        """``residual(x, ffn(y), layer_scale)``: one operator, unless something is done to the branch."""
        plain = isinstance(layer_scale, nn.Identity)
        if (self.training and self.drop_path.active) or not (self.res_scale or plain):
            return self.residual(x, self.ffn(y), layer_scale)
        return self.ffn(y, x, None if plain else layer_scale)


class BaseBlock(_ResidualBlock):
    """Block of Base-Net and Overview-Net: a re-parameterised large kernel and a feed-forward half.

    ``RepConvBlock`` of the official code.

    Args:
        channels (int): C.
        kernel_size (int): Size of the large kernel.
        mlp_ratio (float): Hidden channels of the feed-forward half over C. Defaults to 4.
        drop_path (float): Stochastic depth rate. Defaults to 0.
        res_scale (bool): Scale the shortcut (``ls(x) + y``) instead of the branch (``x + ls(y)``). Defaults to False.
        layer_scale (float, optional): Initial value of the LayerScale; None for none. Defaults to None.
        deploy (bool): Build the large kernel merged. Defaults to False.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        res_scale: bool = False,
        layer_scale: Optional[float] = None,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.dwconv = ResDWConv(channels)
        self.norm = LayerNorm2d(channels)
        self.large_kernel = LargeKernelConv(channels, kernel_size, deploy)
        self.bn = nn.BatchNorm2d(channels)
        self.se = SELayer(channels)
        self.ffn = ConvFFN(channels, int(mlp_ratio * channels))
        self.drop_path = DropPath(drop_path)
        self.layer_scale = nn.Identity() if layer_scale is None else LayerScale(channels, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        x = self.dwconv(x)
        y = self.se(self.bn(self.large_kernel(self.norm(x))))
        return self.feed_forward(x, y, self.layer_scale)

    def switch_to_deploy(self) -> None:
        """Folds the batch norm into the (merged) large kernel."""
        if isinstance(self.bn, _BatchNorm):
            fold_following_bn(self.large_kernel.conv, self.bn)
            self.bn = nn.Identity()


class ContMixer(nn.Module):
    """ContMix with its projections: kernels from the affinity of queries to context cells, applied to values.

    Args:
        query_channels (int): Channels that the queries are made of.
        key_channels (int): Channels that the keys are made of.
        channels (int): C, channels of the values.
        heads (int): Heads of each kernel; ContMix works on G = 2 * heads groups.
        kernel_size (int): K, the large window.
        small_kernel (int): s, the small window.
    """

    def __init__(
        self,
        query_channels: int,
        key_channels: int,
        channels: int,
        heads: int,
        kernel_size: int,
        small_kernel: int,
    ) -> None:
        super().__init__()
        self.groups = 2 * heads
        self.kernel_size = kernel_size
        self.scale = (channels // self.groups) ** -0.5
        self.query = ConvNorm(query_channels, channels // 2)
        self.key = ConvNorm(key_channels, channels // 2)
        self.weight_proj = nn.Conv2d(CONTEXT_SIZE**2, small_kernel**2 + kernel_size**2, 1)
        self.rpb1 = nn.Parameter(torch.zeros(self.groups, 2 * small_kernel - 1, 2 * small_kernel - 1))
        self.rpb2 = nn.Parameter(torch.zeros(self.groups, 2 * kernel_size - 1, 2 * kernel_size - 1))

    def enlarge(self, x: Tensor) -> Tensor:
        """Resizes a map that is smaller than the window so that its shorter side equals the window."""
        height, width = x.shape[2:]
        size = self.kernel_size
        if min(height, width) >= size:
            return x
        target = (size, int(size / height * width)) if height < width else (int(size / width * height), size)
        return resize(x, target)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mixes ``value``.

        Args:
            query (Tensor): (B, query_channels, H, W), H and W at least the window.
            key (Tensor): (B, key_channels, H, W).
            value (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        return contmix(*self.operands(query, key), value)

    def operands(self, query: Tensor, key: Tensor) -> Tuple[Tensor, ...]:
        """The arguments of :func:`mmoverlock.ops.contmix` up to the values: what its kernels are made of."""
        query = self.query(query)
        if self.scale != 1:
            query = query * self.scale
        key = self.key(adaptive_mean(key, CONTEXT_SIZE))
        return (
            query.unflatten(1, (self.groups, -1)),
            key.flatten(2).unflatten(1, (self.groups, -1)),
            self.weight_proj.weight.flatten(1),
            self.weight_proj.bias,
            self.rpb1,
            self.rpb2,
        )

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Folds batch norms, and the scale of the queries into their convolution."""
        self.query.switch_to_deploy()
        self.query.conv.weight *= self.scale
        self.query.conv.bias *= self.scale
        self.scale = 1.0


class Lepe(nn.Module):
    """Large kernel and batch norm beside ContMix: local detail and position.

    Args:
        channels (int): C.
        kernel_size (int): Size of the large kernel.
        deploy (bool): Build the large kernel merged. Defaults to False.
    """

    def __init__(self, channels: int, kernel_size: int, deploy: bool = False) -> None:
        super().__init__()
        self.large_kernel = LargeKernelConv(channels, kernel_size, deploy)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.large_kernel(x))

    def switch_to_deploy(self) -> None:
        """Folds the batch norm into the (merged) large kernel."""
        if isinstance(self.bn, _BatchNorm):
            fold_following_bn(self.large_kernel.conv, self.bn)
            self.bn = nn.Identity()


class NormConv(nn.Sequential):
    """A batch norm and the 1x1 convolution after it; the convolution alone after :meth:`switch_to_deploy`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = Conv1x1(in_channels, out_channels)

    def switch_to_deploy(self) -> None:
        """Folds the batch norm into the convolution."""
        if hasattr(self, 'bn'):
            fold_preceding_bn(self.bn, self.conv)
            del self.bn


class Fusion(nn.Module):
    """Mixes feature and context: depthwise 3x3, batch norm, GELU, 1x1, GRN.

    Args:
        in_channels (int): Channels of feature and context together.
        out_channels (int): C.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.dwconv = DWConv(in_channels)
        self.bn = nn.BatchNorm2d(in_channels)
        self.act = nn.GELU()
        self.conv = Conv1x1(in_channels, out_channels)
        self.grn = GRN(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.bn, nn.Identity):  # folded, and GELU comes at once
            return self.grn(self.conv(self.dwconv(x, gelu=True)))
        return self.grn(self.conv(self.act(self.bn(self.dwconv(x)))))

    def switch_to_deploy(self) -> None:
        """Folds the batch norm into the depthwise convolution."""
        if isinstance(self.bn, _BatchNorm):
            fold_following_bn(self.dwconv, self.bn)
            self.bn = nn.Identity()


class _DynamicBlock(_ResidualBlock):
    """What the focus block and the stand-alone ContMix block share: everything after the values are known.

    Args:
        channels (int): Channels of the map that runs through the block.
        value_channels (int): C, channels of the values that ContMix mixes.
        query_channels, key_channels (int): Channels that queries and keys are made of.
        hidden (int): Hidden channels of the feed-forward half.
    """

    def __init__(
        self,
        channels: int,
        value_channels: int,
        query_channels: int,
        key_channels: int,
        hidden: int,
        heads: int,
        kernel_size: int,
        small_kernel: int,
        drop_path: float,
        res_scale: bool,
        layer_scale: Optional[float],
        deploy: bool,
    ) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.dwconv1 = ResDWConv(channels)
        self.norm1 = LayerNorm2d(channels)
        self.mixer = ContMixer(query_channels, key_channels, value_channels, heads, kernel_size, small_kernel)
        self.mix_proj = ConvNorm(value_channels, value_channels)
        self.lepe = Lepe(value_channels, kernel_size, deploy)
        self.se = SELayer(value_channels)
        self.gate = ConvNorm(value_channels, value_channels)
        self.out_proj = NormConv(value_channels, channels)
        self.dwconv2 = ResDWConv(channels)
        self.norm2 = LayerNorm2d(channels)
        self.ffn = ConvFFN(channels, hidden)
        self.drop_path = DropPath(drop_path)
        self.layer_scale1 = nn.Identity() if layer_scale is None else LayerScale(channels, layer_scale)
        self.layer_scale2 = nn.Identity() if layer_scale is None else LayerScale(channels, layer_scale)

    def gated_mix(self, query: Tensor, key: Tensor, value: Tensor, local: Tensor) -> Tensor:
        """ContMix of ``value``, with local detail and gate from ``local``; (B, C, H, W) to (B, channels, H, W)."""
        size = local.shape[2:]
        mixed = self.mixer(query, key, value)
        if mixed.shape[2:] != size:  # the map had been enlarged to the window
            mixed = F.adaptive_avg_pool2d(mixed, size)
        return self.out_proj(F.silu(self.gate(local)) * self.se(self.mix_proj(mixed) + self.lepe(local)))

    def second_half(self, x: Tensor) -> Tensor:
        """What comes after the mixing."""
        x = self.dwconv2(x)
        return self.feed_forward(x, self.norm2(x), self.layer_scale2)


class FocusBlock(_DynamicBlock):
    """Block of Focus-Net: ContMix on features fused with the context that Overview-Net gave.

    ``DynamicConvBlock`` of the official code; paper section 3.2 and figure 4.

    Args:
        channels (int): C, channels of the feature x.
        context_channels (int): Ch, channels of the context h and of the prior r.
        heads (int): Heads; ContMix works on twice as many groups.
        kernel_size (int): K, the large window and kernel.
        small_kernel (int): s, the small window. Defaults to 5.
        mlp_ratio (float): Hidden channels of the feed-forward half over C. Defaults to 3.
        drop_path (float): Stochastic depth rate. Defaults to 0.
        res_scale (bool): Scale shortcuts instead of branches. Defaults to True.
        layer_scale (float, optional): Initial value of the LayerScales; None for none. Defaults to 1.
        first (bool): The first block of Focus-Net: the context is the prior itself, nothing to add. Defaults to False.
        deploy (bool): Build the large kernel merged. Defaults to False.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        heads: int,
        kernel_size: int,
        small_kernel: int = 5,
        mlp_ratio: float = 3,
        drop_path: float = 0.0,
        res_scale: bool = True,
        layer_scale: Optional[float] = 1.0,
        first: bool = False,
        deploy: bool = False,
    ) -> None:
        super().__init__(
            channels + context_channels,
            channels,
            channels,
            context_channels,
            int(mlp_ratio * channels),
            heads,
            kernel_size,
            small_kernel,
            drop_path,
            res_scale,
            layer_scale,
            deploy,
        )
        self.split = (channels, context_channels)
        if not first:
            self.context_scale = LayerScale(context_channels)
            self.prior_scale = LayerScale(context_channels)
        self.first = first
        self.fusion = Fusion(channels + context_channels, channels)

    def forward(self, x: Tensor, h: Tensor, prior: Tensor) -> Tuple[Tensor, Tensor]:
        """Feature x (B, C, H, W), context h and prior (B, Ch, H, W) to the next feature and context."""
        if not self.first:
            h = self.context_scale(h) + self.prior_scale(prior)
        identity = self.dwconv1(torch.cat([x, h], dim=1))
        z = self.norm1(identity)
        fused = self.fusion(z)
        query, key = self.mixer.enlarge(z).split(self.split, dim=1)
        y = self.gated_mix(query, key, self.mixer.enlarge(fused), fused)
        u = self.second_half(self.residual(identity, y, self.layer_scale1))
        return u.split(self.split, dim=1)


class ContMixBlock(_DynamicBlock):
    """The plug-and-play ContMix block: the focus block without a context, for networks of any kind.

    Args:
        dim (int): Channels in and out.
        num_heads (int): Heads; ContMix works on twice as many groups. Defaults to 2.
        kernel_size (int): K, the large window and kernel. Defaults to 13.
        smk_size (int): s, the small window. Defaults to 5.
        mlp_ratio (float): Hidden channels of the feed-forward half over ``dim``. Defaults to 4.
        drop_path (float): Stochastic depth rate. Defaults to 0.
        res_scale (bool): Scale shortcuts instead of branches. Defaults to False.
        ls_init_value (float, optional): Initial value of the LayerScales; None for none. Defaults to 1.
        deploy (bool): Build the large kernel merged. Defaults to False.

    Raises:
        ValueError: ``dim`` is not a multiple of 4 * ``num_heads``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 2,
        kernel_size: int = 13,
        smk_size: int = 5,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        res_scale: bool = False,
        ls_init_value: Optional[float] = 1.0,
        deploy: bool = False,
    ) -> None:
        if dim % (4 * num_heads):
            raise ValueError(f'dim {dim} is not divisible by 4 * num_heads = {4 * num_heads}')
        super().__init__(
            dim,
            dim,
            dim,
            dim,
            int(mlp_ratio * dim),
            num_heads,
            kernel_size,
            smk_size,
            drop_path,
            res_scale,
            ls_init_value,
            deploy,
        )
        self.value = ConvNorm(dim, dim)
        init_weights(self)
        for rpb in (self.mixer.rpb1, self.mixer.rpb2):
            nn.init.trunc_normal_(rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) to the same; any H and W (a map smaller than the window is enlarged inside)."""
        identity = self.dwconv1(x)
        z = self.norm1(identity)
        large = self.mixer.enlarge(z)
        y = self.gated_mix(large, large, self.value(large), z)
        return self.second_half(self.residual(identity, y, self.layer_scale1))

    def switch_to_deploy(self) -> None:
        """Merges everything that merges, in place."""
        switch_to_deploy(self)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        adapt_block_state_dict(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def init_weights(module: nn.Module) -> None:
    """Initialisation of the official code: convolution weights truncated normal (std 0.02), biases zero."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def merge_large_kernels(module: nn.Module) -> None:
    """Merges the branches of every large kernel below ``module``, in place: the official "reparam" form."""
    for m in module.modules():
        if isinstance(m, LargeKernelConv):
            m.merge_branches()


def switch_to_deploy(module: nn.Module) -> None:
    """Merges everything that merges below ``module``, in place: large kernels, batch norms, residual 3x3 kernels."""
    merge_large_kernels(module)
    for m in list(module.modules()):
        if m is not module and hasattr(m, 'switch_to_deploy'):
            m.switch_to_deploy()
