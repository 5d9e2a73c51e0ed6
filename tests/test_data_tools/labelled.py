"""Labelled pictures in every format, made up: bright rectangles of two classes on a dark ground."""

import json

import numpy as np
from PIL import Image

SIZE = (96, 64)
CLASSES = ('ball', 'brick')
COLOURS = dict(ground=(10, 20, 30), ball=(200, 40, 40), brick=(40, 40, 200))


def scenes(number, seed=0):
    """Boxes (left, top, right, bottom) of each class, whole pixels: one of each a picture, side by side."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        found = []
        for i, name in enumerate(CLASSES):
            left, top = 4 + 46 * i + int(rng.integers(0, 10)), int(rng.integers(4, 20))
            found.append((name, (left, top, left + int(rng.integers(16, 30)), top + int(rng.integers(16, 36)))))
        yield found


def picture(path, boxes=(), size=SIZE, seed=0, **save):
    """A picture with its boxes filled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 30, (size[1], size[0], 3), dtype=np.uint8)
    for name, (left, top, right, bottom) in boxes:
        pixels[top:bottom, left:right] = COLOURS[name]
    Image.fromarray(pixels).save(path, **save)


def voc(root, number=6):
    """Annotations/*.xml, JPEGImages/*.jpg; pixels count from 1."""
    for i, boxes in enumerate(scenes(number)):
        picture(root / 'JPEGImages' / f'{i}.jpg', boxes, seed=i)
        xml(root / 'Annotations' / f'{i}.xml', f'{i}.jpg', boxes)
    return root


def xml(path, filename, boxes, size=SIZE):
    """One VOC file."""
    objects = ''.join(
        f'<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{b[0] + 1}</xmin><ymin>{b[1] + 1}</ymin>'
        f'<xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>\n'
        for name, b in boxes
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<annotation><filename>{filename}</filename>\n<size><width>{size[0]}</width><height>{size[1]}</height>'
        f'<depth>3</depth></size>\n{objects}</annotation>\n'
    )


def yolo(root, number=6, outlines=False):
    """data.yaml, images/train/*.jpg, labels/train/*.txt and the same for val."""
    for i, boxes in enumerate(scenes(number)):
        split = 'val' if i % 3 == 2 else 'train'
        picture(root / 'images' / split / f'{i}.jpg', boxes, seed=i)
        lines = []
        for name, (left, top, right, bottom) in boxes:
            x, y = np.array([left, right]) / SIZE[0], np.array([top, bottom]) / SIZE[1]
            if outlines:
                values = (x[0], y[0], x[1], y[0], x[1], y[1], x[0], y[1])
            else:
                values = (x.mean(), y.mean(), x[1] - x[0], y[1] - y[0])
            lines.append(f'{CLASSES.index(name)} ' + ' '.join(f'{v:.8f}' for v in values))
        label = root / 'labels' / split / f'{i}.txt'
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text('\n'.join(lines) + '\n')
    (root / 'data.yaml').write_text('path: /elsewhere\ntrain: images/train\nval: images/val\nnames: [ball, brick]\n')
    return root


def labelme(root, number=6):
    """*.jpg with *.json: the ball as a polygon, the brick as a rectangle."""
    for i, boxes in enumerate(scenes(number)):
        picture(root / f'{i}.jpg', boxes, seed=i)
        shapes = []
        for name, (left, top, right, bottom) in boxes:
            if name == 'ball':
                points, kind = [[left, top], [right, top], [right, bottom], [left, bottom]], 'polygon'
            else:
                points, kind = [[right, bottom], [left, top]], 'rectangle'
            shapes.append(dict(label=name, points=points, shape_type=kind, group_id=None, flags={}))
        content = dict(shapes=shapes, imagePath=f'{i}.jpg', imageData=None, imageWidth=SIZE[0], imageHeight=SIZE[1])
        (root / f'{i}.json').write_text(json.dumps(content))
    return root


def coco(root, number=6, classes=CLASSES, held_out=2):
    """annotations/{train,val}.json and images/*.jpg, as the BCCD of docs/real-data.md."""
    parts = dict(train=([], []), val=([], []))
    for i, boxes in enumerate(scenes(number)):
        picture(root / 'images' / f'{i}.jpg', boxes, seed=i)
        images, annotations = parts['val' if i >= number - held_out else 'train']
        images.append(dict(id=i + 1, file_name=f'{i}.jpg', width=SIZE[0], height=SIZE[1]))
        for name, (left, top, right, bottom) in boxes:
            box = [left, top, right - left, bottom - top]
            item = dict(id=2 * i + CLASSES.index(name) + 1, image_id=i + 1, category_id=CLASSES.index(name) + 1)
            annotations.append(dict(item, bbox=box, area=box[2] * box[3], iscrowd=0))
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    categories = [dict(id=i, name=name) for i, name in enumerate(classes, 1)]
    for split, (images, annotations) in parts.items():
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(content))
    return root


def index_map(boxes):
    """Label map of a scene: 0 is the ground, 1 and 2 the classes."""
    found = np.zeros(SIZE[::-1], dtype=np.uint8)
    for name, (left, top, right, bottom) in boxes:
        found[top:bottom, left:right] = 1 + CLASSES.index(name)
    return found


def masks(root, number=6, coloured=False, split=True, folder='masks'):
    """images/{train,val}/*.jpg and masks/{train,val}/*.png, of class numbers or of colours."""
    for i, boxes in enumerate(scenes(number)):
        part = ('val' if i % 3 == 2 else 'train') if split else ''
        picture(root / 'images' / part / f'{i}.jpg', boxes, seed=i)
        path = root / folder / part / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        label_map = index_map(boxes)
        if coloured:
            label_map = np.array(list(COLOURS.values()), dtype=np.uint8)[label_map]
        Image.fromarray(label_map).save(path)
    return root


def folders(root, number=5):
    """CLASS/*.jpg."""
    for c, name in enumerate(CLASSES):
        for i in range(number):
            picture(root / name / f'{i}.jpg', [(name, (20, 10, 60, 50))], seed=100 * c + i)
    return root
