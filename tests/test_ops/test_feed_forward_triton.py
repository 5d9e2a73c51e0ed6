"""When the fused feed-forward half is chosen, how the 3x3 cuts maps, and the kernels interpreted on the CPU."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from common import OnGpu, compile_kernel, run_interpreted

from mmoverlock.ops import BackendError, available_backends, depthwise_conv3x3, feed_forward, triton_common
from mmoverlock.ops.depthwise import small
from mmoverlock.ops.feed_forward import triton as fused

KERNEL_TESTS = Path(__file__).with_name('test_feed_forward_triton_kernels.py')


@pytest.mark.skipif(not triton_common.INSTALLED, reason='needs Triton')
def test_kernels_interpreted():
    run_interpreted(KERNEL_TESTS)


def on_gpu(channels=16, hidden=64, out=16, height=5, dtype=torch.float16):
    x = OnGpu(2, channels, height, 7, dtype=dtype)
    shapes = ((hidden, channels, 1, 1), (hidden,), (hidden, 1, 3, 3), (hidden,), (1, hidden, 1, 1), (1, hidden, 1, 1))
    return x, *(OnGpu(*s) for s in (*shapes, (out, hidden, 1, 1), (out,))), 1e-6, True, None, None, None


@pytest.mark.parametrize(
    'changes, capability, reason',
    [
        (dict(dtype=torch.float64), (9, 0), 'x is float64'),
        (dict(height=0), (9, 0), 'empty'),
        (dict(), (7, 5), 'Ampere'),
        (dict(channels=12), (9, 0), 'multiples of 8, they are 12, 64 and 16'),
        (dict(hidden=32768), (9, 0), '16384 hidden channels'),
        (dict(dtype=torch.float32), (8, 0), None),
        (dict(channels=56, hidden=224), (9, 0), None),
    ],
)
def test_refusals_say_why(monkeypatch, changes, capability, reason):
    monkeypatch.setattr(triton_common, 'INSTALLED', True)
    monkeypatch.setattr(triton_common, 'capability', lambda index: capability)
    found = fused.refuse(*on_gpu(**changes))
    assert (found is None) if reason is None else (reason in found), found


def test_refused_on_the_cpu(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(BackendError, match='needs CUDA tensors'):
        depthwise_conv3x3(torch.zeros(1, 8, 5, 5), torch.zeros(8, 1, 3, 3), backend='triton')


@pytest.mark.parametrize('operator', ['feed_forward', 'depthwise_conv3x3'])
def test_order_of_preference(operator):
    assert available_backends(operator) == ('triton', 'reference')


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match=r'expected \(C, 1, 3, 3\)'):
        depthwise_conv3x3(torch.zeros(1, 8, 5, 5), torch.zeros(8, 1, 5, 5))
    args = [torch.zeros(2, 4, 5, 5), *(torch.zeros(s) for s in ((8, 4, 1, 1), 8, (8, 1, 3, 3), 8))]
    args += [torch.zeros(1, 8, 1, 1), torch.zeros(1, 8, 1, 1), torch.zeros(6, 8, 1, 1), torch.zeros(6)]
    assert feed_forward(*args).shape == (2, 6, 5, 5)
    for place, name in ((0, 'x'), (2, 'bias1'), (3, 'dw_weight'), (6, 'beta'), (7, 'weight2'), (8, 'bias2')):
        wrong = [*args]
        wrong[place] = torch.zeros(3, 3, 3, 3) if args[place].dim() > 1 else torch.zeros(5)
        with pytest.raises(ValueError, match=f'{name} has shape'):
            feed_forward(*wrong)
    assert feed_forward(*args, shortcut=torch.ones(2, 6, 5, 5)).eq(1).all()
    with pytest.raises(ValueError, match='shortcut has shape'):
        feed_forward(*args, shortcut=torch.ones(2, 6, 5, 1))
    more = dict(shortcut=torch.ones(2, 6, 5, 5), scale=torch.ones(6), shift=torch.ones(6))
    with pytest.raises(ValueError, match='scale has shape'):
        feed_forward(*args, **dict(more, scale=torch.ones(5)))
    for given in (('scale', 'shift'), ('shortcut', 'scale'), ('shift',)):
        with pytest.raises(ValueError, match='scale and shift are of a shortcut'):
            feed_forward(*args, **{name: more[name] for name in given})


def test_definition_has_gradients():
    torch.manual_seed(0)
    shapes = ((1, 2, 3, 3), (3, 2, 1, 1), (3,), (3, 1, 3, 3), (3,), (1, 3, 1, 1), (1, 3, 1, 1), (2, 3, 1, 1), (2,))
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(feed_forward, args)
    more = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 3, 3), (2,), (2,))]

    def with_shortcut(*tensors):
        return feed_forward(*tensors[:9], shortcut=tensors[9], scale=tensors[10], shift=tensors[11])

    assert torch.autograd.gradcheck(with_shortcut, [*args, *more])


@pytest.mark.parametrize('own', [(7, 4), (4,)])
@pytest.mark.parametrize('tile', [256, 512, 1024])
@pytest.mark.parametrize('batch, channels', [(1, 3), (1, 24), (128, 256), (2, 1536), (64, 224)])
@pytest.mark.parametrize('height, width', [(1, 1), (7, 7), (14, 14), (56, 56), (25, 40), (200, 320), (640, 9)])
def test_plan_covers_the_map(own, tile, batch, channels, height, width):
    tuning = dataclasses.replace(small.TUNING, tile=tile)
    (vectors, _, _, rows, strips, lanes), constants, programs, parts = small.plan(
        (batch, channels, height, width), own, 2112, tuning
    )
    columns = constants['N'] * constants['G']
    assert vectors * constants['V'] == channels and constants['BC'] % constants['V'] == 0
    assert (strips - 1) * rows < height <= strips * rows
    assert (lanes - 1) * columns < width <= lanes * columns
    assert parts == strips * lanes
    assert programs == batch * parts * -(-channels // constants['BC'])
    assert constants['WHOLE'] == (width % constants['N'] == 0)
    assert constants['G'] * constants['BC'] == tile
    if constants['N'] not in own:  # a map that gives work to few programs
        assert constants['N'] == tuning.few_columns
        assert (
            small.plan((batch, channels, height, width), own, 2112, dataclasses.replace(tuning, few=0))[2] < tuning.few
        )


@pytest.mark.skipif(not triton_common.INSTALLED, reason='needs Triton')
@pytest.mark.parametrize(
    'name, constants, carried',
    [
        # Two rows of the gradient, one of it and one of the map on their way, eleven sums.
        ('backward', dict(N=4, G=2, WHOLE=True, GRN=False, GELU=True), 6 + 6 + 6 + 4 + 11),
        # Two rows of N sums, and one of N + 2 values on its way.
        ('forward', dict(N=4, G=2, WHOLE=True, BIAS=False, SQUARES=False, GELU=False), 4 + 4 + 6),
    ],
)
def test_compiler_keeps_rows_that_travel_with_the_loop(name, constants, carried):
    """Triton 3.6 folds ``a, b = b, c`` with one first value for both into a constant ``a``."""
    from mmoverlock.ops.depthwise import small_kernels

    kernel = getattr(small_kernels, f'depthwise3_{name}_kernel')
    compiled = compile_kernel(kernel, small_kernels._SIZES, dict(V=2, BC=16, RESIDUAL=True, **constants))
    found = re.findall(r'%(\S+) =', re.search(r'scf\.for .*?iter_args\((.*?)\) ->', compiled.asm['ttir'])[1])
    assert len(found) == carried, found
