"""tools/deploy/export.py from config and checkpoint to a checked file."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_configs import ARCH, fails, load_tool, picture, write_config

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


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(2):
        picture(tmp_path / 'pictures' / f'{i}.png', rng)
    return str(tmp_path / 'pictures')


def test_a_whole_detector_on_pictures(tool, pictures, tmp_path, capsys, monkeypatch):
    pytest.importorskip('mmdet')
    torch.manual_seed(0)
    config, out = write_config(tmp_path / 'tiny.py', 'det', tmp_path), str(tmp_path / 'a.pt')
    command = [config, 'none', out, '--shape', '136', '--images', pictures, '--cfg-options']
    command += ['model.test_cfg.rpn.nms_pre=50', 'model.test_cfg.rpn.max_per_img=20']
    rows = tool.main(command)
    assert [row.shape[2:] for row in rows] == [(136, 136), (129, 129), (149, 200)]
    assert all(row.error <= 1e-4 and row.detections for row in rows)
    assert 'boxes, scores, labels, count, masks' in (text := capsys.readouterr().out) and 'detections' in text
    monkeypatch.setattr(deploy, 'compare', lambda *args: [deploy.Row((1, 3, 136, 136), 0.0, detections=0)])
    args = tool.parse_args(command)
    tool.check(deploy.deployable(tool.build(args), normalize=True), args, out, (136, 136))
    assert 'nothing was detected, so nothing was compared' in capsys.readouterr().err


def test_pictures_are_what_the_network_takes(tool, pictures, classifier, tmp_path, capsys):
    """--images reads RGB, of any size, and normalises as the config does."""
    files = tool.find_pictures([pictures])
    whole, normal = (
        tool.read_pictures(files, (32, 48), None),
        tool.read_pictures(files, (32, 48), ([127.0] * 3, [60.0] * 3)),
    )
    assert whole.shape == (2, 3, 32, 48) and whole.max() > 100
    torch.testing.assert_close(normal, (whole - 127) / 60)
    Image.new('RGB', (9, 9), (255, 0, 0)).save(tmp_path / 'red.png')
    assert tool.read_pictures([tmp_path / 'red.png'], (4, 4), None)[0, :, 0, 0].tolist() == [255, 0, 0]
    out = tmp_path / 'a.pt'
    fails(
        capsys, out, lambda: tool.main([*classifier, str(out), '--images', str(tmp_path / 'no')]), 'neither a picture'
    )
    fails(capsys, out, lambda: tool.main(['xt', 'none', str(out), '--images', pictures]), 'mean and std')
