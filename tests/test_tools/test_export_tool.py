"""tools/deploy/export.py from config and checkpoint to a checked file."""

import pytest
import torch
from tiny_configs import ARCH, fails, load_tool, write_config

from mmoverlock import OverLoCK, deploy

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture
def tool():
    return load_tool('deploy/export.py')


@pytest.fixture
def classifier(tool, tmp_path):
    """(config, checkpoint) of a tiny classifier."""
    pytest.importorskip('mmpretrain')
    config, checkpoint = write_config(tmp_path / 'tiny.py', 'cls', tmp_path), str(tmp_path / 'a.pth')
    args = tool.parse_args([config, 'none', str(tmp_path / 'x.pt')])
    torch.save(dict(state_dict=tool.build(args).state_dict()), checkpoint)
    return config, checkpoint


def test_onnx_with_open_sizes(tool, classifier, tmp_path, capsys):
    pytest.importorskip('onnxruntime')
    onnx = pytest.importorskip('onnx')
    out = tmp_path / 'deep' / 'a.onnx'
    rows = tool.main([*classifier, str(out), '--exporter', 'torchscript', '--time', '1'])
    assert [row.shape for row in rows] == [(1, 3, 224, 224), (3, 3, 129, 207), (2, 3, 237, 288)]
    assert all(row.error <= 1e-4 and row.torch_ms > 0 and row.exported_ms > 0 for row in rows)
    text = capsys.readouterr().out
    assert 'torchscript exporter' in text and '3x3x129x207' in text and 'MiB written' in text
    metadata = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert metadata['input'] == 'normalised' and metadata['mean'] == '[127.0, 127.0, 127.0]'


def test_pictures_in(tool, classifier, tmp_path):
    """With --normalize the file takes the picture itself."""
    plain, whole = str(tmp_path / 'a.pt'), str(tmp_path / 'b.pt')
    for out, *flags in ((plain,), (whole, '--normalize')):
        tool.main([*classifier, out, '--shape', '64', '--dynamic', 'none', *flags])
    picture = torch.rand(1, 3, 64, 64) * 255
    (a,), (b,) = deploy.load(plain, 'torchscript')((picture - 127) / 60), deploy.load(whole, 'torchscript')(picture)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_mistakes_are_one_line_and_leave_no_file(tool, classifier, tmp_path, capsys):
    config, checkpoint = classifier
    out = tmp_path / 'out' / 'a.pt'
    call = lambda *words: fails(capsys, out, lambda: tool.main(list(words[0])), *words[1:])  # noqa: E731
    call(['no.py', 'none', str(out)], 'no.py is neither a variant')
    call([config, 'no.pth', str(out)], 'checkpoint not found')
    call([config, checkpoint, str(out), '--shape', '64'], 'starts at 129 pixels', "dynamic='batch'")
    wrong = str(tmp_path / 'b.pth')
    torch.save(OverLoCK(dict(ARCH, widths=(8, 16, 32, 64)), out_type='classification').state_dict(), wrong)
    call([config, wrong, str(out)], 'does not fit')
    with pytest.raises(SystemExit):
        tool.main([config, checkpoint, 'a.bin'])
    assert 'say the --format' in capsys.readouterr().err


def test_a_file_that_differs_is_not_kept(tool, classifier, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'a.pt'
    real = deploy.load
    monkeypatch.setattr(deploy, 'load', lambda *args: lambda image: tuple(o + 1e-2 for o in real(*args)(image)))
    command = [*classifier, str(out), '--shape', '64', '--dynamic', 'none']
    fails(capsys, out, lambda: tool.main(command), 'differs from PyTorch by', 'not kept')
