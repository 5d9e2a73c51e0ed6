"""The classifier head of OverLoCK with its auxiliary head, for mmpretrain."""

from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints import adapt_head_state_dict
from ..compat import beside_transformers_5
from ..ops.autocast import no_autocast
from ..registry import MODELS
from .blocks import init_weights, switch_to_deploy
from .layers import ConvNorm, spatial_mean

try:
    from mmpretrain.models.heads import ClsHead

    _IMPORT_ERROR = None
except Exception as error:  # mmpretrain's optional parts fail at import in many ways; the backbone must not care
    ClsHead, _IMPORT_ERROR = nn.Module, error


def _remedy() -> str:
    if beside_transformers_5():
        return 'transformers 5 is beside it; call mmoverlock.compat.apply() before anything imports mmpretrain'
    return 'pip install mmpretrain'


@MODELS.register_module()
class OverLoCKClsHead(ClsHead):
    """Main and auxiliary classifier in one, fed with ``(overview, focus)``.

    Main: 1x1 convolution, batch norm, SiLU, global average pool, linear layer, on the focus map. Auxiliary, while
    training only: batch norm, global average pool, linear layer, on the overview map (paper section 3.4).

    Args:
        num_classes (int): Number of classes.
        in_channels (tuple[int, int]): Channels of the overview and of the focus map (the backbone's
            ``out_channels``).
        hidden_channels (int): Channels of the main head's convolution. Defaults to 1024.
        loss (dict): Config of the loss, for both heads. Defaults to ``dict(type='CrossEntropyLoss',
            loss_weight=1.0)``.
        aux_loss_weight (float): Weight of the auxiliary loss; 0 builds no auxiliary head. Defaults to 0.4.
        topk (int | tuple[int]): Accuracies to report. Defaults to ``(1, 5)``.
        cal_acc (bool): Report the training accuracy; not possible with mixed labels. Defaults to False.
        init_cfg (dict, optional): Defaults to None: the initialisation of the official code.

    Raises:
        ImportError: mmpretrain is not installed or does not import.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        hidden_channels: int = 1024,
        loss: Optional[dict] = None,
        aux_loss_weight: float = 0.4,
        topk=(1, 5),
        cal_acc: bool = False,
        init_cfg: Optional[dict] = None,
    ) -> None:
        if _IMPORT_ERROR is not None:
            raise ImportError(
                f'OverLoCKClsHead needs mmpretrain, which does not import ({_IMPORT_ERROR}): {_remedy()}'
            ) from _IMPORT_ERROR
        if num_classes < 1:
            raise ValueError(f'num_classes must be positive, got {num_classes}')
        loss = loss or dict(type='CrossEntropyLoss', loss_weight=1.0)
        super().__init__(loss=loss, topk=topk, cal_acc=cal_acc, init_cfg=init_cfg)
        overview, focus = in_channels
        self.num_classes = num_classes
        self.aux_loss_weight = aux_loss_weight
        self.proj = ConvNorm(focus, hidden_channels)
        self.fc = nn.Conv2d(hidden_channels, num_classes, 1)
        if aux_loss_weight > 0:
            self.aux_bn = nn.BatchNorm2d(overview)
            self.aux_fc = nn.Conv2d(overview, num_classes, 1)
        init_weights(self)

    @property
    def with_aux(self) -> bool:
        """bool: Whether there is an auxiliary head."""
        return hasattr(self, 'aux_fc')

    def pre_logits(self, feats: Tuple[Tensor, Tensor]) -> Tensor:
        """Pooled features of the main head, (B, hidden_channels)."""
        return spatial_mean(F.silu(self.proj(feats[1])), self.fc.weight.dtype).flatten(1)

    def forward(self, feats: Tuple[Tensor, Tensor]) -> Tensor:
        """Logits of the main head, (B, num_classes), from ``(overview, focus)``."""
        pooled = self.pre_logits(feats)[:, :, None, None]
        with no_autocast(pooled.device.type):  # logits of half precision are coarse, and cost nothing in float32
            return self.fc(pooled).flatten(1)

    def aux_forward(self, feats: Tuple[Tensor, Tensor]) -> Tensor:
        """Logits of the auxiliary head, (B, num_classes), from ``(overview, focus)``."""
        pooled = spatial_mean(self.aux_bn(feats[0]), self.aux_fc.weight.dtype)
        with no_autocast(pooled.device.type):
            return self.aux_fc(pooled).flatten(1)

    def loss(self, feats: Tuple[Tensor, Tensor], data_samples: List, **kwargs) -> dict:
        """Losses of both heads.

        Args:
            feats (tuple[Tensor, Tensor]): ``(overview, focus)`` of the backbone.
            data_samples (list[DataSample]): With ``gt_label`` or, for mixed labels, ``gt_score``.

        Returns:
            dict: ``loss``, ``aux_loss`` (already weighted) and, if asked for, accuracies.
        """
        losses = self._get_loss(self(feats), data_samples, **kwargs)
        if self.with_aux:
            main, self.cal_acc = self.cal_acc, False  # accuracy is the main head's
            try:
                aux = self._get_loss(self.aux_forward(feats), data_samples, **kwargs)
            finally:
                self.cal_acc = main
            losses['aux_loss'] = aux['loss'] * self.aux_loss_weight
        return losses

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Folds the batch norm of the main head, in place."""
        switch_to_deploy(self)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        adapt_head_state_dict(state_dict, prefix)
        if prefix + 'proj.conv.bias' in state_dict:  # saved after switch_to_deploy()
            self.switch_to_deploy()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
