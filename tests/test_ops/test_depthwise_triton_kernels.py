"""The depthwise convolution in Triton against its definition: on a GPU, or interpreted on the CPU."""

from dataclasses import replace

import pytest
import torch
from kernel_tests import DEVICE, HALF, MARKS

from mmoverlock.ops import depthwise_conv2d, depthwise_conv2d_branches, depthwise_conv2d_norm_branches
from mmoverlock.ops.depthwise import norm, norm_dilated, norm_small, orders
from mmoverlock.ops.depthwise import triton as fused

pytestmark = MARKS
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def arguments(shape, size, dtype=torch.float32, parameters=torch.float32):
    generator = torch.Generator().manual_seed(size)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x, weight, bias = draw(*shape), draw(shape[1], 1, size, size), draw(shape[1])
    tensors = [x.to(DEVICE, dtype), weight.to(DEVICE, parameters), bias.to(DEVICE, parameters)]
    return [t.requires_grad_() for t in tensors]


def fast(*args):
    return depthwise_conv2d(*args, backend='triton')


def errors(args, dilation, function=fast):
    """Relative errors, against float64, of the output and of the gradients; nothing may be left unwritten."""
    x, weight, bias = (None if a is None else a.detach() for a in args)
    exact = [None if a is None else a.to(x.dtype).double().requires_grad_() for a in (x, weight, bias)]
    expected = depthwise_conv2d(*exact, dilation, backend='reference')
    wanted = [a for a in exact if a is not None]
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    gradients = torch.autograd.grad(expected, wanted, cotangent.double())
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what is not written with NaN
    try:
        out = function(*args, dilation)
        found = torch.autograd.grad(out, [a for a in args if a is not None], cotangent)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.dtype == x.dtype and out.is_contiguous()
    pairs = zip((out, *found), (expected, *gradients))
    return [((a.double() - b).norm() / (b.norm() + 1e-30)).item() for a, b in pairs]


@pytest.mark.parametrize(
    'shape, size, dilation',
    [
        ((2, 2, 9, 14), 5, 1),  # narrow: the window is as wide as the map
        ((2, 1, 14, 14), 13, 1),  # strips of narrow tiles, wider loads by a row more above
        ((1, 2, 10, 28), 15, 1),
        ((1, 2, 7, 7), 7, 1),  # one tile
        ((2, 1, 19, 72), 17, 1),  # tiles beside each other
        ((1, 1, 10, 67), 19, 1),  # odd columns
        ((1, 1, 1, 1), 3, 7),
        ((1, 2, 3, 2), 17, 1),  # a map smaller than the kernel
        ((3, 1, 5, 1), 3, 1),
        ((1, 1, 1, 70), 9, 1),
        ((1, 1, 16, 66), 9, 2),
        ((2, 1, 15, 72), 3, 7),
        ((1, 1, 6, 9), 3, 5),
        ((70, 1, 5, 6), 5, 1),  # a group of one strip
        ((33, 1, 6, 72), 3, 2),
        ((1, 2, 5, 5), 1, 1),
    ],
)
def test_equals_the_definition(shape, size, dilation):
    found = errors(arguments(shape, size), dilation)
    assert max(found) < TOLERANCE[torch.float32], found


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('mixed', [False, True])
@pytest.mark.parametrize('shape, size, dilation', [((2, 2, 7, 40), 9, 2), ((1, 1, 14, 14), 13, 1)])
def test_half_precision(dtype, mixed, shape, size, dilation):
    args = arguments(shape, size, dtype, torch.float32 if mixed else dtype)
    found = errors(args, dilation)
    assert max(found) < TOLERANCE[dtype], found
    if mixed:
        assert max(found[2:]) < 1e-5, found  # sums in float32


def test_without_bias():
    x, weight, _ = arguments((1, 2, 5, 12), 5)
    assert max(errors((x, weight, None), 1)) < 1e-5


def test_other_memory():
    x, weight, bias = arguments((2, 3, 6, 10), 5)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert max(errors((last, weight, bias), 1)) < 1e-5
    part = torch.randn(2, 5, 8, 24, device=DEVICE)[:, 1:4, 1:7, 3:13].requires_grad_()
    turned = weight.detach().transpose(2, 3).requires_grad_()
    assert max(errors((part, turned, bias), 1)) < 1e-5
    shifted = torch.randn(1 + 2 * 3 * 6 * 16, device=DEVICE)[1:].view(2, 3, 6, 16).requires_grad_()
    assert max(errors((shifted, weight, bias), 1)) < 1e-5


def test_only_what_is_needed():
    x, weight, bias = arguments((1, 2, 5, 5), 3)
    weight.requires_grad_(False)
    x.requires_grad_(False)
    fast(x, weight, bias, 1).sum().backward()
    assert x.grad is None and weight.grad is None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 25))


def test_autocast():
    x, weight, bias = arguments((1, 2, 5, 12), 5)
    with torch.autocast(DEVICE, torch.float16):
        out = fast(x, weight, bias, 1)
        expected = depthwise_conv2d(x, weight, bias, 1, backend='reference')
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
    found = torch.autograd.grad(out.float().square().sum(), (x, weight, bias))
    assert all(g.dtype == torch.float32 for g in found)


def test_second_derivative():
    args = arguments((1, 1, 3, 4), 3)
    results = []
    for backend in ('triton', 'reference'):
        first = torch.autograd.grad(depthwise_conv2d(*args, 2, backend=backend).square().sum(), args, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), args))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_registered_as_torch_asks():
    x, weight, bias = arguments((1, 2, 4, 6), 3)
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    torch.library.opcheck(fused._conv, (x, weight, bias, 1, False), test_utils=checks)
    torch.library.opcheck(fused._conv, (x, weight, None, 2, True), test_utils=checks)
    torch.library.opcheck(fused._weight_grad, (x.detach(), x.detach(), 3, 1), test_utils=checks)


def test_turned_kernel():
    """The operator with ``flip`` on, which is the input gradient, has gradients of its own."""
    x, weight, bias = arguments((1, 2, 4, 6), 3)

    def turned(x, weight, bias, dilation):
        return torch.ops.mmoverlock.depthwise_conv2d(x, weight.flip(2, 3), bias, dilation, True)

    assert max(errors((x, weight, bias), 1, turned)) < 1e-5


@pytest.mark.parametrize('dynamic', [False, True])
def test_traced(dynamic):
    """One graph, forward and backward; the kernels run eagerly, so that no compiler is needed."""
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend='aot_eager', dynamic=dynamic)
    for width in (12, 14):
        assert max(errors(arguments((1, 2, 5, width), 3), 2, compiled)) < 1e-5


def test_traced_under_autocast():
    torch._dynamo.reset()
    x, weight, bias = arguments((1, 2, 5, 12), 5)
    compiled = torch.compile(fast, fullgraph=True, backend='aot_eager')
    with torch.autocast(DEVICE, torch.float16):
        out, expected = compiled(x, weight, bias, 1), fast(x, weight, bias, 1)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.float().sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
def test_cuda_graph():
    x, weight, bias = (a.detach() for a in arguments((2, 4, 14, 14), 13, torch.float16))
    fast(x, weight, bias, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fast(x, weight, bias, 1)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, fast(x, weight, bias, 1), rtol=0, atol=0)


BRANCHES = ((13, 1), (5, 1), (7, 2), (3, 5))


def branch_arguments(shape, dtype):
    x, *_ = arguments(shape, 1, dtype)
    return x, [arguments(shape, size)[1] for size, _ in BRANCHES], [dilation for _, dilation in BRANCHES]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('shape', [(2, 2, 9, 14), (1, 1, 5, 37)])
def test_branches_equal_the_definition(shape, dtype):
    x, weights, dilations = branch_arguments(shape, dtype)
    exact, *exact_weights = (t.detach().to(dtype).double().requires_grad_() for t in (x, *weights))
    expected = depthwise_conv2d_branches(exact, exact_weights, dilations, backend='reference')
    cotangents = [torch.randn(shape, generator=torch.Generator().manual_seed(n)).to(x) for n in range(len(weights))]
    wide = [c.double() for c in cotangents]
    gradients = torch.autograd.grad(expected, (exact, *exact_weights), wide)
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what is not written with NaN
    try:
        outs = depthwise_conv2d_branches(x, weights, dilations, backend='triton')
        found = torch.autograd.grad(outs, (x, *weights), cotangents)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(out.dtype == dtype for out in outs) and all(g.dtype == torch.float32 for g in found[1:])
    for a, b in zip((*outs, *found), (*expected, *gradients)):
        assert ((a.double() - b).norm() / b.norm()).item() < TOLERANCE[dtype]


@pytest.mark.parametrize('frozen', ['x', 'weights', 'unused'])
def test_branches_only_what_is_needed(frozen):
    x, weights, dilations = branch_arguments((1, 1, 13, 13), torch.float32)
    x.requires_grad_(frozen != 'x')
    for weight in weights:
        weight.requires_grad_(frozen != 'weights')
    results = []
    for backend in ('triton', 'reference'):
        outs = depthwise_conv2d_branches(x, weights, dilations, backend=backend)
        outs = outs[1:3] if frozen == 'unused' else outs
        wanted = [t for t in (x, *weights) if t.requires_grad]
        results.append(torch.autograd.grad(sum(o.square().sum() for o in outs), wanted, materialize_grads=True))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_branches_second_derivative():
    x, weights, dilations = branch_arguments((1, 1, 3, 4), torch.float32)
    results = []
    for backend in ('triton', 'reference'):
        outs = depthwise_conv2d_branches(x, weights, dilations, backend=backend)
        first = torch.autograd.grad(sum(o.square().sum() for o in outs), (x, *weights), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, *weights)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_branches_registered_as_torch_asks():
    x, weights, dilations = branch_arguments((1, 1, 4, 6), torch.float32)
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    torch.library.opcheck(fused._branches, (x, weights, dilations), test_utils=checks)
    inputs = x.detach(), [w.detach() for w in weights]
    for wanted in ((True, True), (True, False), (False, True)):
        grads = [torch.randn_like(inputs[0]) for _ in weights]
        torch.library.opcheck(fused._branches_grad, (grads, *inputs, dilations, *wanted), test_utils=checks)


@pytest.mark.parametrize('frozen', [False, True])
def test_branches_compile(frozen):
    """One graph each way, in which all branches are one call; under autocast, as training has it."""
    x, weights, dilations = branch_arguments((1, 2, 5, 8), torch.float32)
    for weight in weights:
        weight.requires_grad_(not frozen)
    wanted = [t for t in (x, *weights) if t.requires_grad]

    def function(x, *weights):
        with torch.autocast(DEVICE, torch.float16):
            return sum(out.float().square().sum() for out in depthwise_conv2d_branches(x, weights, dilations, 'triton'))

    compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
    found = torch.autograd.grad(compiled(x, *weights), wanted)
    for a, b in zip(found, torch.autograd.grad(function(x, *weights), wanted)):
        torch.testing.assert_close(a, b)


NORMED = ((7, 1), (3, 1), (3, 2))


@pytest.fixture(autouse=True)
def small_maps_of_few_images(monkeypatch):
    """Maps that are small enough are taken, with however few images."""
    monkeypatch.setattr(norm_small, '_IMAGES', 1)


def norm_arguments(shape, dtype=torch.float32, branches=NORMED, parameters=torch.float32):
    """A map whose channels lie far from zero, kernels, gammas, betas."""
    x, *_ = arguments(shape, 1)
    x = (x.detach() + torch.arange(shape[1], device=DEVICE).view(1, -1, 1, 1)).to(dtype).requires_grad_()
    weights = [arguments(shape, size, parameters=parameters)[1] for size, _ in branches]
    return [x, *weights, *(arguments(shape, n, parameters=parameters)[2] for n in range(2 * len(branches)))]


def norm_branches(*args, backend='triton', branches=NORMED):
    n = len(branches)
    x, weights, gammas, betas = args[0], args[1 : n + 1], args[n + 1 : 2 * n + 1], args[2 * n + 1 :]
    dilations = [dilation for _, dilation in branches]
    return depthwise_conv2d_norm_branches(x, weights, dilations, gammas, betas, [1e-5] * n, backend=backend)


@pytest.mark.parametrize(
    'shape, dtype',
    [
        ((2, 3, 9, 14), torch.float32),
        ((3, 2, 7, 7), torch.float32),
        ((1, 17, 2, 17), torch.float16),  # more channels than a program of the statistics takes
        ((9, 1, 3, 40), torch.float16),
    ],
)
def test_norm_branches_equal_the_definition(shape, dtype):
    errors = norm_errors(norm_arguments(shape, dtype))
    assert max(errors) < (1e-5 if dtype is torch.float32 else 2e-3), errors


def norm_errors(args, branches=NORMED):
    """Relative errors, against float64, of output, means and variances, and of the gradients."""
    x, *parameters = args
    exact = [a.detach().double().requires_grad_() for a in args]
    expected = norm_branches(*exact, backend='reference', branches=branches)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    gradients = torch.autograd.grad(expected[0], exact, cotangent.double())
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what is not written with NaN
    try:
        found = norm_branches(*args, branches=branches)
        found = (*found, *torch.autograd.grad(found[0], args, cotangent))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[0].dtype == found[3].dtype == x.dtype
    assert all(a.dtype == b.dtype and a.is_contiguous() for a, b in zip(found[4:], parameters))
    return [((a.double() - b).norm() / (b.norm() + 1e-30)).item() for a, b in zip(found, (*expected, *gradients))]


@pytest.mark.parametrize(
    'shape, branches',
    [
        ((2, 2, 5, 6), ((7, 1), (3, 1), (3, 2))),
        ((3, 2, 7, 7), ((7, 1), (5, 1), (3, 1), (3, 2), (3, 3))),
        ((2, 1, 14, 14), ((13, 1), (5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5))),
        ((17, 1, 3, 9), ((5, 1), (3, 2))),  # more images than a program takes at a time
        ((70, 1, 16, 2), ((3, 1), (3, 2))),
        ((1, 1, 16, 16), ((15, 1), (3, 7))),  # as large as they may be
        ((2, 1, 4, 5), ((13, 1), (5, 1), (3, 3))),  # a map smaller than the window: taps that meet nothing
        ((3, 1, 1, 7), ((3, 1),)),
        ((2, 1, 6, 11), ((3, 3), (3, 1))),  # the widest branch is dilated, the window has taps no branch has
    ],
)
def test_norm_branches_on_small_maps(shape, branches):
    """Statistics and gradients of parameters are sums in float32 of products that are exact, or nearly."""
    args = norm_arguments(shape, torch.float16, branches)
    assert norm_small.takes(shape, torch.float16, *zip(*branches))
    out, mean, var, dx, *rest = norm_errors(args, branches)
    assert max(out, dx) < 1e-3, (out, dx)
    assert max(mean, var, *rest) < 1e-5, (mean, var, rest)


def test_norm_branches_on_small_maps_of_half_precision_parameters():
    args = norm_arguments((2, 2, 6, 6), torch.float16, parameters=torch.float16)
    assert max(norm_errors(args)) < 1e-3


def test_norm_branches_small_gradients():
    """Slopes far below what float16 holds, and none at all."""
    args = norm_arguments((2, 2, 6, 6), torch.float16)
    out, _, _ = norm_branches(*args)
    one, small, none = (torch.autograd.grad(out, args, out * s, retain_graph=True) for s in (1, 2**-10, 0))
    for a, b, c in zip(one, small, none):
        torch.testing.assert_close(a.float(), b.float() * 2**10, rtol=2e-3, atol=1e-3 * a.abs().max().item())
        assert not c.any()


@pytest.mark.parametrize(
    'shape, dtype, size, reason',
    [
        ((2, 3, 16, 16), torch.float16, 13, True),
        ((2, 3, 14, 14), torch.bfloat16, 13, True),
        ((2, 3, 14, 14), torch.float32, 13, False),
        ((2, 3, 14, 17), torch.float16, 13, False),
        ((2, 3, 14, 14), torch.float16, 17, False),
    ],
)
def test_norm_branches_small_maps_taken(monkeypatch, shape, dtype, size, reason):
    assert norm_small.takes(shape, dtype, (size, 3), (1, 2)) is reason
    assert not norm_small.takes(shape, dtype, (3,) * 9, (1,) * 9)
    monkeypatch.setattr(norm_small, '_IMAGES', 3)
    assert not norm_small.takes(shape, dtype, (size, 3), (1, 2))


@pytest.mark.parametrize('batch, pixels', [(64, 56 * 56), (64, 49), (1, 320 * 200), (5, 14 * 14)])
def test_norm_branches_plan(batch, pixels):
    plan = norm.plan((batch, 64, 1, pixels), 7)
    wide = plan['sums']['PX']
    tiles = -(-batch // (plan['sums']['BX'] // wide)) * -(-pixels // wide)
    assert (plan['splits'] - 1) * plan['part'] < tiles <= plan['splits'] * plan['part']
    width = plan['planes']['PX']
    assert plan['programs'] * 1024 >= batch * 64 * pixels and pixels % plan['planes']['V'] == 0
    assert plan['programs'] == -(-batch * 64 // (1024 // width)) * -(-pixels // width)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_norm_branches_without_input_gradient(dtype):
    args = norm_arguments((2, 1, 4, 5), dtype)
    args[0].requires_grad_(False)
    out, mean, var = norm_branches(*args)
    assert not mean.requires_grad and not var.requires_grad
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad(out, args[1:], cotangent)
    wide = [args[0].float(), *args[1:]]
    expected = torch.autograd.grad(norm_branches(*wide, backend='reference')[0], args[1:], cotangent.float())
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_norm_branches_second_derivative():
    args = norm_arguments((2, 1, 3, 3))
    results = []
    for backend in ('triton', 'reference'):
        first = torch.autograd.grad(norm_branches(*args, backend=backend)[0].pow(3).sum(), args, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), args))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_norm_branches_registered_as_torch_asks(dtype):
    args = norm_arguments((2, 1, 4, 4), dtype)
    n = len(NORMED)
    lists = (args[1 : n + 1], [d for _, d in NORMED], args[n + 1 : 2 * n + 1], args[2 * n + 1 :], [1e-5] * n)
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    bare = [[t.detach() if isinstance(t, torch.Tensor) else t for t in values] for values in lists]
    x = args[0].detach()
    torch.library.opcheck(norm._norm_branches, (args[0], *lists), test_utils=checks)
    out, mean, var, *kept = norm._norm_branches(x, *bare)
    grad = torch.randn_like(out)
    for wanted in (True, False):
        inputs = (grad, x, kept, mean, var, *bare[:2], bare[-1], wanted)
        torch.library.opcheck(norm._gradients, inputs, test_utils=checks)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_norm_branches_traced(dtype):
    args = norm_arguments((2, 2, 4, 6), dtype)
    compiled = torch.compile(norm_branches, fullgraph=True, backend='aot_eager')
    for a, b in zip(compiled(*args), norm_branches(*args)):
        torch.testing.assert_close(a, b)
    found, expected = (torch.autograd.grad(f(*args)[0].square().sum(), args) for f in (compiled, norm_branches))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('dtype', [torch.float32, *HALF])
@pytest.mark.parametrize(
    'shape, branches',
    [
        ((2, 3, 5, 17), ((5, 1), (3, 4), (3, 5), (3, 7))),  # a map smaller than the window
        ((1, 34, 2, 17), ((5, 1), (3, 2), (3, 1))),  # channels of two programs, and of part of one
        ((3, 2, 17, 5), ((3, 1), (7, 1), (3, 2), (3, 3), (3, 4))),
        ((2, 4, 1, 19), ((5, 1), (3, 2), (3, 3))),
        ((2, 3, 4, 17), ((5, 1), (3, 2))),  # one alone has a map like the others
    ],
)
def test_norm_branches_dilated(shape, branches, dtype, monkeypatch):
    """The last 3x3 branches of large maps in one launch; in as many strips as a phase can be cut into."""
    monkeypatch.setattr(norm_dilated, 'TUNING', replace(norm_dilated.TUNING, programs=10**6))
    errors = norm_errors(norm_arguments(shape, dtype, branches), branches)
    assert max(errors) < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype], errors


def test_norm_branches_on_large_maps_of_half_precision_parameters():
    branches = ((5, 1), (3, 4), (3, 5), (3, 7))
    assert max(norm_errors(norm_arguments((1, 3, 4, 17), torch.float16, branches, torch.float16), branches)) < 2e-3


def test_norm_branches_dilated_are_told(monkeypatch):
    """Which of the branches have no maps: the last 3x3 ones, but never all and never one alone."""
    shape = (1, 2, 3, 17)
    counts = {(9, 3): 0, (9, 3, 3): 2, (9, 3, 5): 0, (3, 3, 3): 2, (9, 5): 0, (3,) * 7: 4}
    assert {sizes: norm_dilated.count(sizes) for sizes in counts} == counts
    args = norm_arguments(shape, torch.float16)
    args[0] = args[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    seen = []
    original = orders.add
    monkeypatch.setattr(orders, 'add', lambda *given: seen.append(given[0].shape) or original(*given))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out, *_ = norm_branches(*args)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert seen == [(1, *shape)], 'the maps that were made one by one'
    assert [s for s in kept if s[-2:] == shape[-2:]] == [shape, (1, *shape)], 'the map in one order, and those'
    (dx,) = torch.autograd.grad(out.sum(), args[0])
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
@pytest.mark.parametrize('shape', [(4, 3, 14, 14), (4, 64, 56, 56)])
def test_norm_branches_cuda_graph(shape):
    """The same bits as without: in a graph the branches of a large map run side by side."""
    branches = ((13, 1), (5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5))
    args = norm_arguments(shape, torch.float16, branches)
    cotangent = torch.randn_like(args[0])

    def step():
        out = norm_branches(*args, branches=branches)
        return (*out, *torch.autograd.grad(out[0], args, cotangent))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        args[0].copy_(torch.randn_like(args[0]))
    for _ in range(3):
        graph.replay()
        for a, b in zip(found, step()):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
