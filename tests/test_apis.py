"""Inference in Python: what it reads, what it gives, and whose names."""

import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from random_models import random_model, smooth_pictures, write_video

from mmoverlock import checkpoints
from mmoverlock.apis import Inferencer, expand, find_config, inferencer, list_configs
from mmoverlock.apis.configs import official_weights
from mmoverlock.checkpoints import to_official
from mmoverlock.cli import UserError

pytest.importorskip('mmcv._ext')
TASKS = dict(cls='mmpretrain', det='mmdet', seg='mmseg')
SIZES = [(64, 64), (80, 64), (64, 64)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('inference')


@pytest.fixture(scope='module')
def files(folder):
    """Config and checkpoint of a task, made once each."""
    made = {}

    def get(task):
        pytest.importorskip(TASKS[task])
        if task not in made:
            made[task] = random_model(folder, task)
        return made[task]

    return get


@pytest.fixture(scope='module')
def infer(files):
    """The inferencer of a task, made once each."""
    made = {}

    def get(task):
        if task not in made:
            made[task] = Inferencer(*files(task), device='cpu', score_thr=0.05)
        return made[task]

    return get


@pytest.fixture(scope='module')
def pictures(folder):
    """Three picture files of two sizes."""
    (folder / 'pictures').mkdir()
    for i, picture in enumerate(smooth_pictures(SIZES)):
        cv2.imwrite(str(folder / 'pictures' / f'{i}.png'), picture)
    return [str(folder / 'pictures' / f'{i}.png') for i in range(3)]


def same(a, b, exact=False):
    """Two results agree: labels exactly, numbers but for rounding."""
    assert a.keys() == b.keys()
    for key in a.keys() - {'input', 'masks', 'visualization'}:
        if key in ('scores', 'bboxes'):
            np.testing.assert_allclose(a[key], b[key], rtol=0 if exact else 1e-4, atol=1e-4)
        elif key == 'sem_seg':
            assert a[key].dtype == b[key].dtype and (a[key] != b[key]).mean() < 1e-3
        elif key == 'shares':
            assert a[key] == pytest.approx(b[key], abs=1e-3)
        else:
            assert a[key] == b[key], key


@pytest.mark.parametrize('task', TASKS)
def test_as_the_packages_own_inferencer(infer, pictures, task):
    """The same file through mmpretrain's, mmdet's and mmseg's own __call__."""
    ours, theirs = infer(task), infer(task).inferencer
    result = ours(pictures[1])[0]
    assert (result['input'], result['height'], result['width']) == (pictures[1], 80, 64)
    with ours._quietly():
        if task == 'cls':
            expected = theirs(pictures[1])[0]
            assert result['labels'][0] == expected['pred_label'] and result['classes'][0] == expected['pred_class']
            np.testing.assert_allclose(result['scores'], np.sort(expected['pred_scores'])[::-1], rtol=1e-5)
            assert result['scores'][0] > result['scores'][1]
        elif task == 'det':
            expected = theirs(pictures[1])['predictions'][0]
            assert len(result['bboxes']) == len(expected['bboxes']) == 4
            assert {k: result[k] for k in expected} == expected
            assert result['classes'] == ['box'] * 4
        else:
            expected = theirs(pictures[1])['predictions']
            assert (result['sem_seg'] == expected).all() and result['sem_seg'].dtype == np.uint8
            assert result['shares']['left'] == pytest.approx((expected == 0).mean())
            assert sum(result['shares'].values()) == pytest.approx(1)


@pytest.mark.parametrize('task', TASKS)
def test_results_depend_neither_on_the_batch_nor_on_how_a_picture_comes(infer, pictures, task):
    arrays = [cv2.imread(p) for p in pictures]
    pillow = [Image.open(p) for p in pictures]
    one_by_one = infer(task)(pictures, return_vis=True)
    for others in (infer(task)(pictures, batch_size=3, return_vis=True), infer(task)(arrays + pillow, batch_size=4)):
        for i, other in enumerate(others):
            same(dict(one_by_one[i % 3], visualization=0), dict(other, visualization=0))
    for picture, result in zip(arrays, one_by_one):
        drawn = result['visualization']
        assert drawn.shape == picture.shape and drawn.dtype == np.uint8
        assert (drawn != picture[..., ::-1]).any()
    # What is not drawn on stays as it is, with red in the first channel.
    if task != 'seg':
        unchanged = (one_by_one[0]['visualization'] == arrays[0][..., ::-1]).all(-1).mean()
        assert unchanged > 0.05


def test_threshold_and_number_of_classes(infer, pictures, monkeypatch):
    scores = [s for r in infer('det')(pictures) for s in r['scores']]
    middle = float(np.median(scores))
    monkeypatch.setattr(infer('det'), 'score_thr', middle)
    kept = [s for r in infer('det')(pictures) for s in r['scores']]
    assert 0 < len(kept) < len(scores) and kept == [s for s in scores if s >= middle]
    labels = infer('cls')(pictures[0])[0]['labels']
    monkeypatch.setattr(infer('cls'), 'topk', 1)
    assert infer('cls')(pictures[0])[0]['labels'] == labels[:1] and len(labels) == 2


def test_several_models_take_turns(infer, pictures):
    """mmengine keeps one default scope for the process: whoever came last must not decide."""
    first = {task: infer(task)(pictures[0])[0] for task in TASKS}
    for task in reversed(TASKS):
        same(first[task], infer(task)(pictures[0])[0], exact=True)


def test_names_come_from_the_checkpoint_then_the_data_set_then_are_numbers(tmp_path, files, infer):
    pytest.importorskip('mmseg')
    assert infer('cls').classes == ('cat', 'dog')  # CustomDataset would read them from its folders
    assert infer('seg').classes == ('left', 'right')
    assert infer('det').classes == ('box',)
    config, checkpoint = files('seg')
    content = torch.load(checkpoint, weights_only=True)
    for meta, expected in (
        (dict(CLASSES=('sky', 'sea'), PALETTE=[[1, 2, 3], [4, 5, 6]]), ('sky', 'sea')),
        (dict(dataset_meta=dict(classes=('one', 'of', 'three'))), ('left', 'right')),
    ):
        torch.save(dict(content, meta=meta), tmp_path / 'a.pth')
        assert Inferencer(config, str(tmp_path / 'a.pth'), device='cpu').classes == expected
    nameless = {'test_dataloader.dataset.metainfo': dict(classes=('a', 'b', 'c'))}
    assert Inferencer(config, checkpoint, device='cpu', cfg_options=nameless).classes == ('0', '1')


def test_official_file_as_it_is(tmp_path, files, infer, pictures):
    config, checkpoint = files('cls')
    torch.save(to_official(torch.load(checkpoint, weights_only=True)['state_dict']), tmp_path / 'official.pth')
    official = Inferencer(config, str(tmp_path / 'official.pth'), device='cpu')(pictures[0])[0]
    assert official['classes'] == [str(i) for i in official['labels']]  # such a file holds no names
    same(dict(official, classes=0), dict(infer('cls')(pictures[0])[0], classes=0))


def test_half_precision(infer, pictures, monkeypatch):
    expected = infer('cls')(pictures[0])[0]['scores']
    monkeypatch.setattr(infer('cls'), 'amp', True)
    scores = infer('cls')(pictures[0])[0]['scores']
    assert scores != expected
    np.testing.assert_allclose(scores, expected, atol=0.05)


# -- inputs


def names(inputs):
    return [source.name for source in expand(inputs)]


def test_folders_and_globs(tmp_path):
    for name in ('b.jpg', 'a.PNG', 'deep/er/a.jpg', 'clip.mp4', 'notes.txt', '[1].jpg'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert names(str(tmp_path)) == ['[1]', 'a', 'b', 'clip', 'deep/er/a']
    assert [s.is_video for s in expand(tmp_path)] == [False, False, False, True, False]
    assert names(f'{tmp_path}/*.jpg') == ['[1]', 'b']
    assert names(f'{tmp_path}/**/a.*') == ['a', 'deep/er/a']
    assert names(str(tmp_path / '[1].jpg')) == ['[1]']  # a file, not a pattern
    assert names([tmp_path / 'notes.txt', 'https://example.org/x/photo.jpg?w=1', np.zeros((2, 2), np.uint8)]) == [
        'notes',
        'photo',
        '000002',
    ]
    assert names([f'{tmp_path}/b.jpg', f'{tmp_path}/b.jpg', f'{tmp_path}/*/*/a.jpg', f'{tmp_path}/a.PNG']) == [
        'b',
        'b-2',
        'deep/er/a',
        'a',
    ]


@pytest.mark.parametrize(
    'inputs, word',
    [
        ('nowhere.jpg', 'input not found: nowhere.jpg'),
        ('nowhere/*.jpg', 'no picture'),
        ('http://example.org/a.jpg', 'only https'),
        ('file:///etc/hostname', 'only https'),
        ([], 'no inputs'),
        (np.zeros((4, 4, 3)), 'uint8'),
        ([np.zeros((4, 4, 2), np.uint8)], 'uint8'),
        ([None], 'NoneType'),
    ],
)
def test_inputs_that_are_none(inputs, word):
    with pytest.raises(UserError, match=word):
        expand(inputs)


def test_unreadable_picture_is_named(infer, pictures, tmp_path):
    (tmp_path / 'empty.jpg').touch()
    (tmp_path / 'text.jpg').write_text('no picture')
    (tmp_path / 'no.mp4').write_bytes(b'no video')
    for name, word in (('empty.jpg', 'the file is empty'), ('text.jpg', 'not a picture'), ('no.mp4', 'not a video')):
        with pytest.raises(UserError, match=f'{name} cannot be read .*{word}'):
            infer('cls')([pictures[0], tmp_path / name])


def test_video_frame_by_frame(infer, tmp_path):
    frames = smooth_pictures([(64, 80)] * 5)
    write_video(tmp_path / 'clip.mp4', frames)
    results = infer('cls')(tmp_path / 'clip.mp4', batch_size=2)
    assert [r['frame'] for r in results] == [0, 1, 2, 3, 4]
    assert [r['time'] for r in results] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert {(r['height'], r['width']) for r in results} == {(64, 80)}
    assert all(r['input'].endswith('clip.mp4') for r in results)


def test_no_more_than_a_batch_in_memory(infer, monkeypatch):
    read = []

    def endless(sources, *args):
        while True:
            read.append(inferencer.Picture(sources[0], np.zeros((64, 64, 3), np.uint8)))
            yield read[-1]

    monkeypatch.setattr(inferencer, 'read', endless)
    results = infer('cls').stream([inferencer.Source('endless', 'endless')], batch_size=3)
    next(results)
    assert len(read) == 3


def test_https(infer, pictures, folder, monkeypatch):
    """From a server here. It speaks http: the address is changed behind the rule that demands https."""
    handler = type('Handler', (SimpleHTTPRequestHandler,), dict(log_message=lambda *args: None))
    server = HTTPServer(('127.0.0.1', 0), partial(handler, directory=folder / 'pictures'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fetch = checkpoints.fetch
    monkeypatch.setattr(checkpoints, 'fetch', lambda url, path: fetch(url.replace('https', 'http'), path))
    try:
        address = f'https://127.0.0.1:{server.server_port}'
        result = infer('cls')(f'{address}/1.png?size=full')[0]
        assert result['input'] == f'{address}/1.png?size=full'
        same(result, infer('cls')(pictures[1])[0])
        with pytest.raises(UserError, match='no.png cannot be fetched .*404'):
            infer('cls')(f'{address}/no.png')
    finally:
        server.shutdown()
        server.server_close()


# -- configs and checkpoints


def test_names_of_configs():
    assert 'mask-rcnn_overlock-t_fpn_1x_coco' in list_configs()
    assert find_config('overlock-t_8xb256_in1k').endswith('configs/classification/overlock-t_8xb256_in1k.py')
    with pytest.raises(UserError, match='did you mean .*overlock-t_8xb256_in1k'):
        find_config('overlock-t_8xb256-in1k')
    address = official_weights(find_config('overlock-t_8xb256_in1k'))
    assert address.startswith(checkpoints.OFFICIAL_RELEASE)
    with pytest.raises(UserError, match='no weights for overlock-demo_shapes'):
        official_weights(find_config('overlock-demo_shapes'))


def test_models_that_cannot_be_used(files, tmp_path):
    config, checkpoint = files('seg')
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    torch.save({k: v for k, v in state.items() if k.startswith('backbone.')}, tmp_path / 'backbone.pth')
    (tmp_path / 'base.py').write_text('model = dict()')
    for arguments, word in (
        ((config, str(tmp_path / 'backbone.pth')), 'it is a backbone'),
        ((config, files('cls')[1]), 'has no decode_head'),
        ((config, str(tmp_path / 'no.pth')), 'checkpoint not found'),
        ((config, checkpoint, 'cuda:77'), 'device cuda:77 cannot be used'),
        ((str(tmp_path / 'base.py'), checkpoint), 'base file'),
        ((config,), 'no weights for'),
    ):
        with pytest.raises(UserError, match=word):
            Inferencer(*arguments)
