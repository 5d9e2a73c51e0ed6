"""A run that was killed, and resumed, is the run that nothing happened to."""

import os
import shutil
import signal

import faults
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from mmoverlock.checkpoints import CheckpointError, latest_checkpoint


def load(path):
    return torch.load(path, weights_only=False)


def same(a, b, where=''):
    """Two checkpoints' parts are equal to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f'{where}.{i}')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(work, other, last, scale=8):
    """Every loss, and all that the last checkpoint keeps."""
    assert faults.losses(work) == faults.losses(other)
    a, b = load(work / last), load(other / last)
    for part in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'random_states', 'data_position'):
        same(a[part], b[part], part)
    assert a['optimizer']['loss_scaler']['scale'] >= scale
    assert a['message_hub']['runtime_info']['best_score'] == b['message_hub']['runtime_info']['best_score']


def seed_of(work):
    name = (work / 'last_checkpoint').read_text()
    return load(name)['meta']['seed']


@pytest.mark.parametrize(
    'kind, fault, arguments',
    [
        ('epochs', 'kill_after', (7,)),
        ('epochs', 'kill_in_write', (5,)),
        ('iterations', 'kill_after', (7,)),
    ],
)
def test_killed(undisturbed, tmp_path, kind, fault, arguments):
    config, other = undisturbed(kind)
    work = tmp_path / 'work'
    code, said = faults.train(
        config, work, '--cfg-options', f'randomness.seed={seed_of(other)}', fault=fault, arguments=arguments
    )
    assert code == -signal.SIGKILL, said
    found = {f for f in os.listdir(work) if f.endswith('.pth')}
    for name in found:  # whatever has its name is whole
        load(work / name)
    half = [f for f in os.listdir(work) if f.endswith('.partial')]
    assert len(half) == (fault == 'kill_in_write')
    code, said = faults.train(config, work, '--resume')  # the seed, too, comes out of the checkpoint
    assert code == 0, said
    assert not [f for f in os.listdir(work) if f.endswith('.partial')]
    assert_same_run(work, other, 'epoch_3.pth' if kind == 'epochs' else 'iter_12.pth')


@pytest.mark.parametrize('kind, iteration', [('epochs', 6), ('iterations', 6), ('epochs', 8)])
def test_terminated(undisturbed, tmp_path, kind, iteration):
    config, other = undisturbed(kind)
    work = tmp_path / 'work'
    code, said = faults.train(
        config,
        work,
        '--cfg-options',
        f'randomness.seed={seed_of(other)}',
        fault='terminate_after',
        arguments=(iteration,),
    )
    assert code == 0, said
    assert f'stopped by SIGTERM after iteration {iteration}' in said
    assert (work / 'last_checkpoint').read_text() == str(work / 'interrupted.pth')
    code, said = faults.train(config, work, '--resume')
    assert code == 0, said
    assert len(faults.losses(work)) == 12
    ran = [line.split()[0] for line in (work / 'losses.txt').read_text().splitlines()]
    assert ran == [str(i) for i in range(1, 13)]  # none twice, none left out
    assert_same_run(work, other, 'epoch_3.pth' if kind == 'epochs' else 'iter_12.pth')


def test_two_processes_stop_together_and_resume(undisturbed, tmp_path):
    config, other = undisturbed('two')
    work = tmp_path / 'work'
    epochs = 'train_cfg.max_epochs=2'
    options = [epochs, f'randomness.seed={seed_of(other)}', 'default_hooks.checkpoint.check_interval=3']
    said = faults.train_two(config, work, '--cfg-options', *options, fault='terminate_after', arguments=(2, 1))
    assert 'after iteration 3' in said  # two iterations an epoch: in the middle of the second
    assert (work / 'last_checkpoint').read_text() == str(work / 'interrupted.pth')
    faults.train_two(config, work, '--resume', '--cfg-options', epochs)
    for name in ('losses.txt', 'losses_1.txt'):
        assert (work / name).read_text() == (other / name).read_text()
    assert_same_run(work, other, 'epoch_2.pth', scale=4)


def test_one_of_two_processes_dies(undisturbed, tmp_path):
    config, _ = undisturbed('epochs')
    work = tmp_path / 'work'
    with pytest.raises(ChildFailedError) as failed:
        faults.train_two(config, work, fault='die_after', arguments=(3, 1))
    assert 'rank 1 has a reason of its own' in str(failed.value)  # the cause, not what it did to the other
    whole = [f for f in os.listdir(work) if f.endswith('.pth')]
    assert 'epoch_1.pth' in whole and 'interrupted.pth' not in whole


@pytest.mark.parametrize('damage', ['truncated', 'bit', 'empty', 'gone'])
def test_damaged_latest_checkpoint(undisturbed, tmp_path, damage):
    config, other = undisturbed('epochs')
    work = tmp_path / 'work'
    shutil.copytree(other, work)
    last = work / 'epoch_3.pth'
    content = bytearray(last.read_bytes())
    if damage == 'truncated':
        del content[len(content) // 2 :]
    elif damage == 'bit':
        content[faults.inside_a_tensor(last)] ^= 4
    else:
        content.clear()
    last.write_bytes(content)
    if damage == 'gone':
        last.unlink()
    (work / 'last_checkpoint').write_text(str(last))
    assert latest_checkpoint(str(work)) == str(work / 'epoch_2.pth')
    if damage == 'bit':  # and the run goes on from there
        (work / 'losses.txt').unlink()
        code, said = faults.train(config, work, '--resume')
        assert code == 0, said
        assert (
            f'{last}: is damaged (the checksum of' in said and f'Resuming from {work / "epoch_2.pth"} instead' in said
        )
        expected = faults.losses(other)
        assert faults.losses(work) == {i: expected[i] for i in ('9', '10', '11', '12')}


def test_no_whole_checkpoint_is_an_error(tmp_path):
    assert latest_checkpoint(str(tmp_path)) is None and latest_checkpoint(str(tmp_path / 'none')) is None
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        (tmp_path / name).write_bytes(b'PK\x03\x04')
    with pytest.raises(CheckpointError, match='no checkpoint to resume from.*epoch_2.pth.*epoch_1.pth'):
        latest_checkpoint(str(tmp_path))


def test_full_disk(undisturbed, tmp_path):
    config, other = undisturbed('epochs')
    work = tmp_path / 'work'
    code, said = faults.train(config, work, fault='fill_disk_after', arguments=(4,))
    assert code == 1
    error = said.strip().splitlines()[-1]
    assert 'cannot be written (File too large' in error and 'continue with --resume' in error
    left = sorted(f for f in os.listdir(work) if 'pth' in f)
    assert 'epoch_1.pth' in left and not [f for f in left if f.endswith('.partial')]
    assert [f for f in left if f.startswith('best_')]
    for name in left:
        load(work / name)
    assert os.path.isfile((work / 'last_checkpoint').read_text())
