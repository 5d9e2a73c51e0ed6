"""The comparison on real pictures: only the backbone differs within a task."""

from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).parents[2] / 'configs/real_data'
BACKBONES = ('overlock-xt', 'resnet50', 'convnext-tiny')
TASKS = dict(cifar10='{}_cifar10', bccd='retinanet_{}_fpn_bccd', camvid='{}_upernet_camvid')


def load(task, backbone):
    return Config.fromfile(ROOT / f'{TASKS[task].format(backbone)}.py')


def test_all_are_there():
    names = {p.stem for p in ROOT.glob('*.py')}
    assert names == {name.format(b) for name in TASKS.values() for b in BACKBONES}


@pytest.mark.parametrize('task', TASKS)
def test_same_recipe_for_every_backbone(task):
    configs = [load(task, b).to_dict() for b in BACKBONES]
    for config in configs:
        # What a config on top adds as names of its own are no settings of the run.
        for key in ('model', 'loss', 'cls_channels', 'dense_channels', 'pretrained'):
            config.pop(key, None)
    assert configs[0] == configs[1] == configs[2]


@pytest.mark.parametrize('task', TASKS)
def test_decay_and_guard_are_those_of_the_main_recipe(task):
    main = Config.fromfile(ROOT.parent / '_base_/schedules/imagenet_bs2048_310e.py')
    config = load(task, 'overlock-xt')
    assert config.optim_wrapper.paramwise_cfg == main.optim_wrapper.paramwise_cfg
    assert config.default_hooks.non_finite_guard == main.default_hooks.non_finite_guard


def find(node, key):
    """Every value of a key in nested dicts and lists."""
    if isinstance(node, dict):
        for k, v in node.items():
            if k == key:
                yield v
            yield from find(v, key)
    elif isinstance(node, (list, tuple)):
        for v in node:
            yield from find(v, key)


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('backbone', BACKBONES)
def test_from_scratch_and_trained_whole(task, backbone):
    config = load(task, backbone)
    assert not config.load_from
    assert not list(find(config.model.to_dict(), 'checkpoint'))
    assert not config.model.get('pretrained')
    # The same number of classes, and the same neck and heads, but for the channels that come in.
    assert set(find(config.model.to_dict(), 'num_classes')) == {dict(cifar10=10, bccd=3, camvid=11)[task]}
    settings = config.model.backbone
    assert settings.get('frozen_stages', -1) == -1 and not settings.get('norm_eval')
    assert not settings.get('drop_path_rate')


@pytest.mark.parametrize('task', ['bccd', 'camvid'])
def test_same_heads(task):
    heads = []
    for backbone in BACKBONES:
        model = load(task, backbone).model.to_dict()
        model.pop('backbone')
        for part in model.values():
            if isinstance(part, dict):
                # Where the first map of the pyramid is at stride 4 or 8 is undone by start_level.
                part.pop('start_level', None)
                if part.get('type') in ('FPN', 'UPerHead', 'FCNHead'):
                    part.pop('in_channels')
        heads.append(model)
    assert heads[0] == heads[1] == heads[2]
