"""tools/analysis/scaling.py on two processes."""

import sys
from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')
sys.path.insert(0, str(Path(__file__).resolve().parent))
import together  # noqa: E402
from tiny_configs import load_tool, write_config  # noqa: E402


def test_rates_efficiency_and_traffic(tmp_path):
    configs = [write_config(tmp_path / f'{task}.py', task, tmp_path) for task in ('cls', 'seg')]
    argv = [*configs, '--batch-size', '2', '--size', '64', '--iters', '1', '--warmup', '1', '--bucket-mb', '0.1']
    first, second = together.call(together.scaling, tmp_path / 'two', argv)
    for task, lines, r, other in zip(('cls', 'seg'), first['lines'][3:], first['results'], second['results']):
        assert r['efficiency'] == pytest.approx(r['all'] / r['one'] / 2)
        assert r['bytes'] == other['bytes'] == 4 * r['params'] and r['buckets'] > 1  # every gradient, once, in float32
        norm = r['sync_bn']
        assert norm['reduced'] + norm['layers'] == norm['gathered'] > 0
        cells = [cell.strip() for cell in lines.strip('|').split('|')]
        assert cells[0] == task and cells[4] == f'{r["efficiency"]:.1%}'
        assert cells[5] == f'{r["bytes"] / 1e6:.2f} ({r["buckets"]})'
    assert len(first['lines']) == 5 and second['lines'] == []  # the first process speaks


def test_gradients_in_one_piece(tmp_path):
    config = write_config(tmp_path / 'cls.py', 'cls', tmp_path)
    argv = [config, '--batch-size', '2', '--size', '64', '--iters', '1', '--warmup', '1', '--flat']
    for process in together.call(together.scaling, tmp_path / 'two', argv):
        (r,) = process['results']
        assert (r['bytes'], r['buckets']) == (4 * r['params'], 1)


def test_batch_norms_are_counted_where_they_run(tiny):
    from mmoverlock import OverLoCK

    tool = load_tool('analysis/scaling.py')
    model = OverLoCK(tiny, out_indices=(0,), frozen_stages=0).train()
    counted = tool.sync_bn_numbers(model, lambda: model(together.batches(1)[0]['inputs'].float()))
    # Of stage 1 alone: one of the block, one of its large kernel, four of the kernel's branches, 8 channels each.
    assert counted == dict(layers=6, gathered=6 * 17, reduced=6 * 16)


def test_clear_errors(tmp_path, capsys, monkeypatch):
    tool = load_tool('analysis/scaling.py')
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    with pytest.raises(SystemExit) as stop:
        tool.main(['x.py'])
    assert stop.value.code == 2 and 'torchrun --nproc_per_node=N' in capsys.readouterr().err
    plain = tmp_path / 'plain.py'
    plain.write_text("model = dict(type='ResNet')\n")
    with pytest.raises(tool.cli.UserError, match='no OverLoCK backbone'):
        tool.build(str(plain), tool.parse_args(['x']))
    with pytest.raises(SystemExit):
        tool.parse_args(['x.py', '--iters', '0'])
