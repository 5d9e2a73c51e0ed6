"""Whole detectors, with their non-maximum suppression, against mmdet's own predict."""

import importlib.util
import warnings

import pytest
import torch
from common import TINY

from mmoverlock import compat, deploy
from mmoverlock.deploy import detectors, exporters, tensorrt
from mmoverlock.deploy.check import detection_difference

pytest.importorskip('torchvision')
if importlib.util.find_spec('mmdet') is None:
    pytest.skip('mmdet is not installed', allow_module_level=True)
onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('onnx', 'onnxruntime')),
    reason='onnx or onnxruntime is not installed',
)
pytestmark = pytest.mark.filterwarnings('ignore')

ARCH = dict(TINY, depths=(1, 1, 1, 1), focus_depths=(1, 1), kernel_sizes=(5, 5, 5, 5), small_kernel=3)
SIZES = [(1, 130, 129), (3, 131, 170), (2, 160, 144)]
CLASSES = 3

RETINANET = dict(
    neck=dict(in_channels=[16, 32, 40], out_channels=16, start_level=0),
    bbox_head=dict(in_channels=16, feat_channels=16, num_classes=CLASSES, stacked_convs=1),
    # Fewer than the coarsest maps have, and more: both happen.
    test_cfg=dict(nms_pre=100, max_per_img=50, score_thr=0.02),
)
STAGE = dict(in_channels=16, fc_out_channels=32, num_classes=CLASSES)
RCNN = dict(
    neck=dict(in_channels=[8, 16, 32, 40], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=STAGE,
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=CLASSES),
    ),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=60), rcnn=dict(max_per_img=40)),
)


def build(name, **changes):
    """A tiny detector of mmdet whose random heads tell boxes, scores and classes apart."""
    compat.apply()
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope('mmdet')
    whole = Config.fromstring(f"_base_ = 'mmdet::_base_/models/{name}_r50_fpn.py'", '.py')
    cfg = whole.model
    cfg.backbone = dict(type='mmoverlock.OverLoCK', arch=ARCH, fuse_overview=True)
    if name == 'retinanet':
        cfg.backbone.out_indices = (1, 2, 3)
    tiny = {**(RETINANET if name == 'retinanet' else RCNN), **changes}
    if name.startswith('cascade'):  # a list of heads: merged one by one
        for head in cfg.roi_head.bbox_head:
            head.update(STAGE)
        tiny['roi_head'] = {k: v for k, v in tiny['roi_head'].items() if k != 'bbox_head'}
    whole.merge_from_dict(dict(model=tiny))
    model = MODELS.build(whole.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if not key.startswith('backbone'):
                scale = (2 / weight[0].numel()) ** 0.5 if weight.dim() > 1 else 0.1
                if any(part in key for part in ('_reg.', 'retina_cls', 'rpn_cls')):
                    scale /= 5  # or boxes multiply rounding errors, and scores of 1 leave the order open
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model


def images(sizes=SIZES):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b, 3, h, w, generator=generator) for b, h, w in sizes]


@pytest.fixture(scope='module')
def models():
    """Each detector once, as a function."""
    torch.manual_seed(0)
    return {name: deploy.deployable(build(name)) for name in ('retinanet', 'mask-rcnn', 'cascade-mask-rcnn')}


def agree(model, run, detections):
    rows = deploy.compare(model, run, images())
    assert max(row.error for row in rows) <= 1e-4, rows
    assert sum(row.detections for row in rows) >= detections, rows


@onnx
@pytest.mark.parametrize('name', ['retinanet', 'mask-rcnn'])
def test_onnx_finds_what_mmdet_finds(models, name, tmp_path):
    import onnx

    model, path = models[name], str(tmp_path / 'a.onnx')
    deploy.export(model, path, 'onnx', (136, 152), exporter='torchscript', opset=17)
    agree(model, deploy.load(path, 'onnx'), detections=150)
    graph = onnx.load(path).graph
    sizes = {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in graph.output}
    number = 50 if name == 'retinanet' else 40
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim][2:] == ['height', 'width']
    assert sizes['boxes'] == ['batch', number, 4] and sizes['labels'] == sizes['scores'] == ['batch', number]
    assert sizes['count'] == ['batch'] and ('masks' in sizes) == (name != 'retinanet')
    assert {node.domain for node in graph.node} == {''}, 'standard operators alone'
    assert tensorrt.problems(path) == []


def test_torchscript_finds_what_mmdet_finds(models, tmp_path):
    model, path = models['cascade-mask-rcnn'], str(tmp_path / 'a.pt')
    deploy.export(model, path, 'torchscript', (136, 152))
    agree(model, deploy.load(path, 'torchscript'), detections=150)
    assert 'mmoverlock.nms' not in torch.jit.load(path).code, 'needs torchvision, but nothing of ours'


def test_the_detections_tell_something(models):
    """Several classes, distinct boxes and scores, masks that are neither empty nor full."""
    (image,) = images(SIZES[-1:])
    for name, model in models.items():
        for found in model.predict(image):
            assert len(found) >= 20 and len(found.labels.unique()) >= 2
            assert len(found.scores.unique()) > 0.9 * len(found)
            assert len(found.bboxes.round().unique(dim=0)) > 0.5 * len(found)
            if name != 'retinanet':
                inside = found.masks.flatten(1).sum(1)
                assert 0 < inside.min() and inside.float().std() > 1


@pytest.mark.parametrize('score_thr', [0.3, 0.99])
def test_few_and_no_detections(models, score_thr):
    """Places that are not used: no box, label -1, score 0."""
    model, (image,) = models['mask-rcnn'], images([(2, 131, 170)])
    cfg = model.model.roi_head.test_cfg
    before, cfg.score_thr = cfg.score_thr, score_thr
    try:
        with torch.no_grad():
            expected, out = model.predict(image), model(image)
    finally:
        cfg.score_thr = before
    boxes, scores, labels, count, masks = out
    assert count.tolist() == [len(found) for found in expected] and count.max() < 40
    assert (count.min() > 0) == (score_thr < 0.9)
    assert boxes.shape == (2, 40, 4) and masks.shape == (2, 40, 28, 28)
    unused = torch.arange(40) >= count[:, None]
    assert not boxes[unused].any() and not scores[unused].any() and (labels[unused] == -1).all()
    assert detection_difference(expected, model.unpack(out, (131, 170))) <= 1e-6


def test_agnostic_heads():
    """One box and one mask for all classes, and suppression across classes."""
    torch.manual_seed(0)
    rcnn = dict(RCNN['test_cfg']['rcnn'], nms=dict(type='nms', iou_threshold=0.4, class_agnostic=True))
    roi_head = dict(RCNN['roi_head'], bbox_head=dict(STAGE, reg_class_agnostic=True))
    roi_head['mask_head'] = dict(roi_head['mask_head'], class_agnostic=True)
    changes = dict(roi_head=roi_head, test_cfg=dict(RCNN['test_cfg'], rcnn=rcnn))
    model = deploy.deployable(build('mask-rcnn', **changes))
    (image,) = images([(2, 131, 170)])
    with torch.no_grad():
        expected, found = model.predict(image), model.unpack(model(image), (131, 170))
    assert sum(map(len, expected)) >= 10
    assert detection_difference(expected, found) <= 1e-6


class Suppression(torch.nn.Module):
    """The suppression alone, as a model."""

    output_names, normalizes = ('boxes', 'scores', 'labels'), False

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 1, 1)  # says how many channels an image has

    def forward(self, image):
        corner = image[:, :2].flatten(2).transpose(1, 2).abs() * 20
        boxes = torch.cat([corner, corner + 15], -1)
        scores, labels = image[:, 2].flatten(1), (image[:, 0].flatten(1) > 0).long()
        return detectors.suppress(boxes, scores, labels, 48, dict(type='nms', iou_threshold=0.3), 20)


@onnx
@pytest.mark.parametrize('exporter', ['torchscript', 'dynamo'])
def test_suppression_by_both_exporters(exporter, tmp_path):
    if exporter == 'dynamo':
        pytest.importorskip('onnxscript')
    model, path = Suppression().eval(), str(tmp_path / 'a.onnx')
    exporters.export_onnx(model, path, (6, 8), dynamic='batch', exporter=exporter)
    run = deploy.load(path, 'onnx')
    for image in images([(1, 6, 8), (3, 6, 8)]):
        expected, found = model(image), run(image)
        assert 5 < (expected[1] > 0).sum(1).min(), 'something is kept'
        assert (expected[1] > 0).sum(1).max() < (image[:, 2] > 0).flatten(1).sum(1).min(), 'and something falls'
        used = expected[1] > 0
        for a, b in zip(expected, found):
            torch.testing.assert_close(a[used], b[used])
        torch.testing.assert_close(expected[1], found[1])


def test_suppression_is_mmcvs():
    from mmcv.ops import batched_nms

    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(1, 200, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + torch.rand(1, 200, 2, generator=generator) * 60], -1)
    scores, labels = torch.rand(1, 200, generator=generator), torch.randint(3, (1, 200), generator=generator)
    cfg = dict(type='nms', iou_threshold=0.2)
    dets, keep = batched_nms(boxes[0], scores[0], labels[0], cfg)
    found = detectors.suppress(boxes, scores, labels, 200, cfg, 150)
    assert 20 < len(keep) < 150 and (found[1] > 0).sum() == len(keep)
    torch.testing.assert_close(found[0][0, : len(keep)], dets[:, :4])
    torch.testing.assert_close(found[2][0, : len(keep)], labels[0][keep])


def test_masks_are_pasted_as_mmdet_does():
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(4, 28, 28, generator=generator)
    boxes = torch.tensor([[0.0, 0, 40, 30], [10.3, 5.2, 20.9, 29.7], [38, 28, 40, 30], [3, 3, 3, 9]])
    expected, _ = _do_paste_mask(masks[:, None], boxes, 30, 40, skip_empty=False)
    torch.testing.assert_close(deploy.paste_masks(masks, boxes, (30, 40)), expected)


def test_differences_are_seen(models):
    """A moved box, another score or label, a missing detection, another mask."""
    (image,) = images([(1, 131, 170)])
    model = models['mask-rcnn']
    with torch.no_grad():
        (a,) = model.unpack(model(image), (131, 170))
    assert detection_difference([a], [a[torch.arange(len(a)).flip(0)]]) == 0, 'the order does not count'

    def changed(**fields):
        other = a[torch.arange(len(a))]
        for key, value in fields.items():
            setattr(other, key, value)
        return detection_difference([a], [other])

    assert changed(bboxes=a.bboxes + torch.eye(len(a), 4) * 3) > 1e-3
    assert changed(scores=a.scores + 0.01) == pytest.approx(0.01, rel=0.1)
    assert changed(labels=(a.labels + 1) % CLASSES) == float('inf')
    assert changed(masks=~a.masks) > 0.1
    assert detection_difference([a], [a[1:]]) == float('inf')


def test_what_cannot_be_exported_is_said(models, tmp_path):
    from mmdet.models import ATSSHead

    model = build('retinanet')
    model.test_cfg.nms = model.bbox_head.test_cfg.nms = dict(type='soft_nms', iou_threshold=0.3)
    with pytest.raises(ValueError, match=r"test_cfg.nms must be dict\(type='nms'.*'soft_nms'"):
        deploy.deployable(model)
    model.bbox_head = ATSSHead(num_classes=2, in_channels=16)
    with pytest.raises(ValueError, match='ATSSHead cannot be exported whole.*RetinaHead.*--backbone'):
        deploy.deployable(model)
    assert deploy.deployable(model, backbone_only=True).output_names == ('stride8', 'stride16', 'stride32')
    with pytest.raises(deploy.ExportError, match='detectors go to onnx and torchscript'):
        deploy.export(models['retinanet'], str(tmp_path / 'a.pt2'), 'export', (136, 152))
    assert not list(tmp_path.iterdir())


def test_nothing_stays_registered(tmp_path):
    from torch.onnx._internal.torchscript_exporter.registration import registry

    with exporters._symbolics(17), warnings.catch_warnings():
        assert registry.is_registered_op('mmoverlock::nms', 17)
    assert not registry.is_registered_op('mmoverlock::nms', 17)


def test_predictions_in_the_original_picture(models):
    """A picture that was scaled and padded: boxes and masks come back at its own size."""
    from mmdet.structures import DetDataSample

    from mmoverlock.deploy import quantize

    model, (image,) = models['mask-rcnn'], images([(2, 160, 192)])
    meta = dict(ori_shape=(80, 96), img_shape=(160, 192), batch_input_shape=(160, 192), scale_factor=(2.0, 2.0))
    with torch.no_grad():
        expected = model.model.predict(image, [DetDataSample(metainfo=dict(meta)) for _ in image], rescale=True)
        samples = [DetDataSample(metainfo=dict(meta)) for _ in image]
        found = quantize.predictions(model, model.model, model(image), samples)
    expected, found = ([sample.pred_instances for sample in samples] for samples in (expected, found))
    assert found[0].masks.shape[1:] == (80, 96) and found[0].bboxes[:, 2].max() <= 96
    assert detection_difference(expected, found) <= 1e-4
