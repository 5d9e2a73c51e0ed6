"""What the check says of a data set beyond its layout, and how the tools answer wrong questions."""

import json
import os
import sys
from pathlib import Path

import labelled
import pytest
from PIL import Image

from mmoverlock import datacheck
from mmoverlock.cli import UserError
from mmoverlock.dataprep import Options, convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'test_tools'))
from tiny_configs import load_tool  # noqa: E402


def coco_split(root, split='train'):
    return datacheck.CocoSplit(
        f'{split}_dataloader',
        str(root),
        str(root / 'images'),
        str(root / f'annotations/{split}.json'),
        labelled.CLASSES,
    )


def texts(findings, level):
    return [f.text for f in findings if f.level == level]


@pytest.fixture
def boxes(tmp_path):
    return labelled.coco(tmp_path / 'coco')


def edit(root, change):
    path = root / 'annotations/train.json'
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_counts_and_sizes(boxes):
    found = ' '.join(texts(coco_split(boxes).inspect(), 'ok'))
    assert 'instances: ball 4, brick 4' in found and 'sizes: 96x64' in found


@pytest.mark.parametrize(
    'change, level, words',
    [
        (lambda d: d['annotations'][0].update(bbox=[5, 5, 0, 4]), 'problem', 'box of no area: 1'),
        (lambda d: d['annotations'][0].update(bbox=[5, 5, float('nan'), 4]), 'problem', 'box of no area: 1'),
        (lambda d: d['annotations'][0].update(bbox=[90, 5, 20, 4]), 'problem', 'reach out of their image: 1'),
        (lambda d: d['annotations'].__delitem__(slice(0, 2)), 'warning', '1 images without an instance'),
        (lambda d: [a.update(category_id=1) for a in d['annotations']], 'warning', 'no instance of brick'),
    ],
)
def test_boxes(boxes, change, level, words):
    edit(boxes, change)
    assert any(words in text for text in texts(coco_split(boxes).inspect(), level))


def test_turned_pictures_have_their_upright_size(boxes):
    """As the pipelines read them; Pillow alone says the size as stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(boxes / 'images/0.jpg') as image:
        image.transpose(Image.Transpose.ROTATE_90).save(boxes / 'images/0.jpg', exif=exif)
    assert not texts(coco_split(boxes).inspect(), 'problem')


def test_splits_that_share_pictures(boxes):
    splits = [coco_split(boxes, 'train'), coco_split(boxes, 'val')]
    assert datacheck.shared(splits) == []
    edit(boxes, lambda d: d['images'].append(dict(id=99, file_name='5.jpg', width=96, height=64)))
    (finding,) = datacheck.shared(splits)
    assert finding.level == 'warning' and '1 images are in both train_dataloader and val_dataloader' in finding.text


def test_label_maps(tmp_path):
    root = labelled.masks(tmp_path / 'maps')
    split = datacheck.MaskSplit(
        'train', str(root), str(root / 'images/train'), str(root / 'masks/train'), ('ground', 'ball', 'brick', 'wall')
    )
    found = split.inspect()
    (shares,) = [t for t in texts(found, 'ok') if 'pixels in' in t]
    parts = [float(word.rstrip('%;,')) for word in shares.split() if word.endswith(('%', '%,', '%;'))]
    assert sum(parts) == pytest.approx(100, abs=0.3) and parts[0] > 60 and parts[3] == 0
    assert any('no pixel of wall' in t for t in texts(found, 'warning'))


def test_folder_of_a_conversion(tmp_path):
    result = convert('folders', labelled.folders(tmp_path / 'in'), tmp_path / 'out', Options())
    assert datacheck.config_of(str(tmp_path / 'out')) == str(result.config)
    assert datacheck.config_of(str(result.config)) == str(result.config)
    with pytest.raises(UserError, match='convert.py.*give a config'):
        datacheck.config_of(str(tmp_path / 'in'))


def test_config_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labelled.folders(tmp_path / 'in')
    result = convert('folders', 'in', 'out', Options(config='configs/mine.py'))
    assert datacheck.config_of('out') == 'configs/mine.py' == str(result.config)
    assert (tmp_path / 'configs/mine.py').is_file() and not list((tmp_path / 'out').glob('*.py'))


def test_tools_say_it_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tool = load_tool('data/convert.py')
    with pytest.raises(SystemExit) as stop:
        tool.main(['voc', 'nowhere', 'out'])
    assert stop.value.code == 2 and capsys.readouterr().err == 'error: no folder nowhere\n'
    labelled.folders(tmp_path / 'in')
    tool.main(['folders', 'in', 'data/bugs', '--val', '0.2'])
    said = capsys.readouterr().out
    assert 'pictures       train         val' in said and 'python tools/train.py data/bugs/overlock-xt_bugs.py' in said
    sheet = load_tool('data/contact_sheet.py')
    for arguments, words in (
        (['in'], 'was not written by'),
        (['data/bugs', '--split', 'test', '--out', 'sheet.doc'], 'name a picture'),
    ):
        with pytest.raises(SystemExit) as stop:
            sheet.main(arguments)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ['data', 'in']
