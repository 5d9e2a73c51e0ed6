import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import randomise
from torch import nn

from mmoverlock import ContMixBlock, OverLoCK
from mmoverlock.checkpoints import to_official
from mmoverlock.models import ARCHS
from mmoverlock.models.layers import DropPath, LargeKernelConv, _train_plainly, mean_by_products

ROOT = Path(__file__).parents[2]

# Stated in the paper's code base: channels of the dense maps.
DENSE_CHANNELS = {
    'xt': (56, 112, 340, 420),
    't': (64, 128, 384, 640),
    's': (64, 128, 448, 640),
    'b': (80, 160, 528, 720),
}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('arch', list(ARCHS))
@pytest.mark.parametrize('form', ['cls', 'cls_reparam', 'det', 'seg'])
def test_official_names_shapes_and_counts(official_shapes, arch, form):
    name = f'cls_{arch}_reparam' if form == 'cls_reparam' else f'{form}_{arch}'
    with torch.device('meta'):
        if form.startswith('cls'):
            pytest.importorskip('mmpretrain')
            from mmoverlock import OverLoCKClsHead

            backbone = OverLoCK(arch, out_type='classification', deploy=form == 'cls_reparam')
            model = nn.ModuleDict(dict(backbone=backbone, head=OverLoCKClsHead(1000, backbone.out_channels)))
        else:
            model = OverLoCK(arch, fuse_overview=form == 'det')
    ours = {k: list(v.shape) for k, v in to_official(model.state_dict()).items()}
    assert ours == official_shapes[name]
    assert parameters(model) == official_shapes['params'][name]


@pytest.mark.parametrize('arch', list(ARCHS))
def test_channels_and_strides(arch):
    with torch.device('meta'):
        model = OverLoCK(arch)
        maps = model.eval()(torch.empty(1, 3, 416, 448))
    assert model.out_channels == DENSE_CHANNELS[arch]
    assert model.out_strides == (4, 8, 16, 32)
    assert [tuple(m.shape) for m in maps] == [
        (1, c, 416 // s, 448 // s) for c, s in zip(model.out_channels, model.out_strides)
    ]


def test_long_names_and_defaults():
    with torch.device('meta'):
        for long, short in (('xtiny', 'xt'), ('tiny', 't'), ('small', 's'), ('base', 'b')):
            assert OverLoCK(long).arch == ARCHS[short]
        arch = {k: ARCHS['xt'][k] for k in ('depths', 'focus_depths', 'widths', 'focus_heads')}
        assert OverLoCK(arch).arch == ARCHS['xt']


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(depth=1), "unknown keys.*'depth'"),
        (dict(widths=None), 'missing keys'),
        (dict(depths=(1, 1, 1)), 'depths needs 4 numbers'),
        (dict(depths=(1, 0, 1, 1)), 'positive integers'),
        (dict(widths=(8, 16, 25, 32)), 'not divisible by 4 \\* focus_heads'),
        (dict(widths=(8, 16, 24, 30)), 'multiple of 4'),
        (dict(widths=(7, 16, 24, 32)), 'must be even'),
        (dict(focus_heads=(5, 2)), 'not divisible'),
        (dict(kernel_sizes=(7, 7, 6, 5)), 'kernel_sizes must be from'),
        (dict(small_kernel=4), 'small_kernel must be odd'),
        (dict(small_kernel=7), 'small_kernel must be odd and at most'),
        (dict(focus_mlp_ratio=0), 'must be positive'),
    ],
)
def test_dict_arch_errors(tiny, change, message):
    arch = {k: v for k, v in {**tiny, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        OverLoCK(arch)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(arch='large'), "'large' is unknown; choose from xt"),
        (dict(arch=3), 'a name or a dict'),
        (dict(out_indices=(0, 4)), 'out_indices'),
        (dict(out_indices=()), 'out_indices'),
        (dict(out_indices=(1, 0)), 'ascending'),
        (dict(out_type='maps'), 'out_type'),
        (dict(fuse_overview=True, out_indices=(0, 1)), 'fuse_overview'),
        (dict(frozen_stages=7), 'frozen_stages'),
        (dict(drop_path_rate=1.0), 'drop_path_rate'),
    ],
)
def test_argument_errors(tiny, kwargs, message):
    with pytest.raises(ValueError, match=message):
        OverLoCK(**{'arch': tiny, **kwargs})


def test_constructor_is_quiet(tiny, capfd):
    OverLoCK(tiny)
    assert capfd.readouterr() == ('', '')


def test_out_indices_are_a_subset(tiny):
    torch.manual_seed(0)
    image = torch.randn(1, 3, 64, 96)
    full = randomise(OverLoCK(tiny)).eval()
    for indices in ((0,), (1, 2, 3), (0, 3)):
        part = OverLoCK(tiny, out_indices=indices).eval()
        part.load_state_dict(full.state_dict(), strict=False)
        outs = full(image)
        assert part.out_channels == tuple(full.out_channels[i] for i in indices)
        for i, out in zip(indices, part(image)):
            assert torch.equal(out, outs[i])


@pytest.mark.parametrize('size', [(1, 1), (33, 64), (17, 250), (96, 96)])
@torch.no_grad()
def test_any_picture_size(tiny, size):
    model = OverLoCK(tiny).eval()
    for out, stride in zip(model(torch.randn(1, 3, *size)), (4, 8, 16, 32)):
        assert out.shape[2:] == tuple(-(-s // stride) for s in size)
        assert out.isfinite().all()


def test_no_value_is_read_back_from_the_device(tiny):
    # Tensors on the meta device hold no values: reading one (a host sync) raises.
    with torch.device('meta'):
        model = OverLoCK(tiny, fuse_overview=True).train()
        sum(m.sum() for m in model(torch.empty(2, 3, 64, 96))).backward()


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(fuse_overview=True),
        dict(out_type='classification'),
        dict(out_indices=(1, 2, 3)),
    ],
)
def test_every_parameter_gets_a_gradient(tiny, kwargs):
    model = randomise(OverLoCK(tiny, **kwargs)).train()
    sum(m.square().sum() for m in model(torch.randn(2, 3, 64, 64))).backward()
    assert not [k for k, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize('with_cp', [True, (3, 5)])
def test_checkpointed_equals_plain(tiny, with_cp):
    image = torch.randn(2, 3, 64, 64)
    plain = randomise(OverLoCK(tiny, drop_path_rate=0.2)).train()
    saving = OverLoCK(tiny, drop_path_rate=0.2, with_cp=with_cp).train()
    saving.load_state_dict(plain.state_dict())
    for model in (plain, saving):
        torch.manual_seed(1)
        sum(m.square().mean() for m in model(image)).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), saving.buffers()):  # not updated twice
        assert torch.equal(a, b), name


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 4, 6])
def test_frozen_stages(tiny, frozen_stages):
    groups = ('stem', 'stage1', 'stage2', 'stage3', 'stage4', 'focus3', 'focus4')
    model = OverLoCK(tiny, frozen_stages=frozen_stages).train()
    before = copy.deepcopy(model.state_dict())
    maps = model(torch.randn(2, 3, 64, 64))
    sum(m.square().sum() for m in maps).backward()
    for i, name in enumerate(groups):
        frozen = i <= frozen_stages
        stage = getattr(model, name)
        assert all(p.requires_grad != frozen for p in stage.parameters())
        norm = next(m for m in stage.modules() if isinstance(m, nn.BatchNorm2d))
        assert norm.training != frozen
    changed = {k.split('.')[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed.isdisjoint(groups[: frozen_stages + 1])
    assert changed.issuperset(groups[frozen_stages + 1 :])


def test_norm_eval(tiny):
    model = OverLoCK(tiny, norm_eval=True).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    model(torch.randn(1, 3, 32, 32))  # nothing to take statistics of


def test_single_value_a_channel_is_refused_in_training(tiny):
    model = OverLoCK(tiny).train()
    with pytest.raises(ValueError, match='single value a channel.*larger images, or norm_eval=True'):
        model(torch.randn(1, 3, 32, 32))
    model(torch.randn(2, 3, 32, 32))
    model.eval()(torch.randn(1, 3, 32, 32))


def test_nan_is_not_hidden(tiny):
    image = torch.randn(1, 3, 64, 64)
    image[0, 0, 5, 5] = float('nan')
    assert all(m.isnan().any() for m in OverLoCK(tiny).eval()(image))


def test_stochastic_depth_rates_grow_along_the_network(tiny):
    model = OverLoCK(tiny, drop_path_rate=0.3)
    order = ('stage1', 'stage2', 'stage3', 'stage4', 'focus3', 'focus4')
    rates = [m.rate for name in order for m in getattr(model, name).modules() if isinstance(m, DropPath)]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.3, len(rates)))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('size', [(50, 80), (7, 7), (13, 9)])
def test_mean_by_products_is_adaptive_pooling(size, layout):
    """What large maps on a GPU take instead of PyTorch's pooling: values and gradients."""
    x = torch.randn(2, 3, *size, dtype=torch.double).to(memory_format=layout).requires_grad_()
    ours, right = mean_by_products(x, 7), nn.functional.adaptive_avg_pool2d(x, 7)
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(right)
    grads = (torch.autograd.grad(y, x, cotangent)[0] for y in (ours, right))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    with torch.autocast('cpu', torch.bfloat16):
        assert mean_by_products(x.detach().float(), 7).dtype == torch.float32  # its gradient is spread thin


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(20000, 1, 1, 1))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(out.mean().item() - 1) < 0.02
    assert torch.equal(drop.eval()(out), out)


def test_initial_values(tiny):
    model = OverLoCK(tiny, fuse_overview=True)
    for name, p in model.named_parameters():
        if name.endswith(('rpb1', 'rpb2', 'gamma', 'beta', 'bias')):
            assert p.abs().max() == 0, name
        elif 'layer_scale' in name or name.endswith(('context_scale.weight', 'prior_scale.weight')):
            assert (p == 1).all(), name
        elif name == 'overview_scale.weight':
            assert (p == 1e-5).all()
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            assert p.std() < 0.03 and p.abs().max() > 0, name
    block = ContMixBlock(16, 2, kernel_size=5, smk_size=3)
    assert 0 < block.mixer.rpb2.std() < 0.03


def test_layer_depth(tiny):
    model = OverLoCK(tiny, fuse_overview=True)
    depths = {name: model.get_layer_depth('backbone.' + name, 'backbone.') for name, _ in model.named_parameters()}
    blocks = sum(tiny['depths']) + sum(tiny['focus_depths'])
    assert {total for _, total in depths.values()} == {blocks + 2}
    assert depths['stem.0.conv.weight'][0] == 0
    assert depths['stage1.0.norm.weight'][0] == 1
    assert depths['down2.conv.weight'][0] == depths['stage2.0.norm.weight'][0] == 2
    assert depths['focus4.0.norm1.weight'][0] == depths['focus_down.x.conv.weight'][0] == blocks
    assert depths['norm0.weight'][0] == depths['overview_norm.weight'][0] == blocks + 1
    assert {d for d, _ in depths.values()} == set(range(blocks + 2))
    assert model.get_layer_depth('head.fc.weight', 'backbone.')[0] == blocks + 1


def test_copies(tiny):
    model = randomise(OverLoCK(tiny)).eval()
    image = torch.randn(1, 3, 64, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(image)[3], model(image)[3])


@torch.no_grad()
def test_deploy_equals_training_form(tiny):
    image = torch.randn(2, 3, 80, 64, dtype=torch.float64)
    model = randomise(OverLoCK(tiny, fuse_overview=True)).double().eval()
    before = model(image)
    model.switch_to_deploy()
    model.switch_to_deploy()  # again does nothing
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    after = model(image)
    for a, b in zip(before, after):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    # 3x3 weights lie as the maps do; on disk all are contiguous, which safetensors demands.
    weight = model.down3.conv.weight
    assert not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    state = {k: v.clone(memory_format=torch.preserve_format) for k, v in model.state_dict().items()}
    assert all(v.is_contiguous() for v in state.values())
    weight.data.zero_()
    model.load_state_dict(state)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(after, model(image)))


@pytest.mark.parametrize('fuse_overview', [False, True])
@pytest.mark.parametrize('channels_last', [False, True])
def test_maps_are_in_the_default_memory_order(tiny, channels_last, fuse_overview):
    # mmcv's operators ignore strides: RoIAlign of a channels-last map is noise, and detectors learn nothing.
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    model = OverLoCK(tiny, fuse_overview=fuse_overview).to(memory_format=fmt)
    for training in (True, False):
        maps = model.train(training)(torch.rand(2, 3, 64, 96).contiguous(memory_format=fmt))
        assert all(m.is_contiguous() for m in maps)


@pytest.mark.parametrize('channels_last', [False, True])
def test_memory_format_does_not_change_the_result(tiny, channels_last):
    model = randomise(OverLoCK(tiny)).eval()
    image = torch.randn(1, 3, 64, 64)
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    other = copy.deepcopy(model).to(memory_format=fmt)
    for a, b in zip(model(image), other(image.to(memory_format=fmt))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(tiny, dtype):
    model = randomise(OverLoCK(tiny)).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = model(image)
        with torch.autocast('cpu', dtype):
            half = model(image)
    for a, b in zip(exact, half):
        relative = (a - b.float()).norm() / a.norm()
        assert relative < (0.1 if dtype == torch.bfloat16 else 0.02), relative


def test_contmix_block_trains_on_any_map_size():
    block = ContMixBlock(16, num_heads=2, kernel_size=7, smk_size=3, drop_path=0.1).train()
    for size in ((3, 5), (7, 7), (12, 9)):
        x = torch.randn(2, 16, *size, requires_grad=True)
        block(x).square().sum().backward()
        assert x.grad.shape == x.shape
    assert not [k for k, p in block.named_parameters() if p.grad is None]
    with pytest.raises(ValueError, match='divisible by 4'):
        ContMixBlock(18, num_heads=2)


def test_memory_of_a_detection_picture_on_cpu():
    """The definition must not explode: the logits and windows of all positions at once would."""
    code = (
        'import resource, torch\n'
        'from mmoverlock import OverLoCK\n'
        'model = OverLoCK("xt", fuse_overview=True).eval()\n'
        'with torch.no_grad(): model(torch.randn(1, 3, 800, 1280))\n'
        'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) * 1024 < 6 * 2**30


def test_branches_in_one_call_track_what_batch_norms_would():
    """What a GPU runs in training: the same output, and the same running statistics, as norms one by one."""
    torch.manual_seed(0)
    single = LargeKernelConv(6, 13).double()
    together = copy.deepcopy(single)
    for _ in range(2):
        x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
        torch.testing.assert_close(together._sum_and_track(x, [together, *together.branches.values()]), single(x))
    expected = single.state_dict()
    for name, found in together.state_dict().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-10, atol=1e-12)


def test_which_norms_go_in_one_call():
    norms = [torch.nn.BatchNorm2d(4) for _ in range(3)]
    assert _train_plainly(norms)
    norms[1].momentum = 0.2
    assert not _train_plainly(norms)
    norms[1].momentum = 0.1
    norms[2].eval()
    assert not _train_plainly(norms)
    assert not _train_plainly([torch.nn.SyncBatchNorm(4)])
    assert not _train_plainly([torch.nn.BatchNorm2d(4, track_running_stats=False)])
    assert not _train_plainly([torch.nn.BatchNorm2d(4, momentum=None)])
