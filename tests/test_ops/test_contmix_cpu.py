"""The CPU's form of ContMix against its definition."""

import pytest
import torch
from test_contmix import SHAPES, arguments

from mmoverlock.ops import BackendError, contmix

# Maps with one, two and four large windows, and one where windows are hardly shared.
SHARED = [
    dict(small=5, large=7, height=7, width=7),
    dict(small=3, large=7, height=8, width=7, values=2),
    dict(small=5, large=7, height=8, width=8),
    dict(small=5, large=7, height=7, width=10),
    dict(small=3, large=7, height=9, width=9),
]


def run(args, backend):
    args = [a.detach().requires_grad_() for a in args]
    out = contmix(*args, backend=backend)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return (out, *torch.autograd.grad(out, args, cotangent))


@pytest.mark.parametrize('shape', SHAPES + SHARED)
@pytest.mark.parametrize('last', [False, True])
def test_equals_the_definition(shape, last):
    args = arguments(**shape)
    if last:
        args[-1] = args[-1].to(memory_format=torch.channels_last)
    for a, b in zip(run(args, 'cpu'), run(args, 'reference')):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize('shape', [SHARED[2], SHARED[4]])
def test_precision(dtype, tolerance, shape):
    args = arguments(dtype=dtype, **shape)
    for a, b in zip(run(args, 'cpu'), run([a.double() for a in args], 'reference')):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize('shape', [SHARED[2], SHARED[4]])
def test_large_logits(shape):
    args = arguments(dtype=torch.float32, **shape)
    args[0] *= 1e4
    exact = contmix(*[a.double() for a in args], backend='reference')
    torch.testing.assert_close(contmix(*args, backend='cpu').double(), exact, rtol=1e-2, atol=1e-2)


def test_second_derivative():
    args = arguments(batch=1, groups=1, dim=1, height=4, width=3, small=1, large=3, cells=2)
    args = [a.requires_grad_() for a in args]
    assert torch.autograd.gradgradcheck(lambda *a: contmix(*a, backend='cpu'), args, fast_mode=True)


def test_second_derivative_is_the_definitions():
    args = [a.requires_grad_() for a in arguments(**SHARED[1])]
    second = []
    for backend in ('cpu', 'reference'):
        grads = torch.autograd.grad(contmix(*args, backend=backend).sin().sum(), args, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in grads), args))
    torch.testing.assert_close(*second)


def test_is_what_a_cpu_takes(monkeypatch):
    from mmoverlock.ops.contmix import cpu

    class Taken(Exception):
        pass

    def widened(*args):
        raise Taken

    monkeypatch.setattr(cpu, 'widened', widened)
    with pytest.raises(Taken):
        contmix(*arguments())
    contmix(*arguments(), backend='reference')


def test_says_why_not():
    args = [torch.zeros_like(a, device='meta') for a in arguments()]
    with pytest.raises(BackendError, match="'cpu' of contmix cannot be used: is for CPU tensors, these are on meta"):
        contmix(*args, backend='cpu')
