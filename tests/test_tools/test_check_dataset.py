import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_configs import load_tool, write_config

from mmoverlock import datacheck


@pytest.fixture(scope='module')
def tool():
    return load_tool('data/check_dataset.py')


@pytest.fixture
def copies(roots, tmp_path):
    """Data sets that a test may damage, and their configs: copies(task) -> (root, config)."""

    def copy(task):
        root = tmp_path / f'data_{task}'
        shutil.copytree(roots[task], root)
        return root, write_config(tmp_path / f'{task}.py', task, root)

    return copy


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_complete_data(tool, copies, task, capsys):
    _, config = copies(task)
    assert tool.main([config]) == 0
    out = capsys.readouterr().out
    assert out.strip().endswith('all there')
    assert 'decoded' in out and 'PROBLEM' not in out


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def mask(path, value):
    Image.fromarray(np.full((64, 64), value, dtype=np.uint8)).save(path)


ANNOTATIONS = 'annotations/instances_train2017.json'


@pytest.mark.parametrize(
    'task, damage, word',
    [
        ('cls', lambda root: remove(root / 'val'), 'val does not exist'),
        ('cls', lambda root: [remove(f) for f in (root / 'train/cat').iterdir()], 'no image in cat'),
        ('cls', lambda root: [remove(d) for d in (root / 'train').iterdir()], 'no class folders'),
        ('cls', lambda root: (root / 'val/cat/cat0.png').write_bytes(b'none'), 'cannot decode'),
        ('det', lambda root: remove(root / ANNOTATIONS), 'does not exist'),
        ('det', lambda root: (root / ANNOTATIONS).write_text('[]'), 'no COCO annotation file'),
        ('det', lambda root: remove(root / 'train2017/2.jpg'), 'listed but not in'),
        (
            'det',
            lambda root: edit(root / ANNOTATIONS, lambda d: d['categories'][0].update(name='x')),
            'does not have: box',
        ),
        (
            'det',
            lambda root: edit(root / ANNOTATIONS, lambda d: d['annotations'][0].pop('segmentation')),
            'without a mask',
        ),
        ('det', lambda root: edit(root / ANNOTATIONS, lambda d: d['annotations'][0].update(image_id=99)), 'not listed'),
        ('det', lambda root: edit(root / ANNOTATIONS, lambda d: d['annotations'][0].update(id=2)), 'used twice'),
        ('det', lambda root: edit(root / ANNOTATIONS, lambda d: d['images'][0].update(width=65)), 'is 64x64'),
        ('seg', lambda root: remove(root / 'annotations/training/1.png'), 'without a label map'),
        ('seg', lambda root: mask(root / 'annotations/training/1.png', 7), 'beyond the 2 classes'),
        ('seg', lambda root: [mask(f, 255) for f in (root / 'annotations/training').iterdir()], 'nothing but "ignore"'),
        (
            'seg',
            lambda root: Image.new('RGB', (64, 64)).save(root / 'annotations/training/1.png'),
            'not one label per pixel',
        ),
        ('seg', lambda root: Image.new('L', (32, 32)).save(root / 'annotations/training/1.png'), 'map (32, 32)'),
    ],
)
def test_damage_is_named(tool, copies, task, damage, word, capsys):
    root, config = copies(task)
    damage(root)
    assert tool.main([config]) == 1
    out = capsys.readouterr().out
    assert word in ' '.join(line for line in out.splitlines() if line.startswith('PROBLEM'))
    assert 'expected layout: ' in out


def test_list_file(tool, copies, capsys):
    root, config = copies('cls')
    (root / 'train.txt').write_text('cat/cat0.png 0\ncat/gone.png 0\ndog/dog0.png 9\n')
    options = ['train_dataloader.dataset.ann_file=train.txt', 'train_dataloader.dataset.metainfo.classes="(cat,dog)"']
    assert tool.main([config, '--cfg-options', *options]) == 1
    out = capsys.readouterr().out
    assert 'listed but not there' in out and 'labels go up to 9' in out


@pytest.mark.parametrize('kind, task', [('imagenet', 'cls'), ('coco', 'det'), ('ade20k', 'seg')])
def test_published_size_is_expected(tool, roots, kind, task, capsys):
    assert tool.main([kind, str(roots[task])]) == 1
    number = dict(imagenet='1281167', coco='118287', ade20k='20210')[kind]
    assert f'the published data set has {number}' in capsys.readouterr().out


@pytest.mark.parametrize('kind', datacheck.DEFAULT_ROOTS)
def test_missing_root(tool, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tool.main([kind]) == 1
    out = capsys.readouterr().out
    assert f'data root {datacheck.DEFAULT_ROOTS[kind]} does not exist' in out


@pytest.mark.parametrize('args', [['nope'], ['nope', 'folder'], ['none.py']])
def test_wrong_question(tool, args, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(args)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith('error: ')


def test_wrapped_data_sets_are_opened():
    from mmengine.config import Config

    leaf = dict(type='CustomDataset', data_root='a', data_prefix='train')
    other = dict(leaf, data_root='b')
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            train_dataloader=dict(
                dataset=dict(type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[leaf, other, leaf]))
            ),
        )
    )
    assert [s.images for s in datacheck.from_config(cfg)] == ['a/train', 'b/train']


def test_what_cannot_be_looked_at_is_left_alone():
    from mmengine.config import Config

    remote = dict(type='CustomDataset', data_root='s3://bucket/data', data_prefix='train')
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            train_dataloader=dict(dataset=remote),
            val_dataloader=dict(dataset=dict(type='CIFAR10', data_root='new')),
        )
    )
    splits = datacheck.from_config(cfg)
    assert len(splits) == 1 and splits[0].missing() == []


def test_ade20k_counts_classes_from_one(roots):
    from mmengine.config import Config

    cfg = Config(
        dict(
            default_scope='mmseg',
            train_dataloader=dict(
                dataset=dict(
                    type='ADE20KDataset',
                    data_root=str(roots['seg']),
                    data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
                )
            ),
        )
    )
    (split,) = datacheck.from_config(cfg)
    assert split.reduce_zero_label and len(split.classes) == 150
