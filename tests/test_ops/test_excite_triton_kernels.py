"""The perceptron of squeeze-and-excitation in Triton against its definition: on a GPU, or interpreted on the CPU."""

import dataclasses

import pytest
import torch
from kernel_tests import DEVICE, MARKS

from mmoverlock.ops import excite
from mmoverlock.ops.excite import triton as fused

pytestmark = MARKS
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def arguments(batch, channels, hidden, dtype=torch.float32, parameters=None):
    generator = torch.Generator().manual_seed(channels)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, parameters or dtype)

    tensors = [
        draw(batch, channels, 1, 1).to(dtype),
        draw(hidden, channels, 1, 1, scale=channels**-0.5),
        draw(hidden),
        draw(channels, hidden, 1, 1, scale=hidden**-0.5),
        draw(channels),
    ]
    return [t.requires_grad_() for t in tensors]


def errors(function, args):
    """Relative errors, against float64, of the output and of the gradients; nothing may be left unwritten."""
    exact = [a.detach().double().requires_grad_() for a in args]
    expected = function(*exact, backend='reference')
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(args[0])
    gradients = torch.autograd.grad(expected, exact, cotangent.double())
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what is not written with NaN
    try:
        out = function(*args, backend='triton')
        found = torch.autograd.grad(out, args, cotangent)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.dtype == args[0].dtype and out.shape == args[0].shape
    assert [g.dtype for g in found] == [a.dtype for a in args]
    assert [g.shape for g in found] == [a.shape for a in args]
    pairs = zip((out, *found), (expected, *gradients))
    return [((a.double() - b).norm() / (b.norm() + 1e-30)).item() for a, b in pairs]


# Odd sizes; channels and hidden values of every vector's length; OverLoCK's smallest layer; a larger batch; hidden
# values in more than one tile of the weights' gradients.
SIZES = [(3, 17, 16), (2, 40, 20), (1, 64, 16), (17, 6, 3), (1, 36, 42), (1, 1, 1), (2, 24, 80)]


@pytest.mark.parametrize('sizes', SIZES)
def test_equals_the_definition(sizes):
    found = errors(excite, arguments(*sizes))
    assert max(found) < 1e-5, found


@pytest.mark.parametrize('tile, programs', [(256, 1), (512, 4), (512, 132)])
@pytest.mark.parametrize('sizes', [(3, 72, 16), (2, 72, 20)])
def test_in_several_tiles(monkeypatch, sizes, tile, programs):
    """Channels in several tiles, an image's second product done by one program, by some, by one a tile."""
    monkeypatch.setattr(fused, 'TUNING', dataclasses.replace(fused.TUNING, tile=tile, programs=programs))
    assert sizes[1] > 2 * fused.plan(*sizes, fused.TUNING)[1]['BC']
    found = errors(excite, arguments(*sizes))
    assert max(found) < 1e-5, found


def test_images_are_added_up_in_parts(monkeypatch):
    monkeypatch.setattr(fused, 'TUNING', dataclasses.replace(fused.TUNING, images=(16, 16)))
    args = arguments(20, 12, 5)
    found = errors(excite, args)
    assert max(found) < 1e-5, found
    runs = [torch.autograd.grad(excite(*args, backend='triton').square().sum(), args) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))  # always in the same order


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('sizes', SIZES[:3])
def test_half_precision(dtype, sizes):
    found = errors(excite, arguments(*sizes, dtype))
    assert max(found) < TOLERANCE[dtype] / 2, found


def test_float32_parameters_keep_their_precision():
    found = errors(excite, arguments(3, 40, 20, torch.float16, torch.float32))
    assert max(found[2:]) < 1e-5, found
    assert max(found) < TOLERANCE[torch.float16] / 2, found


def test_large_values():
    """Gates that are 0 or 1, and values far out in GELU's tails; the sums' own rounding is then seen in the slopes."""
    args = arguments(3, 24, 16)
    with torch.no_grad():
        args[1].mul_(30)
        args[3].mul_(30)
    found = errors(excite, args)
    assert found[0] < 1e-5 and max(found) < 1e-4, found


def test_one_infinite_mean_leaves_other_images_and_gates():
    """As in the definition: gates that its hidden values do not reach stay finite, whatever a tile is padded with."""
    args = arguments(2, 24, 20)
    with torch.no_grad():
        args[0][0, 3] = float('inf')
        args[1][:, 3] = 1.0
        args[3][5] = 0.5
    out, expected = (excite(*args, backend=name) for name in ('triton', 'reference'))
    assert expected[0, 5] == 1
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_slopes_of_closed_and_open_gates():
    """Relative accuracy of a slope that is nearly zero, where the gate itself has been rounded to 1."""
    args = [a.detach() for a in arguments(1, 16, 16)]
    args[3].zero_()
    args[4].copy_(torch.arange(16) * 2 - 16)
    kept = torch.ops.mmoverlock.excite(*args, True)[1][0, 32:].double()
    exact = torch.sigmoid(args[4].double())
    torch.testing.assert_close(kept, exact * torch.sigmoid(-args[4].double()), rtol=1e-5, atol=0)


def test_from_any_memory():
    args = arguments(2, 12, 16)
    parts = [torch.randn(2, 24, 1, 3, device=DEVICE)[:, ::2, :, 1:2], args[1].detach().flatten(1).t().contiguous()]
    args[0], args[1] = parts[0].requires_grad_(), parts[1].t()[..., None, None].requires_grad_()
    assert not args[0].is_contiguous() and not args[1].is_contiguous()
    assert max(errors(excite, args)) < 1e-5
    out = excite(*args, backend='triton')
    grad = torch.randn(2, 24, 1, 1, device=DEVICE)[:, ::2]
    for a, b in zip(torch.autograd.grad(out, args, grad, retain_graph=True),
                    torch.autograd.grad(out, args, grad.contiguous())):  # fmt: skip
        assert torch.equal(a, b)


def test_only_what_is_needed():
    args = arguments(2, 8, 16)
    args[0].requires_grad_(False)
    excite(*args, backend='triton').sum().backward()
    assert args[0].grad is None and all(a.grad is not None for a in args[1:])
    with torch.no_grad():
        assert not excite(*args, backend='triton').requires_grad


def test_autocast_changes_nothing():
    args = arguments(2, 8, 16)
    with torch.autocast(DEVICE, torch.float16):
        out = excite(*args, backend='triton')
    assert torch.equal(out, excite(*args, backend='triton'))


def test_second_derivative():
    args, results = arguments(2, 5, 16), []
    for backend in ('triton', 'reference'):
        first = torch.autograd.grad(excite(*args, backend=backend).square().sum(), args, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), args))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_registered_as_torch_asks(dtype):
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    args = arguments(2, 12, 16, dtype, torch.float32)
    plain = [a.detach() for a in args]
    torch.library.opcheck(fused._excite, (*args, True), test_utils=checks)
    torch.library.opcheck(fused._excite, (*plain, False), test_utils=checks)
    out, kept = torch.ops.mmoverlock.excite(*plain, True)
    torch.library.opcheck(fused._gradients, (torch.randn_like(out), *plain, kept), test_utils=checks)


@pytest.mark.parametrize('dynamic', [False, True])
def test_traced(dynamic):
    """One graph each way; the kernels run eagerly, so that no compiler is needed."""
    torch._dynamo.reset()
    compiled = torch.compile(excite, fullgraph=True, backend='aot_eager', dynamic=dynamic)

    def run(*args, backend):
        return (compiled if backend == 'triton' else excite)(*args, backend=backend)

    for batch in (2, 5):
        assert max(errors(run, arguments(batch, 12, 16))) < 1e-5


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('sizes', [(64, 64, 16), (64, 336, 42), (64, 640, 80), (1, 640, 80), (300, 384, 48)])
def test_layers_of_overlock(sizes, dtype):
    found = errors(excite, arguments(*sizes, dtype, torch.float32))
    assert max(found) < TOLERANCE[dtype] and max(found[2:]) < 1e-5, found


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
@pytest.mark.parametrize('sizes', [(2, 4096, 512), (1, 16, 512), (1, 4096, 16)])
def test_largest(sizes):
    found = errors(excite, arguments(*sizes))
    assert max(found) < 1e-5, found


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
def test_cuda_graph():
    args = [a.detach() for a in arguments(4, 64, 16)]
    excite(*args, backend='triton')
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = excite(*args, backend='triton')
    args[0].copy_(torch.randn_like(args[0]))
    graph.replay()
    torch.testing.assert_close(out, excite(*args, backend='triton'), rtol=0, atol=0)
