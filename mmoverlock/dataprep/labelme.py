"""LabelMe: a JSON file a picture, with polygons, rectangles, circles and masks."""

import base64
import io
import json
import math
from pathlib import Path
from typing import List

import numpy as np

from ..cli import UserError
from .pictures import Pictures, match_size
from .samples import Classes, Instance, Sample, check_box, check_outline

#: Labels with which LabelMe's users mark what is nothing, and what is not to be looked at.
BACKGROUND, IGNORE = '_background_', '__ignore__'
CIRCLE_POINTS = 64


def read(source: Path, options, classes: Classes, problems) -> List[Sample]:
    """Read a folder of LabelMe files.

    Shapes of one class with one ``group_id`` are parts of one object.

    Args:
        source (Path): The folder.
        options (Options): ``images`` and ``labels`` name its folders where they are apart.
        classes (Classes): The class names.
        problems (Problems): Gets what is wrong.

    Returns:
        list[Sample]: Pictures with objects and their outlines.
    """
    labels = options.folder(source, options.labels)
    files = sorted(labels.rglob('*.json'))
    if not files:
        raise UserError(f'no .json file below {labels}: name the folder of labels with --labels')
    pictures = Pictures(options.folder(source, options.images), problems)
    samples, claimed = [], {}
    for file in files:
        name = file.relative_to(labels).with_suffix('').as_posix()
        sample = _read_file(file, name, pictures, classes, problems, options.task == 'segmentation')
        if sample is not None and sample.picture.path in claimed:
            problems.add(file, f'is for the same picture as {claimed[sample.picture.path].name}: remove one of them')
        elif sample is not None:
            claimed[sample.picture.path] = file
            samples.append(sample)
    return samples + [Sample(p, pictures.name(p.path)) for p in pictures.unlabelled(options.empty_ok, problems)]


def _read_file(file: Path, name: str, pictures: Pictures, classes: Classes, problems, semantic: bool):
    pictures.claim(name)
    try:
        data = json.loads(file.read_text(encoding='utf-8'))
        shapes = data['shapes']
        assert isinstance(shapes, list)
    except json.JSONDecodeError as error:
        problems.add(f'{file}:{error.lineno}', f'is no JSON ({error.msg}): save it again in LabelMe')
        return None
    except (OSError, UnicodeDecodeError, KeyError, TypeError, AssertionError):
        problems.add(file, 'has no list "shapes": it is no LabelMe file; remove it or save it again in LabelMe')
        return None
    written = str(data.get('imagePath') or '').replace('\\', '/').split('/')[-1]
    picture = pictures.of_label(file, [name, *([written] if written else [])])
    if picture is None:
        return None
    try:
        size = int(data.get('imageWidth') or 0), int(data.get('imageHeight') or 0)
    except (TypeError, ValueError):
        size = (0, 0)
    if any(size) and not match_size(picture, size, file, problems):
        return None

    sample, parts, before = Sample(picture, pictures.name(picture.path)), {}, len(problems.found)
    for i, shape in enumerate(shapes):
        where = f'{file}: shape {i + 1}'
        label = shape.get('label') if isinstance(shape, dict) else None
        if label == IGNORE or label == BACKGROUND:
            if not semantic:
                continue
        else:
            label = classes.take(label, where)
        if label is None:
            continue
        outline, box = _outline(shape, picture.labelled_size, where, problems) or (None, None)
        if box is None:
            continue
        group, first = shape.get('group_id'), None
        if group is not None and isinstance(outline, list):
            first = parts.get((label, group))
        if first is not None:
            first.outline = [*first.outline, *outline]
            corners = np.array([first.box, box])
            first.box = (*corners[:, :2].min(0).tolist(), *corners[:, 2:].max(0).tolist())
            continue
        sample.instances.append(Instance(label, box, outline))
        if group is not None and isinstance(outline, list):
            parts[label, group] = sample.instances[-1]
    sample.damaged = len(problems.found) > before
    return sample


def _outline(shape: dict, size, where, problems):
    """Polygons or run lengths of a shape, and its box."""
    kind = shape.get('shape_type') or 'polygon'
    try:
        points = np.asarray(shape['points'], dtype=float).reshape(-1, 2)
    except (KeyError, TypeError, ValueError):
        problems.add(where, 'has no list of points: label it again')
        return None
    if not np.isfinite(points).all():
        problems.add(where, 'has points that are not finite numbers: label it again')
        return None
    if kind == 'mask':
        return _mask(shape, points, size, where, problems)
    if kind in ('rectangle', 'circle') and len(points) != 2:
        problems.add(where, f'is a {kind} of {len(points)} points in place of 2: label it again')
        return None
    if kind == 'rectangle':
        (left, top), (right, bottom) = points.min(0), points.max(0)
        points = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    elif kind == 'circle':
        turn = np.arange(CIRCLE_POINTS) * 2 * math.pi / CIRCLE_POINTS
        radius = np.linalg.norm(points[1] - points[0])
        # A circle is drawn by its centre and may pass over the edge of the picture.
        points = (points[0] + radius * np.stack([np.cos(turn), np.sin(turn)], 1)).clip(0, size)
    elif kind != 'polygon':
        problems.add(where, f'is a {kind}, which covers no area: draw a polygon, or remove it')
        return None
    return check_outline([points.ravel().tolist()], size, where, problems)


def _mask(shape: dict, points, size, where, problems):
    """A shape that was painted: a small picture at its place."""
    from PIL import Image
    from pycocotools import mask as coco_mask

    try:
        part = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape['mask'])))) > 0
        left, top = (int(v) for v in points[0])
    except Exception:  # base64, PNG, missing: each fails in its own way
        problems.add(where, 'is a mask that cannot be decoded: save it again in LabelMe')
        return None
    width, height = size
    if left < 0 or top < 0 or left + part.shape[1] > width + 1 or top + part.shape[0] > height + 1 or not part.any():
        problems.add(where, 'is a mask that is empty or reaches out of the picture: label it again')
        return None
    whole = np.zeros((height, width), dtype=np.uint8)
    target = whole[top : top + part.shape[0], left : left + part.shape[1]]
    target[:] = part[: target.shape[0], : target.shape[1]]
    runs = coco_mask.encode(np.asfortranarray(whole))
    x, y, w, h = coco_mask.toBbox(runs).tolist()
    box = check_box((x, y, x + w, y + h), size, where, problems)
    return None if box is None else (dict(size=[height, width], counts=runs['counts'].decode()), box)


def paint(sample: Sample, numbers: dict, background: int) -> np.ndarray:
    """The label map of a picture: its objects in their order, later ones over earlier.

    Args:
        sample (Sample): A picture with outlines.
        numbers (dict[str, int]): Class name to number.
        background (int): What pixels of no object get.

    Returns:
        np.ndarray: (H, W) uint8.
    """
    from PIL import Image, ImageDraw

    width, height = sample.picture.labelled_size
    image = Image.new('L', (width, height), background)
    draw = ImageDraw.Draw(image)
    for instance in sample.instances:
        value = {IGNORE: 255, BACKGROUND: background}.get(instance.label, numbers.get(instance.label))
        if isinstance(instance.outline, dict):
            from pycocotools import mask as coco_mask

            image.paste(value, mask=Image.fromarray(coco_mask.decode(instance.outline) * 255))
            continue
        for polygon in instance.outline:
            draw.polygon(polygon, fill=value)
    return np.asarray(image)
