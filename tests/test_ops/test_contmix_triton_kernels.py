"""The fused ContMix against its definition: on a GPU, or interpreted on the CPU (test_contmix_triton.py does that)."""

import pytest
import torch
from kernel_tests import DEVICE, INTERPRETED, MARKS

from mmoverlock.ops import contmix
from mmoverlock.ops.contmix import reference

pytestmark = MARKS
cuda = pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def arguments(batch, groups, dim, height, width, small, large, cells, channels, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(height * 100 + width)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = [
        draw(batch, groups, dim, height, width) * scale * dim**-0.5,
        draw(batch, groups, dim, cells),
        draw(small**2 + large**2, cells) * cells**-0.5,
        draw(small**2 + large**2),
        draw(groups, 2 * small - 1, 2 * small - 1),
        draw(groups, 2 * large - 1, 2 * large - 1),
        draw(batch, 2 * groups * channels, height, width),
    ]
    tensors = [t.to(DEVICE, dtype if n in (0, 1, 6) else torch.float32) for n, t in enumerate(tensors)]
    return [t.requires_grad_() for t in tensors]


def fused(*args):
    return contmix(*args, backend='triton')


def errors(args, function=fused):
    """Relative errors, against float64, of the output and of the seven gradients; nothing may be left unwritten."""
    exact = [a.detach().double().requires_grad_() for a in args]
    expected = reference.contmix_reference(*exact)
    cotangent = torch.randn(args[-1].shape).to(args[-1])
    gradients = torch.autograd.grad(expected, exact, cotangent.double())
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what is not written with NaN
    try:
        out = function(*args)
        found = torch.autograd.grad(out, args, cotangent)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.dtype == args[-1].dtype and out.shape == args[-1].shape
    for arg, gradient in zip(args, found):
        assert gradient.dtype == arg.dtype and gradient.shape == arg.shape
    pairs = zip([out.detach(), *found], [expected.detach(), *gradients])
    # A window of one pixel has weight one whatever its logit: gradients that are nought are held to the cotangent.
    least = 1e-6 * cotangent.double().norm()
    return [((a.double() - b).norm() / (b.norm() if b.norm() > least else cotangent.norm())).item() for a, b in pairs]


SHAPES = [
    (1, 1, 4, 5, 5, 3, 5, 6, 4),  # the window is the map: one for all positions
    (1, 2, 3, 5, 6, 3, 5, 6, 5),  # two windows
    (2, 1, 17, 6, 6, 1, 5, 1, 2),  # four windows, a window of one pixel, more than 16 channels
    (1, 1, 2, 9, 9, 5, 9, 4, 3),  # more positions of a window than a tile, more logits than are taken at once
    (1, 1, 2, 13, 13, 1, 13, 2, 1),  # small windows that reach more cells than are taken at once
    (1, 3, 3, 5, 17, 3, 5, 6, 5),  # H is the window, one pixel more than a tile
    (2, 1, 17, 7, 5, 1, 5, 1, 2),  # W is the window, one cell, a window of one pixel, more than 16 channels
    (1, 1, 2, 10, 9, 5, 9, 4, 3),  # more than eight rows in a window
    (1, 1, 2, 22, 5, 1, 3, 4, 2),  # rows away from the borders, which are summed together
    (1, 1, 2, 11, 13, 5, 9, 4, 3),  # windows in rows of eight and of sixteen places
    (1, 1, 2, 5, 33, 3, 5, 4, 2),  # values that more than 32 columns of positions would look at, were it wider
]


def test_general_kernels_take_every_map(monkeypatch):
    from mmoverlock.ops.contmix import shared

    monkeypatch.setattr(shared, 'ENABLED', False)
    assert max(errors(arguments(1, 2, 4, 5, 6, 3, 5, 6, 4))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('shape', SHAPES)
def test_equals_definition(shape):
    assert max(errors(arguments(*shape))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('shape', [SHAPES[n] for n in (1, 2, 3, 9)])
def test_both_windows_by_one_program(shape, monkeypatch):
    """What many images or heads have; the shapes above are few, and either window has a program of its own."""
    import dataclasses

    from mmoverlock.ops.contmix import shared

    args = arguments(*shape)
    assert shared.Plan.of(args[0], args[4], args[5], args[6]).few(shape[0])
    monkeypatch.setattr(shared, 'TUNING', dataclasses.replace(shared.TUNING, programs=0))
    assert max(errors(args)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('width', [6, 7])  # shared windows, and the general kernels
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype, width):
    if INTERPRETED and dtype is torch.bfloat16:
        pytest.skip('Triton 3.6 interprets products of bfloat16 as products of integers')
    found = errors(arguments(1, 2, 4, 5, width, 3, 5, 6, 4, dtype=dtype))
    assert max(found) < TOLERANCE[dtype], found


def test_large_logits_stay_finite_and_right():
    args = arguments(1, 1, 4, 5, 6, 3, 5, 6, 4, scale=5e3)
    assert reference.affinity_logits(*args[:4]).abs().max() > 1e4
    found = errors(args)
    assert max(found) < 2e-3, found  # float32 logits of 1e4 are rounded by 1e-3


def test_any_memory_layout():
    args = arguments(1, 2, 4, 5, 7, 3, 5, 6, 4)
    strided = [a.detach() for a in args]
    strided[0] = strided[0].permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)
    strided[1] = strided[1].transpose(2, 3).contiguous().transpose(2, 3)
    strided[6] = strided[6].contiguous(memory_format=torch.channels_last)
    out = fused(*(t.requires_grad_() for t in strided))
    torch.testing.assert_close(out, fused(*args), rtol=1e-5, atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    ones = torch.ones((), device=DEVICE).expand_as(out)  # as the backward of a sum gives
    found = torch.autograd.grad(out, strided, ones)
    wanted = torch.autograd.grad(reference.contmix_reference(*args), args, ones)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_batch_in_chunks_and_map_in_bands(monkeypatch):
    """What keeps memory small on the way back changes nothing but the order of sums."""
    import dataclasses

    from mmoverlock.ops.contmix import general

    args = arguments(2, 1, 2, 9, 18, 1, 3, 4, 2)
    cotangent = torch.randn_like(args[-1])
    whole = torch.autograd.grad(fused(*args), args, cotangent)
    monkeypatch.setattr(general.Plan, 'cut', lambda self, batch: (batch, 2))
    for a, b in zip(torch.autograd.grad(fused(*args), args, cotangent), whole):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(general, 'TUNING', dataclasses.replace(general.TUNING, share=0.0, floor=80))
    assert general.Plan.of(args[0], args[4], args[5], args[6]).chunk() == 1
    for a, b in zip(torch.autograd.grad(fused(*args), args, cotangent), whole):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_products_of_one_chunk_at_a_time(monkeypatch):
    """What chunks of the batch are for: the products of one are gone before those of the next are made."""
    import dataclasses
    import weakref

    from mmoverlock.ops.contmix import shared

    args = arguments(3, 1, 2, 4, 3, 1, 3, 4, 2)
    made, prepare = [], shared._prepare

    def counted(*inputs):
        assert all(product() is None for product in made)
        out = prepare(*inputs)
        made.append(weakref.ref(out[0]))
        return out

    monkeypatch.setattr(shared, 'TUNING', dataclasses.replace(shared.TUNING, whole=0, share=0.0, sums=0.0, floor=1))
    monkeypatch.setattr(shared, '_prepare', counted)
    torch.autograd.grad(fused(*args), args, torch.randn_like(args[-1]))
    assert len(made) == 6  # three each way


def test_shared_windows_with_the_batch_in_chunks(monkeypatch):
    import dataclasses

    from mmoverlock.ops.contmix import shared

    args = arguments(3, 1, 2, 4, 3, 1, 3, 4, 2)
    cotangent = torch.randn_like(args[-1])
    whole = torch.autograd.grad(fused(*args), args, cotangent)
    plan = shared.Plan.of(args[0], args[4], args[5], args[6])
    one = 4 * plan.padded_dim * sum(plan.padded)  # bytes of the products of one batch element
    for floor, chunk, splits in ((3 * one, 3, 2), (2 * one, 2, 1), (0, 1, 1)):
        monkeypatch.setattr(
            shared, 'TUNING', dataclasses.replace(shared.TUNING, whole=0, share=0.0, sums=0.0, floor=max(floor, 1))
        )
        assert (plan.chunk(), plan.splits()) == (chunk, splits)
        for a, b in zip(torch.autograd.grad(fused(*args), args, cotangent), whole):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_operator_is_registered_properly():
    args = arguments(1, 1, 2, 3, 4, 1, 3, 2, 1)
    torch.library.opcheck(
        torch.ops.mmoverlock.contmix.default,
        (*args, True),
        test_utils=('test_schema', 'test_autograd_registration', 'test_faketensor'),
    )


def test_some_inputs_need_no_gradient():
    args = arguments(1, 1, 2, 3, 4, 1, 3, 2, 1)
    frozen = [a.detach().requires_grad_(n in (0, 2)) for n, a in enumerate(args)]
    fused(*frozen).sum().backward()
    assert [a.grad is not None for a in frozen] == [n in (0, 2) for n in range(7)]


def test_second_derivative_is_that_of_the_definition():
    args = arguments(1, 1, 2, 3, 4, 1, 3, 2, 1)
    results = []
    for function in (fused, reference.contmix_reference):
        gradients = torch.autograd.grad(function(*args).square().sum(), args, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), args))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    args = arguments(1, 1, 2, 3, 4, 1, 3, 2, 1)
    plain = torch.autograd.grad(fused(*args).sum(), args)
    again = torch.autograd.grad(checkpoint(fused, *args, use_reentrant=False).sum(), args)
    for a, b in zip(plain, again):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_traced_without_a_break():
    """As torch.compile and torch.export see it; the GPU tests below run what the compiler makes of it."""
    for width in (4, 5):
        args = arguments(1, 1, 2, 3, width, 1, 3, 2, 1)
        compiled = torch.compile(lambda *a: fused(*a).square(), fullgraph=True, backend='aot_eager')
        found = torch.autograd.grad(compiled(*args).sum(), args)
        wanted = torch.autograd.grad(fused(*args).square().sum(), args)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b)


MODEL_SHAPE = (2, 4, 16, 14, 14, 5, 13, 49, 16)


@cuda
@pytest.mark.parametrize('dynamic', [False, True])
def test_compiles_without_a_break(dynamic):
    for shape in (MODEL_SHAPE, (2, 4, 16, 15, 20, 5, 13, 49, 16)):
        args = arguments(*shape, dtype=torch.float16)
        compiled = torch.compile(lambda *a: fused(*a).square(), fullgraph=True, dynamic=dynamic)
        out = compiled(*args)
        torch.testing.assert_close(out, fused(*args).square())
        cotangent = torch.randn_like(out)
        wanted = torch.autograd.grad(fused(*args).square(), args, cotangent)
        for a, b in zip(torch.autograd.grad(out, args, cotangent), wanted):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@cuda
def test_autocast_leaves_its_precision_alone():
    args = arguments(*MODEL_SHAPE, dtype=torch.float16)
    with torch.autocast('cuda', torch.float16):
        assert max(errors(args)) < TOLERANCE[torch.float16]


@cuda
def test_cuda_graph():
    args = arguments(*MODEL_SHAPE, dtype=torch.float16)
    cotangent = torch.randn_like(args[-1])
    # Without its graph, whose leaves would make the recording wait for the stream that this ran in.
    wanted = [fused(*args).detach(), *torch.autograd.grad(fused(*args), args, cotangent)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(fused(*args), args, cotangent)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(*args)
        found = [out, *torch.autograd.grad(out, args, cotangent)]
    graph.replay()
    for a, b in zip(found, wanted):
        assert torch.equal(a, b)


def test_exports():
    class Mix(torch.nn.Module):
        def forward(self, *args):
            return fused(*args)

    args = tuple(a.detach() for a in arguments(*(MODEL_SHAPE if DEVICE == 'cuda' else (1, 1, 2, 3, 4, 1, 3, 2, 1))))
    program = torch.export.export(Mix(), args)
    assert any('mmoverlock.contmix' in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*args), fused(*args))


@cuda
@pytest.mark.parametrize('dtype', list(TOLERANCE))
@pytest.mark.parametrize('shape', [MODEL_SHAPE, (1, 12, 14, 7, 7, 5, 7, 49, 14), (1, 18, 16, 20, 37, 5, 13, 49, 16)])
def test_sizes_of_the_network(shape, dtype):
    found = errors(arguments(*shape, dtype=dtype))
    assert max(found) < TOLERANCE[dtype], found
