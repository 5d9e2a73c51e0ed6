"""The CPU's form of the depthwise convolution against its definition."""

import pytest
import torch

from mmoverlock.ops import BackendError, depthwise_conv2d, depthwise_conv2d_branches

SHAPES = [(2, 3, 9, 14), (1, 1, 1, 1), (1, 4, 20, 5), (3, 2, 6, 6), (2, 2, 24, 17), (1, 3, 3, 11), (2, 3, 1, 40)]
KERNELS = [(3, 1), (5, 1), (7, 1), (7, 2), (9, 2), (13, 1), (17, 1), (19, 1), (3, 2), (3, 5), (3, 7), (7, 3)]


def arguments(shape, size, dtype=torch.float64, last=False):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator) for s in (shape, (shape[1], 1, size, size), (shape[1],))]
    tensors = [t.to(dtype) for t in tensors]
    if last:
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    return [t.requires_grad_() for t in tensors]


def run(args, dilation, backend):
    out = depthwise_conv2d(*args, dilation, backend=backend)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return (out, *torch.autograd.grad(out, [a for a in args if a is not None], cotangent))


@pytest.mark.parametrize('size, dilation', KERNELS)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('last', [False, True])
def test_equals_the_definition(shape, size, dilation, last):
    args = arguments(shape, size, last=last)
    for a, b in zip(run(args, dilation, 'cpu'), run(args, dilation, 'reference')):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize('size, dilation', [(3, 2), (5, 1), (7, 1), (7, 2), (17, 1)])
def test_precision(dtype, tolerance, size, dilation):
    for shape in ((2, 3, 6, 7), (2, 3, 18, 21)):
        args = arguments(shape, size, dtype)
        exact = [a.detach().double().requires_grad_() for a in args]
        for a, b in zip(run(args, dilation, 'cpu'), run(exact, dilation, 'reference')):
            assert a.dtype == dtype
            assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize('last', [False, True])
@pytest.mark.parametrize('dilation', [1, 2])
def test_keeps_the_memory_format(last, dilation):
    x, weight, _ = arguments((2, 4, 9, 8), 7, last=last)
    form = torch.channels_last if last else torch.contiguous_format
    assert depthwise_conv2d(x, weight, None, dilation, backend='cpu').is_contiguous(memory_format=form)
    if last:  # some channels of a map, which are not contiguous
        out = depthwise_conv2d(x[:, :3], weight[:3], None, dilation, backend='cpu')
        assert out.is_contiguous(memory_format=form)


@pytest.mark.parametrize(
    'shape, size, dilation', [((1, 2, 3, 4), 7, 1), ((1, 1, 4, 3), 7, 2), ((1, 1, 9, 8), 17, 1), ((1, 2, 4, 5), 3, 3)]
)
def test_second_derivative(shape, size, dilation):
    args = arguments(shape, size)
    if size < 17:  # seconds for that one
        assert torch.autograd.gradgradcheck(lambda *a: depthwise_conv2d(*a, dilation, backend='cpu'), args)
    second = []
    for backend in ('cpu', 'reference'):
        out = depthwise_conv2d(*args, dilation, backend=backend)
        grads = torch.autograd.grad(out.sin().sum(), args, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in grads), args))
    torch.testing.assert_close(*second)


@pytest.mark.parametrize('frozen', [(0,), (1,), (0, 2)])
@pytest.mark.parametrize('size, dilation', [(13, 1), (7, 2), (3, 4)])
def test_only_what_is_wanted(frozen, size, dilation):
    args = arguments((2, 3, 6, 6), size)
    for n in frozen:
        args[n].requires_grad_(False)
    wanted = [a for a in args if a.requires_grad]
    grads = [
        torch.autograd.grad(depthwise_conv2d(*args, dilation, backend=backend).sin().sum(), wanted)
        for backend in ('cpu', 'reference')
    ]
    torch.testing.assert_close(*grads)


def test_autocast():
    args = arguments((2, 3, 18, 21), 17, torch.float32)
    exact = [a.detach().double().requires_grad_() for a in args]
    with torch.autocast('cpu', torch.bfloat16):
        found, same = (run(args, 1, backend) for backend in ('cpu', 'reference'))
    for a, b, c in zip(found, same, run(exact, 1, 'reference')):
        assert a.dtype == b.dtype
        assert (a.double() - c).norm() <= 1e-2 * c.norm()


def test_branches_and_refusals():
    x, weight, _ = arguments((2, 3, 9, 8), 7)
    outs = depthwise_conv2d_branches(x, [weight, weight[..., :3, :3]], [1, 3], 'cpu')
    torch.testing.assert_close(outs, depthwise_conv2d_branches(x, [weight, weight[..., :3, :3]], [1, 3], 'reference'))
    with pytest.raises(BackendError, match="'cpu'.*cannot be used: is for CPU tensors, these are on meta"):
        depthwise_conv2d(x.to('meta'), weight.to('meta'), backend='cpu')
    with pytest.raises(BackendError, match='a tensor is empty'):
        depthwise_conv2d(x[:0], weight, backend='cpu')
    assert depthwise_conv2d(x[:0], weight).shape == (0, 3, 9, 8)


def test_exported_graphs_have_pytorchs_convolution():
    class Conv(torch.nn.Module):
        def forward(self, x, weight):
            return depthwise_conv2d(x, weight, None, 2)

    x, weight, _ = (a.detach() for a in arguments((2, 3, 9, 8), 7))
    graph = torch.export.export(Conv(), (x, weight)).graph
    targets = {n.target for n in graph.nodes if n.op == 'call_function'}
    assert torch.ops.aten.conv2d.default in targets and torch.ops.aten.pad.default not in targets
