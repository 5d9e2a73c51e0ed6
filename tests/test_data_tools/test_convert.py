"""Every format comes out as it went in, and what is wrong is named with its place and its cure."""

import json
import os
from pathlib import Path

import labelled
import numpy as np
import pytest
from labelled import CLASSES, COLOURS, SIZE
from PIL import Image
from pycocotools import mask as coco_mask

from mmoverlock.cli import UserError
from mmoverlock.dataprep import Options, convert

ORIENTATION = 0x0112


def written(folder, split):
    """Boxes by picture and class, and the categories, of a COCO file."""
    data = json.loads((folder / 'annotations' / f'{split}.json').read_text())
    names = {c['id']: c['name'] for c in data['categories']}
    files = {i['id']: Path(i['file_name']).stem for i in data['images']}
    boxes = {}
    for item in data['annotations']:
        x, y, w, h = item['bbox']
        boxes.setdefault(files[item['image_id']], []).append((names[item['category_id']], (x, y, x + w, y + h)))
    return boxes, data


def truth(number=6):
    return {str(i): boxes for i, boxes in enumerate(labelled.scenes(number))}


@pytest.mark.parametrize('form', ['voc', 'yolo', 'yolo outlines', 'labelme', 'coco'])
def test_objects(form, tmp_path):
    source, name = tmp_path / 'in', form.split()[0]
    make = getattr(labelled, name)
    make(source, outlines=True) if 'outlines' in form else make(source)
    result = convert(name, source, tmp_path / 'out', Options(val=1 / 3))
    assert result.classes == list(CLASSES) and result.counts == dict(train=4, val=2)
    seen = {}
    for split in ('train', 'val'):
        boxes, data = written(tmp_path / 'out', split)
        seen.update(boxes)
        for info in data['images']:
            with Image.open(tmp_path / 'out/images' / split / info['file_name']) as image:
                assert image.size == (info['width'], info['height']) == SIZE
        for item in data['annotations']:
            if form in ('yolo outlines', 'labelme'):
                runs = coco_mask.merge(coco_mask.frPyObjects(item['segmentation'], *SIZE[::-1]))
                assert coco_mask.toBbox(runs).tolist() == pytest.approx(item['bbox'], abs=1)
                assert item['area'] == coco_mask.area(runs) > 200
            else:
                assert 'segmentation' not in item and item['area'] == pytest.approx(np.prod(item['bbox'][2:]), rel=1e-3)
    expected = truth()
    assert seen.keys() == expected.keys()
    for key, boxes in expected.items():
        assert [n for n, _ in seen[key]] == [n for n, _ in boxes]
        for (_, found), (_, box) in zip(seen[key], boxes):
            assert found == pytest.approx(box, abs=0.02)
    assert ('mask-rcnn' in result.config.name) == (form in ('yolo outlines', 'labelme'))


def test_labelme_shapes(tmp_path):
    """Circles, painted masks, and shapes of a group, which are one object."""
    source = labelled.labelme(tmp_path / 'in', 2)
    content = json.loads((source / '0.json').read_text())
    part = np.zeros((12, 20), np.uint8)
    part[3:9, 5:15] = 255
    Image.fromarray(part).save(tmp_path / 'part.png')
    import base64

    code = base64.b64encode((tmp_path / 'part.png').read_bytes()).decode()
    content['shapes'] = [
        dict(label='ball', shape_type='circle', points=[[30, 30], [40, 30]]),
        dict(label='brick', shape_type='mask', points=[[50, 20], [69, 31]], mask=code),
        dict(label='ball', shape_type='polygon', points=[[1, 1], [9, 1], [9, 9]], group_id=7),
        dict(label='ball', shape_type='rectangle', points=[[20, 50], [30, 60]], group_id=7),
        dict(label='__ignore__', shape_type='rectangle', points=[[70, 40], [90, 60]]),
    ]
    (source / '0.json').write_text(json.dumps(content))
    convert('labelme', source, tmp_path / 'out', Options(val=0.5, seed=0))
    items = {}
    for split in ('train', 'val'):
        boxes, data = written(tmp_path / 'out', split)
        items.update({k: (v, data['annotations']) for k, v in boxes.items()})
    boxes, annotations = items['0']
    assert [b for _, b in boxes] == [
        pytest.approx((20, 20, 40, 40), abs=0.2),
        (55, 23, 65, 29),
        (1, 1, 30, 60),
    ]
    assert annotations[0]['area'] == pytest.approx(np.pi * 100, rel=0.05)
    assert annotations[1]['area'] == 60
    assert len(annotations[2]['segmentation']) == 2

    convert('labelme', source, tmp_path / 'maps', Options(val=0.5, task='segmentation'))
    label_map = np.asarray(Image.open(next((tmp_path / 'maps/annotations').rglob('0.png'))))
    assert label_map[30, 30] == 1 and label_map[26, 60] == 2 and label_map[50, 80] == 255 and label_map[0, 0] == 0
    convert('labelme', source, tmp_path / 'no_ground', Options(val=0.5, task='segmentation', background='ignore'))
    label_map = np.asarray(Image.open(next((tmp_path / 'no_ground/annotations').rglob('0.png'))))
    assert label_map[30, 30] == 0 and label_map[26, 60] == 1 and label_map[0, 0] == 255


@pytest.mark.parametrize('coloured', [False, True])
@pytest.mark.parametrize('split', [False, True])
def test_masks(coloured, split, tmp_path):
    source = labelled.masks(tmp_path / 'in', coloured=coloured, split=split)
    lines = [f'{name} {" ".join(map(str, rgb))}' if coloured else name for name, rgb in COLOURS.items()]
    (tmp_path / 'classes.txt').write_text('\n'.join(lines))
    result = convert('masks', source, tmp_path / 'out', Options(classes=[str(tmp_path / 'classes.txt')]))
    assert result.classes == list(COLOURS)
    assert result.counts == (dict(train=4, val=2) if split else dict(train=5, val=1))
    for key, boxes in truth().items():
        path = next((tmp_path / 'out/annotations').rglob(f'{key}.png'))
        np.testing.assert_array_equal(np.asarray(Image.open(path)), labelled.index_map(boxes))
        assert Path(str(path).replace('annotations', 'images')).with_suffix('.jpg').is_file()
    if coloured:
        assert str(COLOURS['ball']) in result.config.read_text()


def test_masks_without_a_class(tmp_path):
    """A class that is left out becomes "ignore", and the ones after it move up."""
    source = labelled.masks(tmp_path / 'in')
    result = convert('masks', source, tmp_path / 'out', Options(classes=list(COLOURS), ignore=['ball']))
    assert result.classes == ['ground', 'brick']
    label_map = np.asarray(Image.open(next((tmp_path / 'out/annotations').rglob('0.png'))))
    expected = labelled.index_map(truth()['0'])
    np.testing.assert_array_equal(label_map, np.array([0, 255, 1])[expected])


def test_binary_masks(tmp_path):
    """0 and 255 alone are two classes; read as they stand, everything but 0 would be ignored."""
    source = labelled.masks(tmp_path / 'in', split=False)
    for path in (source / 'masks').glob('*.png'):
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    result = convert('masks', source, tmp_path / 'out', Options())
    assert result.classes == ['background', 'foreground']
    assert any('two classes' in line for line in result.problems.lines())
    assert set(np.unique(np.asarray(Image.open(next((tmp_path / 'out/annotations').rglob('0.png')))))) == {0, 1}


def test_folders(tmp_path):
    source = labelled.folders(tmp_path / 'in')
    result = convert('folders', source, tmp_path / 'out', Options(val=0.2, test=0.2))
    assert result.counts == dict(train=6, val=2, test=2)
    for split, number in (('train', 3), ('val', 1), ('test', 1)):  # of each class in proportion
        for name in CLASSES:
            assert len(list((tmp_path / 'out' / split / name).iterdir())) == number
    names = [p.name for p in sorted((tmp_path / 'out').rglob('*.jpg')) if 'ball' in str(p)]
    assert sorted(names) == [f'{i}.jpg' for i in range(5)]


def test_splits_by_seed(tmp_path):
    source = labelled.folders(tmp_path / 'in', 8)

    def held_out(seed):
        out = tmp_path / 'out'
        convert('folders', source, out, Options(seed=seed, overwrite=True, link=True))
        assert all(p.is_symlink() and p.is_file() for p in out.rglob('*.jpg'))
        return sorted(str(p.relative_to(out)) for p in (out / 'val').rglob('*.jpg'))

    first = held_out(0)
    assert held_out(0) == first and any(held_out(seed) != first for seed in (1, 2, 3))


def test_voc_split_of_its_own(tmp_path):
    source = labelled.voc(tmp_path / 'in')
    lists = source / 'ImageSets/Main'
    lists.mkdir(parents=True)
    (lists / 'train.txt').write_text('0\n1\n2\n5\n')
    (lists / 'val.txt').write_text('3\n4\n')
    convert('voc', source, tmp_path / 'out', Options())
    assert sorted(written(tmp_path / 'out', 'val')[0]) == ['3', '4']
    result = convert('voc', source, tmp_path / 'anew', Options(resplit=True, val=0.5))
    assert result.counts == dict(train=3, val=3)


# -- what is wrong -------------------------------------------------------------------------------


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def value(text, tag, number):
    """A VOC file with the first <tag> changed."""
    start = text.index(f'<{tag}>') + len(tag) + 2
    return text[:start] + str(number) + text[text.index(f'</{tag}>') :]


def voc_value(tag, number):
    def damage(root):
        path = root / 'Annotations/0.xml'
        path.write_text(value(path.read_text(), tag, number))

    return damage


def labelme_shape(change):
    def damage(root):
        content = json.loads((root / '0.json').read_text())
        change(content['shapes'][0])
        (root / '0.json').write_text(json.dumps(content))

    return damage


def sixteen_bit(root):
    Image.fromarray(np.full(SIZE[::-1], 4000, np.uint16)).save(root / 'JPEGImages/0.png')
    (root / 'JPEGImages/0.jpg').unlink()


def yolo_line(line):
    def damage(root):
        with (root / 'labels/train/0.txt').open('a') as file:
            file.write(line + '\n')

    return damage


def mask_pixel(number):
    def damage(root):
        pixels = np.array(Image.open(root / 'masks/train/0.png'))
        pixels[7, 5] = number
        Image.fromarray(pixels).save(root / 'masks/train/0.png')

    return damage


BAD = dict(
    broken_picture=('voc', lambda r: (r / 'JPEGImages/0.jpg').write_bytes(b'no jpeg'), ['0.jpg', 'broken', 'copy it']),
    cut_picture=(
        'voc',
        lambda r: (r / 'JPEGImages/0.jpg').write_bytes((r / 'JPEGImages/0.jpg').read_bytes()[:700]),
        ['0.jpg', 'truncated'],
    ),
    empty_picture=('voc', lambda r: (r / 'JPEGImages/0.jpg').write_bytes(b''), ['0.jpg', 'empty', 'copy it']),
    sixteen_bit=('voc', sixteen_bit, ['0.png', 'more than 8 bits', 'upper 8']),
    no_picture=('voc', lambda r: (r / 'JPEGImages/0.jpg').unlink(), ['0.xml', 'no picture 0', 'remove the label']),
    no_label=('voc', lambda r: (r / 'Annotations/0.xml').unlink(), ['0.jpg', 'has no label', '--empty-ok']),
    same_name=('voc', lambda r: labelled.picture(r / 'JPEGImages/0.png'), ['0.jpg, 0.png', 'one name']),
    other_size=('voc', voc_value('width', 97), ['0.xml', '97x64', '96x64']),
    outside=('voc', voc_value('xmax', 140), ['0.xml: object 1', 'reaches 44 pixels out', '96x64']),
    no_area=('voc', voc_value('xmax', 1), ['0.xml: object 1', 'no area']),
    not_a_number=('voc', voc_value('ymin', 'nan'), ['0.xml: object 1', 'finite']),
    no_box=('voc', voc_value('ymin', ''), ['0.xml: object 1', 'no box of four numbers']),
    no_class=('voc', voc_value('name', ''), ['0.xml: object 1', 'no class name']),
    unknown_class=('voc', voc_value('name', 'wall'), ['0.xml: object 1', "'wall'", 'ball, brick', '--ignore']),
    no_xml=('voc', lambda r: replace(r / 'Annotations/0.xml', '</size>', ''), ['0.xml:', 'is no XML']),
    entity=(
        'voc',
        lambda r: replace(r / 'Annotations/0.xml', '<annotation>', '<!DOCTYPE a [<!ENTITY b "c">]><annotation>'),
        ['0.xml', 'document type'],
    ),
    yolo_class=('yolo', yolo_line('2 .5 .5 .1 .1'), ['0.txt:3', 'class number 2', '0 to 1']),
    yolo_pixels=('yolo', yolo_line('1 48 32 10 10'), ['0.txt:3', 'pixels', 'fractions']),
    yolo_outside=('yolo', yolo_line('1 .98 .5 .2 .2'), ['0.txt:3', 'out of the picture']),
    yolo_numbers=('yolo', yolo_line('1 .5 .5 .2'), ['0.txt:3', '4 numbers']),
    yolo_words=('yolo', yolo_line('ball .5 .5 .2 .2'), ['0.txt:3', 'not of numbers']),
    yolo_no_picture=('yolo', lambda r: (r / 'images/train/0.jpg').unlink(), ['0.txt', 'no picture 0']),
    labelme_json=('labelme', lambda r: (r / '0.json').write_text('{"shapes": ['), ['0.json:1', 'no JSON']),
    labelme_kind=('labelme', labelme_shape(lambda s: s.update(shape_type='line')), ['shape 1', 'is a line', 'no area']),
    labelme_points=('labelme', labelme_shape(lambda s: s.update(points=[[1, 1], [2, 2]])), ['shape 1', '2 points']),
    labelme_flat=(
        'labelme',
        labelme_shape(lambda s: s.update(points=[[1, 1], [2, 2], [3, 3]])),
        ['shape 1', 'encloses no area'],
    ),
    coco_image=(
        'coco',
        lambda r: replace(r / 'annotations/train.json', '"image_id": 1,', '"image_id": 99,'),
        ['train.json: annotation 1', 'image 99', 'not listed'],
    ),
    coco_category=(
        'coco',
        lambda r: replace(r / 'annotations/train.json', '"category_id": 1,', '"category_id": 9,'),
        ['train.json: annotation 1', 'category 9'],
    ),
    coco_picture=('coco', lambda r: (r / 'images/0.jpg').unlink(), ['train.json: image 1', 'no picture 0.jpg']),
    mask_value=('masks', mask_pixel(9), ['0.png', 'the first is 9 at x=5, y=7', '--classes']),
    mask_size=(
        'masks',
        lambda r: Image.new('L', (90, 64)).save(r / 'masks/train/0.png'),
        ['0.png', '90x64', '96x64'],
    ),
    mask_alone=('masks', lambda r: (r / 'images/train/0.jpg').unlink(), ['0.png', 'no picture']),
    picture_alone=('masks', lambda r: (r / 'masks/train/0.png').unlink(), ['0.jpg', 'has no label']),
    folder=('folders', lambda r: (r / 'ball/0.jpg').rename(r / '0.jpg'), ['0.jpg', 'no folder of a class']),
)


@pytest.mark.parametrize('name', BAD)
def test_bad_labels(name, tmp_path, capsys):
    """Named with place and cure, and nothing written; with --skip-bad left out, and the rest is there."""
    form, damage, words = BAD[name]
    source = getattr(labelled, form)(tmp_path / 'in')
    damage(source)
    classes = dict(masks=list(COLOURS)).get(form, None if form == 'yolo' else list(CLASSES))
    with pytest.raises(UserError, match='1 problem.*--skip-bad; nothing was written'):
        convert(form, source, tmp_path / 'out', Options(classes=classes))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('  ')]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert sorted(p.name for p in tmp_path.iterdir()) == ['in']

    result = convert(form, source, tmp_path / 'out', Options(classes=classes, skip_bad=True))
    assert len(result.problems.found) == 1
    assert json.loads((tmp_path / 'out/dataset.json').read_text())['left_out'] == result.problems.found
    whole = dict(folders=10).get(form, 6)
    object_alone = {'object', 'shape', 'annotation', 'class number', 'pixels', 'out of the picture', 'numbers'}
    kept = whole if any(w in ' '.join(words) for w in object_alone) else whole - 1
    assert sum(result.counts.values()) == kept


def test_all_problems_at_once(tmp_path, capsys):
    source = labelled.voc(tmp_path / 'in', 30)
    for i in range(25):
        (source / 'JPEGImages' / f'{i}.jpg').write_bytes(b'')
    with pytest.raises(UserError, match='25 problems'):
        convert('voc', source, tmp_path / 'out', Options())
    assert '... and 5 more' in capsys.readouterr().err


def test_a_picture_that_lost_all_its_objects_goes(tmp_path):
    """It would teach that there are none."""
    source = labelled.yolo(tmp_path / 'in')
    (source / 'labels/train/0.txt').write_text('1 .5 .5 0 0\n')
    (source / 'labels/train/1.txt').write_text('')  # shows nothing
    result = convert('yolo', source, tmp_path / 'out', Options(skip_bad=True))
    assert result.counts == dict(train=3, val=2)
    assert [Path(i['file_name']).stem for i in written(tmp_path / 'out', 'train')[1]['images']] == ['1', '3', '4']


def test_empty_ok(tmp_path):
    source = labelled.voc(tmp_path / 'in')
    (source / 'Annotations/0.xml').unlink()
    result = convert('voc', source, tmp_path / 'out', Options(empty_ok=True))
    assert sum(result.counts.values()) == 6 and 'filter_empty_gt=False' in result.config.read_text()


@pytest.mark.parametrize(
    'form, options, words',
    [
        ('voc', dict(val=0), 'shares'),
        ('voc', dict(val=0.6, test=0.4), 'shares'),
        ('voc', dict(classes=['ball', 'ball']), 'twice'),
        ('voc', dict(classes=['names.txt']), 'no file names.txt'),
        ('voc', dict(task='segmentation'), 'not what voc labels are for'),
        ('voc', dict(detector='mask-rcnn'), 'needs an outline'),
        ('voc', dict(labels='nowhere'), 'no nowhere in'),
        ('voc', dict(images='Annotations'), 'no picture below'),
        ('yolo', dict(labels='labels/val', images='images/val', classes=['a'], skip_bad=True), 'nothing labelled'),
        ('labelme', dict(side=8), '--side'),
    ],
)
def test_bad_questions(form, options, words, tmp_path):
    source = getattr(labelled, form)(tmp_path / 'in')
    with pytest.raises(UserError, match=words):
        convert(form, source, tmp_path / 'out', Options(**options))
    assert not (tmp_path / 'out').exists()


def test_colours_need_a_list(tmp_path):
    source = labelled.masks(tmp_path / 'in', coloured=True)
    with pytest.raises(UserError, match='coloured.*--classes FILE'):
        convert('masks', source, tmp_path / 'out', Options(classes=list(COLOURS)))


def test_target_is_kept(tmp_path):
    """Only what a conversion wrote is written over, and only when asked; a failure leaves what was there."""
    source, out = labelled.folders(tmp_path / 'in'), tmp_path / 'out'
    out.mkdir()
    (out / 'precious').write_text('1')
    with pytest.raises(UserError, match='no conversion made it'):
        convert('folders', source, out, Options(overwrite=True))
    assert (out / 'precious').read_text() == '1'
    with pytest.raises(UserError, match='within one another'):
        convert('folders', source, source / 'out', Options())
    first = tmp_path / 'first'
    convert('folders', source, first, Options())
    with pytest.raises(UserError, match='--overwrite'):
        convert('folders', source, first, Options())
    (source / 'ball/0.jpg').write_bytes(b'')
    with pytest.raises(UserError):
        convert('folders', source, first, Options(overwrite=True))
    assert len(list(first.rglob('*.jpg'))) == 10
    convert('folders', source, first, Options(overwrite=True, skip_bad=True))
    assert len(list(first.rglob('*.jpg'))) == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ['first', 'in', 'out']


def test_interrupted(tmp_path, monkeypatch):
    """Ctrl-C while pictures are copied leaves nothing."""
    from mmoverlock.dataprep import convert as module

    source = labelled.folders(tmp_path / 'in')

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    import sys

    monkeypatch.setattr(sys.modules[module.__module__], 'write_picture', stop)
    with pytest.raises(KeyboardInterrupt):
        convert('folders', source, tmp_path / 'out', Options())
    assert [p.name for p in tmp_path.iterdir()] == ['in']


# -- odd pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize('labels', ['upright', 'stored'])
@pytest.mark.parametrize('form', ['voc', 'masks'])
def test_turned_pictures(form, labels, tmp_path):
    """Labels fit what the pipelines read, whichever way they were made: on the bright pixels, not beside them."""
    import mmcv

    source = getattr(labelled, form)(tmp_path / 'in')
    boxes = truth()['0']
    path = source / ('JPEGImages/0.jpg' if form == 'voc' else 'images/train/0.jpg')
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by 90 degrees, clockwise
    with Image.open(path) as image:
        stored = image.transpose(Image.Transpose.ROTATE_90) if labels == 'upright' else image
        stored.save(path, exif=exif, quality=95)
    assert mmcv.imread(str(path)).shape[:2] == (SIZE[::-1] if labels == 'upright' else SIZE)
    result = convert(form, source, tmp_path / 'out', Options(classes=list(COLOURS) if form == 'masks' else None))
    assert any('EXIF' in line for line in result.problems.lines()) or (form, labels) == ('masks', 'upright')
    image = mmcv.imread(str(next((tmp_path / 'out/images').rglob('0.jpg'))), channel_order='rgb')
    assert image.shape[:2] == SIZE[::-1]
    for name, (left, top, right, bottom) in boxes:
        inside = image[top + 2 : bottom - 2, left + 2 : right - 2].reshape(-1, 3).mean(0)
        assert np.abs(inside - COLOURS[name]).max() < 30


def test_pictures_that_are_written_anew(tmp_path):
    """Formats that mmpretrain does not list, and for mmseg several endings, become PNG with the same pixels."""
    source = labelled.masks(tmp_path / 'in', split=False)
    with Image.open(source / 'images/0.jpg') as image:
        pixels = np.asarray(image)
        image.save(source / 'images/0.webp', lossless=True)
    (source / 'images/0.jpg').unlink()
    result = convert('masks', source, tmp_path / 'out', Options(classes=list(COLOURS)))
    assert {p.suffix for p in (tmp_path / 'out/images').rglob('*.*')} == {'.png'}
    np.testing.assert_array_equal(np.asarray(Image.open(next((tmp_path / 'out/images').rglob('0.png')))), pixels)
    assert "img_suffix='.png'" in result.config.read_text()


def test_cmyk(tmp_path):
    source = labelled.folders(tmp_path / 'in')
    with Image.open(source / 'ball/0.jpg') as image:
        image.convert('CMYK').save(source / 'ball/0.jpg')
    result = convert('folders', source, tmp_path / 'out', Options())
    assert any('CMYK' in line for line in result.problems.lines())


def test_same_picture_in_two_splits(tmp_path):
    source = labelled.masks(tmp_path / 'in')
    (source / 'images/val/2.jpg').write_bytes((source / 'images/train/0.jpg').read_bytes())
    result = convert('masks', source, tmp_path / 'out', Options(classes=list(COLOURS)))
    assert any('in two splits' in line for line in result.problems.lines())


# -- the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize('form', ['voc', 'labelme', 'masks', 'folders'])
def test_config(form, tmp_path, monkeypatch):
    """Classes in every head, the data where it was written, paths through links."""
    from mmengine.config import Config

    from mmoverlock.dataprep import configs

    monkeypatch.chdir(tmp_path)
    getattr(labelled, form)(tmp_path / 'in')
    os.makedirs(tmp_path / 'disk/deep')
    (tmp_path / 'data').symlink_to('disk/deep')
    # Beside the data: a '..' too many ends above it, and not in the root, where one more does no harm.
    (tmp_path / 'checkout').mkdir()
    (tmp_path / 'checkout/configs').symlink_to(configs.CONFIGS)
    monkeypatch.setattr(configs, 'CONFIGS', tmp_path / 'checkout/configs')
    number = 3 if form == 'masks' else 2
    options = Options(classes=list(COLOURS) if form == 'masks' else None, pretrained='mine.pth', arch='t')
    result = convert(form, 'in', 'data/out', options)
    cfg = Config.fromfile(result.config)
    assert Config.fromfile(os.path.realpath(result.config)).model == cfg.model

    def find(node, key):
        if isinstance(node, dict):
            for k, v in node.items():
                if k == key:
                    yield v
                yield from find(v, key)
        elif isinstance(node, (list, tuple)):
            for v in node:
                yield from find(v, key)

    assert set(find(cfg.model.to_dict(), 'num_classes')) == {number}
    assert cfg.model.backbone.arch == 't' and cfg.model.backbone.init_cfg.checkpoint == 'mine.pth'
    for name in ('train', 'val', 'test'):
        dataset = cfg[f'{name}_dataloader'].dataset
        assert dataset.data_root == 'data/out' and len(dataset.metainfo.classes) == number


@pytest.mark.parametrize('task', ['detection', 'segmentation', 'classification'])
def test_length(task):
    """Fewer pictures are seen more often, never too few steps, never more work for less data."""
    from mmoverlock.dataprep import configs

    plans = [configs.length_of(task, n) for n in (2, 20, 200, 2000, 20000)]
    assert all(a.epochs >= b.epochs for a, b in zip(plans, plans[1:]))
    assert all(a.steps <= b.steps for a, b in zip(plans[1:], plans[2:]))
    assert all(plan.steps >= configs.MIN_STEPS for plan in plans)
    assert configs.length_of(task, 200, 3).epochs == 3


def test_class_lists():
    from mmoverlock.dataprep.masks import parse_classes

    for line in ('traffic light 250 170 30', '250\t170 30  traffic light', 'traffic light,250,170,30'):
        assert parse_classes([line]) == [('traffic light', (250, 170, 30))]
    assert parse_classes(['name,r,g,b', 'sky,1,2,3', '# no', '']) == [('sky', (1, 2, 3))]
    assert parse_classes(['# label:color_rgb:parts:actions', 'road:128,64,128::']) == [('road', (128, 64, 128))]
    assert parse_classes(['sky 4', 'road']) == [('sky', (4,)), ('road', ())]
