"""YOLO: a text file a picture, with boxes or outlines in fractions of it."""

from pathlib import Path
from typing import List, Optional, Tuple

from ..cli import UserError
from .pictures import Pictures
from .samples import Classes, Instance, Sample, check_box, check_outline

SPLITS = ('train', 'val', 'test')


def read(source: Path, options, classes: Classes, problems) -> List[Sample]:
    """Read a folder of YOLO labels.

    ``data.yaml`` gives the names of the classes and, where it names a training and a validation folder, the split. The
    labels of ``.../images/a.jpg`` are in ``.../labels/a.txt``; without such folders, beside the pictures.

    Args:
        source (Path): The folder.
        options (Options): ``images`` and ``labels`` name its folders where they are called otherwise.
        classes (Classes): The class names; those of ``data.yaml`` where none are given.
        problems (Problems): Gets what is wrong.

    Returns:
        list[Sample]: Pictures with boxes, and with outlines where the labels have them.
    """
    data = _data_yaml(source)
    names = _names(source, data, classes)
    if classes.given is None:
        classes.given = list(names)
    samples = []
    for split, images, labels in _folders(source, data, options):
        pictures = Pictures(images, problems)
        used = set()
        for path in pictures.all:
            label = labels / f'{pictures.name(path)}.txt'
            if not label.is_file():
                continue
            used.add(label)
            if len(pictures.by_stem[pictures.name(path)]) > 1:
                problems.add(path, f'another picture has the same name, and {label.name} can be of one: rename it')
                pictures.used.add(path)
                continue
            picture = pictures.usable(path)
            if picture is not None:
                if picture.orientation != 1:
                    problems.note('pictures turned by an EXIF tag: labels are taken to be for the upright picture')
                before = len(problems.found)
                instances = _read_file(label, picture.size, names, classes, problems)
                damaged = len(problems.found) > before
                samples.append(Sample(picture, pictures.name(path), split, instances, damaged=damaged))
        for label in sorted(set(labels.rglob('*.txt')) - used):
            if (
                label.name not in ('classes.txt', 'train.txt', 'val.txt', 'test.txt')
                and 'readme' not in label.name.lower()
            ):
                problems.add(label, f'no picture {label.stem} below {images}: add it, or remove the label')
        samples += [Sample(p, pictures.name(p.path), split) for p in pictures.unlabelled(options.empty_ok, problems)]
    return samples


def _data_yaml(source: Path) -> dict:
    files = [f for f in (source / 'data.yaml', source / 'dataset.yaml', *sorted(source.glob('*.y*ml'))) if f.is_file()]
    if not files:
        return {}
    import yaml

    try:
        data = yaml.safe_load(files[0].read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f'{files[0]} is no YAML: {str(error).splitlines()[0]}') from error
    if not isinstance(data, dict):
        raise UserError(f'{files[0]} has no "names:": it is no description of a YOLO data set')
    return data


def _names(source: Path, data: dict, classes: Classes) -> List[str]:
    """Class names by their number in the labels."""
    names = data.get('names')
    if isinstance(names, dict):
        try:
            numbers = sorted(int(k) for k in names)
        except ValueError as error:
            raise UserError(f'data.yaml: "names:" is to go from number to name ({error})') from error
        if numbers != list(range(len(numbers))):
            raise UserError(f'data.yaml: the numbers of "names:" are to be 0 to {len(numbers) - 1}, but are {numbers}')
        names = [names[k] for k in sorted(names, key=int)]
    if not names and (source / 'classes.txt').is_file():
        names = [line.strip() for line in (source / 'classes.txt').read_text().splitlines() if line.strip()]
    if not names:
        names = classes.given
    if not names:
        raise UserError(
            f'{source} has neither a data.yaml with "names:" nor a classes.txt: give the names by --classes'
        )
    if data.get('nc') not in (None, len(names)):
        raise UserError(f'data.yaml: "nc: {data["nc"]}", but {len(names)} names: correct one of them')
    return [str(name) for name in names]


def _folders(source: Path, data: dict, options) -> List[Tuple[Optional[str], Path, Path]]:
    """Split, folder of pictures and folder of labels, of each part."""
    if options.images or options.labels:
        images = options.folder(source, options.images, 'images')
        return [(None, images, options.folder(source, options.labels, 'labels'))]
    found = []
    for split in SPLITS:
        entry = data.get(split) or (data.get('valid') if split == 'val' else None)
        for item in entry if isinstance(entry, list) else [entry]:
            if item and not str(item).endswith('.txt'):
                found.append((split, _resolve(source, data.get('path'), str(item), split)))
    if not found:
        for split, names in (('train', ('train',)), ('val', ('val', 'valid')), ('test', ('test',))):
            places = [p for n in names for p in (source / 'images' / n, source / n / 'images') if p.is_dir()]
            found += [(split, place) for place in places[:1]]
    if not found:
        found = [(None, options.folder(source, None, 'images'))]
    return [(split, images, _labels_of(images)) for split, images in found]


def _resolve(source: Path, root, item: str, split: str) -> Path:
    """A folder that data.yaml names: ``path`` and the folder were often written on another machine."""
    tail = item.replace('\\', '/').lstrip('./')
    places = [source / tail, Path(item), source / item]
    if root:
        places += [source / str(root) / item, Path(str(root)) / item]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f'data.yaml: no folder {item} for "{split}:" in {source}: correct it, or name --images and --labels'
    )


def _labels_of(images: Path) -> Path:
    """As YOLO finds them: the last ``images`` in the path becomes ``labels``."""
    parts = list(images.parts)
    if 'images' in parts:
        at = len(parts) - 1 - parts[::-1].index('images')
        parts[at] = 'labels'
        if Path(*parts).is_dir():
            return Path(*parts)
    return images


def _read_file(file: Path, size, names: List[str], classes: Classes, problems) -> List[Instance]:
    width, height = size
    instances = []
    try:
        lines = file.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.add(file, f'is no text ({error}): write it again')
        return []
    for number, line in enumerate(lines, 1):
        words, where = line.split(), f'{file}:{number}'
        if not words:
            continue
        try:
            values = [float(w) for w in words]
        except ValueError:
            problems.add(where, f"'{line.strip()[:60]}' is not of numbers: a class number and a box or an outline")
            continue
        if not values[0].is_integer() or not 0 <= values[0] < len(names):
            problems.add(where, f'class number {words[0]}, but the names go from 0 to {len(names) - 1}: correct it')
            continue
        is_box = len(values) == 5
        if not is_box and (len(values) < 7 or len(values) % 2 == 0):
            problems.add(where, f'{len(values)} numbers: 5 make a box, 7 or more (an odd number) an outline')
            continue
        label = classes.take(names[int(values[0])], where)
        if label is None:
            continue
        if max(map(abs, values[1:])) > 2:
            problems.add(where, 'are these pixels? YOLO labels are fractions of width and height, 0 to 1')
            continue
        if is_box:
            x, y, w, h = values[1] * width, values[2] * height, values[3] * width, values[4] * height
            box = check_box((x - w / 2, y - h / 2, x + w / 2, y + h / 2), size, where, problems)
            outline = None
        else:
            points = [v * (height if i % 2 else width) for i, v in enumerate(values[1:])]
            outline, box = check_outline([points], size, where, problems) or (None, None)
        if box is not None:
            instances.append(Instance(label, box, outline))
    return instances
