"""When the fused ContMix is chosen, and its kernels interpreted on the CPU."""

from pathlib import Path

import pytest
import torch
from common import OnGpu, run_interpreted

from mmoverlock.ops import BackendError, available_backends, contmix, triton_common
from mmoverlock.ops.contmix import general, shared
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


@pytest.mark.skipif(not triton_common.INSTALLED, reason='needs Triton')
def test_kernels_interpreted():
    run_interpreted(KERNEL_TESTS)


def refusal(monkeypatch, **options):
    """Why the call is refused on a GPU that this machine need not have."""
    monkeypatch.setattr(triton_common, 'INSTALLED', True)
    capability = options.pop('capability', (9, 0))
    monkeypatch.setattr(triton_common, 'capability', lambda index: capability)
    args = [OnGpu(*a.shape, dtype=a.dtype) for a in arguments(**options)]
    return fused.refuse(*args)


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
    monkeypatch.setattr(triton_common, 'INSTALLED', False)
    with pytest.raises(BackendError, match='Triton is not installed'):
        contmix(*args, backend='triton')


def test_order_of_preference():
    assert available_backends('contmix') == ('triton', 'cpu', 'reference', 'natten')


@pytest.mark.parametrize('shape', [(2, 8, 16, 20, 20, 5, 13), (2, 8, 16, 50, 80, 5, 13), (128, 16, 16, 9, 9, 5, 7)])
def test_backward_memory_is_planned(shape):
    """The gradients of M, the largest temporaries, stay a few hundredths of one logits tensor (or of megabytes)."""
    batch, groups, dim, height, width, small, large = shape
    plan = general.Plan(batch, groups, height, width, dim, dim, (small, large))
    chunk = plan.chunk()
    splits, bands = plan.cut(chunk)
    columns, partials = sum(plan.columns), plan.stripes * bands
    products = 4 * chunk * groups * dim * columns
    gradients = products * (partials + (partials > 1)) + 4 * splits * groups * partials * (plan.places + columns)
    sums = 2 * 4 * batch * groups * 2 * height * width
    table = 4 * groups * large**2 * columns
    assert products + gradients + sums + table <= max(0.125 * plan.logits_bytes, 4 * general.TUNING.floor)


def test_memory_is_planned_where_windows_are_shared():
    """Products, softmax sums, deltas, tables and their gradients at 224²: a tenth of the logits at most."""
    plan = shared.Plan(128, 8, 14, 14, 16, 16, (5, 13))
    table = 4 * 8 * 14 * 14 * sum(plan.padded)
    products = 4 * plan.chunk() * 8 * 16 * sum(plan.padded)
    sums = 2 * 4 * 128 * 8 * 2 * 14 * 14
    cells = 4 * 8 * 14 * 14 * 256
    weight = 4 * shared._PARTS * 49 * sum(plan.padded)
    assert products + sums + table * (1 + plan.splits()) + cells + weight <= 0.1 * plan.logits_bytes
    assert plan.chunk() < plan.chunk(train=False) == 128  # nothing is kept for a backward pass: one launch
    assert shared.Plan(64, 8, 14, 14, 16, 16, (5, 13)).chunk() == 64  # some MB are no matter


@pytest.mark.parametrize('height, width, shared_windows', [(13, 13, True), (14, 14, True), (13, 15, False)])
def test_which_maps_share_windows(height, width, shared_windows):
    assert shared.takes(height, width, 13, 16) == shared_windows
    assert not shared.takes(height, width, 13, 40)  # wide heads: ptxas makes wrong code of one kernel
    if shared_windows:
        plan = shared.Plan(1, 1, height, width, 16, 16, (5, 13))
        starts = {
            (min(max(i - 6, 0), height - 13), min(max(j - 6, 0), width - 13))
            for i in range(height)
            for j in range(width)
        }
        assert plan.tiles % len(starts) == 0
        assert len(starts) * plan.sides[0] * plan.sides[1] == height * width


def test_unwritten_registers_are_found():
    """On lines of machine code as ptxas has made them."""
    import importlib.util

    path = Path(__file__).resolve().parents[2] / 'tools/analysis/benchmark_contmix.py'
    spec = importlib.util.spec_from_file_location('benchmark_contmix', path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    right = [
        ('0', 'UMOV UR9, 0x400 '),
        ('1', 'UIADD3 UR4, UR9, 0x2000, URZ '),
        ('2', 'UMOV UR5, URZ '),
        ('3', 'UIADD3.64 UR6, UR4, 0x20, URZ '),
        ('4', 'HGMMA.64x16x16.F32 R24, R44, gdesc[UR4].tnspB, R24 '),
        ('5', '@!P0 ULDC.64 UR16, c[0x0][0x208] '),
        ('6', '@P5 STG.E desc[UR16][R136.64], R31 '),
    ]
    assert tool.unwritten(right) == []
    for missing in (0, 1, 2, 3, 5):
        assert tool.unwritten(right[:missing] + right[missing + 1 :])
