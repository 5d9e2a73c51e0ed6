"""FSDP through mmengine's strategy: the run is that of DDP, and its checkpoints are a plain run's."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from common import TINY

pytest.importorskip('mmpretrain')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'test_faults'))
import faults  # noqa: E402
from tiny_configs import imagenet_folders, write_config  # noqa: E402

from mmoverlock import OverLoCK  # noqa: E402

#: What sharding could get wrong: groups by dimension, clipping by the norm of all gradients, the optimizer's state. An
#: eps far over the rounding of gradients that are zero (of biases before a batch norm), which Adam would blow up.
EXTRA = """
custom_imports = dict(imports=['faults_parts'])
custom_hooks = [dict(type='RecordLosses')]
sync_bn = 'torch'  # left out on the CPU
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.5, eps=1e-4),
    clip_grad=dict(max_norm=0.5),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0))
param_scheduler = dict(type='CosineAnnealingLR', T_max=4, end=4, by_epoch=False)
train_dataloader.update(batch_size=2)
default_hooks['non_finite_guard'] = dict(type='mmoverlock.NonFiniteGuardHook')
"""
FRAGMENT = Path(__file__).resolve().parents[2] / 'configs/_base_/strategies/fsdp.py'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Folder of three runs of two processes: ``ddp``, ``fsdp``, and ``resumed``, FSDP from its first epoch on."""
    folder = tmp_path_factory.mktemp('fsdp')
    data = imagenet_folders(folder / 'data')
    ddp = write_config(folder / 'ddp.py', 'cls', data, EXTRA)
    fsdp = write_config(folder / 'fsdp.py', 'cls', data, EXTRA + f'_base_ = {str(FRAGMENT)!r}\n')
    faults.train_two(ddp, folder / 'ddp')
    faults.train_two(fsdp, folder / 'fsdp')
    (folder / 'resumed').mkdir()
    shutil.copy(folder / 'fsdp' / 'epoch_1.pth', folder / 'resumed')
    faults.train_two(fsdp, folder / 'resumed', '--resume', str(folder / 'resumed' / 'epoch_1.pth'))
    return folder


def losses(work):
    return {int(i): float.fromhex(loss) for i, loss in faults.losses(work).items()}


def load(path):
    return torch.load(path, weights_only=False)


def test_fsdp_trains_as_ddp_does(runs):
    ddp, fsdp = losses(runs / 'ddp'), losses(runs / 'fsdp')
    assert list(fsdp) == [1, 2, 3, 4] and len(set(fsdp.values())) == 4
    assert fsdp == pytest.approx(ddp, rel=1e-5)
    a, b = load(runs / 'ddp' / 'epoch_2.pth'), load(runs / 'fsdp' / 'epoch_2.pth')
    torch.testing.assert_close(b['state_dict'], a['state_dict'], rtol=1e-4, atol=1e-6)


def test_checkpoint_is_a_plain_one(runs):
    a, b = load(runs / 'ddp' / 'epoch_2.pth'), load(runs / 'fsdp' / 'epoch_2.pth')
    assert list(a['state_dict']) == list(b['state_dict']) and set(a) == set(b)
    assert a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    assert {g['weight_decay'] for g in b['optimizer']['param_groups']} == {0.0, 0.5}
    torch.testing.assert_close(b['optimizer']['state'], a['optimizer']['state'], rtol=1e-3, atol=1e-7)
    assert a['param_schedulers'] == b['param_schedulers']


def test_resumed_run_is_the_undisturbed_one(runs):
    assert losses(runs / 'resumed') == {i: loss for i, loss in losses(runs / 'fsdp').items() if i > 2}
    a, b = load(runs / 'fsdp' / 'epoch_2.pth'), load(runs / 'resumed' / 'epoch_2.pth')
    torch.testing.assert_close(b['state_dict'], a['state_dict'], rtol=0, atol=0)
    torch.testing.assert_close(b['optimizer']['state'], a['optimizer']['state'], rtol=0, atol=0)


def test_every_block_is_a_unit():
    from mmoverlock.engine.fsdp import blocks_policy

    model = OverLoCK(dict(TINY, depths=(2, 1, 3, 1)))
    units = blocks_policy()._run_policy(model, set(), {})
    stages = ('stage1', 'stage2', 'stage3', 'stage4', 'focus3', 'focus4')
    blocks = {block for name in stages for block in getattr(model, name)}
    assert set(units) == blocks and len(blocks) == 10


def test_what_cannot_be_is_refused():
    from mmoverlock.engine import FiniteEMA
    from mmoverlock.engine.fsdp import FSDPStrategy

    with pytest.raises(ValueError, match="state_dict_cfg='full'"):
        FSDPStrategy(state_dict_cfg='local')
    sharded = torch.nn.Sequential(torch.nn.Linear(1, 1))
    sharded[0]._fsdp_wrapped_module = torch.nn.Identity()
    with pytest.raises(ValueError, match='with FSDP leave EMAHook out'):
        FiniteEMA(sharded)


def test_optimizer_of_other_groups_is_refused():
    from mmoverlock.engine.fsdp import _by_name, _by_number

    named = dict(state=dict(a=1, c=3), param_groups=[dict(lr=1, params=['b', 'a']), dict(lr=2, params=['c'])])
    numbered = _by_number(named)
    assert numbered == dict(state={1: 1, 2: 3}, param_groups=[dict(lr=1, params=[0, 1]), dict(lr=2, params=[2])])
    assert _by_name(numbered, [['b', 'a'], ['c']]) == named
    with pytest.raises(ValueError, match='other parameter groups'):
        _by_name(numbered, [['b'], ['a', 'c']])
