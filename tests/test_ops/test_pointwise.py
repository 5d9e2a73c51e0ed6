"""1x1 convolutions against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from mmoverlock.ops import pointwise
from mmoverlock.ops.pointwise import conv1x1

SHAPES = [(2, 3, 5, 4, 7), (1, 1, 1, 6, 3), (3, 8, 2, 1, 1), (2, 5, 9, 1, 3)]  # B, C, E, H, W


def arguments(shape, dtype=torch.float64, last=True):
    batch, channels, out, height, width = shape
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, channels, height, width), (out, channels, 1, 1), (out,))
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    if last:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    return [t.requires_grad_() for t in (x, weight, bias)]


def run(conv, args):
    out = conv(*args)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return (out, *torch.autograd.grad(out, [a for a in args if a is not None], cotangent))


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('with_bias', [False, True])
def test_equals_the_definition(shape, last, with_bias):
    x, weight, bias = arguments(shape, last=last)
    args = (x, weight, bias if with_bias else None)
    for a, b in zip(run(conv1x1, args), run(F.conv2d, args)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_precision(dtype, tolerance):
    args = arguments((2, 40, 24, 9, 7), dtype)
    exact = [a.detach().double().requires_grad_() for a in args]
    for a, b in zip(run(conv1x1, args), run(F.conv2d, exact)):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize('last', [False, True])
def test_keeps_the_memory_format(last):
    x, weight, bias = arguments(SHAPES[0], last=last)
    form = torch.channels_last if last else torch.contiguous_format
    out = conv1x1(x, weight, bias)
    assert out.is_contiguous(memory_format=form)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert grad.is_contiguous(memory_format=form)
    if last:  # some channels of a map, which are not contiguous
        out = conv1x1(x[:, :2], weight[:, :2], bias)
        assert out.is_contiguous(memory_format=form)
        torch.testing.assert_close(out, F.conv2d(x[:, :2], weight[:, :2], bias))


def test_second_derivative():
    assert torch.autograd.gradgradcheck(conv1x1, arguments(SHAPES[0]))


def test_autocast():
    args = arguments(SHAPES[0], torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        found, same = run(conv1x1, args), run(F.conv2d, args)
    for a, b in zip(found, same):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_graphs_have_pytorchs_convolution():
    class Conv(torch.nn.Module):
        def forward(self, x, weight):
            return conv1x1(x, weight)

    args = tuple(a.detach() for a in arguments(SHAPES[0])[:2])
    nodes = torch.export.export(Conv(), args).graph.nodes
    assert [n.target for n in nodes if n.op == 'call_function'] == [torch.ops.aten.conv2d.default]
    assert 'aten::_convolution' in str(torch.jit.trace(Conv(), args).inlined_graph)


def test_products_on_a_gpu():
    """Of some channels of a channels-last map, which a convolution there would copy; tensors need no GPU for this."""
    with FakeTensorMode():
        x = torch.empty(2, 8, 5, 4, device='cuda').to(memory_format=torch.channels_last)
        weight = torch.empty(3, 4, 1, 1, device='cuda')
        assert pointwise._product_on_gpu(x[:, :4]) and not pointwise._product_on_gpu(x)
        out = conv1x1(x[:, 2:6], weight)
    assert out.shape == (2, 3, 5, 4) and out.is_contiguous(memory_format=torch.channels_last)
