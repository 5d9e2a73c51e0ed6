"""Pascal VOC: an XML file a picture."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Dict, List

from ..cli import UserError
from .pictures import Pictures, match_size
from .samples import Classes, Instance, Sample, check_box

SPLITS = ('train', 'val', 'test')


def read(source: Path, options, classes: Classes, problems) -> List[Sample]:
    """Read a folder of VOC annotations.

    ``ImageSets/Main/{train,val,test}.txt``, where they are, say which picture is in which split.

    Args:
        source (Path): The folder.
        options (Options): ``images`` and ``labels`` name its folders, by default ``JPEGImages`` and ``Annotations``, or
            the folder itself where these are not there.
        classes (Classes): The class names.
        problems (Problems): Gets what is wrong.

    Returns:
        list[Sample]: Pictures with boxes.
    """
    labels = options.folder(source, options.labels, 'Annotations')
    files = sorted(labels.rglob('*.xml'))
    if not files:
        raise UserError(f'no .xml file below {labels}: name the folder of labels with --labels')
    pictures = Pictures(options.folder(source, options.images, 'JPEGImages', 'images'), problems)
    splits = _splits(source / 'ImageSets' / 'Main')
    samples, claimed = [], {}
    for file in files:
        sample = _read_file(file, pictures, classes, problems, file.relative_to(labels).with_suffix('').as_posix())
        if sample is None:
            continue
        if sample.picture.path in claimed:
            problems.add(file, f'is for the same picture as {claimed[sample.picture.path].name}: remove one of them')
            continue
        claimed[sample.picture.path] = file
        sample.split = splits.get(Path(sample.name).name)
        samples.append(sample)
    if splits and any(s.split is None for s in samples):
        problems.note('pictures that ImageSets/Main does not name: the whole data set is split anew')
        for sample in samples:
            sample.split = None
    return samples + [
        Sample(p, pictures.name(p.path), splits.get(p.path.stem))
        for p in pictures.unlabelled(options.empty_ok, problems)
    ]


def _splits(folder: Path) -> Dict[str, str]:
    """Picture name to split."""
    found = {}
    for split in SPLITS:
        listed = folder / f'{split}.txt'
        if listed.is_file():
            found.update((line.split()[0], split) for line in listed.read_text().splitlines() if line.strip())
    return found if {'train', 'val'} <= set(found.values()) else {}


def _read_file(file: Path, pictures: Pictures, classes: Classes, problems, name: str):
    pictures.claim(name)
    try:
        content = file.read_bytes()
        if b'<!DOCTYPE' in content or b'<!ENTITY' in content:  # entities can grow without bound
            problems.add(file, 'declares a document type, which no VOC label does: remove that line')
            return None
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        line, column = error.position
        problems.add(f'{file}:{line}', f'is no XML from column {column} on ({error}): write it again')
        return None
    except OSError as error:
        problems.add(file, f'cannot be read ({error.strerror})')
        return None

    # The label's own name first: editors keep the name that the picture had when it was opened, and people rename both.
    written = (root.findtext('filename') or '').strip()
    picture = pictures.of_label(file, [name, *([written] if written else [])])
    if picture is None:
        return None
    try:
        size = int(root.findtext('size/width') or 0), int(root.findtext('size/height') or 0)
    except ValueError:
        problems.add(file, 'has no numbers in <size>: write the width and height of the picture there')
        return None
    if any(size):
        if not match_size(picture, size, file, problems):
            return None
    else:
        problems.note('labels without a size of the picture: taken to fit')

    sample, before = Sample(picture, pictures.name(picture.path)), len(problems.found)
    for i, node in enumerate(root.findall('object')):
        where = f'{file}: object {i + 1}'
        label = classes.take(node.findtext('name'), where)
        if label is None:
            continue
        try:
            left, top, right, bottom = (float(node.findtext(f'bndbox/{k}')) for k in ('xmin', 'ymin', 'xmax', 'ymax'))
        except (TypeError, ValueError):
            problems.add(where, 'has no box of four numbers xmin, ymin, xmax, ymax: label it again')
            continue
        # VOC counts pixels from 1 and includes the last one.
        box = check_box((left - 1, top - 1, right, bottom), picture.labelled_size, where, problems)
        if box is None:
            continue
        difficult = (node.findtext('difficult') or '0').strip() == '1'
        if difficult:
            problems.note('objects marked difficult: neither trained on nor counted as missed')
        sample.instances.append(Instance(label, box, ignore=difficult))
    sample.damaged = len(problems.found) > before
    return sample
