"""Layer-wise learning rate decay: the rates by layer, the rules of weight decay beside it, in all three tasks."""

from pathlib import Path

import pytest
import torch
from common import TINY
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmoverlock import OverLoCK

CONFIGS = Path(__file__).parents[2] / 'configs'
NAME = 'mmoverlock.LayerDecayOptimWrapperConstructor'
BLOCKS = sum(TINY['depths']) + sum(TINY['focus_depths'])


def optimizer_of(model, lr=1.0, weight_decay=0.5, **paramwise_cfg):
    cfg = dict(
        constructor=NAME,
        optimizer=dict(type='AdamW', lr=lr, weight_decay=weight_decay),
        paramwise_cfg=paramwise_cfg,
    )
    return build_optim_wrapper(model, cfg).optimizer


def settings(model, optimizer, key='lr'):
    groups = {id(p): g for g in optimizer.param_groups for p in g['params']}
    return {n: groups[id(p)][key] for n, p in model.named_parameters() if p.requires_grad}


class Wrapped(nn.Module):
    """A backbone deep in a model, beside other parts."""

    def __init__(self):
        super().__init__()
        self.student = nn.Module()
        self.student.backbone = OverLoCK(TINY)
        self.neck = nn.Conv2d(4, 4, 1)


def test_rates_by_hand():
    model = Wrapped()
    optimizer = optimizer_of(model, lr=2.0, decay_rate=0.5)
    rates = settings(model, optimizer)
    own = {n[len('student.backbone.') :]: r for n, r in rates.items() if n.startswith('student.')}
    assert rates['neck.weight'] == own['norm3.weight'] == 2.0
    # stem, one block a stage for 4 stages, focus3 has two, focus4 one: 0, 1-4, 5-6, 7 of 9 layers.
    assert own['stem.0.conv.weight'] == 2.0 * 0.5**8
    assert own['stage1.0.norm.weight'] == 2.0 * 0.5**7
    assert own['down4.conv.weight'] == own['stage4.0.ffn.fc1.weight'] == 2.0 * 0.5**4
    assert own['focus3.1.mixer.rpb1'] == 2.0 * 0.5**2
    assert own['focus4.0.mixer.rpb2'] == own['focus_down.x.conv.weight'] == 2.0 * 0.5
    assert set(rates.values()) == {2.0 * 0.5**i for i in range(BLOCKS + 2)}


def test_settings_that_agree_share_a_group():
    model = Wrapped()
    assert len(optimizer_of(model, decay_rate=0.5).param_groups) == BLOCKS + 2
    groups = optimizer_of(model, decay_rate=0.5, norm_decay_mult=0.0).param_groups
    assert len(groups) <= 2 * (BLOCKS + 2)
    assert all(g['lr_scale'] == g['lr'] for g in groups)
    assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))


def test_all_rules_of_mmengine_hold():
    """Weight decay as without the constructor, rates as without it times the layer's scale."""
    model = Wrapped()
    model.neck.requires_grad_(False)
    rules = dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.25,
        flat_decay_mult=0.0,
        dwconv_decay_mult=0.75,
        custom_keys={'rpb': dict(decay_mult=2.0), 'stage2': dict(lr_mult=3.0), 'neck': dict(lr_mult=9.0)},
    )
    ours = optimizer_of(model, decay_rate=0.5, **rules)
    cfg = dict(optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.5), paramwise_cfg=rules)
    default = build_optim_wrapper(model, cfg).optimizer
    assert settings(model, ours, 'weight_decay') == settings(model, default, 'weight_decay')
    expected, scales = settings(model, default), settings(model, ours, 'lr_scale')
    assert settings(model, ours) == {n: r * scales[n] for n, r in expected.items()}
    assert len(set(settings(model, ours, 'weight_decay').values())) == 5
    assert scales['student.backbone.stage2.0.norm.weight'] == 0.5**6


@pytest.mark.parametrize('key', ['decay_rate', 'layer_decay_rate'])
def test_both_names_of_the_rate(key):
    model = Wrapped()
    assert settings(model, optimizer_of(model, **{key: 0.9}))['student.backbone.stem.0.conv.weight'] == 0.9**8


@pytest.mark.parametrize('name', [
    'classification/overlock-xt_8xb256_in1k',
    'detection/mask-rcnn_overlock-xt_fpn_1x_coco',
    'segmentation/overlock-xt_upernet_8xb2-160k_ade20k-512x512',
])  # fmt: skip
def test_in_the_configs_of_every_task(name):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    init_default_scope(cfg.default_scope)
    cfg.optim_wrapper.type = 'OptimWrapper'  # AMP needs a GPU
    cfg.optim_wrapper.constructor = NAME
    cfg.optim_wrapper.paramwise_cfg.decay_rate = 0.8
    before = cfg.optim_wrapper.to_dict()
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert cfg.optim_wrapper.to_dict() == before
    lr, layers = cfg.optim_wrapper.optimizer.lr, sum((2, 2, 3, 2, 6, 2)) + 2
    for param, rate in settings(model, optimizer).items():
        if param.startswith('backbone.'):
            depth, total = model.backbone.get_layer_depth(param, 'backbone.')
            assert total == layers
            assert rate == pytest.approx(lr * 0.8 ** (layers - 1 - depth))
        else:
            assert rate == lr
    assert min(settings(model, optimizer).values()) == pytest.approx(lr * 0.8 ** (layers - 1))
    del cfg.optim_wrapper.constructor
    cfg.optim_wrapper.paramwise_cfg.pop('decay_rate')
    default = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert settings(model, optimizer, 'weight_decay') == settings(model, default, 'weight_decay')


def test_a_backbone_of_mmpretrain():
    from mmpretrain.models import ConvNeXt

    model = nn.Module()
    model.backbone = ConvNeXt('atto')
    rates = settings(model, optimizer_of(model, decay_rate=0.5))
    assert rates['backbone.downsample_layers.0.0.weight'] < rates['backbone.stages.3.0.gamma'] <= 1


@pytest.mark.parametrize('cfg, message', [
    (dict(), 'needs one rate'),
    (dict(decay_rate=0.9, layer_decay_rate=0.9), 'needs one rate'),
    (dict(decay_rate=0.0), r'must be in \(0, 1\], got 0.0'),
    (dict(decay_rate=1.5), r'must be in \(0, 1\], got 1.5'),
])  # fmt: skip
def test_errors(cfg, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(Wrapped(), **cfg)


def test_a_model_without_layers():
    with pytest.raises(ValueError, match='no part of Conv2d has get_layer_depth'):
        optimizer_of(nn.Conv2d(1, 1, 1), decay_rate=0.9)


def test_a_step_and_a_schedule():
    """Schedules scale every group; the step moves early layers less."""
    from mmengine.optim import PolyLR

    model = Wrapped()
    optimizer = optimizer_of(model, lr=1e-3, decay_rate=0.5)
    before = settings(model, optimizer)
    scheduler = PolyLR(optimizer, power=1.0, eta_min=0.0, begin=0, end=4, by_epoch=False)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    scheduler.step()
    after = settings(model, optimizer)
    assert len({round(after[n] / before[n], 6) for n in after}) == 1 and after['neck.weight'] < 1e-3
