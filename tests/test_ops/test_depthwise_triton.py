"""When the depthwise convolution in Triton is chosen, how it cuts maps, and its kernels interpreted on the CPU."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from common import OnGpu, compile_kernel, run_interpreted

from mmoverlock.ops import BackendError, available_backends, depthwise_conv2d, triton_common
from mmoverlock.ops.depthwise import norm_dilated
from mmoverlock.ops.depthwise import triton as fused

KERNEL_TESTS = Path(__file__).with_name('test_depthwise_triton_kernels.py')


@pytest.mark.skipif(not triton_common.INSTALLED, reason='needs Triton')
def test_kernels_interpreted():
    run_interpreted(KERNEL_TESTS)


@pytest.mark.skipif(not triton_common.INSTALLED, reason='needs Triton')
@pytest.mark.parametrize(
    'name, constants',
    [
        ('dilated_forward', dict(T=3, N=4, G=2, BC=16, GRAD=False)),
        ('dilated_forward', dict(T=2, N=4, G=2, BC=16, GRAD=True)),
        ('dilated_backward', dict(T=4, N=4, G=2, BC=16)),
        ('planes', dict(VP=4, BP=16, BC=16)),
        ('sum', dict(VP=4, BP=16, BC=16, T=3, M=2, SCALED=True)),
        ('sum', dict(VP=4, BP=16, BC=16, T=0, M=1, SCALED=False)),
    ],
)
def test_kernels_compile(name, constants):
    from mmoverlock.ops.depthwise import norm_dilated_kernels, orders_kernels

    module = norm_dilated_kernels if name.startswith('dilated') else orders_kernels
    compiled = compile_kernel(getattr(module, f'{name}_kernel'), module._SIZES, dict(V=4, **constants))
    assert compiled.asm['cubin']


@pytest.mark.parametrize('dilations', [(4, 5, 7), (3, 4, 5), (1, 2)])
@pytest.mark.parametrize('shape', [(64, 64, 56, 56), (2, 512, 25, 40), (1, 3, 2, 70), (2, 34, 200, 3)])
def test_dilated_plan_covers_the_map(shape, dilations):
    batch, channels, height, width = shape
    (vectors, _, _, rows, shares, lanes, *steps), constants, programs, parts = norm_dilated.plan(
        shape, dilations, norm_dilated.TUNING
    )
    assert vectors * constants['V'] == channels and steps[: len(dilations)] == list(dilations) and len(steps) == 4
    assert programs == len(dilations) * parts * -(-channels // constants['BC'])
    assert parts == batch * shares * lanes
    cdiv, least = triton_common.cdiv, min(dilations)
    assert 1 <= shares <= least * cdiv(cdiv(height, least), rows), 'programs without a strip'
    assert lanes * constants['G'] >= max(d * cdiv(cdiv(width, d), constants['N']) for d in dilations)


def tile(launch, shape, size):
    """Pixels of a tile, tiles of a program, and pixels of the window at a time."""
    plan, constants = launch(OnGpu(*shape), size, 1)
    return plan.tile[0] * plan.tile[1], constants['BM'], constants['BK']


@pytest.mark.parametrize(
    'shape, size, forward, gradient',
    [
        ((64, 64, 56, 56), 17, (128, 128, 64), (64, 64, 128)),
        ((128, 256, 14, 14), 13, (128, 64, 32), (64, 64, 128)),  # the window is as wide as the map
        ((64, 512, 7, 7), 7, (64, 64, 64), (64, 64, 64)),
        ((2, 128, 100, 160), 15, (64, 128, 64), (64, 32, 128)),  # 128 pixels would waste more rows of the last strip
        ((2, 256, 50, 80), 13, (128, 128, 64), (32, 32, 64)),
        ((2, 512, 25, 40), 7, (64, 64, 64), (32, 32, 64)),  # products of 128 pixels would have 32 rows
        ((1, 256, 14, 14), 13, (32, 16, 32), (32, 16, 64)),
    ],
)
def test_tiles_by_the_shape(shape, size, forward, gradient):
    assert tile(fused.forward_launch, shape, size) == forward
    assert tile(fused.grad_launch, shape, size) == gradient


def test_trials_of_the_benchmark():
    """Every set of launch parameters that ``benchmark_depthwise.py --only tune`` tries plans a convolution."""
    path = Path(__file__).parents[2] / 'tools/analysis/benchmark_depthwise.py'
    spec = importlib.util.spec_from_file_location('benchmark_depthwise', path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    plans = {'forward': fused._forward_launch, 'weight': fused._grad_launch}
    for form, option in tool.TRIALS:
        tuning = dataclasses.replace(fused.TUNING, **option)
        found = {plans[form](shape, torch.float16, size, d, tuning)[1]['BM'] for shape, size, d in tool.CASES.values()}
        assert len(found) > 1, option


@pytest.mark.parametrize(
    'x, weight, dilation, capability, reason',
    [
        (OnGpu(1, 2, 9, 9, dtype=torch.float64), OnGpu(2, 1, 5, 5), 1, (9, 0), 'x is float64'),
        (OnGpu(1, 2, 9, 9), OnGpu(2, 1, 5, 5, dtype=torch.float64), 1, (9, 0), 'weight is float64'),
        (OnGpu(1, 2, 0, 9), OnGpu(2, 1, 5, 5), 1, (9, 0), 'empty'),
        (OnGpu(1, 2, 9, 9), OnGpu(2, 1, 5, 5), 1, (7, 5), 'Ampere'),
        (OnGpu(1, 2, 9, 9), OnGpu(2, 1, 17, 17), 7, (9, 0), 'spans 113 pixels'),
        (OnGpu(1, 2, 9, 9), OnGpu(2, 1, 17, 17, dtype=torch.float32), 1, (8, 0), None),
        (OnGpu(1, 2, 9, 9, dtype=torch.bfloat16), OnGpu(2, 1, 97, 97), 1, (9, 0), None),
    ],
)
def test_refusals_say_why(monkeypatch, x, weight, dilation, capability, reason):
    monkeypatch.setattr(triton_common, 'INSTALLED', True)
    monkeypatch.setattr(triton_common, 'capability', lambda index: capability)
    found = fused.refuse(x, weight, None, dilation)
    assert (found is None) if reason is None else (reason in found), found


def test_refused_on_the_cpu_and_without_triton(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    args = torch.zeros(1, 2, 5, 5), torch.zeros(2, 1, 3, 3)
    with pytest.raises(BackendError, match='needs CUDA tensors'):
        depthwise_conv2d(*args, backend='triton')
    monkeypatch.setattr(triton_common, 'INSTALLED', False)
    with pytest.raises(BackendError, match='not installed'):
        depthwise_conv2d(*args, backend='triton')


def test_order_of_preference():
    assert available_backends('depthwise_conv2d') == ('triton', 'cpu', 'reference', 'implicit_gemm')


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
@pytest.mark.parametrize('size, dilation', [(1, 1), (5, 1), (17, 1), (19, 1), (3, 7), (9, 2), (97, 1)])
@pytest.mark.parametrize('width', [1, 7, 14, 28, 33, 56, 64, 65, 320])
@pytest.mark.parametrize('batch, height', [(1, 1), (2, 14), (128, 14), (2, 200)])
def test_plan_covers_the_map(dtype, size, dilation, width, batch, height):
    x = torch.empty(batch, 3, height, width, dtype=dtype, device='meta')
    plan = fused._Plan.of(x.shape, x.dtype, size, dilation, 64, 128)
    (down, across), (rows, columns), (up, left) = plan.tile, plan.window, plan.before
    reach = dilation * (size // 2)
    assert plan.across * across >= width and plan.strips * down >= height
    assert plan.groups * plan.together >= plan.strips and plan.lanes == batch * plan.across * plan.together
    # What the kernel reaches is in the window, or beyond the map.
    assert (left >= reach and columns >= left + across + reach) or (left == 0 and across == columns >= width)
    assert (up >= size // 2 and rows >= up + down + size // 2) or (up == 0 and rows == -(-height // dilation) <= down)
    assert columns <= fused._MAX_COLUMNS
    # Every vector begins at a multiple of its length.
    vector, row = plan.vectors
    assert height * width % vector == 0 and width % row == 0 and left % row == 0
    if plan.flat:
        assert dilation == 1 and up * width % vector == 0
        assert plan.strips == 1 or down * width % vector == 0
    else:
        assert vector == row
