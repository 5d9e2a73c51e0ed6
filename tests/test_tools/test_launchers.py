"""dist_*.sh and slurm_*.sh: what they hand on, and one real run of two processes."""

import os
import socket
import stat
import subprocess
import sys

import pytest
from tiny_configs import TOOLS, last


@pytest.fixture
def recorder(tmp_path):
    """A program that prints its arguments, one a line."""
    path = tmp_path / 'recorder'
    path.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def call(script, *args, **env):
    done = subprocess.run(
        ['bash', os.path.join(TOOLS, script), *args],
        capture_output=True,
        text=True,
        env={**os.environ, **{k: str(v) for k, v in env.items()}},
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_dist_train_starts_torchrun(recorder):
    code, args, _ = call('dist_train.sh', 'my config.py', '4', '--amp', '--cfg-options', 'a=b c', PYTHON=recorder)
    assert code == 0
    assert args[:7] == [
        '-m',
        'torch.distributed.run',
        '--nnodes=1',
        '--node_rank=0',
        '--master_addr=127.0.0.1',
        '--master_port=29500',
        '--nproc_per_node=4',
    ]
    assert args[7].endswith('train.py')
    assert args[8:] == ['my config.py', '--launcher', 'pytorch', '--amp', '--cfg-options', 'a=b c']


def test_dist_test_on_several_machines(recorder):
    code, args, _ = call(
        'dist_test.sh',
        'c.py',
        'c.pth',
        '8',
        '--tta',
        PYTHON=recorder,
        NNODES=2,
        NODE_RANK=1,
        MASTER_ADDR='host',
        PORT=1234,
    )
    assert code == 0
    assert args[2:7] == [
        '--nnodes=2',
        '--node_rank=1',
        '--master_addr=host',
        '--master_port=1234',
        '--nproc_per_node=8',
    ]
    assert args[7].endswith('test.py')
    assert args[8:] == ['c.py', 'c.pth', '--launcher', 'pytorch', '--tta']


@pytest.mark.parametrize(
    'extra, handed_on',
    [
        ([], []),
        (['work', '--amp'], ['--work-dir=work', '--amp']),  # as in mmdet and mmpretrain
        (['--amp'], ['--amp']),  # as in mmseg
    ],
)
def test_slurm_train(recorder, tmp_path, extra, handed_on):
    (tmp_path / 'srun').symlink_to(recorder)
    code, args, _ = call(
        'slurm_train.sh',
        'part',
        'job',
        'c.py',
        *extra,
        GPUS=16,
        SRUN_ARGS='--qos high',
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
    )
    assert code == 0
    assert args[:3] == ['-p', 'part', '--job-name=job']
    assert {'--ntasks=16', '--ntasks-per-node=8', '--gres=gpu:8', '--cpus-per-task=5'} < set(args)
    assert args[args.index('--qos') + 1] == 'high'
    assert args[args.index('c.py') :] == ['c.py', '--launcher', 'slurm', *handed_on]


def test_slurm_test_smaller_than_a_node(recorder, tmp_path):
    (tmp_path / 'srun').symlink_to(recorder)
    code, args, _ = call(
        'slurm_test.sh', 'part', 'job', 'c.py', 'c.pth', '--tta', GPUS=2, PATH=f'{tmp_path}:{os.environ["PATH"]}'
    )
    assert code == 0
    assert {'--ntasks=2', '--ntasks-per-node=2', '--gres=gpu:2'} < set(args)
    assert args[args.index('c.py') :] == ['c.py', 'c.pth', '--launcher', 'slurm', '--tta']


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'])
def test_usage(script):
    code, _, error = call(script, 'one')
    assert code == 2 and error.startswith('usage: ')


def test_two_processes_train_on_the_cpu(trained, tmp_path):
    config, _ = trained('cls')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    code, _, error = call(
        'dist_train.sh',
        config,
        '2',
        '--work-dir',
        str(tmp_path),
        '--no-validate',
        '--cfg-options',
        'train_cfg.max_epochs=1',
        'log_level=INFO',
        PYTHON=sys.executable,
        PORT=port,
        OMP_NUM_THREADS=1,
        CUDA_VISIBLE_DEVICES='',
    )
    assert code == 0, error
    assert error.count('running distributed on the CPU') == 1  # said by the first process only
    assert last(tmp_path).endswith('epoch_1.pth')
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert '[1/1]' in log  # 8 pictures, 4 a process: one step an epoch instead of two
