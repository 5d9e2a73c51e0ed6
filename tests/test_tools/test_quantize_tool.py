"""tools/deploy/quantize.py and check_operators.py, from an exported file on."""

import importlib.util

import pytest
import torch
from tiny_configs import fails, imagenet_folders, load_tool, write_config

if any(importlib.util.find_spec(name) is None for name in ('onnx', 'onnxruntime', 'mmpretrain')):
    pytest.skip('onnx, onnxruntime or mmpretrain is not installed', allow_module_level=True)
pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """(config, file, folder) of a tiny classifier whose file takes pictures."""
    folder = tmp_path_factory.mktemp('int8')
    imagenet_folders(folder)
    config, file = write_config(folder / 'tiny.py', 'cls', folder), str(folder / 'a.onnx')
    torch.manual_seed(0)
    command = [config, 'none', file, '--shape', '64', '--dynamic', 'batch', '--normalize', '--exporter', 'torchscript']
    load_tool('deploy/export.py').main(command)
    return config, file, folder


@pytest.fixture
def tool():
    return load_tool('deploy/quantize.py')


def test_both_files_side_by_side(tool, exported, tmp_path, capsys):
    config, file, _ = exported
    out = tmp_path / 'deep' / 'b.onnx'
    rows = tool.main([config, file, str(out), '--samples', '4', '--time', '1', '--target', 'tensorrt'])
    assert out.is_file() and rows['INT8']['MiB'] != rows['float32']['MiB']
    for row in rows.values():
        assert row['ms, 1x3x64x64'] > 0 and row['accuracy/top1'] in (0, 25, 50, 75, 100)
    text = capsys.readouterr().out
    assert 'Conv' in text.splitlines()[-7:][0] and 'accuracy/top1' in text and 'b.onnx written' in text
    checker = load_tool('deploy/check_operators.py')
    checker.main([file, str(out)])
    assert 'nothing that the list forbids' in capsys.readouterr().out


def test_operators_that_tensorrt_does_not_have(exported, tmp_path, capsys):
    import onnx

    proto, bad = onnx.load(exported[1]), str(tmp_path / 'c.onnx')
    next(node for node in proto.graph.node if node.op_type == 'Erf').op_type = 'Unique'
    onnx.save(proto, bad)
    with pytest.raises(SystemExit) as stop:
        load_tool('deploy/check_operators.py').main([exported[1], bad])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'c.onnx: Unique: no such operator (1 node)' in line and 'a.onnx' not in line


def test_mistakes_are_one_line_and_leave_no_file(tool, exported, tmp_path, capsys, monkeypatch):
    config, file, folder = exported
    out = tmp_path / 'b.onnx'
    call = lambda *words: fails(capsys, out, lambda: tool.main(list(words[0])), *words[1:])  # noqa: E731
    call([config, str(folder / 'tiny.py'), str(out)], 'cannot read', 'export.py')
    call(['no.py', file, str(out)], 'config not found')
    call([config, file, str(out), '--keep', '.*', '--no-test'], 'no node is left')
    call([config, file, str(out), '--cfg-options', 'train_dataloader.dataset.data_root=nowhere'], 'nowhere')
    checker = load_tool('deploy/check_operators.py')
    fails(capsys, out, lambda: checker.main([config]), 'cannot read')
    for flags, words in (['--samples', '0'], '--samples must'), (['--keep', '['], '--keep [: '):
        with pytest.raises(SystemExit):
            tool.main([config, file, str(out), *flags])
        assert words in capsys.readouterr().err
