"""Mixed and half precision at its limits, against float64, forward and backward.

Inputs and weights are scaled so that results come near the largest float16 or the smallest; what float16 can hold must
come out right. Autocast runs on the CPU here, whose list of float32 operations is not CUDA's; the operators and layers
are the same.
"""

import copy

import pytest
import torch
from common import TINY, randomise
from torch import nn

from mmoverlock import ContMixBlock, OverLoCK, OverLoCKClsHead
from mmoverlock.models.blocks import BaseBlock, FocusBlock, Fusion
from mmoverlock.models.layers import GRN, ConvFFN, LargeKernelConv, LayerScale, SELayer, affine, resize, spatial_mean

HALF = [torch.float16, torch.bfloat16]
#: Relative rounding of a type; errors are allowed a few of it, more through a block.
EPS = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
MAX = 65504.0


def relative(a, b):
    """Error relative to the norm; infinite where ``a`` is not finite."""
    return ((a.double() - b).norm() / b.norm()).item() if a.isfinite().all() else float('inf')


def compare(module, inputs, dtype, grad_scale=1.0, half_module=False):
    """Runs in half precision and in float64, on the same rounded values.

    ``half_module``: weights in half precision too. Otherwise weights stay float32 under autocast, as in training.

    Returns:
        tuple[dict, float]: Relative error of ``out``, ``input`` (gradient) and every parameter's gradient; the largest
        exact output.
    """
    module = copy.deepcopy(module)
    if half_module:
        module.to(dtype)
    exact = copy.deepcopy(module).double()
    inputs = [x.to(dtype) for x in inputs]
    got, expected = ([x.detach().to(t).requires_grad_() for x in inputs] for t in (dtype, torch.float64))
    with torch.autocast('cpu', dtype, enabled=not half_module):
        out = module(*got)
    truth = exact(*expected)
    out, truth = ([o] if isinstance(o, torch.Tensor) else list(o) for o in (out, truth))
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64) * grad_scale for t in truth]
    grads = [g.to(o.dtype) for g, o in zip(grads, out)]
    torch.autograd.backward(out, grads)
    torch.autograd.backward(truth, [g.double() for g in grads])
    errors = dict(
        out=max(relative(a, b) for a, b in zip(out, truth)),
        input=max(relative(a.grad, b.grad) for a, b in zip(got, expected)),
    )
    pairs = [(n, p.grad, q.grad) for (n, p), q in zip(module.named_parameters(), exact.parameters())]
    # In front of a batch norm a bias has the exact gradient zero, and a scale nearly so: relative to what, then? To a
    # tenth of the largest gradient at least.
    floor = 0.1 * max(q.norm() for _, _, q in pairs)
    errors.update({n: relative(p, q) * (q.norm() / max(q.norm(), floor)).item() for n, p, q in pairs if q.norm() > 0})
    return errors, max(t.abs().max().item() for t in truth)


def picture(*shape, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).clamp(-MAX, MAX)


#: Layers whose result is near the size of their input, so that inputs can be taken to the limit.
LAYERS = dict(
    grn=lambda: randomise(GRN(16)),
    se=lambda: randomise(SELayer(16)),
    layer_scale=lambda: LayerScale(16),
)


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e4])
@pytest.mark.parametrize('grad_scale', [1e-2, 1.0, 1e3])
@pytest.mark.parametrize('layer', LAYERS)
def test_layers_from_smallest_to_largest(layer, dtype, scale, grad_scale):
    """Maps of up to 45,000 with gradients of a thousand: sums over the map are 1e9 and more, and float32 keeps them."""
    errors, largest = compare(LAYERS[layer](), [picture(2, 16, 40, 24, scale=scale)], dtype, grad_scale)
    assert largest < MAX
    assert {k: v for k, v in errors.items() if not v < 2 * EPS[dtype]} == {}


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('value', [0.0, 6e-8, MAX])
def test_grn_of_flat_maps(dtype, value):
    """All zero, all the smallest, all the largest float16: finite, with finite gradients."""
    module = randomise(GRN(8))
    with torch.no_grad():
        module.gamma.fill_(-0.5)
    x = torch.full((2, 8, 30, 20), value, dtype=dtype, requires_grad=True)
    out = module(x)
    torch.testing.assert_close(out.double(), 0.5 * x.double() + module.beta.double(), rtol=2**-6, atol=1e-4)
    out.sum(dtype=torch.float32).backward()
    assert x.grad.isfinite().all() and module.gamma.grad.isfinite().all()


BLOCKS = dict(
    large_kernel=(lambda: LargeKernelConv(16, 13), [(2, 16, 14, 17)]),
    fusion=(lambda: Fusion(16, 16), [(2, 16, 14, 17)]),
    ffn=(lambda: ConvFFN(16, 64), [(2, 16, 14, 17)]),
    base=(lambda: BaseBlock(16, 7, res_scale=True, layer_scale=1.0), [(2, 16, 14, 17)]),
    focus=(lambda: FocusBlock(16, 8, 2, 7, 3), [(2, 16, 9, 11), (2, 8, 9, 11), (2, 8, 9, 11)]),
    # smaller than the window: enlarged, and pooled again
    focus_small=(lambda: FocusBlock(16, 8, 2, 7, 3), [(2, 16, 3, 4), (2, 8, 3, 4), (2, 8, 3, 4)]),
    contmix=(lambda: ContMixBlock(16, 2, 7, 3), [(2, 16, 9, 11)]),
)


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('at_limit', [False, True])
@pytest.mark.parametrize('name', BLOCKS)
def test_blocks_in_training(name, at_limit, dtype):
    """As they come, and with the input scaled until the exact result is half the largest float16.

    In front of every sum of a block is a norm: large inputs must not overflow inside. The feed-forward half alone has
    none, so its hidden values are its limit.
    """
    make, shapes = BLOCKS[name]
    module = randomise(make()).train()
    inputs = [picture(*shape, seed=i) for i, shape in enumerate(shapes)]
    scale = 1.0
    if at_limit:
        with torch.no_grad():
            out = copy.deepcopy(module).double()(*[1e3 * x.double() for x in inputs])
        out = out if isinstance(out, torch.Tensor) else torch.cat([o.flatten() for o in out])
        scale = min(1e3 * MAX / 2 / out.abs().max().item(), MAX / 8)
        scale = scale / 8 if name == 'ffn' else scale
    # Gradients as small as the inputs are large: those of the weights are products of both, and float16 there. Behind a
    # norm they are so of themselves.
    grad_scale = 1.0 if name in ('large_kernel', 'fusion') else 1 / scale
    errors, largest = compare(module, [x * scale for x in inputs], dtype, grad_scale)
    assert largest < MAX
    assert {k: v for k, v in errors.items() if not v < 24 * EPS[dtype]} == {}


@pytest.mark.parametrize('dtype', HALF)
def test_se_keeps_small_values(dtype):
    """Pooled values of 1e-6 and gates that hardly move: a float16 pipeline rounds their gradients to zero."""
    errors, _ = compare(randomise(SELayer(16)), [picture(2, 16, 64, 64, scale=1e-4)], dtype)
    assert errors['reduce.weight'] < 2 * EPS[dtype] and errors['reduce.bias'] < 2 * EPS[dtype]


@pytest.mark.parametrize('dtype', HALF)
def test_overview_branch_behind_layer_scale(dtype):
    """Times 1e-5, in half precision, its gradients are zero or noise: here they are float32's."""
    model = randomise(OverLoCK(TINY, fuse_overview=True)).train()
    with torch.no_grad():
        model.overview_scale.weight.fill_(1e-5)
    exact = copy.deepcopy(model).double()
    seen = {}
    hook = model.overview_norm.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].detach()))
    image = picture(2, 3, 64, 64)
    with torch.autocast('cpu', dtype):
        (last,) = model(image)[3:]
    hook.remove()
    grad = (picture(*last.shape, seed=3) * 1e-3).to(last.dtype)
    last.backward(grad)
    # float64 from the branch's own input on
    branch = exact.overview_scale(exact.overview_proj(exact.overview_norm(seen['x'].double())))
    branch.backward(grad.double())
    for name in ('overview_norm', 'overview_proj', 'overview_scale'):
        for (key, p), q in zip(getattr(model, name).named_parameters(), getattr(exact, name).parameters()):
            assert q.grad.norm() > 0 and relative(p.grad, q.grad) < 1e-3, f'{name}.{key}'


@pytest.mark.parametrize('dtype', HALF)
def test_heads_give_float32_logits(dtype):
    """Losses are taken of logits that were never rounded to half precision, of both heads."""
    head = randomise(OverLoCKClsHead(7, (32, 40), hidden_channels=16)).eval()
    feats = [picture(2, 32, 7, 7, scale=300.0).to(dtype), picture(2, 40, 7, 7, scale=300.0, seed=1).to(dtype)]
    exact = copy.deepcopy(head).double()
    with torch.autocast('cpu', dtype):
        main, aux = head(feats), head.aux_forward(feats)
    assert main.dtype == aux.dtype == torch.float32
    expected = [f.double() for f in feats]
    # what is pooled is half; its rounding averages out
    assert relative(aux, exact.aux_forward(expected)) < EPS[dtype]
    assert relative(main, exact(expected)) < 2 * EPS[dtype]


@pytest.mark.parametrize('dtype', HALF)
def test_helpers_in_half_precision(dtype):
    x = torch.full((1, 2, 300, 300), 6e4, dtype=dtype)
    assert torch.allclose(spatial_mean(x, dtype).double(), x[..., :1, :1].double())
    # 90,000 shares for one pixel: in bfloat16, one by one, a sum stops growing at 256.
    small = torch.randn(1, 1, 1, 1).to(dtype).requires_grad_()
    resize(small, (50, 70)).backward(torch.ones(1, 1, 50, 70, dtype=dtype))
    assert small.grad.item() == pytest.approx(3500, rel=EPS[dtype])
    weight = torch.rand(1, 2, 1, 1, requires_grad=True)
    big = torch.full((1, 2, 60, 60), 5e4, dtype=dtype)
    affine(big, weight, torch.zeros(1, 2, 1, 1)).backward(torch.full_like(big, 1e3))
    assert weight.grad[0, 0].item() == pytest.approx(3600 * big[0, 0, 0, 0].item() * 1e3, rel=1e-5)


def test_affine_differentiates_twice():
    x = torch.randn(2, 3, 4, 5).half().requires_grad_()
    weight, bias = torch.rand(2, 3, 1, 1, requires_grad=True), torch.rand(1, 3, 1, 1, requires_grad=True)
    out = affine(x, weight, bias)
    (first,) = torch.autograd.grad(out.float().square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    torch.testing.assert_close(second, 2 * x.float().square().sum((2, 3), keepdim=True), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('kwargs', [dict(fuse_overview=True), dict(), dict(out_type='classification')])
@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('scale', [1.0, 3e3])
def test_network_trains_with_pictures_of_any_range(kwargs, dtype, scale):
    """Un-normalised pictures (of up to 65,504): outputs, gradients and running statistics stay finite."""
    model = randomise(OverLoCK(TINY, drop_path_rate=0.1, **kwargs)).train()
    image = picture(2, 3, 64, 64, scale=scale * 4)
    with torch.autocast('cpu', dtype):
        maps = model(image)
    assert all(m.isfinite().all() for m in maps)
    sum(m.float().square().mean() for m in maps).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, b in model.named_buffers() if not b.isfinite().all()] == []


@pytest.mark.parametrize('dtype', HALF)
def test_half_modules_infer(dtype):
    """``model.half()`` of a merged model: near float64 of the unmerged one, whatever its statistics were.

    Running variances beyond 65,504 have no place in float16; merged, in float64, they are gone before the cast.
    """
    model = randomise(OverLoCK(TINY)).eval()
    block = model.stage1[0].large_kernel
    with torch.no_grad():
        block.bn.running_var.fill_(1e6)
        block.bn.weight.fill_(1e3)
    image = picture(1, 3, 64, 64)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(image.double())
        model.switch_to_deploy()
        got = model.to(dtype)(image.to(dtype))
    for a, b in zip(got, expected):
        assert a.dtype == dtype and relative(a, b) < 32 * EPS[dtype]


def test_only_float_types_of_the_same_kind_leave_the_blocks():
    """A block gives what its input was, so that one float32 layer does not turn the rest of the network float32."""
    for name, (make, shapes) in BLOCKS.items():
        module = make().eval()
        module.half()
        for m in module.modules():
            assert not isinstance(m, nn.BatchNorm2d) or m.weight.dtype == torch.float16
        out = module(*[picture(*shape).half() for shape in shapes])
        out = [out] if isinstance(out, torch.Tensor) else out
        assert all(o.dtype == torch.float16 for o in out), name
