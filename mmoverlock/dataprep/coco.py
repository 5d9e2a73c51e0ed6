"""COCO: boxes and masks in one JSON file a split."""

import json
from pathlib import Path
from typing import List, Optional

from ..cli import UserError
from .pictures import Pictures, match_size
from .samples import Classes, Instance, Sample, check_box, check_outline


def read(source: Path, options, classes: Classes, problems) -> List[Sample]:
    """Read annotation files of COCO's form.

    A file with 'train', 'val' or 'test' in its name is that split.

    Args:
        source (Path): The folder.
        options (Options): ``labels`` names the folder of annotation files, or one file, by default ``annotations`` or
            the folder itself; ``images`` the folder of pictures, by default ``images`` or the folder itself.
        classes (Classes): The class names.
        problems (Problems): Gets what is wrong.

    Returns:
        list[Sample]: Pictures with boxes, and with masks where the file has them.
    """
    place = options.folder(source, options.labels, 'annotations')
    files = [place] if place.is_file() else sorted(place.glob('*.json'))
    if not files:
        raise UserError(f'no .json file in {place}: name the folder or the file with --labels')
    pictures = Pictures(options.folder(source, options.images, 'images'), problems)
    samples, claimed, listed = [], {}, []
    for file in files:
        for sample in _read_file(file, pictures, classes, problems, listed):
            if sample.picture.path in claimed:
                problems.add(
                    file, f'lists {sample.picture.path.name}, as {claimed[sample.picture.path]} does: keep one'
                )
            else:
                claimed[sample.picture.path] = file.name
                samples.append(sample)
    # In COCO's form a picture shows nothing when it is listed without instances: one that is not listed is no part.
    left = sum(path not in pictures.used for path in pictures.all)
    if left:
        problems.note(f'pictures that no annotation file lists, left out: {left}')
    if classes.given is None:  # in the order of the file, without those that have no object
        classes.given = [name for name in dict.fromkeys(listed) if name in classes.met]
    return samples


def _split(file: Path) -> Optional[str]:
    return next((split for split in ('train', 'val', 'test') if split in file.stem.lower()), None)


def _read_file(file: Path, pictures: Pictures, classes: Classes, problems, listed: list) -> List[Sample]:
    try:
        data = json.loads(file.read_text(encoding='utf-8'))
        images, annotations = data['images'], data['annotations']
        names = {c['id']: str(c['name']).strip() for c in data['categories']}
        listed += [names[key] for key in sorted(names)]
    except json.JSONDecodeError as error:
        raise UserError(f'{file}:{error.lineno}: is no JSON ({error.msg}): copy it again') from error
    except (OSError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f'{file} is no COCO annotation file (no {error}): remove it, or name another by --labels'
        ) from error
    samples = {}
    for info in images:
        where = f'{file}: image {info.get("id")}'
        picture = pictures.of_label(where, [str(info.get('file_name', ''))])
        if picture is None:
            samples[info.get('id')] = None  # named already
            continue
        size = info.get('width'), info.get('height')
        if all(size) and not match_size(picture, size, where, problems):
            samples[info['id']] = None
            continue
        samples[info['id']] = Sample(picture, pictures.name(picture.path), _split(file))
    for item in annotations:
        where = f'{file}: annotation {item.get("id")}'
        if item.get('image_id') not in samples:
            problems.add(where, f'is for image {item.get("image_id")}, which is not listed: remove it')
            continue
        sample = samples[item['image_id']]
        if sample is None:
            continue
        before = len(problems.found)
        if item.get('category_id') in names:
            label = classes.take(names[item['category_id']], where)
            instance = label and _instance(item, label, sample.picture.labelled_size, where, problems)
            if instance:
                sample.instances.append(instance)
        else:
            problems.add(where, f'is of category {item.get("category_id")}, which is not listed: correct it')
        sample.damaged |= len(problems.found) > before
    return [s for s in samples.values() if s is not None]


def _instance(item: dict, label: str, size, where, problems) -> Optional[Instance]:
    crowd, outline = bool(item.get('iscrowd')), item.get('segmentation')
    try:
        x, y, w, h = item['bbox']
        box = check_box((x, y, x + w, y + h), size, where, problems)
    except (KeyError, TypeError, ValueError):
        problems.add(where, 'has no "bbox" of four numbers x, y, width, height: add it')
        return None
    if box is None:
        return None
    if isinstance(outline, list) and outline:
        checked = check_outline(outline, size, where, problems)
        if checked is None:
            return None
        outline = checked[0]
    elif isinstance(outline, dict):
        if list(outline.get('size', ())) != [size[1], size[0]]:
            problems.add(where, f'has a mask of size {outline.get("size")}, the picture is {size[0]}x{size[1]}')
            return None
    else:
        outline = None
    return Instance(label, box, outline, ignore=crowd)
