"""Depthwise 3x3 and feed-forward half in Triton against their definitions: on a GPU, or interpreted on the CPU."""

import dataclasses

import pytest
import torch
from kernel_tests import DEVICE, HALF, MARKS

from mmoverlock.ops import depthwise_conv3x3, feed_forward
from mmoverlock.ops.depthwise import small
from mmoverlock.ops.feed_forward import triton as fused
from mmoverlock.ops.sums import add_up

pytestmark = MARKS
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize('shape', [(1, 1, 5), (2, 64, 33), (1, 130, 11, 16), (1, 2100, 24), (3, 20, 40, 7)])
def test_sums_of_shares(shape):
    shares = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sums = add_up(shares)
    assert sums.shape == (shape[0], *shape[2:])
    torch.testing.assert_close(sums, shares.double().sum(1).float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(sums, add_up(shares))


@pytest.mark.parametrize('shape, turn', [((1, 3, 11, 5), 9), ((2, 4, 18, 16), 9), ((1, 2, 4, 1), 9), ((1, 1, 7, 3), 3)])
def test_sums_of_shares_turned(shape, turn):
    """Whole groups of rows lie column by column, what is left over as it was."""
    shares = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows, whole = shares.sum(1), shape[2] // turn * turn
    groups = rows[:, :whole].unflatten(1, (-1, turn)).transpose(2, 3)
    expected = torch.cat([groups.flatten(1), rows[:, whole:].flatten(1)], 1)
    torch.testing.assert_close(add_up(shares, turn), expected)


def conv_arguments(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(shape[-1])
    x = torch.randn(shape, generator=generator)
    weight, bias = torch.randn(shape[1], 1, 3, 3, generator=generator), torch.randn(shape[1], generator=generator)
    return [t.requires_grad_() for t in (x.to(DEVICE, dtype), weight.to(DEVICE), bias.to(DEVICE))]


def ffn_arguments(batch, channels, hidden, out, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(height * 100 + width)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)

    tensors = [
        draw(batch, channels, height, width).to(dtype),
        draw(hidden, channels, 1, 1, scale=channels**-0.5),
        draw(hidden),
        draw(hidden, 1, 3, 3, scale=1 / 3),
        draw(hidden),
        draw(1, hidden, 1, 1),
        draw(1, hidden, 1, 1),
        draw(out, hidden, 1, 1, scale=hidden**-0.5),
        draw(out),
    ]
    return [t.requires_grad_() for t in tensors]


def errors(function, args, *options):
    """Relative errors, against float64, of the output and of the gradients; nothing may be left unwritten."""
    exact = [a.detach().double().requires_grad_() for a in args]
    expected = function(*exact, *options, backend='reference')
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(args[0])
    gradients = torch.autograd.grad(expected, exact, cotangent.double())
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what is not written with NaN
    try:
        out = function(*args, *options, backend='triton')
        found = torch.autograd.grad(out, args, cotangent)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.dtype == args[0].dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert [g.dtype for g in found] == [a.dtype for a in args]
    pairs = zip((out, *found), (expected, *gradients))
    return [((a.double() - b).norm() / (b.norm() + 1e-30)).item() for a, b in pairs]


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize(
    'shape',
    [(2, 8, 5, 7), (1, 3, 9, 17), (2, 24, 20, 9), (1, 16, 1, 1), (3, 1, 1, 20), (1, 40, 17, 2), (1, 136, 2, 28)],
)
def test_conv3x3_equals_the_definition(shape, residual):
    found = errors(depthwise_conv3x3, conv_arguments(shape), residual)
    assert max(found) < 1e-5, found


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_conv3x3_half_precision(dtype):
    found = errors(depthwise_conv3x3, conv_arguments((2, 8, 18, 7), dtype), True)
    assert max(found) < TOLERANCE[dtype] / 2, found
    assert max(found[2:]) < 1e-5, found  # sums in float32


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, *HALF])
def test_conv3x3_and_gelu(dtype, residual):
    """In one kernel where no gradients are wanted, else one after the other."""
    args = conv_arguments((2, 8, 18, 7), dtype)
    found = errors(depthwise_conv3x3, args, residual, True)
    assert max(found) < TOLERANCE[dtype], found
    exact = depthwise_conv3x3(*(a.detach().double() for a in args), residual, True, backend='reference')
    plain = [a.detach() for a in args]
    out = depthwise_conv3x3(*plain, residual, True, backend='triton')
    assert out.dtype == dtype and torch.equal(out, torch.ops.mmoverlock.depthwise_conv3x3_gelu(*plain, residual))
    assert (out.double() - exact).norm() < (1e-5 if dtype is torch.float32 else TOLERANCE[dtype] / 2) * exact.norm()


def test_conv3x3_in_strips():
    """A map cut into strips, as small batches are, equals the whole."""
    assert small.plan((1, 8, 64, 8), small.TUNING.grad_columns, small.TUNING.grad_programs, small.TUNING)[3] > 2
    assert max(errors(depthwise_conv3x3, conv_arguments((1, 8, 64, 8)), True)) < 1e-5


def test_conv3x3_without_bias_from_any_memory():
    x, weight, bias = conv_arguments((2, 8, 6, 5))
    part = torch.randn(2, 12, 8, 9, device=DEVICE)[:, 1:9, 1:7, 3:8].requires_grad_()
    turned = weight.detach().transpose(2, 3).requires_grad_()
    assert max(errors(depthwise_conv3x3, (part, turned, bias))) < 1e-5

    def without(x, weight, backend):
        return depthwise_conv3x3(x, weight, backend=backend)

    assert max(errors(without, (x, weight))) < 1e-5


# Odd sizes; channels that fill no tile; hidden channels more than a tile's; a map of one position; images whose
# positions do not fill a tile.
SIZES = [(2, 8, 16, 8, 3, 5), (1, 24, 40, 16, 17, 9), (2, 16, 152, 24, 7, 7), (3, 8, 8, 8, 1, 1), (1, 72, 24, 8, 2, 70)]


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('sizes', SIZES)
def test_ffn_equals_the_definition(sizes, residual):
    found = errors(feed_forward, ffn_arguments(*sizes), 1e-6, residual)
    assert max(found) < 1e-5, found


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('sizes', SIZES[:3])
def test_ffn_half_precision(dtype, sizes):
    found = errors(feed_forward, ffn_arguments(*sizes, dtype))
    assert max(found) < TOLERANCE[dtype], found


@pytest.mark.parametrize('dtype', [torch.float32, *HALF])
@pytest.mark.parametrize('splits', [2, 4])
def test_depth_of_a_product_shared_by_programs(monkeypatch, splits, dtype):
    """96 hidden channels are two or three steps of the product: shares differ, and the fourth of four is empty."""
    many = dict(splits=splits, split_depth=96 // splits, split_programs=10**6)
    for tuning in (dict(many), dict(many, small_project=(16, 16, 64, 4, 3, 255))):
        monkeypatch.setattr(fused, 'TUNING', dataclasses.replace(fused.TUNING, **tuning))
        assert fused._splits(1, 96) == splits
        args = ffn_arguments(2, 8, 96, 24, 5, 7, dtype)
        found = errors(feed_forward, args)
        assert max(found) < TOLERANCE[dtype], found
        outs = [feed_forward(*args, backend='triton') for _ in range(3)]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])  # whoever came last


def test_depth_is_shared_where_programs_are_few():
    assert [fused._splits(programs, 2048) for programs in (1, 32, 33, 66, 67, 500)] == [4, 4, 4, 2, 1, 1]
    assert [fused._splits(8, depth) for depth in (256, 511, 512, 1023, 1024)] == [1, 1, 2, 2, 4]


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('sizes, dtype', [(s, torch.float32) for s in SIZES] + [(SIZES[0], d) for d in HALF])
def test_ffn_with_a_shortcut(sizes, dtype, scaled):
    """Added by the last kernel where no gradients are wanted, else after it."""
    args = ffn_arguments(*sizes, dtype)
    batch, _, _, out, height, width = sizes
    generator = torch.Generator().manual_seed(5)
    more = [torch.randn(s, generator=generator) for s in ((batch, out, height, width), (out,), (out,))]
    more = [more[0].to(DEVICE, dtype), *(t.to(DEVICE) for t in more[1:])][: 3 if scaled else 1]
    if scaled:  # every second of some numbers
        more[1] = more[1].repeat_interleave(2)[::2]
    more = [t.requires_grad_() for t in more]

    def function(*tensors, backend):
        return feed_forward(*tensors[:9], 1e-6, True, *tensors[9:], backend=backend)

    if sizes == SIZES[0] and dtype is torch.float32:
        found = errors(function, [*args, *more])
        assert max(found) < TOLERANCE[dtype], found
    exact = function(*(t.detach().double() for t in (*args, *more)), backend='reference')
    out = function(*(t.detach() for t in (*args, *more)), backend='triton')
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert (out.double() - exact).norm() < TOLERANCE[dtype] * exact.norm()


def test_ffn_with_a_shortcut_of_another_type():
    """Such as a float32 one under autocast: added as PyTorch adds."""
    args = [a.detach() for a in ffn_arguments(1, 8, 16, 8, 3, 5)]
    with torch.autocast(DEVICE, torch.float16):
        out = feed_forward(*args, shortcut=args[0], backend='triton')
        expected = feed_forward(*args, backend='triton') + args[0]
    assert out.dtype == torch.float32 and torch.equal(out, expected)


@pytest.mark.parametrize('parts, columns', [(1, 8), (300, 72)])
def test_shares_are_summed(monkeypatch, parts, columns):
    monkeypatch.setattr(fused, 'TUNING', dataclasses.replace(fused.TUNING, shares=1))
    shares = torch.randn(2, parts, columns, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sums = fused._fewer_shares(shares)
    torch.testing.assert_close(sums.double(), shares.double().sum(1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_ffn_of_large_images(monkeypatch):
    """The shares of an image's sums, here from two on, are summed before the normalisation reads them."""
    monkeypatch.setattr(fused, 'TUNING', dataclasses.replace(fused.TUNING, shares=2))
    counts, plain = [], fused._fewer_shares
    monkeypatch.setattr(fused, '_fewer_shares', lambda shares: counts.append(shares.shape[1]) or plain(shares))
    found = errors(feed_forward, ffn_arguments(2, 8, 24, 16, 17, 9))
    assert max(found) < 1e-5, found
    assert min(counts) >= 2, counts


def test_ffn_of_nothing():
    """A channel without any response: its norm is zero, and so is the gradient through it."""
    args = ffn_arguments(1, 8, 8, 8, 3, 3)
    with torch.no_grad():
        for parameter in args[3:5]:
            parameter[2] = 0
    found = errors(feed_forward, args, 1e-6, False)
    assert max(found) < 1e-5, found


@pytest.mark.parametrize('dtype', HALF)
def test_ffn_of_large_values(dtype):
    """Squares that overflow half precision, and values far out in GELU's tails."""
    args = ffn_arguments(1, 8, 16, 8, 4, 4, dtype)
    with torch.no_grad():
        args[1] *= 60
        args[7] /= 60
    found = errors(feed_forward, args)
    assert max(found) < TOLERANCE[dtype], found


def test_gelu_keeps_its_tail():
    """Relative accuracy where GELU is nearly zero, forward and backward."""
    args = ffn_arguments(1, 8, 8, 8, 1, 9)
    with torch.no_grad():
        args[0].zero_()
        args[2].copy_(-torch.arange(8) / 1.6)  # to -4.4
        args[3].zero_()
        args[4].zero_()
        args[5].zero_()
    kept = torch.ops.mmoverlock.feed_forward(*(a.detach() for a in args), 1e-6, True, True)
    expected = torch.nn.functional.gelu(args[2].detach().double())
    torch.testing.assert_close(kept[2][0, :, 0, 0].double(), expected, rtol=1e-5, atol=0)
    found = errors(feed_forward, args)
    assert max(found[3:4]) < 1e-5, found


def test_ffn_only_what_is_needed():
    args = ffn_arguments(1, 8, 16, 8, 3, 3)
    args[0].requires_grad_(False)
    feed_forward(*args, backend='triton').sum().backward()
    assert args[0].grad is None and all(a.grad is not None for a in args[1:])
    with torch.no_grad():
        assert not feed_forward(*args, backend='triton').requires_grad


def test_autocast():
    args = ffn_arguments(1, 8, 16, 8, 3, 5)
    with torch.autocast(DEVICE, torch.float16):
        out = feed_forward(*args, backend='triton')
        conv = depthwise_conv3x3(args[0], *conv_arguments((1, 8, 3, 5))[1:], backend='triton')
    assert out.dtype == conv.dtype == torch.float16
    expected = feed_forward(*(a.detach().double() for a in args), backend='reference')
    assert ((out.double() - expected).norm() / expected.norm()).item() < TOLERANCE[torch.float16]
    found = torch.autograd.grad(out.float().square().sum(), args)
    assert all(g.dtype == torch.float32 for g in found)


@pytest.mark.parametrize('function', [depthwise_conv3x3, feed_forward])
def test_second_derivative(function):
    args = conv_arguments((1, 2, 3, 4)) if function is depthwise_conv3x3 else ffn_arguments(1, 8, 8, 8, 2, 2)
    results = []
    for backend in ('triton', 'reference'):
        first = torch.autograd.grad(function(*args, backend=backend).square().sum(), args, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), args, materialize_grads=True))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_registered_as_torch_asks():
    checks = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    x, weight, bias = conv_arguments((1, 2, 4, 6))
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(small._conv, (x, weight, bias, True), test_utils=checks)
    torch.library.opcheck(small._conv_gelu, (x.detach(), weight.detach(), None, True), test_utils=checks)
    torch.library.opcheck(small._gradients, (x.detach(), x.detach(), weight.detach(), True), test_utils=checks)
    args = ffn_arguments(1, 8, 16, 8, 3, 5)
    args[0] = args[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(fused._feed_forward, (*args, 1e-6, True, True), test_utils=checks)
    plain = [a.detach() for a in args]
    torch.library.opcheck(fused._feed_forward, (*plain, 1e-6, True, False), test_utils=checks)
    out, *kept = torch.ops.mmoverlock.feed_forward(*plain, 1e-6, True, True)
    for scale, shift in ((None, None), (plain[8], plain[8])):
        inputs = (*plain, 1e-6, True, out, scale, shift)
        torch.library.opcheck(fused._with_shortcut, inputs, test_utils=checks)
    for wanted in (False, True):
        inputs = (torch.randn_like(out), *plain, *kept, 1e-6, True, wanted)
        torch.library.opcheck(fused._gradients, inputs, test_utils=checks)


@pytest.mark.parametrize('dynamic', [False, True])
def test_traced(dynamic):
    """One graph each way; the kernels run eagerly, so that no compiler is needed."""
    torch._dynamo.reset()

    def function(*args, backend):
        return feed_forward(depthwise_conv3x3(args[0], *args[-2:], True, backend), *args[1:-2], backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend='aot_eager', dynamic=dynamic)

    def run(*args, backend):
        return (compiled if backend == 'triton' else function)(*args, backend=backend)

    for width in (4, 6):
        args = [*ffn_arguments(1, 8, 16, 8, 3, width), *conv_arguments((1, 8, 3, width))[1:]]
        assert max(errors(run, args)) < 1e-5


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
def test_cuda_graph():
    args = [a.detach() for a in ffn_arguments(2, 64, 256, 64, 14, 14, torch.float16)]
    feed_forward(*args, backend='triton')
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = feed_forward(*args, backend='triton')
    args[0].copy_(torch.randn_like(args[0]))
    graph.replay()
    torch.testing.assert_close(out, feed_forward(*args, backend='triton'), rtol=0, atol=0)
