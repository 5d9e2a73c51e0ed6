"""tools/analysis/feeding.py, and the faster crop that it speaks for."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('mmpretrain')
sys.path.insert(0, str(Path(__file__).resolve().parent / 'test_tools'))
from mmengine.registry import TRANSFORMS, init_default_scope  # noqa: E402
from tiny_configs import load_tool  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
CONFIG = str(CONFIGS / 'classification/overlock-xt_8xb256_in1k.py')


def photo(seed, height, width):
    """Smooth colours with edges and some noise."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width] / 100
    waves = [np.sin(6 * x * (i + 1) + rng.rand()) * np.cos(5 * y + i) + (x + y > 2) for i in range(3)]
    return np.clip(np.stack(waves, -1) * 80 + 110 + rng.randn(height, width, 3) * 8, 0, 255).astype(np.uint8)


@pytest.fixture(scope='module')
def tool():
    return load_tool('analysis/feeding.py')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    for i in range(3):
        (folder / 'some').mkdir(exist_ok=True)
        Image.fromarray(photo(i, 150, 200)).save(folder / 'some' / f'{i}.jpg', quality=90)
    return folder


def test_steps_decoders_and_loaders_are_timed(tool, pictures, capsys):
    tool.main(
        [CONFIG, '--images', str(pictures), '--number', '3', '--rounds', '1', '--workers', '1', '--target', '100']
    )
    steps, sentence, decoders, loaders = capsys.readouterr().out.strip().split('\n\n')
    rows = [[cell.strip() for cell in row.strip('|').split('|')] for row in steps.splitlines()[2:]]
    names = ['LoadImageFromFile', 'RandomResizedCrop', 'RandomFlip', 'RandAugment', 'RandAugment']
    assert [row[0] for row in rows][:5] == names and rows[-1][0] == 'all'
    assert sum(float(row[1]) for row in rows[:-1]) == pytest.approx(float(rows[-1][1]), abs=0.05)
    rate, needed = float(sentence.split()[0]), int(sentence.split()[-2])
    assert rate == pytest.approx(1e3 / float(rows[-1][1]), rel=0.02)
    assert needed == pytest.approx(100 / rate, abs=1.01)
    found = {row.split('|')[1].strip(): int(row.split('|')[3]) for row in decoders.splitlines()[2:]}
    assert {'cv2', 'pillow'} <= set(found)
    assert max(found.values()) <= 2  # all are libjpeg(-turbo): the same, or off by rounding in another release
    assert float(loaders.splitlines()[-1].split('|')[2]) > 0


def test_clear_errors(tool, tmp_path, capsys):
    for argv, words in (
        (['absent.py'], 'config not found'),
        ([CONFIG, '--images', str(tmp_path)], 'no JPEG pictures there'),
        (
            [str(CONFIGS / 'segmentation/overlock-xt_upernet_8xb2-160k_ade20k-512x512.py'), '--images', 'x'],
            'annotations',
        ),
        ([str(CONFIGS / '_base_/models/overlock_cls.py')], 'no train_dataloader'),
    ):
        with pytest.raises(SystemExit) as stop:
            tool.main(argv)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.parse_args(['x.py', '--rounds', '0'])


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_crop_resized_by_torch_has_the_pixels_of_pillow(interpolation):
    init_default_scope('mmpretrain')
    settings = dict(scale=(224, 192), interpolation=interpolation)
    ours = TRANSFORMS.build(dict(type='mmoverlock.RandomResizedCrop', **settings))
    theirs = TRANSFORMS.build(dict(type='RandomResizedCrop', backend='pillow', **settings))
    differences = []
    for seed in range(12):
        image = photo(seed, 375, 500)
        results = []
        for transform in (ours, theirs):
            np.random.seed(seed)
            results.append(transform(dict(img=image)))
        a, b = results
        assert a['img'].shape == a['img_shape'] == (224, 192, 3) and a['img'].dtype == np.uint8
        assert a['img'].flags['C_CONTIGUOUS']
        differences.append(np.abs(a['img'].astype(int) - b['img']).ravel())
    differences = np.concatenate(differences)
    assert differences.max() <= 2 and (differences > 0).mean() < 0.01


def test_switch_in_the_config_changes_the_crop_alone():
    from mmengine.config import Config

    plain, fast = (
        Config.fromfile(CONFIGS / '_base_/datasets' / f'imagenet_bs256{name}.py') for name in ('', '_torch-resize')
    )
    a, b = (list(cfg.train_dataloader.dataset.pipeline) for cfg in (plain, fast))
    kinds = [[branch[0].type for branch in pipeline.pop(1).transforms] for pipeline in (a, b)]
    assert kinds == [['RandomResizedCrop'] * 2, ['mmoverlock.RandomResizedCrop'] * 2] and a == b
    assert plain.val_dataloader == fast.val_dataloader


def test_what_torch_does_not_resize_is_refused():
    from mmoverlock.engine.transforms import RandomResizedCrop

    for settings in (dict(interpolation='lanczos'), dict(backend='cv2')):
        with pytest.raises(ValueError, match='takes no backend'):
            RandomResizedCrop(224, **settings)
