"""OverLoCK in timm, and in torch.hub."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import GOLDEN, TINY, fill, randomise

timm = pytest.importorskip('timm')
import mmoverlock.timm  # noqa: E402, F401
from mmoverlock import OverLoCK  # noqa: E402
from mmoverlock.checkpoints import CheckpointError, to_official  # noqa: E402

ROOT = Path(__file__).parents[1]
NAME = 'overlock_tiny.mmoverlock'
SMALL = dict(arch=TINY, hidden_channels=16)


def create(**kwargs):
    return timm.create_model(NAME, **{**SMALL, **kwargs})


def test_all_variants_are_listed():
    names = timm.list_models('overlock_*', module='timm', include_tags=True)
    assert names == [f'overlock_{size}.mmoverlock' for size in ('base', 'small', 'tiny', 'xtiny')]


def test_importing_mmoverlock_leaves_timm_alone():
    code = 'import sys; sys.modules["timm"] = None; import mmoverlock'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, timeout=300).returncode == 0


def test_official_numbers(official_state_dict, tmp_path):
    """An official classifier in an official file gives the official scores."""
    path, golden = tmp_path / 'official.pth', np.load(GOLDEN / 'xt_cls_224.npz')
    torch.save(official_state_dict('cls_xt'), path)
    model = timm.create_model('overlock_xtiny', pretrained=True, pretrained_cfg_overlay=dict(file=str(path))).eval()
    with torch.no_grad():
        logits = model(fill.image(2, 224, 224))
    expected = torch.from_numpy(golden['logits'])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize('size', ['xtiny', 'tiny', 'small', 'base'])
def test_default_cfg_names_what_is_there(size):
    with torch.device('meta'):
        model = timm.create_model(f'overlock_{size}.mmoverlock')
    cfg, state = model.default_cfg, model.state_dict()
    assert state[cfg['classifier'] + '.weight'].shape[:2] == (1000, model.head_hidden_size)
    assert state[cfg['first_conv'] + '.weight'].shape[1] == cfg['input_size'][0]
    assert model.get_classifier().out_channels == cfg['num_classes'] == model.num_classes
    assert cfg['crop_pct'] == dict(xtiny=0.925, tiny=0.95, small=0.95, base=0.975)[size]
    data = timm.data.resolve_model_data_config(model)
    assert data['input_size'] == (3, 224, 224) and data['interpolation'] == 'bicubic'


def test_forward_and_head():
    model, x = create(num_classes=7).eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, 3, 3)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        scores = model(x)
        assert scores.shape == (2, 7) and torch.equal(model.forward_head(features), scores)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.head_hidden_size)
        model.reset_classifier(0, '')
        assert model(x).shape == (2, model.head_hidden_size, 3, 3)
        model.reset_classifier(5, 'avg')
        assert model(x).shape == (2, 5) and model.num_classes == 5
        assert create(num_classes=0, global_pool='')(x).shape == (2, model.head_hidden_size, 3, 3)
        assert create(in_chans=1, num_classes=2)(x[:, :1]).shape == (2, 2)
    with pytest.raises(ValueError, match='global_pool'):
        model.reset_classifier(5, 'max')


@pytest.mark.parametrize('checkpointing', [False, True])
def test_every_parameter_gets_a_gradient(checkpointing):
    model = create(num_classes=4, drop_rate=0.1, drop_path_rate=0.1).train()
    model.set_grad_checkpointing(checkpointing)
    out = model(torch.randn(2, 3, 96, 96))
    out.mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert torch.isfinite(out).all()


def test_features_only():
    model, x = create(features_only=True).eval(), torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        maps = model(x)
    info = model.feature_info
    assert [m.shape[1] for m in maps] == info.channels() == [8, 16, 32, 40]
    assert [96 // m.shape[2] for m in maps] == info.reduction() == [4, 8, 16, 32]
    assert not any(n.startswith('model.head.') for n, _ in model.named_parameters())
    some = create(features_only=True, out_indices=(1, 3)).eval()
    some.load_state_dict(model.state_dict())
    with torch.no_grad():
        for a, b in zip(some(x), maps[1::2]):
            assert torch.equal(a, b)


def test_intermediates_are_the_classifiers():
    """Not those of the dense form, whose network goes on from a normed map."""
    model, x = create(num_classes=3).eval(), torch.randn(1, 3, 64, 64)
    randomise(model)
    plain = OverLoCK(TINY, out_type='classification').eval()
    plain.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, plain(x)[1]) and torch.equal(maps[3], last)
        assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2


def test_layer_groups_follow_the_forward_pass():
    from timm.models import group_parameters

    model = create(num_classes=3)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert set(groups) == {n for n, _ in model.named_parameters()}
        order = [
            groups[f'backbone.{name}']
            for name in (
                'stem.0.conv.weight',
                'stage1.0.dwconv.weight',
                'stage2.0.dwconv.weight',
                'stage3.0.dwconv.weight',
                'stage4.0.dwconv.weight',
                'focus3.0.dwconv1.weight',
                'focus4.0.dwconv1.weight',
            )
        ] + [groups['head.fc.weight']]
        assert order == sorted(set(order))


def test_hugging_face_layout(tmp_path):
    """Saved with safetensors and a config, and read back by timm."""
    pytest.importorskip('safetensors')
    model = randomise(create(num_classes=6)).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=dict(num_classes=6), safe_serialization=True)
    assert {'model.safetensors', 'config.json'} <= {p.name for p in tmp_path.iterdir()}
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **SMALL).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
    fewer = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, **SMALL, num_classes=2, in_chans=1)
    assert fewer.head.fc.weight.shape[0] == 2
    torch.testing.assert_close(
        fewer.backbone.stem[0].conv.weight[:, 0], model.backbone.stem[0].conv.weight.sum(1), rtol=1e-6, atol=1e-6
    )


def test_file_of_another_variant_is_refused(tmp_path):
    path = tmp_path / 'a.pth'
    other = dict(TINY, widths=(8, 16, 24, 64))
    classifier = create(arch=other)
    torch.save(to_official(classifier.state_dict()), path)
    with pytest.raises(CheckpointError, match='arch'):
        create().load_pretrained(str(path))
    torch.save(dict(a=torch.zeros(1)), path)
    with pytest.raises(CheckpointError, match='does not fit'):
        create().load_pretrained(str(path))


def test_deploy_computes_the_same():
    model, x = randomise(create(num_classes=3)).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        model.switch_to_deploy()
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_hub_entries():
    model = torch.hub.load(str(ROOT), 'overlock_xtiny', source='local', out_indices=(3,))
    assert isinstance(model, OverLoCK) and model.out_channels == (420,)
    block = torch.hub.load(str(ROOT), 'contmix_block', source='local', dim=8, num_heads=1, kernel_size=5)
    assert block(torch.rand(1, 8, 6, 7)).shape == (1, 8, 6, 7)


def test_hub_weights(official_state_dict, monkeypatch):
    """``pretrained`` fetches the official file of the form that is built."""
    fetched = []

    def load(url):
        fetched.append(url.rsplit('/', 1)[1])
        return official_state_dict('cls_xt_reparam' if 'reparam' in url else 'cls_xt')

    monkeypatch.setattr('mmoverlock.checkpoints.load_state_dict_file', load)
    for deploy in (False, True):
        model = torch.hub.load(str(ROOT), 'overlock_xtiny', source='local', pretrained=True, deploy=deploy)
        assert model.stem[0].bn.running_mean.abs().sum() > 0
    assert fetched == ['overlock_xt_in1k_224.pth', 'overlock_xt_in1k_224_reparam.pth']
