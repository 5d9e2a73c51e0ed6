import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_configs import TOOLS, fails, last, write_config

from mmoverlock import cli
from mmoverlock.engine import NonFiniteError


@pytest.fixture
def config(tmp_path, imagenet):
    return write_config(tmp_path / 'tiny.py', 'cls', imagenet)


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_writes_logs_and_checkpoints(trained, task):
    _, work = trained(task)
    assert os.path.isfile(last(work))
    assert (work / f'tiny_{task}.py').is_file()  # the config as it was run
    assert list(work.glob('*/*.log'))


def test_compile_switch_of_mmengine(train, config, tmp_path, monkeypatch):
    """``compile`` beside ``model`` reaches the whole training step; test_compile.py traces the network."""
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda function, **options: compiled.append((function, options)) or function)
    options = ['compile.backend=eager', 'train_cfg.max_epochs=1', 'train_cfg.val_begin=9']
    train.main([config, '--work-dir', str(tmp_path / 'w'), '--cfg-options', *options])
    ((function, options),) = compiled
    assert function.__name__ == 'train_step' and options == dict(backend='eager')


def test_resume_continues_where_it_stopped(trained, train, tmp_path):
    config, work = trained('cls')
    copy = tmp_path / 'moved'  # last_checkpoint names a file of the old place
    shutil.copytree(work, copy)
    (copy / 'epoch_1.pth').unlink()
    train.main([config, '--work-dir', str(copy), '--resume', '--cfg-options', 'train_cfg.max_epochs=3'])
    assert not (copy / 'epoch_1.pth').exists()  # the first epoch did not run again
    before = torch.load(work / 'epoch_2.pth', weights_only=False)
    after = torch.load(copy / 'epoch_3.pth', weights_only=False)
    assert after['meta']['epoch'] == 3 and after['meta']['iter'] == 6

    def step(checkpoint):
        return next(iter(checkpoint['optimizer']['state'].values()))['step']

    assert (step(before), step(after)) == (4, 6)  # the optimizer's state came along
    # So did the schedule: the third epoch had its own rate, not the first one's.
    assert [c['param_schedulers'][0]['last_step'] for c in (before, after)] == [2, 3]


def test_resume_from_a_named_checkpoint(trained, train, tmp_path):
    config, work = trained('cls')
    first = str(work / 'epoch_1.pth')
    cfg = train.prepare(train.parse_args([config, '--work-dir', str(tmp_path), '--resume', first]))
    assert cfg.resume and cfg.load_from == first


def test_resume_of_a_lost_checkpoint(train, config, tmp_path, capsys):
    (tmp_path / 'last_checkpoint').write_text('/gone/epoch_7.pth')
    with pytest.raises(SystemExit):
        train.main([config, '--work-dir', str(tmp_path), '--resume'])
    assert 'epoch_7.pth' in capsys.readouterr().err


def test_resume_without_anything_to_resume_starts_anew(train, config, tmp_path, capsys):
    cfg = train.prepare(train.parse_args([config, '--work-dir', str(tmp_path), '--resume']))
    assert not cfg.get('resume') and cfg.get('load_from') is None
    assert 'nothing to resume' in capsys.readouterr().err


def test_weights_only_file_is_no_run_to_resume(train, config, tmp_path, capsys):
    weights = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=dict(a=torch.zeros(1))), weights)
    work = tmp_path / 'work'
    fails(
        capsys,
        work,
        lambda: train.main([config, '--work-dir', str(work), '--resume', str(weights)]),
        'weights only',
        'load_from',
    )


def test_missing_config(train, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, 'work_dirs', lambda: train.main(['nope.py']), 'config not found', 'nope.py', tmp_path)


def test_config_with_a_syntax_error(train, tmp_path, capsys):
    (tmp_path / 'bad.py').write_text('model = dict(\n')
    fails(
        capsys,
        tmp_path / 'w',
        lambda: train.main([str(tmp_path / 'bad.py'), '--work-dir', str(tmp_path / 'w')]),
        'cannot read config',
    )


def test_malformed_cfg_options(train, config, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([config, '--cfg-options', 'oops'])
    assert stop.value.code == 2
    assert '--cfg-options' in capsys.readouterr().err


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_missing_data_root(train, task, tmp_path, capsys):
    config = write_config(tmp_path / f'tiny_{task}.py', task, tmp_path / 'nowhere')
    work = tmp_path / 'work'
    layout = dict(cls='train/CLASS', det='instances_{train,val}2017.json', seg='images/{training')
    fails(
        capsys,
        work,
        lambda: train.main([config, '--work-dir', str(work)]),
        tmp_path / 'nowhere',
        'does not exist',
        layout[task],
        'check_dataset.py',
    )


def test_missing_annotation_file(train, coco, tmp_path, capsys):
    config = write_config(tmp_path / 'tiny.py', 'det', coco)
    work = tmp_path / 'work'
    fails(
        capsys,
        work,
        lambda: train.main(
            [
                config,
                '--work-dir',
                str(work),
                '--cfg-options',
                'train_dataloader.dataset.ann_file=annotations/none.json',
            ]
        ),
        'annotations/none.json',
    )


def test_missing_validation_data_does_not_matter_without_validation(train, config, tmp_path):
    args = train.parse_args(
        [
            config,
            '--work-dir',
            str(tmp_path),
            '--no-validate',
            '--cfg-options',
            'val_dataloader.dataset.data_root=nowhere',
        ]
    )
    assert train.prepare(args).val_dataloader is None


@pytest.mark.parametrize('content', [b'', b'<html>not found</html>', b'PK\x03\x04 cut off'])
@pytest.mark.parametrize('option', ['load_from', 'model.backbone.init_cfg.checkpoint'])
def test_corrupt_checkpoint(train, config, tmp_path, capsys, content, option):
    bad, work = tmp_path / 'bad.pth', tmp_path / 'work'
    bad.write_bytes(content)
    fails(
        capsys,
        work,
        lambda: train.main(
            [
                config,
                '--work-dir',
                str(work),
                '--cfg-options',
                f'{option}={bad}',
                *(['model.backbone.init_cfg.type=Pretrained'] if 'init' in option else []),
            ]
        ),
        'cannot read checkpoint',
        bad,
    )


def test_missing_checkpoint(train, config, tmp_path, capsys):
    work = tmp_path / 'work'
    fails(
        capsys,
        work,
        lambda: train.main([config, '--work-dir', str(work), '--resume', str(tmp_path / 'none.pth')]),
        'checkpoint not found',
        tmp_path / 'none.pth',
    )


@pytest.mark.parametrize('option', ['load_from', 'model.backbone.init_cfg.checkpoint'])
def test_checkpoint_of_another_variant(trained, train, ade, tmp_path, capsys, option):
    config, folder = trained('seg')
    work = tmp_path / 'work'
    flags = [f'{option}={last(folder)}', 'model.backbone.arch.widths="[8,16,32,64]"']
    if 'init' in option:
        flags.append('model.backbone.init_cfg.type=Pretrained')
    fails(
        capsys,
        work,
        lambda: train.main([config, '--work-dir', str(work), '--cfg-options', *flags]),
        'does not fit',
        last(folder),
    )


def test_backbone_of_a_classifier_starts_a_segmentor(trained, train, ade, tmp_path):
    _, folder = trained('cls')
    config = write_config(tmp_path / 'tiny.py', 'seg', ade)
    options = [f'model.backbone.init_cfg.checkpoint={last(folder)}', 'model.backbone.init_cfg.type=Pretrained']
    train.prepare(train.parse_args([config, '--cfg-options', *options]))


@pytest.mark.parametrize(
    'option, word',
    [
        ('model.backbone.arch=huge', 'huge'),
        ('model.backbone.arch.widths="[8,16,32]"', 'widths'),
        ('model.backbone.arch.focus_heads="[3,1]"', 'focus_heads'),
        ('model.backbone.out_indices="[0,7]"', 'out_indices'),
        ('model.backbone.colour=blue', 'colour'),
    ],
)
def test_impossible_backbone(train, config, tmp_path, capsys, option, word):
    work = tmp_path / 'work'
    fails(
        capsys,
        work,
        lambda: train.main([config, '--work-dir', str(work), '--cfg-options', option]),
        'model.backbone',
        word,
    )


def test_mmcv_without_operators(train, coco, tmp_path, capsys, monkeypatch):
    config = write_config(tmp_path / 'tiny.py', 'det', coco)
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)
    work = tmp_path / 'work'
    fails(
        capsys,
        work,
        lambda: train.main([config, '--work-dir', str(work)]),
        'mmcv has no compiled operators',
        'pip install',
        'MMCV_WITH_OPS=1',
    )


def test_work_dir_that_is_a_file(train, config, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit):
        train.main([config, '--work-dir', str(tmp_path / 'file')])
    assert 'is a file' in capsys.readouterr().err


def test_single_picture_under_pyramid_pooling(train, ade, tmp_path, capsys):
    config = write_config(tmp_path / 'tiny.py', 'seg', ade)
    work = tmp_path / 'work'
    fails(
        capsys,
        work,
        lambda: train.main([config, '--work-dir', str(work), '--cfg-options', 'train_dataloader.batch_size=1']),
        'batch of one picture',
        'UPerHead',
        'batch_size',
    )


def test_single_value_in_the_backbone(train, config, tmp_path, capsys):
    pipeline = "[dict(type='LoadImageFromFile'), dict(type='Resize', scale=32), dict(type='PackInputs')]"
    mine = tmp_path / 'small.py'
    mine.write_text(f'_base_ = {config!r}\ntrain_dataloader = dict(batch_size=1, dataset=dict(pipeline={pipeline}))\n')
    with pytest.raises(SystemExit) as stop:
        train.main([str(mine), '--work-dir', str(tmp_path / 'work')])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ') and 'batch norm' in error


def test_single_value_is_explained():
    norm = torch.nn.BatchNorm2d(3)
    with pytest.raises(cli.UserError, match='batch_size'), cli.explain_single_value():
        norm(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match='^other$'), cli.explain_single_value():
        raise ValueError('other')


def test_steps_that_are_not_finite_end_in_one_line():
    with pytest.raises(cli.UserError, match='^3 steps in a row skipped$'), cli.explain_non_finite():
        raise NonFiniteError('3 steps in a row skipped')


@pytest.mark.parametrize(
    'world, lost, told, waits',
    [(2, True, False, True), (2, True, True, False), (2, False, False, False), (1, True, False, False)],
)
def test_a_broken_connection_waits_for_its_cause(monkeypatch, capsys, world, lost, told, waits):
    slept, runner = [], SimpleNamespace(hooks=[object(), SimpleNamespace(told_to_stop=told)])
    monkeypatch.setenv('WORLD_SIZE', str(world))
    monkeypatch.setattr(time, 'sleep', slept.append)
    monkeypatch.setattr(signal, 'signal', lambda *args: None)
    text = 'gloo/transport/tcp/pair.cc:1: Read error: Connection reset by peer' if lost else 'out of memory'
    with pytest.raises(RuntimeError, match=text), cli.wait_for_the_cause(runner, 7):
        raise RuntimeError(text)
    assert slept == ([7] if waits else [])
    assert ('lost the connection to another process' in capsys.readouterr().err) == (lost and world > 1)


def test_amp_needs_a_gpu(train, config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, 'has_accelerator', lambda: False)
    work = tmp_path / 'work'
    fails(capsys, work, lambda: train.main([config, '--work-dir', str(work), '--amp']), '--amp', 'GPU')


def test_amp_of_the_config_is_dropped_without_a_gpu(train, monkeypatch, capsys):
    from mmengine.config import Config

    monkeypatch.setattr(cli, 'has_accelerator', lambda: False)
    cfg = Config(
        dict(optim_wrapper=dict(type='AmpOptimWrapper', loss_scale=512.0, dtype='float16', clip_grad=dict(max_norm=5)))
    )
    train.set_amp(cfg, False)
    assert cfg.optim_wrapper == dict(type='OptimWrapper', clip_grad=dict(max_norm=5))
    assert 'full precision' in capsys.readouterr().err


def test_amp_with_a_gpu(train, monkeypatch):
    from mmengine.config import Config

    monkeypatch.setattr(cli, 'has_accelerator', lambda: True)
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    train.set_amp(cfg, True)
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', loss_scale='dynamic')
    odd = Config(dict(optim_wrapper=dict(type='ApexOptimWrapper')))
    with pytest.raises(cli.UserError, match='ApexOptimWrapper'):
        train.set_amp(odd, True)


def test_auto_scale_lr(train, config, ade, tmp_path, capsys):
    cfg = train.prepare(train.parse_args([config, '--auto-scale-lr']))
    assert cfg.auto_scale_lr.enable
    config = write_config(tmp_path / 'seg.py', 'seg', ade)  # has no base_batch_size
    fails(
        capsys,
        tmp_path / 'work',
        lambda: train.main([config, '--work-dir', str(tmp_path / 'work'), '--auto-scale-lr']),
        'base_batch_size',
    )


def test_no_validate_forgets_the_best_checkpoint(train, config):
    cfg = train.prepare(
        train.parse_args([config, '--no-validate', '--cfg-options', 'default_hooks.checkpoint.save_best=auto'])
    )
    assert cfg.val_cfg is None and 'save_best' not in cfg.default_hooks.checkpoint


def test_default_work_dir_is_named_after_the_config(train, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.prepare(train.parse_args([config])).work_dir == './work_dirs/tiny'


def test_persistent_workers_need_workers():
    from mmengine.config import Config

    cfg = Config(
        dict(
            default_scope='mmpretrain',
            train_dataloader=dict(num_workers=0, persistent_workers=True),
            val_dataloader=dict(num_workers=2),
        )
    )
    cli.set_loader_defaults(cfg, SimpleNamespace(no_pin_memory=True))
    assert cfg.train_dataloader.persistent_workers is False
    assert cfg.val_dataloader.persistent_workers is True
    assert cfg.val_dataloader.pin_memory is False
    assert cfg.val_dataloader.collate_fn.type == 'default_collate'


def test_runs_from_any_folder_of_a_checkout_that_is_not_installed(tmp_path):
    # -I: no PYTHONPATH and no current directory on the path.
    done = subprocess.run(
        [sys.executable, '-I', os.path.join(TOOLS, 'train.py'), 'none.py'], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith('error: config not found: none.py')
    assert 'Traceback' not in done.stderr
    assert not os.listdir(tmp_path)
