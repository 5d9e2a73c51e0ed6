"""The demo's data set: drawn the same every time, right in all three layouts, whole or absent."""

import json
from pathlib import Path

import cv2
import make_scenes
import numpy as np
import pytest
from make_scenes import CLASSES, SceneParams

PARAMS = SceneParams(cls_train=14, cls_val=6, dense_train=6, dense_val=4)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('demo') / 'data'
    stamp, there = make_scenes.make_scenes(root, PARAMS, workers=1)
    assert not there and stamp['params']['cls_train'] == 14
    return root


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}


def read_coco(root, split):
    return json.loads((root / f'coco/annotations/instances_{split}2017.json').read_text())


def test_same_seed_same_files(root, tmp_path):
    make_scenes.make_scenes(tmp_path / 'again', PARAMS, workers=2)
    assert contents(tmp_path / 'again') == contents(root)


def test_another_seed_another_picture(root, tmp_path):
    make_scenes.make_scenes(tmp_path / 'other', SceneParams(seed=1, cls_train=6, cls_val=6, dense_train=1, dense_val=1))
    name = 'coco/train2017/000000.jpg'
    assert (tmp_path / 'other' / name).read_bytes() != (root / name).read_bytes()


def test_more_pictures_leave_the_first_ones(root, tmp_path):
    make_scenes.make_scenes(tmp_path / 'more', SceneParams(cls_train=20, cls_val=6, dense_train=9, dense_val=4))
    more, few = contents(tmp_path / 'more'), contents(root)
    pictures = [name for name in few if name.endswith(('.jpg', '.png'))]
    assert len(pictures) == 14 + 6 + 3 * (6 + 4)
    assert all(more[name] == few[name] for name in pictures)


def test_held_out_pictures_are_others(root):
    for pattern in ('imagenet/{}/*/*.jpg', 'coco/{}2017/*.jpg'):
        train, val = ({p.read_bytes() for p in root.glob(pattern.format(s))} for s in ('train', 'val'))
        assert train and val and not train & val


def test_class_folders(root):
    folders = sorted(p.name for p in (root / 'imagenet/train').iterdir())
    # Sorted, because mmpretrain numbers class folders in the order of their names.
    assert tuple(folders) == CLASSES == tuple(sorted(CLASSES))
    assert [len(list((root / 'imagenet/train' / c).iterdir())) for c in CLASSES] == [3, 3, 2, 2, 2, 2]


@pytest.mark.parametrize('split, ade', [('train', 'training'), ('val', 'validation')])
def test_coco_and_ade_say_the_same(root, split, ade):
    mask_tools = pytest.importorskip('pycocotools.mask')
    coco = read_coco(root, split)
    assert [c['name'] for c in coco['categories']] == list(CLASSES)
    assert len({a['id'] for a in coco['annotations']}) == len(coco['annotations']) > 0
    for image in coco['images']:
        stem = Path(image['file_name']).stem
        picture = root / f'coco/{split}2017' / image['file_name']
        assert picture.read_bytes() == (root / f'ade/images/{ade}/{stem}.jpg').read_bytes()
        labels = cv2.imread(str(root / f'ade/annotations/{ade}/{stem}.png'), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (image['height'], image['width']) == cv2.imread(str(picture)).shape[:2]
        expected = np.ones_like(labels)  # the background
        shapes = [a for a in coco['annotations'] if a['image_id'] == image['id']]
        for a in shapes:
            encoded = mask_tools.frPyObjects(a['segmentation'], image['height'], image['width'])
            mask = mask_tools.decode(encoded).astype(bool)
            assert (expected[mask] == 1).all(), 'two shapes claim a pixel'
            expected[mask] = a['category_id'] + 1
            assert a['area'] == mask.sum() > 0
            assert a['bbox'] == mask_tools.toBbox(encoded).tolist()
        assert 1 <= len(shapes) <= 5
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize('pattern', ['0', '1', '01', '10', '0110', '1001', '0000', '1111'])
def test_run_lengths(pattern):
    mask_tools = pytest.importorskip('pycocotools.mask')
    mask = np.array([int(c) for c in pattern], bool).reshape(-1, 2 if len(pattern) == 4 else 1)
    code = make_scenes.run_lengths(mask)
    assert sum(code['counts']) == mask.size
    decoded = mask_tools.decode(mask_tools.frPyObjects(code, *mask.shape))
    np.testing.assert_array_equal(decoded, mask)


@pytest.mark.parametrize('label', range(len(CLASSES)))
def test_the_dominant_shape_is_there(label, monkeypatch):
    seen = []
    draw = make_scenes._draw
    monkeypatch.setattr(make_scenes, '_draw', lambda *args: seen.append(draw(*args)) or seen[-1])
    for i in range(20):
        picture = make_scenes.draw_single(label, 64, np.random.default_rng(i))
        *others, last = seen.pop()[1]
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert last.label == label
        assert all(last.mask.sum() > 1.5 * other.mask.sum() for other in others)


def test_scenes_hide_no_shape():
    for i in range(30):
        _, shapes = make_scenes.draw_scene(128, np.random.default_rng(i))
        assert all(s.mask.sum() > 60 for s in shapes)


def test_finished_data_is_reused(root):
    before = {p: p.stat().st_mtime_ns for p in root.rglob('*')}
    stamp, there = make_scenes.make_scenes(root, PARAMS)
    assert there and stamp['instances']['val'] == len(read_coco(root, 'val')['annotations'])
    assert {p: p.stat().st_mtime_ns for p in root.rglob('*')} == before


def test_other_parameters_are_made_anew(tmp_path):
    small = SceneParams(cls_train=6, cls_val=6, dense_train=1, dense_val=1)
    make_scenes.make_scenes(tmp_path / 'data', small, workers=1)
    _, there = make_scenes.make_scenes(tmp_path / 'data', SceneParams(7, 6, 6, 2, 1), workers=1)
    assert not there
    assert len(read_coco(tmp_path / 'data', 'train')['images']) == 2


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError('disk full')

    monkeypatch.setattr(make_scenes, '_write_split', fail)
    with pytest.raises(OSError, match='disk full'):
        make_scenes.make_scenes(tmp_path / 'data', PARAMS)
    assert not list(tmp_path.iterdir())


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / 'thesis.tex').write_text('years of work')
    with pytest.raises(FileExistsError, match='not a data set of this generator'):
        make_scenes.make_scenes(tmp_path, PARAMS)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


@pytest.mark.parametrize('wrong', [dict(cls_train=5), dict(cls_val=0), dict(dense_val=0), dict(dense_size=16)])
def test_impossible_parameters(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SceneParams(**wrong)


def test_command_line(tmp_path, capsys):
    options = '--cls-train 6 --cls-val 6 --dense-train 1 --dense-val 1 --workers 1'.split()
    make_scenes.main([str(tmp_path / 'data'), *options])
    assert 'written' in capsys.readouterr().out
    make_scenes.main([str(tmp_path / 'data'), *options])
    assert 'already there' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='make_scenes: cls_train must be at least 6'):
        make_scenes.main([str(tmp_path / 'no'), '--cls-train', '1'])
    assert not (tmp_path / 'no').exists()
