"""When the fused ContMix is chosen, and its kernels interpreted on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmoverlock.ops import BackendError, available_backends, contmix
from mmoverlock.ops.contmix import triton as fused

KERNEL_TESTS = Path(__file__).with_name('test_contmix_triton_kernels.py')


def arguments(groups=1, dim=2, height=5, width=5, small=1, large=3, channels=1, dtype=torch.float32, device='meta'):
    def make(*shape):
        return torch.empty(*shape, dtype=dtype, device=device)

    return [
        make(1, groups, dim, height, width),
        make(1, groups, dim, 4),
        make(small**2 + large**2, 4),
        make(small**2 + large**2),
        make(groups, 2 * small - 1, 2 * small - 1),
        make(groups, 2 * large - 1, 2 * large - 1),
        make(1, 2 * groups * channels, height, width),
    ]


@pytest.mark.skipif(not fused._INSTALLED, reason='needs Triton')
def test_kernels_interpreted():
    """In a process of their own: Triton reads the wish to interpret when it is first imported."""
    env = dict(os.environ, TRITON_INTERPRET='1', CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', str(KERNEL_TESTS)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert ' passed' in result.stdout


def refusal(monkeypatch, **options):
    """Why the call is refused on a GPU that this machine need not have."""
    monkeypatch.setattr(fused, '_INSTALLED', True)
    capability = options.pop('capability', (9, 0))
    monkeypatch.setattr(fused, '_capability', lambda index: capability)
    args = [_Cuda(a) for a in arguments(**options)]
    return fused.refuse(*args)


class _Cuda:
    """A tensor's shape and type on a GPU that is not there."""

    def __init__(self, tensor):
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, torch.device('cuda', 0)


@pytest.mark.parametrize(
    'options, reason',
    [
        (dict(dtype=torch.float64), 'float64'),
        (dict(large=17, height=17, width=17), 'window is 17'),
        (dict(dim=65), 'wider than 64'),
        (dict(channels=65), 'wider than 64'),
        (dict(dim=0), 'empty'),
        (dict(capability=(7, 5)), 'Ampere'),
        (dict(), None),
        (dict(dtype=torch.bfloat16, dim=64, channels=64, large=15, height=15, width=15), None),
    ],
)
def test_refusals_say_why(monkeypatch, options, reason):
    found = refusal(monkeypatch, **options)
    assert (found is None) if reason is None else (reason in found), found


def test_refused_on_the_cpu_and_without_triton(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    args = arguments(device='cpu')
    with pytest.raises(BackendError, match='needs CUDA tensors'):
        contmix(*args, backend='triton')
    monkeypatch.setattr(fused, '_INSTALLED', False)
    with pytest.raises(BackendError, match='Triton is not installed'):
        contmix(*args, backend='triton')


def test_order_of_preference():
    assert available_backends('contmix') == ('triton', 'reference', 'natten')


@pytest.mark.parametrize('shape', [(2, 8, 16, 14, 14, 5, 13), (2, 8, 16, 50, 80, 5, 13), (128, 16, 16, 7, 7, 5, 7)])
def test_backward_memory_is_planned(shape):
    """The gradients of M, the largest temporaries, stay a few hundredths of one logits tensor (or of megabytes)."""
    batch, groups, dim, height, width, small, large = shape
    plan = fused._Plan(batch, groups, height, width, dim, dim, (small, large))
    logits = 4 * batch * groups * height * width * plan.logits
    chunk = fused._Plan(plan.chunk(), groups, height, width, dim, dim, (small, large))
    parts = -(-height // chunk.rows()) * plan.tiles
    products = 4 * chunk.batch * groups * dim * plan.logits
    assert products * (parts if parts > 1 else 0) <= max(0.05 * logits, fused.TUNING.floor)
    assert products <= max(0.05 * logits, fused.TUNING.floor)
