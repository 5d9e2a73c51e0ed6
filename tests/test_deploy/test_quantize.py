"""INT8 files, and predictions from a file's outputs."""

import importlib.util

import pytest
import torch
from mmengine.config import ConfigDict
from test_export import mm_model, randomise

from mmoverlock import deploy
from mmoverlock.deploy import quantize, tensorrt

onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('onnx', 'onnxruntime')),
    reason='onnx or onnxruntime is not installed',
)


def batches(number=3, size=24):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, size, size, generator=generator) for _ in range(number)]


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    """(function, its ONNX file): convolutions, a transposed one, a linear layer, a product of two activations."""
    pytest.importorskip('onnx')

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 32, 3, bias=False), torch.nn.BatchNorm2d(32)
            self.depthwise, self.up = torch.nn.Conv2d(32, 32, 3, groups=32), torch.nn.ConvTranspose2d(32, 16, 2, 2)
            self.fc = torch.nn.Linear(16, 5)

        def forward(self, x):
            x = self.depthwise(self.norm(self.conv(x)).relu())
            return self.fc(self.up(x).sigmoid().flatten(2).mean(2)), x.flatten(2) @ x.flatten(2).transpose(1, 2)

    torch.manual_seed(0)
    model = deploy.deployable(Net())
    model.output_names = ('logits', 'product')
    path = str(tmp_path_factory.mktemp('int8') / 'a.onnx')
    deploy.export(model, path, 'onnx', (24, 24), 'batch', exporter='torchscript')
    return model, path


@onnx
@pytest.mark.parametrize('target', quantize.TARGETS)
def test_int8_is_near_and_small(file, target, tmp_path):
    import onnx

    model, path = file
    out = str(tmp_path / 'b.onnx')
    names = quantize.quantize(path, out, batches(), target)
    proto = onnx.load(out)
    weights = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert len(names) == len(weights) == 4, 'two convolutions, a transposed one, a linear layer'
    assert all(('MatMul' in name) is False for name in names)
    run = deploy.load(out, 'onnx')
    image = batches(4)[-1]
    for a, b in zip(model(image), run(image)):
        assert 0 < float((a - b).abs().max()) < 0.1 * float(a.abs().max())
    assert bool(tensorrt.problems(out)) == (target == 'onnxruntime')
    scales = {t.name: t for t in proto.graph.initializer if t.name.endswith('_scale')}
    assert any(list(t.dims) == [32] for t in scales.values()), 'weights by channel'


@onnx
def test_what_stays_float(file, tmp_path):
    import onnx

    _, path = file
    out = str(tmp_path / 'b.onnx')
    names = quantize.quantize(path, out, batches(1), exclude=lambda name: 'conv' in name.lower())
    assert len(names) == 1 and 'fc' in names[0].lower()
    weights = [t for t in onnx.load(out).graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert len(weights) == 1
    with pytest.raises(ValueError, match='no node is left'):
        quantize.quantize(path, out, batches(1), exclude=lambda name: True)
    with pytest.raises(ValueError, match='no image to learn'):
        quantize.quantize(path, out, [])
    with pytest.raises(ValueError, match='does not run on the pictures.*--dynamic batch'):
        quantize.quantize(path, str(tmp_path / 'c.onnx'), batches(1, 16))
    assert not (tmp_path / 'c.onnx').exists()


def data_sample(task):
    """A data sample without truth, of a picture that was scaled by 2."""
    if task == 'cls':
        from mmpretrain.structures import DataSample

        return DataSample()
    from mmseg.structures import SegDataSample

    return SegDataSample(metainfo=dict(ori_shape=(64, 48), img_shape=(128, 96), padding_size=[0, 0, 0, 0]))


@pytest.mark.parametrize('task, fields', [('cls', ('pred_score', 'pred_label')), ('seg', ('pred_sem_seg',))])
def test_predictions_are_the_models_own(task, fields):
    torch.manual_seed(0)
    whole = randomise(mm_model(task)).eval()
    whole.test_cfg = ConfigDict(mode='whole')
    model, image = deploy.deployable(whole), batches(1, 144)[0][:, :, :128, :96].contiguous()
    with torch.no_grad():
        expected = whole.predict(image, [data_sample(task) for _ in image])
        found = quantize.predictions(model, whole, model(image), [data_sample(task) for _ in image])
    assert len(found) == len(expected) == 2
    for a, b in zip(expected, found):
        for field in fields:
            x, y = getattr(a, field), getattr(b, field)
            x, y = (x.data, y.data) if task == 'seg' else (x, y)
            assert x.shape == y.shape and float((x - y).abs().float().mean()) < 1e-4


def test_no_metric_for_a_backbone():
    with pytest.raises(ValueError, match='no metric for a backbone'):
        quantize.evaluate({}, deploy.deployable(torch.nn.Conv2d(3, 3, 1)), torch.nn.Identity(), [])
