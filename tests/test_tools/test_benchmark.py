import csv
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from common import TINY
from tiny_configs import TOOLS, load_tool, write_config

from mmoverlock.models import overlock
from mmoverlock.ops import backends
from mmoverlock.ops.backends import Backend
from mmoverlock.ops.depthwise.reference import depthwise_conv2d_reference

FAST = ['--device', 'cpu', '--iters', '1', '--warmup', '1', '--threads', '1']


@pytest.fixture(scope='module')
def tool():
    return load_tool('analysis/benchmark.py')


@pytest.fixture
def tiny_variant(tool, monkeypatch):
    """The variant xt is next to nothing, so that a row takes no time."""
    threads = torch.get_num_threads()
    monkeypatch.setitem(overlock.ARCHS, 'xt', {**overlock.ARCHS['xt'], **TINY})
    monkeypatch.setattr(tool.Row, 'expected', (None, None))
    monkeypatch.setattr(tool, 'count', lambda *args: (1, 1))  # a second each
    yield
    torch.set_num_threads(threads)


def rows_of(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def test_rows_of_ours_and_a_peer(tool, tiny_variant, tmp_path, capsys):
    pytest.importorskip('timm')
    path = tmp_path / 'out.csv'
    models = ['xt', 'test_convnext']
    code = tool.main([*models, '--mode', 'eval', 'train', '--shape', '64', '--batch', '4', '--csv', str(path), *FAST])
    out = capsys.readouterr().out.splitlines()
    assert code == 0, out
    rows = rows_of(path)
    assert [(r['model'], r['mode'], r['form']) for r in rows] == [
        ('xt', 'eval', 'deploy'),
        ('xt', 'train', 'train'),
        ('test_convnext', 'eval', '-'),
        ('test_convnext', 'train', '-'),
    ]
    for row in rows:
        assert row['status'] == 'ok' and 0 <= float(row['error']) <= float(row['tolerance'])
        assert float(row['img_s']) == pytest.approx(4e3 / float(row['ms']))
        assert row['gib'] == ''  # peak memory is a GPU's
        assert row['torch'] in out[0] and row['card'] in out[0] and '--shape 64' in row['command']
    table = out[2:7]
    starts = table[0].index('img/s') + len('img/s')
    assert all(line[starts - 1].isdigit() and line[starts] == ' ' for line in table[1:]), table  # columns are aligned


def test_rows_in_turn(tool, tiny_variant, tmp_path, monkeypatch):
    """Steps of all rows alternate; one that cannot be built leaves the others alone."""
    order, time, prepare = [], tool.Row.time, tool.Row.prepare
    monkeypatch.setattr(tool.Row, 'time', lambda self, step: order.append(self.job.mode) or time(self, step))
    monkeypatch.setattr(tool.Row, 'prepare', lambda self: 1 / (self.job.dtype == 'fp32') and prepare(self))
    path = tmp_path / 'out.csv'
    args = ['xt', '--mode', 'eval', 'train', '--dtype', 'fp32', 'bf16', '--shape', '64', '--batch', '4', *FAST]
    assert tool.main([*args, '--csv', str(path), '--in-turn', '--iters', '2']) == 1
    assert order == ['eval', 'train'] * 3, 'a step to warm up, and two'
    status = {(row['mode'], row['dtype']): row['status'] for row in rows_of(path)}
    assert status == {(m, d): 'ok' if d == 'fp32' else 'failed' for m in ('eval', 'train') for d in ('fp32', 'bf16')}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with pytest.raises(tool.cli.UserError, match='for --device cpu'):
        tool.set_device(SimpleNamespace(device='cuda', in_turn=True, threads=0))


@pytest.mark.parametrize('task', ['det', 'seg'])
def test_pyramids(tool, tiny_variant, task, capsys):
    assert tool.main(['xt', '--task', task, '--mode', 'eval', 'train', '--shape', '64x96', '--batch', '2', *FAST]) == 0
    assert f'train {task}' in capsys.readouterr().out


def test_counts_are_those_of_get_flops(tool, monkeypatch):
    monkeypatch.setitem(overlock.ARCHS, 'xt', {**overlock.ARCHS['xt'], **TINY})
    tool.count.cache_clear()
    pytest.importorskip('mmpretrain')
    for form in tool.get_flops.FORMS:
        result = tool.get_flops.report(lambda: tool.get_flops.build_variant('xt', 'cls'), 'xt', form, (224, 224))
        assert tool.count('xt', 'cls', form, (224, 224)) == (result['params'][form], result['complete'])
    tool.count.cache_clear()


@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('wrong', [1.02, float('nan')])
def test_a_wrong_fast_form_is_caught(tool, tiny_variant, monkeypatch, capsys, mode, wrong):
    def slightly_off(x, weight, bias, dilation):
        return wrong * depthwise_conv2d_reference(x, weight, bias, dilation)

    def all_slightly_off(x, weights, dilations):
        return [slightly_off(x, weight, None, dilation) for weight, dilation in zip(weights, dilations)]

    for operator, run in (('depthwise_conv2d', slightly_off), ('depthwise_conv2d_branches', all_slightly_off)):
        kept = backends._OPERATORS[operator]
        off = Backend('off', run, lambda *args: None)
        monkeypatch.setitem(backends._OPERATORS, operator, (off, *(b for b in kept if b.name == 'reference')))
    assert tool.main(['xt', '--mode', mode, '--shape', '64', '--batch', '4', *FAST]) == 1
    out = capsys.readouterr().out
    assert 'WRONG' in out and '1 wrong or failed' in out


def test_what_the_definitions_lose_too_is_no_mistake(tool, tiny_variant, monkeypatch, capsys):
    """Deeper networks lose more than the tolerance was found with: twice what the definitions lose is allowed."""
    argv = ['xt', '--shape', '64', '--dtype', 'bf16', *FAST]
    monkeypatch.setitem(tool.TOLERANCE['eval'], 'bf16', 1e-4)
    assert tool.main(argv) == 0
    assert ' ok' in capsys.readouterr().out
    monkeypatch.setattr(tool.Row, 'plain_error', lambda self: 1e-4)
    assert tool.main(argv) == 1


def test_wrong_folding_is_caught(tool, tiny_variant, monkeypatch):
    reshape = tool.reshape

    def forget_the_mean(model, form):
        for m in model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.zero_()
        return reshape(model, form)

    monkeypatch.setattr(tool, 'reshape', forget_the_mean)
    assert tool.main(['xt', '--shape', '64', *FAST]) == 1


def test_plain_head_is_the_head(tool):
    from mmoverlock import OverLoCKClsHead

    pytest.importorskip('mmpretrain')
    ours, plain = OverLoCKClsHead(1000, (8, 12), 16), tool.PlainHead(1000, (8, 12), 16)
    ours.load_state_dict(plain.state_dict())
    feats = torch.rand(2, 8, 2, 2), torch.rand(2, 12, 2, 2)
    for form in ('train', 'deploy'):
        assert torch.equal(ours.eval()(feats), plain.eval()(feats))
        assert torch.equal(ours.aux_forward(feats), plain.aux_forward(feats))
        assert tool.get_flops.parameters(ours) == tool.get_flops.parameters(plain), form
        ours.switch_to_deploy()
        plain.switch_to_deploy()


def test_out_of_memory_is_a_row_and_the_others_go_on(tool, tiny_variant, monkeypatch, tmp_path):
    build = tool.build

    def small_card(job):
        if job.batch == 2:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')
        if job.batch == 3:
            raise RuntimeError('something else')
        return build(job)

    monkeypatch.setattr(tool, 'build', small_card)
    path = tmp_path / 'out.csv'
    assert tool.main(['xt', '--shape', '64', '--batch', '2', '1', '--csv', str(path), *FAST]) == 0
    assert [(r['status'], bool(r['img_s'])) for r in rows_of(path)] == [('OOM', False), ('ok', True)]
    assert tool.main(['xt', '--shape', '64', '--batch', '3', '1', '--csv', str(path), *FAST]) == 1
    rows = rows_of(path)
    assert [r['status'] for r in rows] == ['failed', 'ok'] and 'something else' in rows[0]['note']


def test_plot_takes_top1_from_the_metafiles(tool, tmp_path, capsys):
    assert [tool.published_top1(n) for n in ('xt', 't', 's', 'b', 'tiny')] == [82.7, 84.2, 84.8, 85.1, 84.2]
    assert tool.published_top1('no_such_model') is None
    path, picture = tmp_path / 'rows.csv', tmp_path / 'out.png'
    rows = [
        dict.fromkeys(tool.COLUMNS, '')
        | dict(model=model, task='cls', mode='eval', batch=1, dtype='fp16', run='eager', img_s=speed, status=status)
        for model, speed, status in [('xt', 9.0, 'ok'), ('t', 5.0, 'ok'), ('b', 1.0, 'WRONG'), ('peer', 7.0, 'ok')]
    ]
    tool.write_csv(str(path), rows, dict(card='a card', torch='2'))
    assert tool.main(['--read', str(path), '--plot', str(picture)]) == 1  # one of the rows was wrong
    assert picture.read_bytes().startswith(b'\x89PNG')
    assert 'peer is not in the plot' in capsys.readouterr().err
    tool.write_csv(str(path), rows[:2] + rows[3:], dict(card='a card', torch='2'))
    assert tool.main(['--read', str(path), '--plot', str(picture), '--top1', 'peer=80.5']) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize('task', ['det', 'seg'])
def test_network_of_a_config(tool, task, roots, tmp_path, capsys):
    config = write_config(tmp_path / f'tiny_{task}.py', task, roots[task])
    path = tmp_path / 'out.csv'
    code = tool.main(['--config', config, '--shape', '64x96', '--csv', str(path), *FAST])
    assert code == 0, capsys.readouterr().out
    (row,) = rows_of(path)
    assert row['model'] == f'tiny_{task}' and float(row['macs']) > 0 and float(row['params']) > 0
    assert tool.count(config, 'config', 'deploy', (64, 96))[1] == float(row['macs'])


def test_boxes_of_a_config(tool):
    boxes = tool.random_boxes(2, 500, (800, 1280))
    with torch.device('meta'):  # another default, as on a GPU
        assert torch.equal(tool.random_boxes(2, 500, (800, 1280)), boxes)
    assert boxes.shape == (1000, 5) and boxes[:500, 0].eq(0).all() and boxes[500:, 0].eq(1).all()
    left, top, right, bottom = boxes[:, 1:].unbind(1)
    assert (left >= 0).all() and (right <= 1288).all() and (top >= 0).all() and (bottom <= 808).all()
    assert (right > left).all() and (bottom > top).all()
    assert torch.equal(boxes.half().float(), boxes)


def test_configs_of_packages(tool):
    """A peer's config by mmengine's name for it, counted though its backbone cannot be built on ``meta``."""
    pytest.importorskip('mmdet')
    cfg = tool.read_config(tool.MASK_RCNN_CONVNEXT)
    assert cfg.model.backbone.type == 'mmpretrain.ConvNeXt'
    parameters, macs = tool.count(tool.MASK_RCNN_CONVNEXT, 'config', '-', (64, 64))
    assert 47e6 < parameters < 49e6 and macs > 0  # 48.1 M, as its authors say
    with pytest.raises(tool.cli.UserError, match='mmdet::nothing.py'):
        tool.read_config('mmdet::nothing.py')


def test_suites_are_rows_that_can_be(tool):
    pytest.importorskip('timm')
    for name, jobs in tool.suites().items():
        assert len(set(jobs)) == len(jobs), name
        for job in jobs:
            tool.check_job(job, 'cuda')
    wanted = {('eval', 128, (224, 224)), ('train', 64, (224, 224)), ('eval', 1, (224, 224))}
    wanted |= {('eval', 2, (800, 1280)), ('train', 2, (800, 1280))}
    for model in ('t', 'convnext_tiny'):
        assert wanted <= {(j.mode, j.batch, j.shape) for j in tool.suites()['targets'] if j.model == model}


def test_clear_errors(tool, capsys, tmp_path):
    def fails(*argv, words):
        with pytest.raises(SystemExit) as stop:
            tool.main([*argv, '--device', 'cpu'])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err

    fails('convnext_gigantic', words='neither a variant')
    fails('--config', str(tmp_path / 'absent.py'), words='config not found')
    fails('xt', '--mode', 'train', '--dtype', 'fp16-pure', words='is for eval')
    for run in ('cudagraph', 'blocks+graphs'):
        fails('xt', '--run', run, words=f'{run} needs a GPU')
    fails('xt', '--shape', '1x2x3', words='argument --shape')
    fails('xt', '--batch', '0', words='argument --batch')
    fails(words='name models')
    fails('--read', str(tmp_path / 'absent.csv'), words='cannot read')


def test_side_by_side_without_task_packages(tmp_path):
    """Rows of processes, in their order, where the task packages are missing."""
    (tmp_path / 'sitecustomize.py').write_text(
        'import sys\n'
        'for name in ("mmcv", "mmdet", "mmseg", "mmpretrain"): sys.modules[name] = None\n'
        'from mmoverlock.models import overlock\n'
        f'overlock.ARCHS["xt"].update({TINY!r})\n'
    )
    path, tool = tmp_path / 'out.csv', TOOLS + '/analysis/benchmark.py'
    words = ['xt', '--mode', 'train', 'eval', '--shape', '64', '--batch', '2', '--parallel', '--csv', str(path)]
    done = subprocess.run(
        [sys.executable, tool, *words, *FAST],
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), os.path.dirname(TOOLS)])),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(path)
    assert [(r['mode'], r['status'], r['note']) for r in rows] == [
        ('train', 'ok', 'plain head'),
        ('eval', 'ok', 'plain head'),
    ]


def test_a_peer_of_mmpretrain(tool, capsys):
    pytest.importorskip('mmpretrain')
    name = 'convnext-tiny_32xb128_in1k'  # its config asks for stochastic depth, and reads values while it is built
    rates = {m.drop_prob for m in tool.build(tool.Job(name)).modules() if hasattr(m, 'drop_prob')}
    assert rates == {0.0}
    params, macs = tool.count(name, 'cls', '-', (224, 224))
    assert params == 28589128 and macs / 1e9 == pytest.approx(4.46, abs=0.01)
    assert tool.published_top1(name) > 80
