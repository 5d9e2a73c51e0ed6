"""The network against numbers computed with the official code (see tests/golden)."""

import numpy as np
import pytest
import torch
from common import GOLDEN, fill
from torch import nn

from mmoverlock import ContMixBlock, OverLoCK
from mmoverlock.checkpoints import from_official, to_official

TOLERANCE = 1e-5


def error(ours, reference):
    reference = torch.as_tensor(reference)
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def map_error(ours, golden, name):
    """Error of a map of which every 997th value was kept if it is large."""
    assert tuple(ours.shape) == tuple(golden[f'{name}.shape'])
    values = ours.flatten()
    return error(values[::997] if values.numel() > 20000 else values, golden[f'{name}.sample'])


class Classifier(nn.Module):
    """Backbone and head under the names that mmpretrain's classifier gives them."""

    def __init__(self, deploy=False):
        super().__init__()
        from mmoverlock import OverLoCKClsHead

        self.backbone = OverLoCK('xt', out_type='classification', deploy=deploy)
        self.head = OverLoCKClsHead(1000, self.backbone.out_channels)

    def forward(self, x):
        return self.head(self.backbone(x))


@pytest.fixture(scope='module')
def classifier(official_state_dict):
    pytest.importorskip('mmpretrain')
    model = Classifier()
    model.load_state_dict(from_official(official_state_dict('cls_xt')))
    return model.eval()


@pytest.mark.parametrize('case, shape', [('xt_cls_224', (2, 224, 224)), ('xt_cls_192x256', (1, 192, 256))])
@torch.no_grad()
def test_classifier(classifier, case, shape):
    golden, seen = np.load(GOLDEN / f'{case}.npz'), {}
    hooks = [
        module.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
        for name, module in (
            ('base_stage2', classifier.backbone.stage2),
            ('base_stage3', classifier.backbone.stage3),
        )
    ]
    features = classifier.backbone(fill.image(*shape))
    for hook in hooks:
        hook.remove()
    seen.update(overview=features[0], focus=features[1])
    errors = {name: map_error(seen[name], golden, name) for name in seen}
    errors['logits'] = error(classifier.head(features), golden['logits'])
    assert max(errors.values()) <= TOLERANCE, errors


@torch.no_grad()
def test_merged_classifier(official_state_dict):
    pytest.importorskip('mmpretrain')
    golden, image = np.load(GOLDEN / 'xt_cls_224.npz'), fill.image(2, 224, 224)
    model = Classifier()
    model.load_state_dict(from_official(official_state_dict('cls_xt')))
    model.eval().backbone.merge_large_kernels()
    assert error(model(image), golden['logits_reparam']) <= TOLERANCE
    official_form = Classifier(deploy=True).eval()
    official_form.load_state_dict(model.state_dict())
    small = fill.image(1, 64, 64, seed=1)
    assert torch.equal(official_form(small), model(small))

    model.backbone.switch_to_deploy()
    model.head.switch_to_deploy()
    assert not [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert error(model(image), golden['logits_reparam']) <= TOLERANCE

    folded = Classifier(deploy=True).eval()
    folded.load_state_dict(model.state_dict())
    assert torch.equal(folded(small), model(small))


@pytest.mark.parametrize(
    'name, fuse_overview, case, shape',
    [
        ('det_xt', True, 'xt_det_256x320', (1, 256, 320)),
        ('seg_xt', False, 'xt_seg_128', (1, 128, 128)),
    ],
)
@torch.no_grad()
def test_dense_backbone(official_state_dict, name, fuse_overview, case, shape):
    golden = np.load(GOLDEN / f'{case}.npz')
    model = OverLoCK('xt', fuse_overview=fuse_overview).eval()
    model.load_state_dict(official_state_dict(name))
    errors = [map_error(out, golden, f'out{i}') for i, out in enumerate(model(fill.image(*shape)))]
    assert max(errors) <= TOLERANCE, errors
    if name == 'seg_xt':  # once is enough: the picture is the smaller one
        model.switch_to_deploy()
        errors = [map_error(out, golden, f'out{i}') for i, out in enumerate(model(fill.image(*shape)))]
        assert max(errors) <= TOLERANCE, errors


def test_training_step(official_state_dict):
    pytest.importorskip('mmpretrain')
    golden = np.load(GOLDEN / 'xt_train_96.npz')
    model = Classifier()
    model.load_state_dict(from_official(official_state_dict('cls_xt')))
    model.train()
    features = model.backbone(fill.image(4, 96, 96))
    main, aux = model.head(features), model.head.aux_forward(features)
    loss = main.square().mean() + 0.4 * aux.square().mean()
    loss.backward()
    assert error(main, golden['main']) <= TOLERANCE
    assert error(aux, golden['aux']) <= TOLERANCE
    assert error(loss, golden['loss']) <= TOLERANCE

    gradients = {k: p.grad.norm().item() for k, p in model.named_parameters()}
    ours = to_official({**model.state_dict(), **gradients})
    reference = dict(zip(golden['grad_names'].tolist(), golden['grad_norms'].tolist()))
    assert len(reference) == len(gradients)
    # Biases before a batch norm have a true gradient of zero and hold only rounding: measured against the largest.
    floor = 1e-4 * max(reference.values())
    worst = max((abs(ours[k] - v) / max(v, floor), k) for k, v in reference.items())
    assert worst[0] <= 1e-3, worst

    state = to_official(model.state_dict())
    means = torch.tensor([state[str(name)].mean().item() for name in golden['bn_names']])
    assert error(means, golden['bn_means'].astype(np.float32)) <= TOLERANCE


@torch.no_grad()
def test_contmix_block(official_state_dict):
    golden = np.load(GOLDEN / 'contmix_block.npz')
    block = ContMixBlock(64, num_heads=2, kernel_size=13, smk_size=5, mlp_ratio=4, res_scale=True, ls_init_value=1)
    block.load_state_dict(official_state_dict('contmix_block'))
    block.eval()
    for deploy in (False, True):
        if deploy:
            block.switch_to_deploy()
        assert error(block(torch.as_tensor(golden['x'])), golden['y']) <= TOLERANCE
        assert error(block(torch.as_tensor(golden['x_small'])), golden['y_small']) <= TOLERANCE
