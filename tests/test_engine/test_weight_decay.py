"""Who gets weight decay: the configs' rules on our names, against the published rules."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmoverlock.checkpoints import to_official
from mmoverlock.registry import HOOKS, OPTIM_WRAPPER_CONSTRUCTORS

CONFIGS = Path(__file__).parents[2] / 'configs'
DENSE = (
    'detection/mask-rcnn_overlock-xt_fpn_1x_coco',
    'detection/retinanet_overlock-xt_fpn_ms-3x_coco',
    'detection/cascade-mask-rcnn_overlock-xt_fpn_1x_coco',
    'segmentation/overlock-xt_upernet_8xb2-160k_ade20k-512x512',
)


def build(name):
    """The config's model, which is the paper's XT, and its weight decay by parameter name."""
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    init_default_scope(cfg.default_scope)
    cfg.optim_wrapper.type = 'OptimWrapper'  # AMP needs a GPU
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    groups = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    decay = {n: groups[id(p)] for n, p in model.named_parameters()}
    return model, cfg.optim_wrapper.optimizer.weight_decay, decay


@pytest.mark.parametrize('name', DENSE)
def test_dense_decay_follows_the_official_names(name):
    """Published: no decay where the official name contains 'norm', decay everywhere else."""
    model, base, decay = build(name)
    assert base == (0.01 if 'segmentation' in name else 0.05)
    params = dict(model.named_parameters())
    official = to_official(params)
    names = {id(p): official_name for official_name, p in official.items()}
    assert len(names) == len(params)
    renamed = 0
    for our_name, param in params.items():
        official_name = names[id(param)]
        expected = 0.0 if 'norm' in official_name else base
        assert decay[our_name] == expected, (our_name, official_name)
        renamed += our_name != official_name
    assert renamed > 400
    exempt = {re.sub(r'\d+\.\d+', 'N', n).rsplit('.', 1)[0] for n in decay if decay[n] == 0}
    outputs = (1, 2, 3) if 'retinanet' in name else (0, 1, 2, 3)
    assert exempt == {
        'backbone.focusN.norm1',
        'backbone.focusN.norm2',
        *(f'backbone.norm{i}' for i in outputs),
        *(['backbone.overview_norm'] if 'detection' in name else []),
    }


def test_imagenet_decay():
    """timm's rule: none on biases and other parameters of at most one dimension, all else decayed."""
    model, base, decay = build('classification/overlock-xt_8xb256_in1k')
    assert base == 0.05
    for name, param in model.named_parameters():
        assert decay[name] == (0.0 if param.ndim <= 1 or name.endswith('.bias') else base), name
    free = [n for n in decay if decay[n] == 0]
    assert len(free) > 300
    assert sum(n.endswith(('rpb1', 'rpb2')) for n in decay) == 2 * 8  # two a focus block, 3-D
    assert not [n for n in free if n.endswith(('rpb1', 'rpb2', 'gamma', 'beta', 'layer_scale1.weight'))]


def test_registry_looks_here():
    """A broken package would only show as a name that is not found."""
    for registry in (HOOKS, OPTIM_WRAPPER_CONSTRUCTORS):
        registry.import_from_location()
        assert 'mmoverlock.engine' in registry._locations
