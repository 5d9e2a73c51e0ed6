"""tools/infer.py: what it writes, and what it does about what it cannot read."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_configs import load_tool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from random_models import random_model, smooth_pictures, write_video  # noqa: E402

from mmoverlock.apis import Inferencer, Writer, expand  # noqa: E402

pytest.importorskip('mmcv._ext')
TASKS = dict(cls='mmpretrain', det='mmdet', seg='mmseg')


@pytest.fixture(scope='module')
def infer():
    return load_tool('infer.py')


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    made = {}

    def get(task):
        pytest.importorskip(TASKS[task])
        if task not in made:
            made[task] = random_model(tmp_path_factory.mktemp(task), task)
        return made[task]

    return get


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    """Two pictures, one in a folder of its own, a video, and a file that is no picture."""
    folder = tmp_path_factory.mktemp('inputs')
    (folder / 'more').mkdir()
    first, second = smooth_pictures([(64, 64), (64, 96)])
    cv2.imwrite(str(folder / 'a.jpg'), first)
    cv2.imwrite(str(folder / 'more' / 'a.png'), second)
    write_video(folder / 'clip.mp4', smooth_pictures([(64, 80)] * 3))
    (folder / 'broken.jpg').write_bytes((folder / 'a.jpg').read_bytes()[:100])
    return folder


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file())


def frames(path):
    video, found = cv2.VideoCapture(str(path)), []
    while (answer := video.read())[0]:
        found.append(answer[1])
    return found


@pytest.mark.parametrize('task', TASKS)
def test_pictures_and_predictions(infer, model, inputs, tmp_path, capsys, task):
    config, checkpoint = model(task)
    out = tmp_path / 'deep' / 'out'
    with pytest.raises(SystemExit) as stop:  # one picture was left out
        infer.main(
            [config, checkpoint, str(inputs), '--out', str(out), '--batch-size', '3', '--device', 'cpu']
            + ['--score-thr', '0.0', '--topk', '1']
        )
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert 'broken.jpg cannot be read' in printed.err and 'left out: 1' in printed.out
    expected = ['preds/a.json', 'preds/clip.jsonl', 'preds/more/a.json']
    expected += ['vis/a.jpg', 'vis/clip.mp4', 'vis/more/a.jpg']
    if task == 'seg':
        expected += ['preds/a.png', 'preds/more/a.png', *(f'preds/clip_frames/{i:06d}.png' for i in range(3))]
    assert files(out) == sorted(expected)
    assert cv2.imread(str(out / 'vis/more/a.jpg')).shape == (64, 96, 3)
    assert [f.shape for f in frames(out / 'vis/clip.mp4')] == [(64, 80, 3)] * 3
    lines = [json.loads(line) for line in (out / 'preds/clip.jsonl').read_text().splitlines()]
    assert [line['frame'] for line in lines] == [0, 1, 2]
    result = json.loads((out / 'preds/more/a.json').read_text())
    assert result['input'] == str(inputs / 'more' / 'a.png') and (result['height'], result['width']) == (64, 96)
    for one in (result, *lines):
        if task == 'cls':
            assert len(one['classes']) == 1 and one['classes'][0] in ('cat', 'dog') and 0.5 <= one['scores'][0] <= 1
        elif task == 'det':
            check_boxes(one)
        else:
            labels = cv2.imread(str(out / one['sem_seg']), cv2.IMREAD_UNCHANGED)
            assert labels.shape == (one['height'], one['width'])
            assert one['shares'].get('right', 0) == pytest.approx((labels == 1).mean())


def check_boxes(result):
    """Boxes lie in the picture, and masks in their boxes."""
    from pycocotools import mask

    assert len(result['bboxes']) == len(result['masks']) == len(result['scores']) == 4
    assert result['classes'] == ['box'] * 4 and result['scores'] == sorted(result['scores'], reverse=True)
    for (x1, y1, x2, y2), rle in zip(result['bboxes'], result['masks']):
        assert 0 <= x1 < x2 <= result['width'] and 0 <= y1 < y2 <= result['height']
        assert rle['size'] == [result['height'], result['width']]
        rows, cols = mask.decode(rle).nonzero()
        if len(rows):
            assert cols.min() >= x1 - 1 and cols.max() <= x2 + 1 and rows.min() >= y1 - 1 and rows.max() <= y2 + 1


def test_only_what_is_asked_for(infer, model, inputs, tmp_path):
    config, checkpoint = model('cls')
    blue = np.zeros((64, 64, 3), np.uint8)
    blue[..., 0] = 255
    cv2.imwrite(str(tmp_path / 'blue.png'), blue)
    common = [config, checkpoint, str(tmp_path / 'blue.png'), str(inputs / 'clip.mp4'), '--device', 'cpu']
    infer.main([*common, '--out', str(tmp_path / 'a'), '--no-draw'])
    infer.main([*common, '--out', str(tmp_path / 'b'), '--no-json'])
    assert files(tmp_path) == [
        *('a/preds/blue.json', 'a/preds/clip.jsonl', 'b/vis/blue.jpg', 'b/vis/clip.mp4', 'blue.png'),
    ]
    # Red and blue are not swapped on the way.
    corner = cv2.imread(str(tmp_path / 'b' / 'vis' / 'blue.jpg'))[-8:, -8:].reshape(-1, 3).mean(0)
    assert corner[0] > 200 and corner[1:].max() < 40
    with pytest.raises(SystemExit):
        infer.main([*common, '--out', str(tmp_path / 'c'), '--no-json', '--no-draw'])


def test_a_video_that_breaks_off_leaves_no_half_file(model, inputs, tmp_path):
    inferencer = Inferencer(*model('cls'), device='cpu')
    with pytest.raises(KeyboardInterrupt), Writer(inferencer, str(tmp_path)) as writer:
        for picture, sample in inferencer.stream(expand([inputs / 'a.jpg', inputs / 'clip.mp4'])):
            writer.add(picture, sample)
            if picture.frame == 1:
                assert len(files(tmp_path)) == 4  # two whole ones, two that grow
                raise KeyboardInterrupt
    assert files(tmp_path) == ['preds/a.json', 'vis/a.jpg']


def test_mistakes_stop_it_before_anything_is_written(infer, model, inputs, tmp_path, capsys):
    config, checkpoint = model('cls')
    (tmp_path / 'file').touch()
    picture, out = str(inputs / 'a.jpg'), str(tmp_path / 'out')
    for arguments, word in (
        ([config, checkpoint, picture, 'no.jpg', '--out', out], 'input not found: no.jpg'),
        ([config, checkpoint, 'http://example.org/a.jpg', '--out', out], 'only https'),
        ([config, checkpoint, picture, '--out', str(tmp_path / 'file')], 'is a file'),
        ([config, 'no.pth', picture, '--out', out], 'checkpoint not found'),
        (['overlock-x_8xb256_in1k', checkpoint, picture, '--out', out], 'did you mean'),
        ([config, 'official', picture, '--out', out], 'no weights for'),
    ):
        with pytest.raises(SystemExit) as stop:
            infer.main(arguments)
        error = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and error[-1].startswith('error: ') and word in error[-1]
    assert files(tmp_path) == ['file']
