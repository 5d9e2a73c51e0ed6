"""The perceptron of squeeze-and-excitation: its definition, when the fused form is chosen, its kernels interpreted."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from common import OnGpu, compile_kernel, run_interpreted

from mmoverlock.models.layers import SELayer
from mmoverlock.ops import BackendError, available_backends, excite, triton_common
from mmoverlock.ops.excite import triton as fused

KERNEL_TESTS = Path(__file__).with_name('test_excite_triton_kernels.py')


@pytest.mark.skipif(not triton_common.INSTALLED, reason='needs Triton')
def test_kernels_interpreted():
    run_interpreted(KERNEL_TESTS)


def shapes(batch=2, channels=5, hidden=3):
    return (batch, channels, 1, 1), (hidden, channels, 1, 1), (hidden,), (channels, hidden, 1, 1), (channels,)


def arguments(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes(*sizes)]


def test_definition_equals_its_formula():
    x, w1, b1, w2, b2 = args = arguments()
    z = x[:, :, 0, 0] @ w1[:, :, 0, 0].T + b1
    h = z * 0.5 * (1 + torch.erf(z / 2**0.5))
    expected = 1 / (1 + torch.exp(-(h @ w2[:, :, 0, 0].T + b2)))
    torch.testing.assert_close(excite(*args), expected[:, :, None, None], rtol=1e-12, atol=1e-12)


def test_definition_has_gradients():
    assert torch.autograd.gradcheck(excite, arguments())
    assert torch.autograd.gradgradcheck(excite, arguments(), fast_mode=True)


@pytest.mark.parametrize('place, name', [*enumerate(('pooled', 'weight1', 'bias1', 'weight2', 'bias2'))])
def test_arguments_that_do_not_fit(place, name):
    args = [torch.zeros(s) for s in shapes()]
    assert excite(*args).shape == (2, 5, 1, 1)
    # The first weight says what is expected: of it, the kernel's size can be wrong.
    args[place] = torch.zeros(3, 5, 3, 3) if place == 1 else torch.zeros([n + 1 for n in args[place].shape])
    with pytest.raises(ValueError, match=rf'excite: {name} has shape \(.*\), expected \('):
        excite(*args)


@pytest.mark.parametrize(
    'sizes, dtype, capability, reason',
    [
        ((2, 64, 16), torch.float64, (9, 0), 'pooled is float64'),
        ((0, 64, 16), torch.float32, (9, 0), 'empty'),
        ((2, 64, 0), torch.float32, (9, 0), 'empty'),
        ((2, 64, 16), torch.float32, (7, 5), 'Ampere'),
        ((2, 4104, 513), torch.float32, (9, 0), '4096 channels and 512 hidden values, not 4104 and 513'),
        ((2, 4096, 512), torch.float32, (8, 0), None),
        ((1, 17, 3), torch.float16, (9, 0), None),
    ],
)
def test_refusals_say_why(monkeypatch, sizes, dtype, capability, reason):
    monkeypatch.setattr(triton_common, 'INSTALLED', True)
    monkeypatch.setattr(triton_common, 'capability', lambda index: capability)
    found = fused.refuse(*(OnGpu(*s, dtype=dtype) for s in shapes(*sizes)))
    assert (found is None) if reason is None else (reason in found), found


def test_chosen_by_device(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    assert available_backends('excite') == ('triton', 'reference')
    args = [a.detach().float() for a in arguments()]
    with pytest.raises(BackendError, match='needs CUDA tensors'):
        excite(*args, backend='triton')
    assert torch.equal(excite(*args), excite(*args, backend='reference'))


@pytest.mark.parametrize('batch', [1, 2, 64, 1000])
@pytest.mark.parametrize('channels, hidden', [(1, 1), (17, 3), (64, 16), (336, 42), (640, 80), (4096, 512), (8, 512)])
@pytest.mark.parametrize('tile', [512, 16384])
def test_plan_covers_the_layer(batch, channels, hidden, tile):
    tuning = dataclasses.replace(fused.TUNING, tile=tile)
    (vectors, hidden_vectors, shares), images, weights = fused.plan(batch, channels, hidden, tuning)
    assert vectors * images['V'] == channels and hidden_vectors * images['W'] == hidden
    assert images['BE'] >= hidden
    assert 1 <= shares <= -(-channels // images['BC'])
    assert shares == 1 or shares * batch <= tuning.programs
    assert images['BC'] * images['BE'] <= max(tile, 16 * images['BE'])
    assert all(weights[v] == images[v] for v in 'VW') and weights['BB'] in tuning.images
    assert min(weights[b] for b in ('BC', 'BE', 'BB')) >= 16  # what a product takes


@pytest.mark.skipif(not triton_common.INSTALLED, reason='needs Triton')
@pytest.mark.parametrize(
    'name, constants, carried',
    [
        # The sums, the next tile of weights and of what it is multiplied with; then the next tile alone.
        ('', dict(BC=64, BE=16, KEEP=True), [3, 1]),
        ('grad_', dict(BC=64, BE=16), [4, 1]),
        # Both sums and those of the biases.
        ('weight_grad_', dict(BC=16, BE=16, BB=16), [4]),
    ],
)
def test_compiler_takes_the_kernels(name, constants, carried):
    from mmoverlock.ops.excite import triton_kernels

    kernel = getattr(triton_kernels, f'excite_{name or "forward_"}kernel')
    compiled = compile_kernel(kernel, triton_kernels._SIZES, dict(V=8, W=2, **constants))
    loops = re.findall(r'scf\.for .*?iter_args\((.*?)\) ->', compiled.asm['ttir'])
    assert [loop.count('=') for loop in loops] == carried, loops


def test_layer_keeps_its_names_and_numbers():
    torch.manual_seed(0)
    layer, x = SELayer(24).double(), torch.randn(2, 24, 5, 7, dtype=torch.float64)
    assert list(layer.state_dict()) == ['reduce.weight', 'reduce.bias', 'expand.weight', 'expand.bias']
    gates = layer.expand(torch.nn.functional.gelu(layer.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
    torch.testing.assert_close(layer(x), x * gates, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_layer_in_the_type_of_its_weights(dtype):
    layer, x = SELayer(24).to(dtype), torch.randn(2, 24, 5, 7)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x.bfloat16())
    assert out.dtype == torch.bfloat16
    exact = SELayer(24).double()
    exact.load_state_dict(layer.state_dict())
    torch.testing.assert_close(out.double(), exact(x.bfloat16().double()), rtol=2**-6, atol=2**-8)


def test_layer_is_one_graph():
    torch._dynamo.reset()
    layer, x = SELayer(24), torch.randn(2, 24, 5, 7)
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    assert not any('mmoverlock' in str(n.target) for n in torch.export.export(layer, (x,)).graph.nodes)
