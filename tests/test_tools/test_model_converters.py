import os

import pytest
import torch
from tiny_configs import ARCH, load_tool

from mmoverlock import OverLoCK, OverLoCKClsHead
from mmoverlock.checkpoints import load_state_dict_file, to_official


def classifier(**kwargs):
    backbone = OverLoCK(ARCH, out_type='classification', **kwargs)
    head = OverLoCKClsHead(2, backbone.out_channels, hidden_channels=16)
    return torch.nn.ModuleDict(dict(backbone=backbone, head=head)).eval()


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = classifier()
    for name, buffer in model.named_buffers():  # norms that are not the identity
        if name.endswith('running_var'):
            buffer.uniform_(0.5, 2)
        elif name.endswith('running_mean'):
            buffer.normal_()
    return model


def same(a, b):
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_round_trip(model, tmp_path):
    ours, official, back = (str(tmp_path / n) for n in ('a.pth', 'b.pth', 'c.pth'))
    torch.save(dict(state_dict=model.state_dict()), ours)
    load_tool('model_converters/to_official.py').main([ours, official])
    same(torch.load(official), to_official(model.state_dict()))
    load_tool('model_converters/from_official.py').main([official, back])
    same(load_state_dict_file(back), model.state_dict())
    assert sorted(os.listdir(tmp_path)) == ['a.pth', 'b.pth', 'c.pth']


@pytest.mark.parametrize('official', [False, True])
def test_merged_file_computes_the_same(model, tmp_path, official):
    src, dst = str(tmp_path / 'a.pth'), str(tmp_path / 'deep' / 'b.pth')
    state = to_official(model.state_dict()) if official else model.state_dict()
    torch.save(state, src)
    load_tool('model_converters/reparameterize.py').main([src, dst])
    merged = classifier(deploy=True)
    merged.load_state_dict(load_state_dict_file(dst), strict=True)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(model['backbone'](x), merged['backbone'](x)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_merged_file_under_official_names(model, tmp_path):
    src, dst = str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')
    torch.save(model.state_dict(), src)
    load_tool('model_converters/reparameterize.py').main([src, dst, '--official'])
    expected = classifier(deploy=True).state_dict()
    assert list(torch.load(dst)) == list(to_official(expected))


@pytest.mark.parametrize(
    'tool, content, word',
    [
        ('from_official', None, 'no such'),
        ('to_official', None, 'no such'),
        ('reparameterize', None, 'no such'),
        ('from_official', b'broken', 'damaged'),
        ('reparameterize', b'broken', 'damaged'),
        ('from_official', dict(a=torch.zeros(1)), 'not an official'),
        ('to_official', dict(a=torch.zeros(1)), 'not an OverLoCK'),
        ('reparameterize', dict(a=torch.zeros(1)), 'no large kernels'),
    ],
)
def test_bad_input_writes_nothing(tool, content, word, tmp_path, capsys):
    src = tmp_path / 'src.pth'
    if isinstance(content, bytes):
        src.write_bytes(content)
    elif content is not None:
        torch.save(content, src)
    before = os.listdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        load_tool(f'model_converters/{tool}.py').main([str(src), str(tmp_path / 'dst.pth')])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith('error: ') and word in error and '\n' not in error
    assert os.listdir(tmp_path) == before


def test_merging_twice(model, tmp_path, capsys):
    src, once = str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')
    torch.save(model.state_dict(), src)
    tool = load_tool('model_converters/reparameterize.py')
    tool.main([src, once])
    with pytest.raises(SystemExit):
        tool.main([once, str(tmp_path / 'c.pth')])
    assert 'merged already' in capsys.readouterr().err


def test_a_failing_write_leaves_the_old_file(model, tmp_path, monkeypatch):
    src, dst = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save(to_official(model.state_dict()), src)
    dst.write_bytes(b'old')

    def fail(content, path):
        with open(path, 'wb') as file:
            file.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError):
        load_tool('model_converters/from_official.py').main([str(src), str(dst)])
    assert dst.read_bytes() == b'old'
    assert sorted(os.listdir(tmp_path)) == ['a.pth', 'b.pth']
