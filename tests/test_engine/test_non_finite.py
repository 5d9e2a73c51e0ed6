"""Steps with infinities: as if they had never been, counted, named; and averages that stay finite."""

import itertools
import logging
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.runner import Runner
from torch import nn

from mmoverlock.engine import FiniteEMA, NonFiniteError, NonFiniteGuardHook
from mmoverlock.engine.non_finite import non_finite

COUNT = itertools.count()  # mmengine wants a name a run


class Toy(BaseModel):
    """A network with running statistics, and a fault where the batch asks for one."""

    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x, fault=None, mode='loss'):
        x = self.bn(self.first(x))
        y = self.second(x.clamp(-9, 9))
        if fault == 'gradient':
            y.register_hook(lambda g: g * float('inf'))
        return dict(loss=self.out(y.relu()).square().mean())

    def train_step(self, data, optim_wrapper):
        loss, log = self.parse_losses(self(**data))
        optim_wrapper.update_params(loss)
        return log


def batch(seed, fault=None):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    if fault == 'input':
        x[2, 1] = float('nan')
    if fault == 'statistics':  # the variance overflows; the normalised values, and all gradients, are zero
        x[0] = 1e30
    return dict(x=x, fault=fault)


class CpuAmp(AmpOptimWrapper):
    """mmengine's wrapper with a loss scaler that works without a GPU."""

    def __init__(self, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=2.0**16)
        self.cast_dtype = torch.bfloat16


def wrap(model, kind, **kwargs):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    return (CpuAmp if kind == 'amp' else OptimWrapper)(optimizer=optimizer, **kwargs)


def train(tmp_path, batches, kind='plain', hooks=None, max_consecutive=20, **kwargs):
    """Trains on the batches and returns the runner; without hooks, with the guard alone."""
    torch.manual_seed(1)
    model = Toy()
    runner = Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=torch.utils.data.DataLoader(batches, batch_size=None),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=wrap(model, kind, **kwargs),
        default_hooks=dict.fromkeys(
            ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')
        ),
        custom_hooks=[NonFiniteGuardHook(max_consecutive)] if hooks is None else hooks,
        experiment_name=f'{tmp_path.name}-{next(COUNT)}',
        log_level='WARNING',
    )
    runner.train()
    return runner


def assert_equal_states(a, b, exact=True):
    for one, other in ((a.model, b.model), (a.optim_wrapper.optimizer, b.optim_wrapper.optimizer)):
        one, other = one.state_dict(), other.state_dict()
        for state in (one, other):
            state.pop('param_groups', None)
        torch.testing.assert_close(one, other, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


FAULTS = ['input', 'gradient', 'statistics']


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('kind, kwargs', [
    ('plain', {}),
    ('plain', dict(clip_grad=dict(max_norm=0.5))),
    ('amp', {}),
    ('amp', dict(clip_grad=dict(max_norm=0.5))),
])  # fmt: skip
def test_a_skipped_step_leaves_no_trace(tmp_path, fault, kind, kwargs):
    good = [batch(i) for i in range(5)]
    undisturbed = train(tmp_path, good, kind, **kwargs)
    runner = train(tmp_path, good[:3] + [batch(9, fault)] + good[3:], kind, **kwargs)
    # A lower loss scale rounds in other places; the state is the same.
    assert_equal_states(runner, undisturbed, exact=kind == 'plain')
    assert runner.message_hub.runtime_info['skipped_steps'] == 1
    if kind == 'amp':  # the scale is not to blame for the statistics of a batch norm
        scale = runner.optim_wrapper.loss_scaler.get_scale()
        assert scale == (2.0**16 if fault == 'statistics' else 2.0**15)


@pytest.mark.parametrize('fault', FAULTS)
def test_without_the_guard_the_fault_stays(tmp_path, fault):
    """The faults of these tests are faults: mmengine alone does not survive them."""
    runner = train(tmp_path, [batch(0), batch(1, fault), batch(2)], hooks=[])
    state = runner.model.state_dict()
    assert any(bool(non_finite([v])) for v in state.values())


def one_of_two(rank, folder):
    """A process of two: in the second iteration, the statistics of process 1 alone break."""
    torch.distributed.init_process_group('gloo', f'file://{folder}/meet', rank=rank, world_size=2)
    batches = [batch(0), batch(1, 'statistics' if rank else None), batch(2)]
    runner = train(Path(folder) / str(rank), batches)
    torch.save((runner.message_hub.runtime_info['skipped_steps'], runner.model.state_dict()), f'{folder}/{rank}.pth')


def test_all_processes_skip_together(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    (one, first), (two, second) = (torch.load(tmp_path / f'{rank}.pth') for rank in range(2))
    assert one == two == 1
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize('bad', [0, 1])
def test_accumulated_gradients_are_skipped_together(tmp_path, bad):
    """A step of two batches: a fault in either undoes what both left in the statistics."""
    spoilt = [batch(7), batch(8)]
    spoilt[bad] = batch(9, 'input')
    good = [batch(i) for i in range(4)]
    undisturbed = train(tmp_path, good, accumulative_counts=2)
    runner = train(tmp_path, good[:2] + spoilt + good[2:], accumulative_counts=2)
    assert_equal_states(runner, undisturbed)


def test_the_run_stops_with_the_name(tmp_path):
    with pytest.raises(NonFiniteError) as error:
        train(tmp_path, [batch(0)] + [batch(9, 'gradient')] * 5, max_consecutive=3)
    # out.* is behind the fault and has gradients; the last that does not is the layer with the fault.
    assert '3 steps in a row' in str(error.value) and 'the last second.bias' in str(error.value)
    with pytest.raises(NonFiniteError, match='bn.running_mean, the first of 2 buffers'):
        train(tmp_path, [batch(0)] + [batch(9, 'input')] * 5, max_consecutive=3)


def test_a_parameter_that_is_not_finite_is_named(tmp_path):
    class Spoil(Hook):
        def before_train_iter(self, runner, **kwargs):
            if runner.iter == 1:
                runner.model.second.weight.data[0, 0] = float('inf')

    with pytest.raises(NonFiniteError, match='parameter second.weight itself'):
        train(tmp_path, [batch(i) for i in range(4)], hooks=[Spoil(), NonFiniteGuardHook(2)])


def test_only_steps_in_a_row_stop_the_run(tmp_path, caplog):
    faulty = [batch(i, 'gradient' if i % 2 else None) for i in range(9)]
    runner = train(tmp_path, faulty, max_consecutive=2)
    assert runner.message_hub.runtime_info['skipped_steps'] == 4
    assert runner.message_hub.get_scalar('train/skipped_steps').data[0].tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    with pytest.raises(ValueError, match='must be positive'):
        NonFiniteGuardHook(0)


def test_the_log_says_what_and_how_many(tmp_path):
    lines = []

    class Catch(Hook):
        priority = 'HIGHEST'

        def before_train(self, runner):
            handler = logging.Handler()
            handler.emit = lambda record: lines.append(record.getMessage())
            runner.logger.addHandler(handler)

    train(tmp_path, [batch(0), batch(1, 'gradient')], 'amp', hooks=[Catch(), NonFiniteGuardHook()])
    (line,) = [text for text in lines if 'not finite' in text]
    assert 'iteration 2' in line and 'second.bias' in line and '1 in a row, 1 in all' in line
    assert 'loss scale 65536 -> 32768' in line


def test_the_guard_leaves_the_wrapper_as_it_was(tmp_path):
    runner = train(tmp_path, [batch(0)])
    assert 'step' not in vars(runner.optim_wrapper)


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('update_buffers', [True, False])
def test_averages_stay_finite(tmp_path, fault, update_buffers):
    """mmengine's own EMA beside the guard, whatever breaks."""
    ema = ROOT_HOOKS.build(dict(type='EMAHook', momentum=0.1, update_buffers=update_buffers))
    train(tmp_path, [batch(0), batch(1, fault), batch(2), batch(3, fault)], hooks=[ema, NonFiniteGuardHook()])
    assert not non_finite(ema.ema_model.state_dict().values())


@pytest.mark.parametrize('update_buffers', [True, False])
@pytest.mark.parametrize('interval', [1, 3])
def test_finite_ema_is_the_average_of_mmengine(update_buffers, interval):
    torch.manual_seed(0)
    model = Toy()
    kwargs = dict(momentum=0.1, interval=interval, update_buffers=update_buffers)
    expected, average = ExponentialMovingAverage(model, **kwargs), FiniteEMA(model, **kwargs)
    assert ROOT_MODELS.build(dict(type='mmoverlock.FiniteEMA', model=model)).momentum == 2e-4
    for _ in range(7):
        with torch.no_grad():
            for value in [*model.parameters(), *model.buffers()]:
                value.add_(torch.randn_like(value) if value.is_floating_point() else 1)
        expected.update_parameters(model)
        average.update_parameters(model)
        torch.testing.assert_close(average.state_dict(), expected.state_dict())


@pytest.mark.parametrize('name', ['second.weight', 'bn.running_var'])
@pytest.mark.parametrize('update_buffers', [True, False])
def test_finite_ema_passes_over_what_is_not(name, update_buffers):
    model = Toy()
    average = FiniteEMA(model, momentum=0.1, update_buffers=update_buffers)
    average.update_parameters(model)
    before = {k: v.clone() for k, v in average.state_dict().items()}
    healthy = model.state_dict()[name].clone()
    model.state_dict()[name].fill_(float('nan'))
    average.update_parameters(model)
    torch.testing.assert_close(average.state_dict(), before)
    model.state_dict()[name].copy_(healthy)
    average.update_parameters(model)
    assert average.steps == 2 and average.passed_over == 1


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('value', [float('inf'), -float('inf'), float('nan')])
def test_non_finite(dtype, value):
    tensors = [
        torch.randn(3, 4).to(dtype),
        torch.zeros(0),
        torch.arange(3),
        torch.full((2,), torch.finfo(dtype).max, dtype=dtype),
    ]
    before = [t.clone() for t in tensors]
    assert not non_finite(tensors) and not non_finite([])
    torch.testing.assert_close(tensors, before, rtol=0, atol=0)
    tensors[0].t()[1, 2] = value
    assert non_finite(tensors)
    assert non_finite([torch.ones(2), tensors[0].to_sparse()])
