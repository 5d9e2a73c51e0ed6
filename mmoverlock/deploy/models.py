"""What is exported: models as plain functions from images to tensors, without data samples and losses."""

import copy
from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..models import OverLoCK


class Deployable(nn.Module):
    """A model as a function of images, merged and in evaluation mode.

    Args:
        model (nn.Module): What :meth:`run` calls; moved to evaluation mode and merged in place.
        output_names (Sequence[str]): Names of the outputs, in order.
        normalize (tuple, optional): (mean, std) by channel: the input then is the picture itself, RGB from 0 to 255.
            Defaults to None: the input is normalised already.
    """

    def __init__(self, model: nn.Module, output_names: Sequence[str], normalize: Optional[tuple] = None) -> None:
        super().__init__()
        self.model = model
        self.output_names = tuple(output_names)
        self.normalizes = normalize is not None
        if self.normalizes:
            for name, values in zip(('mean', 'std'), normalize):
                self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1).clone())
        for module in list(self.modules()):
            if type(module).__module__.startswith('mmoverlock.models') and hasattr(module, 'switch_to_deploy'):
                module.switch_to_deploy()
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        """(B, 3, H, W) to the outputs that :attr:`output_names` names."""
        if self.normalizes:
            image = (image - self.mean) / self.std
        return tuple(self.run(image))

    def run(self, image: Tensor) -> Sequence[Tensor]:
        """The outputs for a normalised image."""
        out = self.model(image)
        return (out,) if isinstance(out, Tensor) else out


class Classifier(Deployable):
    """mmpretrain's classifier: class scores before the softmax, (B, classes)."""

    def run(self, image: Tensor) -> Sequence[Tensor]:
        return (self.model(image, mode='tensor'),)


class Segmentor(Deployable):
    """mmseg's encoder-decoder: class scores before the softmax at the size of the image, (B, classes, H, W)."""

    def run(self, image: Tensor) -> Sequence[Tensor]:
        head = self.model.decode_head
        logits = head(self.model.extract_feat(image))
        size = image.shape[2:]
        return (F.interpolate(logits, size=size, mode='bilinear', align_corners=head.align_corners),)


def statistics(model: nn.Module):
    """(mean, std) that a model's data preprocessor subtracts and divides by, or None where it does neither."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    if not getattr(preprocessor, '_enable_normalize', False):
        return None
    return preprocessor.mean.flatten().tolist(), preprocessor.std.flatten().tolist()


def deployable(model: nn.Module, backbone_only: bool = False, normalize: bool = False) -> Deployable:
    """A copy of a model as a function of images.

    Args:
        model (nn.Module): An :class:`mmoverlock.OverLoCK`, a classifier of mmpretrain, an encoder-decoder of mmseg, a
            RetinaNet or R-CNN of mmdet, or any module from an image to a tensor or a tuple of tensors. It stays as it
            is.
        backbone_only (bool): Take the model's backbone alone. Defaults to False.
        normalize (bool): Put the normalisation of the model's data preprocessor in front. Defaults to False.

    Returns:
        Deployable: With merged kernels, in evaluation mode, on the CPU.

    Raises:
        ValueError: The model has no backbone or no normalisation, or a part that is not known here.
    """
    whole = model
    if backbone_only and not isinstance(model, OverLoCK):
        if not hasattr(model, 'backbone'):
            raise ValueError(f'{type(model).__name__} has no backbone to export alone')
        model = model.backbone
    values = statistics(whole) if normalize else None
    if normalize and values is None:
        raise ValueError(f'{type(whole).__name__} has no data preprocessor that normalises; leave normalize out')
    model = copy.deepcopy(model).cpu()
    if isinstance(model, OverLoCK):
        if model.out_type == 'pyramid':
            names = [f'stride{stride}' for stride in model.out_strides]
        else:
            names = ['overview', 'focus']
        return Deployable(model, names, values)
    if hasattr(model, 'decode_head'):
        if isinstance(model.decode_head, nn.ModuleList):
            raise ValueError('segmentors with a cascade of decode heads cannot be exported')
        return Segmentor(model, ['logits'], values)
    if hasattr(model, 'bbox_head') or hasattr(model, 'roi_head'):
        from .detectors import Detector

        return Detector(model, values)
    if hasattr(model, 'head') and hasattr(model, 'extract_feat'):
        return Classifier(model, ['logits'], values)
    return Deployable(model, ['output'], values)
