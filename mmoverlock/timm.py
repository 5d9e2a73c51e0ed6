"""OverLoCK as models of timm: ``import mmoverlock.timm``, then ``timm.create_model('overlock_tiny.mmoverlock')``.

Nothing else here imports timm, and this module imports no OpenMMLab package but mmengine.
"""

from typing import List, Optional, Tuple, Union

import torch.nn as nn
import torch.nn.functional as F
from timm.models import adapt_input_conv, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor

from .checkpoints import OFFICIAL_RELEASE, CheckpointError, from_official, is_official, load_state_dict_file
from .models.blocks import init_weights, switch_to_deploy
from .models.layers import ConvNorm
from .models.overlock import STAGES, OverLoCK

__all__ = ['OverLoCKClassifier']


class _Head(nn.Module):
    """The main classifier head; the names of :class:`mmoverlock.OverLoCKClsHead`, whose checkpoints it loads."""

    def __init__(self, in_channels: int, hidden_channels: int, num_classes: int, pool: str, drop_rate: float) -> None:
        super().__init__()
        self.proj = ConvNorm(in_channels, hidden_channels)
        self.drop_rate = drop_rate
        self.reset(num_classes, pool)

    def reset(self, num_classes: int, pool: Optional[str] = None) -> None:
        self.pool = self.pool if pool is None else pool
        if self.pool not in ('', 'avg'):
            raise ValueError(f"global_pool must be 'avg' or '' (none), got {self.pool!r}")
        weight = self.proj.conv.weight
        self.fc = nn.Identity()
        if num_classes > 0:
            self.fc = nn.Conv2d(weight.shape[0], num_classes, 1, device=weight.device, dtype=weight.dtype)
            init_weights(self.fc)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.silu(self.proj(x))
        if self.pool:
            x = x.mean((2, 3), keepdim=True)
        x = F.dropout(x, self.drop_rate, self.training)
        x = x if pre_logits else self.fc(x)
        return x.flatten(1) if self.pool else x


class OverLoCKClassifier(nn.Module):
    """OverLoCK with its main head, as timm expects a model; the auxiliary head is left to mmpretrain's training.

    Args:
        arch (str | dict): As :class:`mmoverlock.OverLoCK`'s.
        num_classes (int): 0 for pooled features. Defaults to 1000.
        in_chans (int): Channels of the image. Defaults to 3.
        global_pool (str): ``'avg'``, or ``''`` for a map. Defaults to ``'avg'``.
        drop_rate (float): Dropout before the classifier. Defaults to 0.
        drop_path_rate (float): Stochastic depth. Defaults to 0.
        hidden_channels (int): Of the head. Defaults to 1024.
        deploy (bool): Build the large kernels merged. Defaults to False.

    Raises:
        ValueError: An argument cannot be; the message says which.
    """

    def __init__(
        self,
        arch: Union[str, dict],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        hidden_channels: int = 1024,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = OverLoCK(arch, in_channels=in_chans, drop_path_rate=drop_path_rate, deploy=deploy)
        channels, strides = self.backbone.out_channels, self.backbone.out_strides
        for i in range(4):  # without its norms, the pyramid is the classifier's network, which has none
            setattr(self.backbone, f'norm{i}', nn.Identity())
        self.num_features, self.head_hidden_size = channels[3], hidden_channels
        names = ('stage1', 'stage2', 'focus3', 'focus4')
        self.feature_info = [
            dict(num_chs=c, reduction=s, module=f'backbone.{n}') for c, s, n in zip(channels, strides, names)
        ]
        self.head = _Head(channels[3], hidden_channels, num_classes, global_pool, drop_rate)
        init_weights(self.head)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last map, (B, num_features, H/32, W/32)."""
        return self.backbone(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to scores (B, num_classes), or with ``pre_logits`` to (B, head_hidden_size)."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to scores (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """The maps at strides 4, 8, 16 and 32.

        Args:
            x (Tensor): (B, in_chans, H, W).
            indices (int | list[int], optional): The last so many, or which. Defaults to None: all.
            norm (bool): No effect: there is no last norm. Defaults to False.
            stop_early (bool): No effect: Focus-Net needs what came before. Defaults to False.
            output_fmt (str): ``'NCHW'``.
            intermediates_only (bool): Leave out the last map by itself. Defaults to False.

        Returns:
            list[Tensor] | tuple[Tensor, list[Tensor]]: The maps, or the last map and the maps.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted, _ = feature_take_indices(4, indices)
        maps = self.backbone(x)
        taken = [maps[i] for i in wanted]
        return taken if intermediates_only else (maps[-1], taken)

    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Drops the head (``prune_head``). All maps come from one pass over the whole network: no stage can go."""
        wanted, _ = feature_take_indices(4, indices)
        if prune_head:
            self.head = nn.Identity()
            self.num_classes = 0
        return wanted

    def get_classifier(self) -> nn.Module:
        """The last layer: a 1x1 convolution."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new last layer; 0 classes for pooled features, ``global_pool=''`` for a map."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's groups of parameters, for layer-wise learning rates."""
        entries = dict(down2='stage2', down3='stage3', down4='stage4', focus_down='focus4', context_proj='stage4')
        blocks = []
        for i, stage in enumerate(STAGES):
            for name in [n for n, s in entries.items() if s == stage and n != 'context_proj']:
                blocks.append((rf'^backbone\.{name}', (i, 0)))
            blocks.append((rf'^backbone\.{stage}' if coarse else rf'^backbone\.{stage}\.(\d+)', (i,)))
        blocks.append((r'^backbone\.context_proj', (3, 10**4)))  # after the last block of stage 4
        return dict(stem=r'^backbone\.stem', blocks=blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass to save memory."""
        self.backbone.with_cp = dict.fromkeys(range(1, 7), float('inf')) if enable else {}

    def switch_to_deploy(self) -> None:
        """Merges everything that merges, in place. Inference only."""
        switch_to_deploy(self)

    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Loads an official file or a checkpoint of ours, without executing it.

        Another number of classes keeps the new classifier, other channels of the image adapt the first weights, as in
        timm.

        Raises:
            CheckpointError: The file cannot be read or does not fit.
        """
        state = checkpoint_filter_fn(load_state_dict_file(checkpoint_path), self)
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [k for k in missing if not k.startswith('head.fc.') and not k.endswith('num_batches_tracked')]
        if missing or unexpected:
            raise CheckpointError(
                f'{checkpoint_path} does not fit: {len(missing)} parameters missing, {len(unexpected)} unknown '
                f'({", ".join([*missing, *unexpected][:3])}, ...)'
            )


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict:
    """A checkpoint in any layout of ours or the official one, as an :class:`OverLoCKClassifier` loads it."""
    if is_official(state_dict):
        state_dict = from_official(state_dict)
    first, classes = 'backbone.stem.0.conv.weight', 'head.fc.weight'
    own = model.state_dict()
    state_dict = {k: v for k, v in state_dict.items() if not k.startswith('head.aux_')}
    if first in state_dict and state_dict[first].shape != own[first].shape:
        state_dict[first] = adapt_input_conv(own[first].shape[1], state_dict[first])
    if classes in state_dict and (classes not in own or state_dict[classes].shape != own[classes].shape):
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith('head.fc.')}
    return state_dict


def _cfg(arch: str, crop_pct: float) -> dict:
    return dict(
        url=f'{OFFICIAL_RELEASE}v1/overlock_{arch}_in1k_224.pth',
        custom_load=True,
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=crop_pct,
        interpolation='bicubic',
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv='backbone.stem.0.conv',
        classifier='head.fc',
        paper_ids='arXiv:2502.20087',
        paper_name='OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels',
        origin_url='https://github.com/LMMMEng/OverLoCK',
    )


default_cfgs = generate_default_cfgs(
    {
        'overlock_xtiny.mmoverlock': _cfg('xt', 0.925),
        'overlock_tiny.mmoverlock': _cfg('t', 0.95),
        'overlock_small.mmoverlock': _cfg('s', 0.95),
        'overlock_base.mmoverlock': _cfg('b', 0.975),
    }
)


def _create(variant: str, default_arch: str, pretrained: bool, **kwargs) -> nn.Module:
    return build_model_with_cfg(
        OverLoCKClassifier,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'),
        **{'arch': default_arch, **kwargs},
    )


@register_model
def overlock_xtiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """OverLoCK-XT."""
    return _create('overlock_xtiny', 'xt', pretrained, **kwargs)


@register_model
def overlock_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """OverLoCK-T."""
    return _create('overlock_tiny', 't', pretrained, **kwargs)


@register_model
def overlock_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """OverLoCK-S."""
    return _create('overlock_small', 's', pretrained, **kwargs)


@register_model
def overlock_base(pretrained: bool = False, **kwargs) -> nn.Module:
    """OverLoCK-B."""
    return _create('overlock_base', 'b', pretrained, **kwargs)
