"""Two processes with half of the batch each are one process with all of it.

On the CPU through gloo, with a stand-in for SyncBatchNorm, which torch has for GPUs only; with two GPUs or more, the
same through NCCL and with torch's own.
"""

import sys
from pathlib import Path

import pytest
import torch
from mmengine.model import convert_sync_batchnorm
from torch import nn

pytest.importorskip('mmpretrain')
sys.path.insert(0, str(Path(__file__).resolve().parent))
import together  # noqa: E402


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """What each of two processes found."""
    return together.call(together.everything, tmp_path_factory.mktemp('ddp') / 'two')


@pytest.mark.parametrize('name', together.RUNS)
def test_same_losses_gradients_and_weights(two, name):
    """Float64: what is left is the order of sums. AdamW's eps holds gradients that are zero but for it at zero."""
    settings = {k: v for k, v in together.RUNS[name].items() if k not in ('static_graph', 'flat')}
    one = together.train(**settings)
    first, second = (process['runs'][name] for process in two)
    mean = [(a + b) / 2 for a, b in zip(first['losses'], second['losses'])]
    assert mean == pytest.approx(one['losses'], rel=1e-9)
    assert first['losses'] != pytest.approx(second['losses'], rel=1e-3)  # each has pictures of its own
    assert len(first['gradients']) == len(one['gradients']) == 3
    torch.testing.assert_close(first['gradients'], one['gradients'], rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(second['gradients'], first['gradients'], rtol=0, atol=0)
    # Weights, and running statistics of all pictures.
    torch.testing.assert_close(first['state'], one['state'], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(second['state'], first['state'], rtol=1e-7, atol=1e-9)


def test_no_parameter_goes_without_a_gradient(two):
    for process in two:
        assert dict(zip(map(str, together.SETTINGS), process['unused'])) == {str(s): '' for s in together.SETTINGS}
        assert 'unused' in process['control'] or 'Expected to have finished reduction' in process['control']
        assert '2 parameters got no gradient, the first spare.weight: freeze' in process['flat_control']


def test_a_converted_model_merges(tiny):
    """switch_to_deploy() of a model with SyncBN folds as many batch norms, into the same weights."""
    from common import randomise

    from mmoverlock import OverLoCK

    plain = randomise(OverLoCK(tiny)).eval()
    converted = convert_sync_batchnorm(randomise(OverLoCK(tiny))).eval()
    norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(type(m) is nn.SyncBatchNorm for m in norms)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = converted(x)
        plain.switch_to_deploy()
        converted.switch_to_deploy()
        assert list(converted.state_dict()) == list(plain.state_dict())
        torch.testing.assert_close(converted.state_dict(), plain.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(converted(x), before, rtol=1e-4, atol=1e-4)


def test_a_converted_model_recomputes(tiny):
    """with_cp and SyncBN: the same gradients, and statistics that are updated once."""
    from common import randomise

    from mmoverlock import OverLoCK

    arch = dict(tiny, focus_depths=(1, 1))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    models = [randomise(OverLoCK(arch, with_cp=with_cp)).double().train() for with_cp in (False, True)]
    models[1] = convert_sync_batchnorm(models[1])
    for model in models:
        sum(feature.relu().square().mean() for feature in model(x)).backward()
    plain, converted = models
    torch.testing.assert_close(converted.state_dict(), plain.state_dict())
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in models]
    torch.testing.assert_close(*gradients)
