"""Detectors of mmdet as plain functions from images to boxes, with non-maximum suppression inside.

What mmdet does picture by picture with lists of varying length happens here for the whole batch, in tensors of fixed
length: candidates that fall away keep their place with a score of -1. Exporters can say that, and runtimes are fast at
it.
"""

import math
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .models import Deployable

#: Most candidates for the last suppression of an R-CNN. TensorRT's TopK takes no more than 3839, its NMS 5000.
MAX_CANDIDATES = 3000


def _survivors(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> Tensor:
    kept = torch.zeros_like(scores)
    for i in range(boxes.shape[0]):
        candidates = (scores[i] > 0).nonzero().squeeze(1)
        best = torch.ops.torchvision.nms(boxes[i][candidates], scores[i][candidates], iou_threshold)[:limit]
        kept[i, candidates[best]] = 1
    return kept


@torch.library.custom_op('mmoverlock::nms', mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> Tensor:
    """Non-maximum suppression of a batch, as one operator that the ONNX exporters know how to write.

    Args:
        boxes (Tensor): (B, N, 4), corners.
        scores (Tensor): (B, N); boxes with a score of 0 or less do not take part.
        iou_threshold (float): A box falls to a better one that it overlaps by more than this.
        limit (int): Most boxes to keep of a picture.

    Returns:
        Tensor: (B, N), 1 where a box is kept and 0 elsewhere.
    """
    return _survivors(boxes, scores, iou_threshold, limit)


@nms.register_fake
def _(boxes, scores, iou_threshold, limit):
    return torch.empty_like(scores)


def nms_to_onnx(op, boxes, scores, iou_threshold: float, limit: int):
    """:func:`nms` in ONNX operators.

    Args:
        op: Makes a node when its attribute of the operator's name is called, as onnxscript's opsets do.
    """
    numbers = [op.Constant(value_ints=[limit]), op.Constant(value_floats=[iou_threshold])]
    chosen = op.NonMaxSuppression(
        boxes, op.Unsqueeze(scores, op.Constant(value_ints=[1])), *numbers, op.Constant(value_floats=[0.0])
    )
    place = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)  # (picture, class, box) without the class
    ones = op.Expand(op.Constant(value_floats=[1.0]), op.Gather(op.Shape(chosen), op.Constant(value_ints=[0]), axis=0))
    return op.ScatterND(op.Mul(scores, op.Constant(value_floats=[0.0])), place, ones)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """(B, N, C) by (B, K) to (B, K, C)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _row_and_column(index: Tensor, width: int) -> Tuple[Tensor, Tensor]:
    """Places in a flattened table; floor division and remainder take a dozen ONNX nodes, for negative numbers."""
    row = torch.div(index, width, rounding_mode='trunc')
    return row, index - row * width


def decode(coder: nn.Module, boxes: Tensor, deltas: Tensor, size: Sequence[int]) -> Tensor:
    """mmdet's ``DeltaXYWHBBoxCoder.decode``, for sizes that a graph leaves open.

    Args:
        coder (nn.Module): Its settings are read.
        boxes (Tensor): (..., 4), corners of what is moved.
        deltas (Tensor): (..., 4), what the network says.
        size (Sequence[int]): Height and width to clip at.

    Returns:
        Tensor: (..., 4), corners.
    """
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    extent = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5 + extent * deltas[..., :2]
    limit = abs(math.log(16 / 1000))  # mmdet's: a box grows to 62.5 times its anchor at most
    half = extent * deltas[..., 2:].clamp(-limit, limit).exp() * 0.5
    boxes = torch.cat([centre - half, centre + half], -1)
    if not coder.clip_border:
        return boxes
    one = boxes.new_ones(())
    height, width = size
    return torch.minimum(boxes.clamp(min=0), torch.stack([one * width, one * height] * 2))


def dense_candidates(
    head: nn.Module, features: Sequence[Tensor], size: Sequence[int], by_level: bool
) -> Tuple[Tensor, Tensor, Tensor]:
    """The best boxes of each level of an anchor head, before suppression.

    Args:
        head (nn.Module): RetinaNet's head or an RPN.
        features (Sequence[Tensor]): What the head looks at.
        size (Sequence[int]): Height and width of the image.
        by_level (bool): Boxes compete with those of their level (RPN) instead of their class.

    Returns:
        tuple[Tensor, Tensor, Tensor]: boxes (B, K, 4), scores (B, K), group in which they compete (B, K).
    """
    number, threshold = head.test_cfg.nms_pre, head.test_cfg.get('score_thr', 0)
    maps, moves = head(features)
    priors = head.prior_generator.grid_priors([m.shape[-2:] for m in maps], device=maps[0].device)
    levels = []
    for level, (scores, deltas, anchors) in enumerate(zip(maps, moves, priors)):
        batch, classes = scores.shape[0], head.cls_out_channels
        scores = scores.permute(0, 2, 3, 1).reshape(batch, -1, classes).sigmoid()
        deltas = deltas.permute(0, 2, 3, 1).reshape(batch, -1, 4)
        scores = torch.where(scores > threshold, scores, -1.0)
        # A small picture may have fewer anchors than candidates are asked for, and a graph asks for a fixed number.
        spare = -(-number // classes)
        scores = F.pad(scores, (0, 0, 0, spare), value=-1.0).flatten(1)
        deltas, anchors = F.pad(deltas, (0, 0, 0, spare)), F.pad(anchors, (0, 0, 0, spare))
        scores, best = scores.topk(number)
        anchor, label = _row_and_column(best, classes)
        boxes = decode(head.bbox_coder, anchors[anchor], _pick(deltas, anchor), size)
        levels.append((boxes, scores, torch.full_like(label, level) if by_level else label))
    return tuple(torch.cat(parts, 1) for parts in zip(*levels))


def suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, candidates: int, nms_cfg: dict, number: int, min_size: float = -1
) -> Tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression within groups, and the best of what is left.

    As in mmcv's ``batched_nms``, groups are moved apart by more than the largest coordinate: they never overlap.

    Args:
        boxes (Tensor): (B, K, 4).
        scores (Tensor): (B, K); with 0 or less they do not take part.
        groups (Tensor): (B, K), label or level.
        candidates (int): K, known where the graph is made.
        nms_cfg (dict): mmdet's ``nms`` of a ``test_cfg``.
        number (int): Most to keep.
        min_size (float): Boxes that are not wider and higher than this fall away; not below 0. Defaults to -1.

    Returns:
        tuple[Tensor, Tensor, Tensor]: boxes (B, M, 4), scores (B, M), groups (B, M), best first, M the smaller of K and
        ``number``. Unused places have a score of -1.
    """
    if min_size >= 0:
        extent = boxes[..., 2:] - boxes[..., :2]
        scores = torch.where((extent[..., 0] > min_size) & (extent[..., 1] > min_size), scores, -1.0)
    apart = boxes
    if not nms_cfg.get('class_agnostic', False):
        reach = torch.where((scores > 0)[..., None], boxes, 0.0).flatten(1).amax(1) + 1
        apart = boxes + (groups.to(boxes.dtype) * reach[:, None])[..., None]
    number = min(number, candidates)
    operator = nms
    if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
        operator = torch.jit.script(_survivors)  # TorchScript keeps its loop, and needs nothing of ours
    kept = operator(apart, scores, float(nms_cfg['iou_threshold']), number)
    scores, best = torch.where(kept > 0, scores, -1.0).topk(number)
    return _pick(boxes, best), scores, groups.gather(1, best)


def roi_features(extractor: nn.Module, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """mmdet's ``SingleRoIExtractor`` without lists of boxes by level.

    Each level pools all boxes. Those of other levels are empty for it, which costs next to nothing.

    Args:
        extractor (nn.Module): Its settings are read.
        features (Sequence[Tensor]): One (B, C, H, W) a level.
        boxes (Tensor): (B, K, 4).

    Returns:
        Tensor: (B * K, C, h, w).
    """
    from torchvision.ops import roi_align

    picture = torch.arange(boxes.shape[0], device=boxes.device).to(boxes.dtype)
    picture = picture[:, None, None].expand(-1, boxes.shape[1], 1)
    rois = torch.cat([picture, boxes], -1).flatten(0, 1)
    levels = extractor.map_roi_levels(rois, extractor.num_inputs)
    pooled = None
    for level, (layer, feature) in enumerate(zip(extractor.roi_layers, features)):
        here = (levels == level)[:, None]
        own = torch.cat([rois[:, :1], torch.where(here, rois[:, 1:], 0.0)], 1)
        part = roi_align(feature, own, layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned)
        pooled = part if pooled is None else torch.where(here[:, :, None, None], part, pooled)
    return pooled


def _stages(modules) -> List[nn.Module]:
    """A cascade's modules, or the one of a plain R-CNN."""
    return list(modules) if isinstance(modules, nn.ModuleList) else [modules]


def paste_masks(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Masks of boxes as masks of the picture.

    Args:
        masks (Tensor): (N, h, w), probabilities within the box.
        boxes (Tensor): (N, 4), corners in pixels.
        size (Sequence[int]): Height and width of the picture.

    Returns:
        Tensor: (N, height, width), probabilities; mmdet takes those from 0.5 on.
    """
    height, width = size
    x1, y1, x2, y2 = (edge[:, None] for edge in boxes.unbind(1))
    across = (torch.arange(width, device=boxes.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
    down = (torch.arange(height, device=boxes.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
    shape = (len(boxes), height, width)
    grid = torch.stack([across[:, None, :].expand(shape), down[:, :, None].expand(shape)], -1)
    grid = torch.where(torch.isinf(grid), 0.0, grid)  # a box without extent, as mmdet has it
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def check_supported(model: nn.Module) -> None:
    """Whether :class:`Detector` says what mmdet's ``predict`` does.

    Raises:
        ValueError: It does not; the message names the part.
    """
    dense = getattr(model, 'rpn_head', None) if hasattr(model, 'roi_head') else getattr(model, 'bbox_head', None)
    parts = [(dense, ('RetinaHead', 'RPNHead'))]
    configs = [('test_cfg.rpn' if hasattr(model, 'roi_head') else 'test_cfg', getattr(dense, 'test_cfg', None) or {})]
    heads = []
    if hasattr(model, 'roi_head'):
        roi = model.roi_head
        heads = _stages(roi.bbox_head)
        parts += [(roi, ('StandardRoIHead', 'CascadeRoIHead'))]
        parts += [
            (head, ('BBoxHead', 'ConvFCBBoxHead', 'Shared2FCBBoxHead', 'Shared4Conv1FCBBoxHead')) for head in heads
        ]
        extractors = _stages(roi.bbox_roi_extractor)
        if roi.with_mask:
            parts += [(head, ('FCNMaskHead',)) for head in _stages(roi.mask_head)]
            extractors = extractors + _stages(roi.mask_roi_extractor)
        parts += [(extractor, ('SingleRoIExtractor',)) for extractor in extractors]
        parts += [(layer, ('RoIAlign',)) for extractor in extractors for layer in extractor.roi_layers]
        configs.append(('test_cfg.rcnn', roi.test_cfg))
    parts += [(getattr(head, 'bbox_coder', None), ('DeltaXYWHBBoxCoder',)) for head in [dense, *heads]]
    for part, names in parts:
        if type(part).__name__ not in names:
            raise ValueError(
                f'{type(model).__name__} with a {type(part).__name__} cannot be exported whole (known are '
                f'{", ".join(names)}); export its backbone (--backbone, backbone_only=True)'
            )
    if not dense.use_sigmoid_cls:
        raise ValueError(f'a {type(dense).__name__} with a softmax cannot be exported whole')
    if any(head.custom_cls_channels for head in heads):
        raise ValueError('box heads with a classification loss that brings its own activation cannot be exported whole')
    for name, cfg in configs:
        kind = (cfg.get('nms') or {}).get('type', 'nms')
        if kind != 'nms' or 'iou_threshold' not in (cfg.get('nms') or {}):
            raise ValueError(f"{name}.nms must be dict(type='nms', iou_threshold=...) for an export, not {kind!r}")


class Detector(Deployable):
    """RetinaNet, Faster, Mask and Cascade R-CNN of mmdet, as their ``predict`` finds boxes.

    The outputs have as many places as the config's ``max_per_img``, best first; ``count`` says how many are used.
    ``boxes`` (B, M, 4), corners in pixels of the input; ``scores`` (B, M), unused 0; ``labels`` (B, M), unused -1;
    ``count`` (B,); ``masks`` (B, M, 28, 28), probabilities within the box, where there is a mask head:
    :func:`paste_masks` lays them over the picture.

    Args:
        model (nn.Module): A detector of mmdet.
        normalize (tuple, optional): As in :class:`Deployable`. Defaults to None.

    Raises:
        ValueError: The detector has a part that is not known here.
    """

    def __init__(self, model: nn.Module, normalize: Optional[tuple] = None) -> None:
        check_supported(model)
        two_stage = hasattr(model, 'roi_head')
        masks = two_stage and model.roi_head.with_mask
        super().__init__(model, ['boxes', 'scores', 'labels', 'count'] + ['masks'] * masks, normalize)
        self.two_stage = two_stage
        self.levels = (model.rpn_head if two_stage else model.bbox_head).prior_generator.num_levels

    def output_shapes(self, batch) -> list:
        """Shapes of the outputs in their order, for a batch size or its name."""
        dense = (self.model.rpn_head if self.two_stage else self.model.bbox_head).test_cfg
        places = min(dense.max_per_img, dense.nms_pre * self.levels)
        shapes = []
        if self.two_stage:
            roi = self.model.roi_head
            places = min(roi.test_cfg.max_per_img, MAX_CANDIDATES, places * _stages(roi.bbox_head)[-1].num_classes)
            shapes = [[batch, places, None, None]] * roi.with_mask
        return [[batch, places, 4], [batch, places], [batch, places], [batch], *shapes]

    def run(self, image: Tensor) -> Sequence[Tensor]:
        size = image.shape[2:]
        features = self.model.extract_feat(image)
        head = self.model.rpn_head if self.two_stage else self.model.bbox_head
        cfg = head.test_cfg
        found = dense_candidates(head, features, size, self.two_stage)
        candidates = cfg.nms_pre * self.levels
        boxes, scores, labels = suppress(*found, candidates, cfg.nms, cfg.max_per_img, cfg.get('min_bbox_size', -1))
        if self.two_stage:
            boxes, scores, labels = self.look_closer(
                features, size, boxes, scores > 0, min(cfg.max_per_img, candidates)
            )
        used = scores > 0
        out = [
            torch.where(used[..., None], boxes, 0.0),
            torch.where(used, scores, 0.0),
            torch.where(used, labels, -1),
            used.sum(1),
        ]
        if 'masks' in self.output_names:
            out.append(self.masks(features, out[0], labels))
        return out

    def look_closer(
        self, features: Sequence[Tensor], size: Sequence[int], boxes: Tensor, used: Tensor, number: int
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Second stage: proposals (B, P, 4), of which some are used (B, P), to boxes, scores and labels."""
        roi, logits = self.model.roi_head, 0
        heads, batch = _stages(roi.bbox_head), boxes.shape[0]
        for stage, (head, extractor) in enumerate(zip(heads, _stages(roi.bbox_roi_extractor))):
            stage_logits, deltas = head(roi_features(extractor, features, boxes))
            stage_logits = stage_logits.reshape(batch, number, head.num_classes + 1)
            logits = logits + stage_logits
            deltas = deltas.reshape(batch, number * (1 if head.reg_class_agnostic else head.num_classes), 4)
            if stage + 1 < len(heads):
                if not head.reg_class_agnostic:
                    own = stage_logits[..., :-1].argmax(-1)
                    own = own + torch.arange(number, device=own.device) * head.num_classes
                    deltas = _pick(deltas, own)
                boxes = decode(head.bbox_coder, boxes, deltas, size)
        classes, cfg = head.num_classes, roi.test_cfg
        scores = (logits / len(heads)).softmax(-1)[..., :-1]
        scores = torch.where(used[..., None] & (scores > cfg.score_thr), scores, -1.0).flatten(1)
        candidates = min(MAX_CANDIDATES, number * classes)
        scores, best = scores.topk(candidates)
        box, label = _row_and_column(best, classes)
        deltas = _pick(deltas, box if head.reg_class_agnostic else best)
        boxes = decode(head.bbox_coder, _pick(boxes, box), deltas, size)
        return suppress(boxes, scores, label, candidates, cfg.nms, cfg.max_per_img)

    def masks(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Probabilities of the boxes' own classes, (B, M, h, w)."""
        roi, masks = self.model.roi_head, []
        for head, extractor in zip(_stages(roi.mask_head), _stages(roi.mask_roi_extractor)):
            logits = head(roi_features(extractor, features, boxes))
            own = torch.zeros_like(labels) if head.class_agnostic else labels
            place = torch.arange(logits.shape[0], device=labels.device) * logits.shape[1] + own.flatten()
            masks.append(logits.flatten(0, 1)[place].sigmoid())
        mean = sum(masks) / len(masks)
        return mean.reshape(*labels.shape, *mean.shape[1:])

    def unpack(self, outputs: Sequence[Tensor], size: Sequence[int]) -> list:
        """Outputs as mmdet has them: a list of ``InstanceData`` with ``bboxes``, ``scores``, ``labels`` and ``masks``.

        And ``mask_margins``: how far a pixel's probability is from where it would count otherwise.
        """
        from mmengine.structures import InstanceData

        pictures = []
        for boxes, scores, labels, count, *masks in zip(*outputs):
            fields = dict(bboxes=boxes[:count], scores=scores[:count], labels=labels[:count])
            if masks:
                threshold = self.model.roi_head.test_cfg.mask_thr_binary
                pasted = paste_masks(masks[0][:count], fields['bboxes'], size)
                fields.update(masks=pasted >= threshold, mask_margins=(pasted - threshold).abs())
            pictures.append(InstanceData(**fields))
        return pictures

    def predict(self, image: Tensor) -> list:
        """What mmdet's own ``predict`` finds in the same images: a list of ``InstanceData``."""
        from mmdet.structures import DetDataSample

        if self.normalizes:
            image = (image - self.mean) / self.std
        size = tuple(image.shape[2:])
        meta = dict(img_shape=size, ori_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
        samples = self.model.predict(image, [DetDataSample(metainfo=dict(meta)) for _ in image], rescale=False)
        return [sample.pred_instances for sample in samples]
