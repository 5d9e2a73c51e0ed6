"""Exported files against PyTorch."""

import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F
from common import TINY, randomise

from mmoverlock import ContMixBlock, OverLoCK, compat, deploy
from mmoverlock.deploy import exporters, tensorrt

ARCH = dict(TINY, depths=(1, 1, 1, 1), focus_depths=(1, 1), kernel_sizes=(5, 5, 5, 5), small_kernel=3)
LEAST = 129  # pixels, from which on no map has to be enlarged
SIZES = [(1, 130, 129), (3, 131, 170), (2, 160, 144)]

onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('onnx', 'onnxruntime')),
    reason='onnx or onnxruntime is not installed',
)
onnxscript = pytest.mark.skipif(importlib.util.find_spec('onnxscript') is None, reason='onnxscript is not installed')


def images(sizes, channels=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b, channels, h, w, generator=generator) for b, h, w in sizes]


def mm_model(task):
    """A whole classifier or segmentor, tiny."""
    compat.apply()
    from mmengine.registry import MODELS

    backbone = dict(type='mmoverlock.OverLoCK', arch=ARCH)
    if task == 'cls':
        pytest.importorskip('mmpretrain.models')
        return MODELS.build(
            dict(
                type='mmpretrain.ImageClassifier',
                data_preprocessor=dict(
                    type='mmpretrain.ClsDataPreprocessor', mean=[120.0, 110.0, 100.0], std=[60.0, 50.0, 40.0]
                ),
                backbone=dict(backbone, out_type='classification'),
                head=dict(type='mmoverlock.OverLoCKClsHead', num_classes=5, in_channels=(32, 40), hidden_channels=16),
            )
        )
    pytest.importorskip('mmseg.models')
    return MODELS.build(
        dict(
            type='mmseg.EncoderDecoder',
            data_preprocessor=dict(type='mmseg.SegDataPreProcessor', mean=[127.0] * 3, std=[60.0] * 3),
            backbone=backbone,
            decode_head=dict(
                type='mmseg.UPerHead',
                in_channels=[8, 16, 32, 40],
                in_index=[0, 1, 2, 3],
                channels=8,
                pool_scales=(1, 2, 3, 6),
                num_classes=3,
                norm_cfg=dict(type='BN'),
                align_corners=False,
                loss_decode=dict(type='mmseg.CrossEntropyLoss'),
            ),
            train_cfg=dict(),
            test_cfg=dict(mode='whole'),
        )
    )


MODELS = dict(
    det=lambda: OverLoCK(ARCH, fuse_overview=True),
    seg=lambda: OverLoCK(ARCH),
    cls=lambda: mm_model('cls'),
    upernet=lambda: mm_model('seg'),
)


def build(name, **kwargs):
    torch.manual_seed(0)
    return deploy.deployable(randomise(MODELS[name]()), **kwargs)


def agree(model, path, format, sizes=SIZES):
    rows = deploy.compare(model, deploy.load(str(path), format), images(sizes))
    assert [row.shape for row in rows] == [(b, 3, h, w) for b, h, w in sizes]
    assert max(row.error for row in rows) <= 1e-4, rows


@onnx
@pytest.mark.parametrize('name', MODELS)
def test_onnx_of_any_size(name, tmp_path):
    model, path = build(name), tmp_path / 'a.onnx'
    taken = exporters.export_onnx(
        model, str(path), (136, 152), opset=17, exporter='torchscript', metadata=dict(mean=[1, 2])
    )
    assert taken == 'torchscript'
    agree(model, path, 'onnx')
    import onnx

    proto = onnx.load(path)
    (image,), outputs = proto.graph.input, proto.graph.output
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == ['batch', 3, 'height', 'width']
    assert [o.name for o in outputs] == list(model.output_names)
    assert {o.domain: o.version for o in proto.opset_import}[''] == 17
    assert {p.key: p.value for p in proto.metadata_props} == dict(mean='[1, 2]')
    assert tensorrt.problems(path) == []


@onnx
def test_onnx_refuses_a_size_that_it_cannot_serve(tmp_path):
    """A map smaller than the window ends in an error of the runtime, not in numbers."""
    model, path = build('seg'), tmp_path / 'a.onnx'
    deploy.export(model, str(path), 'onnx', (136, 152), exporter='torchscript')
    run = deploy.load(str(path), 'onnx')
    for size in [(1, LEAST - 1, 160), (1, 160, LEAST - 1), (1, 64, 64)]:
        with pytest.raises(Exception, match='out of data bounds|out of bounds'):
            run(*images([size]))


@pytest.fixture(scope='module')
def block():
    """The block has all that is difficult about open sizes. On a whole network, torch.export takes a minute."""
    torch.manual_seed(0)
    return deploy.deployable(randomise(ContMixBlock(8, num_heads=1, kernel_size=5, smk_size=3, mlp_ratio=1)))


BLOCK_SIZES = [(1, 5, 5), (3, 9, 6), (2, 17, 20)]


@onnx
@onnxscript
def test_onnx_by_the_dynamo_exporter(block, tmp_path):
    path = str(tmp_path / 'a.onnx')
    assert 'dynamo' in deploy.export(block, path, 'onnx', (6, 8), exporter='dynamo')
    assert tensorrt.problems(path) == []
    run = deploy.load(path, 'onnx')
    rows = deploy.compare(block, run, images(BLOCK_SIZES, channels=8))
    assert max(row.error for row in rows) <= 1e-4, rows
    with pytest.raises(Exception, match='out of data bounds|out of bounds'):
        run(*images([(1, 4, 9)], channels=8))


def test_torch_export_of_any_size(block, tmp_path):
    if not hasattr(torch.compiler, 'is_exporting'):
        pytest.skip('this torch cannot leave sizes open')
    path = str(tmp_path / 'a.pt2')
    deploy.export(block, path, 'export', (6, 8))
    run = deploy.load(path, 'export')
    rows = deploy.compare(block, run, images(BLOCK_SIZES, channels=8))
    assert max(row.error for row in rows) <= 1e-4, rows
    with pytest.raises(Exception, match='Guard failed'):
        run(*images([(1, 4, 9)], channels=8))


def test_smallest_size(block):
    assert deploy.smallest_size(block) == 5
    assert deploy.smallest_size(OverLoCK(ARCH)) == LEAST
    assert deploy.smallest_size(torch.nn.Identity()) == 1


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['det', 'upernet'])
def test_torchscript_of_any_size(name, tmp_path):
    model, path = build(name), tmp_path / 'a.pt'
    deploy.export(model, str(path), 'torchscript', (136, 152))
    agree(model, path, 'torchscript')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('size', [64, 80])
def test_small_pictures_of_a_fixed_size(size, tmp_path):
    """Maps that are enlarged to the window and pooled back."""
    model, path = build('det'), tmp_path / 'a.pt'
    deploy.export(model, str(path), 'torchscript', (size, size + 9), dynamic='batch')
    agree(model, path, 'torchscript', [(1, size, size + 9), (3, size, size + 9)])


def test_what_cannot_be_exported_is_said(monkeypatch, tmp_path):
    model, path = build('seg'), str(tmp_path / 'a')
    with pytest.raises(deploy.ExportError, match=r"starts at 129 pixels.*64x160.*dynamic='batch'"):
        deploy.export(model, path, 'torchscript', (64, 160))
    with pytest.raises(deploy.ExportError, match='format must be one of onnx'):
        deploy.export(model, path, 'caffe', (160, 160))
    with pytest.raises(deploy.ExportError, match='only for ONNX'):
        deploy.export(model, path, 'torchscript', (160, 160), opset=17)
    with pytest.raises(ValueError, match='no data preprocessor'):
        deploy.deployable(OverLoCK(ARCH), normalize=True)
    with pytest.raises(ValueError, match='no backbone'):
        deploy.deployable(torch.nn.Conv2d(3, 3, 1), backbone_only=True)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(deploy.ExportError, match=r'onnx not installed: pip install "mmoverlock\[deploy\]"'):
        deploy.export(model, path, 'onnx', (160, 160))
    assert not list(tmp_path.iterdir())


def test_normalisation_inside():
    whole = randomise(mm_model('cls'))
    inside, outside = (deploy.deployable(whole, normalize=flag) for flag in (True, False))
    picture = torch.rand(1, 3, 136, 136) * 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([120.0, 110.0, 100.0], [60.0, 50.0, 40.0]))
    torch.testing.assert_close(inside(picture), outside((picture - mean) / std))
    assert not inside.training and whole.training, 'the model itself stays as it is'
    assert outside.model.backbone.stage1[0].dwconv.merged and not whole.backbone.stage1[0].dwconv.merged


def test_a_detector_gives_its_backbone():
    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.bbox_head = OverLoCK(ARCH), torch.nn.Identity()

    with pytest.raises(ValueError, match='Detector with a Identity cannot be exported whole.*--backbone'):
        deploy.deployable(Detector())
    assert deploy.deployable(Detector(), backbone_only=True).output_names == (
        'stride4',
        'stride8',
        'stride16',
        'stride32',
    )


@pytest.mark.parametrize('size', [(7, 7), (17, 9), (6, 30)])
@pytest.mark.parametrize('cells', [7, 1, (3, 6), (None, 2)])
def test_pooling_is_pytorchs(size, cells):
    x = torch.randn(2, 3, *size, dtype=torch.double)
    torch.testing.assert_close(
        exporters.adaptive_avg_pool2d(x, cells), F.adaptive_avg_pool2d(x, cells), rtol=1e-12, atol=1e-12
    )


def test_difference_sees_what_differs():
    from mmoverlock.deploy.check import difference

    a = torch.full((2, 3), 10.0)
    assert difference([a], [a]) == 0
    assert difference([a], [a + 1]) == pytest.approx(0.1)
    assert difference([a / 100], [a / 100 + 0.5]) == pytest.approx(0.5)
    for wrong in ([a[:1]], [a, a], [a * float('nan')]):
        assert difference([a], wrong) == float('inf')


def test_nothing_stays_changed():
    before = F.adaptive_avg_pool2d, dict(exporters.os.environ)
    with exporters.recording():
        assert F.adaptive_avg_pool2d is exporters.adaptive_avg_pool2d and not torch.is_grad_enabled()
        warnings.warn('not seen', UserWarning, stacklevel=1)
    assert (F.adaptive_avg_pool2d, dict(exporters.os.environ)) == before and torch.is_grad_enabled()


@onnx
def test_what_tensorrt_lacks_is_spelled_out(tmp_path):
    """Integers that are clipped, with one bound or two, and booleans that are compared."""
    import numpy as np
    import onnx
    import onnxruntime

    parts = """
        <ir_version: 9, opset_import: ["" : 18]>
        g (int64[N] x, bool[N] a, bool[N] b) => (int64[N] both, int64[N] low, bool[N] same)
        <int64 two = {2}, int64 five = {5}> {
            y = Identity(x)  c = Identity(a)
            both = Clip(y, two, five)  low = Clip(y, two)  same = Equal(c, b)
        }"""
    proto = onnx.parser.parse_model(parts)
    feed = dict(x=np.arange(8), a=np.arange(8) % 2 > 0, b=np.arange(8) % 3 > 0)
    before = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feed)
    exporters._spell_out(proto)
    assert not {'Clip', 'Equal'} & {node.op_type for node in proto.graph.node}
    after = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feed)
    assert all((x == y).all() for x, y in zip(before, after))
