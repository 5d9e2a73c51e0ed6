"""Trainings in processes of their own, and what is done to them. Imported on both sides: nothing happens at import.

The processes are forked from a server that has imported everything once, so that one takes a second or two.
"""

import gc
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import zipfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / 'test_tools'))
from tiny_configs import load_tool, write_config  # noqa: E402

from mmoverlock import compat  # noqa: E402

PRELOAD = ['faults']
# The server imports what it finds (Python 3.12's does not find this module), before any patch: beside transformers 5
# mmpretrain cannot be imported without one.
if not compat.beside_transformers_5():
    PRELOAD += ['mmpretrain.datasets', 'mmpretrain.models', 'mmpretrain.engine', 'mmpretrain.evaluation']

#: Everything that a resumed run could lose: random augmentation in a worker that outlives the epoch and in the main
#: process, mixup and stochastic depth from the model's random numbers, an average of the weights with its buffers, a
#: schedule by iteration, a loss scaler, and no seed in the config.
EXTRA = """
custom_imports = dict(imports=['faults_parts'])
randomness = dict(seed=None)
model.update(train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8)]))
model['backbone']['drop_path_rate'] = 0.3
model['head'].update(loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'))
pipeline[1:1] = [dict(type='RandomResizedCrop', scale=64), dict(type='RandomFlip', prob=0.5)]
custom_hooks = [dict(type='mmpretrain.EMAHook', momentum=0.1, update_buffers=True), dict(type='RecordLosses')]
param_scheduler = dict(type='CosineAnnealingLR', T_max=10, end=10, by_epoch=False)
optim_wrapper = dict(type='CPUScalerOptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
train_dataloader.update(batch_size=2, num_workers=1, persistent_workers=True)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3)
default_hooks['checkpoint'].update(max_keep_ckpts=2, save_best='auto')
"""
BY_ITERATION = """
train_cfg = dict(type='IterBasedTrainLoop', max_iters=12, val_interval=4)
train_dataloader['sampler'] = dict(type='InfiniteSampler', shuffle=True)
default_hooks['checkpoint'].update(by_epoch=False, interval=4)
"""


def config(path, root, extra=''):
    """Writes the tiny classifier's config with everything above."""
    return write_config(path, 'cls', root, EXTRA + extra)


# -- what is done to a run: called in its process before it starts


def kill_after(iteration):
    """kill -9 in the middle of an epoch."""
    _after(iteration, lambda: os.kill(os.getpid(), signal.SIGKILL))


def terminate_after(iteration, rank=0):
    """What slurm does: SIGTERM to every process of the job, the workers too."""
    if int(os.environ.get('RANK', 0)) == rank:
        everyone = ['kill', '-TERM', '--', f'-{os.getpid()}']
        _after(iteration, lambda: subprocess.run(everyone, start_new_session=True, check=True))


def die_after(iteration, rank):
    """One process of several raises."""

    def die():
        raise RuntimeError(f'rank {rank} has a reason of its own')

    if int(os.environ.get('RANK', 0)) == rank:
        _after(iteration, die)


def _after(iteration, do):
    from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

    for loop in (EpochBasedTrainLoop, IterBasedTrainLoop):

        def train_step(self, *args, original=loop.run_iter, **kwargs):
            if self.iter + 1 == iteration:
                # Within the iteration, as a signal comes at any time, and before the hooks that look for it.
                self.runner.call_hook = _once(self.runner, self.runner.call_hook, do)
            return original(self, *args, **kwargs)

        loop.run_iter = train_step


def _once(runner, call_hook, do):
    def call(name, **kwargs):
        if name == 'after_train_iter':
            del runner.call_hook
            do()
        return call_hook(name, **kwargs)

    return call


def kill_in_write(number):
    """kill -9 when half of the n-th checkpoint is written."""
    from mmengine.fileio import LocalBackend

    original, left = LocalBackend.put, [number]

    def put(self, content, path):
        left[0] -= '.pth' in str(path)
        if left[0]:
            return original(self, content, path)
        with open(path, 'wb') as file:
            file.write(content[: len(content) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    LocalBackend.put = put


def fill_disk_after(number):
    """From the n-th checkpoint on, no file can grow beyond half of one: the write fails in its middle."""
    from mmengine.fileio import LocalBackend

    original, left = LocalBackend.put, [number]

    def put(self, content, path):
        left[0] -= '.pth' in str(path)
        if not left[0]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, resource.RLIM_INFINITY))
        return original(self, content, path)

    LocalBackend.put = put


def kill_worker_after(number):
    """The n-th sample kills the worker that loads it, as the kernel does when memory is short."""
    from mmpretrain.datasets import CustomDataset

    original, left = CustomDataset.__getitem__, [number]

    def getitem(self, index):
        left[0] -= 1
        if not left[0] and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    CustomDataset.__getitem__ = getitem


# -- running


def _train(argv, log, fault=None, arguments=()):
    """In the process: train with the tool."""
    os.setsid()
    with open(log, 'ab', buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    _leave_out_what_takes_seconds()
    if fault is not None:
        globals()[fault](*arguments)
    load_tool('train.py').main(argv)


def _leave_out_what_takes_seconds():
    """Formatting the config's text, asking compilers for their versions, walks over the server's memory."""
    import mmengine.config.config
    from mmengine.runner import Runner

    gc.freeze()
    mmengine.config.config.FormatCode = lambda text, **kwargs: (text, True)
    Runner._log_env = lambda self, env_cfg: None


def context():
    """The server's context, everything imported, and no GPU in sight: packages count them when they are imported."""
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=''):
        forkserver.ensure_running()
    return ctx


def train(config_file, work, *flags, fault=None, arguments=(), timeout=60):
    """One training in a process; gives (exit code, what it said). A negative code is the signal that killed it."""
    log = Path(work).with_suffix('.log')
    log.unlink(missing_ok=True)
    argv = [str(config_file), '--work-dir', str(work), *flags]
    process = context().Process(target=_train, args=(argv, str(log), fault, arguments))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError('the training hangs:\n' + log.read_text())
    return process.exitcode, log.read_text()


def train_two(config_file, work, *flags, fault=None, arguments=()):
    """A training of two processes under torch's launcher, as ``tools/dist_train.sh`` starts it.

    Returns:
        str: What they said.

    Raises:
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: One of them failed.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    context()
    log = Path(work).with_suffix('.log')
    log.unlink(missing_ok=True)
    argv = [str(config_file), '--work-dir', str(work), '--launcher', 'pytorch', *flags]
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        start_method='forkserver',
        rdzv_backend='c10d',
        rdzv_endpoint='localhost:0',
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(launch, _train)(argv, str(log), fault, arguments)
    except ChildFailedError:
        print(log.read_text())  # which pytest shows of a test that fails
        raise
    return log.read_text()


def losses(work):
    """Iteration to loss, the exact number; of an iteration that ran twice, the last."""
    lines = (Path(work) / 'losses.txt').read_text().split()
    return dict(zip(lines[::2], lines[1::2]))


def inside_a_tensor(checkpoint):
    """Offset of a byte amid the largest tensor of a checkpoint: others may be padding, which nobody reads."""
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    with open(checkpoint, 'rb') as file:
        file.seek(largest.header_offset + 26)
        name, extra = struct.unpack('<HH', file.read(4))
    return largest.header_offset + 30 + name + extra + largest.file_size // 2
