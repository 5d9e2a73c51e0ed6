"""One group of the optimizer for equal settings, against mmengine's group for every parameter."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmoverlock import OverLoCK

CONFIGS = Path(__file__).parents[2] / 'configs'
PAIR = ('DefaultOptimWrapperConstructor', 'mmoverlock.GroupedOptimWrapperConstructor')


def optimizers(model, optim_wrapper):
    """mmengine's optimizer and ours."""
    return [build_optim_wrapper(model, dict(optim_wrapper, constructor=name)).optimizer for name in PAIR]


def settings(optimizer, model):
    """What every parameter's group says, by name."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: {k: v for k, v in g.items() if k != 'params'} for g in optimizer.param_groups for p in g['params']
    }


@pytest.mark.parametrize(
    'name, groups',
    [
        ('classification/overlock-xt_8xb256_in1k', 2),
        ('detection/mask-rcnn_overlock-xt_fpn_1x_coco', 2),
        ('segmentation/overlock-xt_upernet_8xb2-160k_ade20k-512x512', 2),
        ('real_data/resnet50_cifar10', 2),
    ],
)
def test_same_settings_in_few_groups(name, groups):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    init_default_scope(cfg.default_scope)
    assert cfg.optim_wrapper.constructor == PAIR[1]
    cfg.optim_wrapper.type = 'OptimWrapper'  # AMP needs a GPU
    model = MODELS.build(cfg.model)
    plain, ours = optimizers(model, cfg.optim_wrapper)
    expected, found = settings(plain, model), settings(ours, model)
    assert expected.keys() == found.keys()
    for parameter, values in expected.items():
        for key in ('lr', 'weight_decay'):
            assert found[parameter][key] == values[key], (parameter, key)
    assert len(plain.param_groups) > 150
    # mmengine's keys lr_mult and decay_mult stand in the groups, too, and tell apart what the optimizer treats alike.
    assert groups <= len(ours.param_groups) <= groups + 1


def test_same_steps(tiny):
    torch.manual_seed(0)
    optim_wrapper = dict(
        optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.5),
        paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={'focus3': dict(lr_mult=0.1)}),
    )
    models = [OverLoCK(tiny).train(), OverLoCK(tiny).train()]
    models[1].load_state_dict(models[0].state_dict())
    steps = [optimizers(model, optim_wrapper)[n] for n, model in enumerate(models)]
    image = torch.rand(2, 3, 64, 64)
    for _ in range(2):
        for model, optimizer in zip(models, steps):
            optimizer.zero_grad()
            sum(m.square().mean() for m in model(image)).backward()
            optimizer.step()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=name)
