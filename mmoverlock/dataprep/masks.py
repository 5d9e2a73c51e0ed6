"""Label maps: a picture of class numbers or of colours for every picture."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np

from ..cli import UserError
from ..datacheck import list_files
from .pictures import Pictures
from .samples import Classes, Sample

IGNORE = 255
SPLIT_FOLDERS = dict(
    train='train', training='train', val='val', valid='val', validation='val', test='test', testing='test'
)


@dataclass
class Coding:
    """How a label map says its classes.

    Args:
        names (list[str]): Classes.
        values (dict[int, int]): Value in the label map (grey, or ``red << 16 | green << 8 | blue``) to class number.
        colours (list[tuple[int, int, int]], optional): Colour of each class, where the maps are coloured.
    """

    names: List[str]
    values: Dict[int, int]
    colours: Optional[List[Tuple[int, int, int]]] = None


def parse_classes(lines: List[str]) -> List[Tuple[str, Tuple[int, ...]]]:
    """Names of classes, each with a colour, a grey value or nothing.

    Known are ``name``, ``name 3``, ``name 64 0 128``, ``64 0 128 name``, with blanks, tabs, commas or, as CVAT writes
    it, colons between them, and a heading.

    Args:
        lines (list[str]): Lines of a file.

    Returns:
        list[tuple[str, tuple[int, ...]]]: Name and zero, one or three numbers.
    """
    found = []
    for line in lines:
        words = [w for w in re.split(r'[\s,:;]+', line.strip()) if w]
        if not words or words[0].startswith('#') or [w.lower() for w in words[1:4]] == ['r', 'g', 'b']:
            continue
        numbers = [bool(re.fullmatch(r'\d{1,3}', w)) for w in words]
        if len(words) > 3 and all(numbers[:3]):
            found.append((' '.join(words[3:]), tuple(map(int, words[:3]))))
        elif len(words) > 3 and all(numbers[-3:]):
            found.append((' '.join(words[:-3]), tuple(map(int, words[-3:]))))
        elif len(words) > 1 and numbers[-1]:
            found.append((' '.join(words[:-1]), (int(words[-1]),)))
        else:
            found.append((' '.join(words), ()))
    return found


def read(source: Path, options, classes: Classes, problems) -> List[Sample]:
    """Read a folder of pictures and a folder of label maps with the same names.

    Folders ``train``, ``val`` and ``test`` in both are the split.

    Args:
        source (Path): The folder.
        options (Options): ``images`` and ``labels`` name its folders, by default ``images`` and ``masks``, ``labels``
            or ``annotations``; ``label_suffix`` is what follows a picture's name in its map's.
        classes (Classes): The class names.
        problems (Problems): Gets what is wrong.

    Returns:
        list[Sample]: Pictures with label maps, which are decoded when they are written.
    """
    folder = options.folder(source, options.labels, 'masks', 'labels', 'annotations')
    pictures = Pictures(options.folder(source, options.images, 'images'), problems)
    files = [folder / name for name in list_files(str(folder), [options.label_suffix])]
    if not files:
        raise UserError(
            f'no label map *{options.label_suffix} below {folder}: name the folder with --labels, the ending '
            'with --label-suffix'
        )
    pairs = []
    for file in files:
        name = file.relative_to(folder).as_posix()[: -len(options.label_suffix)]
        if file in pictures.all and folder != pictures.folder:
            continue
        if pictures.folder == folder and name not in pictures.by_stem:
            continue
        picture = pictures.of_label(file, [name])
        if picture is not None:
            pairs.append((picture, file))
    if folder == pictures.folder:  # the maps lie among the pictures, and are not labelled themselves
        pictures.used.update(files)
    coding = find_coding([file for _, file in pairs], options, problems)
    classes.given = coding.names
    classes.colours = coding.colours
    samples = []
    for picture, file in pairs:
        label_map = _checked(picture, file, coding, classes.ignored, problems)
        if label_map is not None:
            sample = Sample(picture, pictures.name(picture.path), label_map=label_map)
            samples.append(_with_split(sample))
    pictures.unlabelled(False, problems)
    kept = [name for name in coding.names if name not in classes.ignored]
    classes.met += kept
    return samples


def _with_split(sample: Sample) -> Sample:
    first, _, rest = sample.name.partition('/')
    if rest and first.lower() in SPLIT_FOLDERS:
        sample.split, sample.name = SPLIT_FOLDERS[first.lower()], rest
    return sample


def codes_of(path: Path) -> Tuple[np.ndarray, bool]:
    """The values of a label map.

    Args:
        path (Path): The file.

    Returns:
        tuple[np.ndarray, bool]: (H, W) int32 values, and whether they are colours (``red << 16 | green << 8 | blue``).

    Raises:
        OSError: If it cannot be decoded.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.mode in ('L', 'P', '1', 'I', 'I;16'):
            return np.asarray(image).astype(np.int32), False
        rgb = np.asarray(image.convert('RGB')).astype(np.int32)
    if (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all():
        return rgb[..., 0], False
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2], True


def find_coding(files: List[Path], options, problems) -> Coding:
    """What the values of label maps mean: as the list of classes says, else as the maps show.

    Args:
        files (list[Path]): Label maps.
        options (Options): ``class_lines``: the list of classes, if there is one.
        problems (Problems): Gets remarks.

    Returns:
        Coding: Names and values.

    Raises:
        UserError: If the list does not fit the maps.
    """
    listed = parse_classes(options.class_lines) if options.class_lines else []
    kinds = {len(numbers) for _, numbers in listed}
    if len(kinds) > 1:
        bare = next(name for name, numbers in listed if len(numbers) != max(kinds))
        raise UserError(f"--classes: '{bare}' has no colour or value, others have one: give it to all or to none")
    names = [name for name, _ in listed]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled and kinds == {3}:
        problems.note(f'classes of several colours: {", ".join(sorted(doubled))}')
        names = list(dict.fromkeys(names))
    elif doubled:
        raise UserError(f'--classes: {", ".join(sorted(doubled))} twice: each class once')
    if kinds == {3}:
        colours = {name: numbers for name, numbers in reversed(listed)}
        values = {r << 16 | g << 8 | b: names.index(name) for name, (r, g, b) in listed}
        if len(values) < len(listed):
            raise UserError('--classes: two classes have one colour: give each its own')
        return Coding(names, values, [colours[name] for name in names])
    if kinds == {1}:
        return Coding(names, {numbers[0]: names.index(name) for name, numbers in listed})

    met, coloured = _values_met(files)
    if coloured:
        raise UserError(
            f'{coloured} is coloured: say which colour is which class, with --classes FILE of lines like '
            '"road 128 64 128"'
        )
    if met <= {0, IGNORE} and IGNORE in met and (not names or len(names) == 2):
        problems.note('label maps of 0 and 255 alone: taken as two classes, not as "ignore"')
        return Coding(names or ['background', 'foreground'], {0: 0, IGNORE: 1})
    if not names:
        names = [f'class_{i}' for i in range(max(met - {IGNORE}, default=-1) + 1)]
        problems.note(f'no --classes: called {", ".join(names[:3])}...')
    return Coding(names, {i: i for i in range(len(names))})


def _values_met(files: List[Path]):
    """All values of the label maps, and the first map that is coloured."""
    met = set()
    for file in files:
        try:
            values, coloured = codes_of(file)
        except Exception:  # told when it is its turn
            continue
        if coloured:
            return met, file
        met |= set(np.unique(values).tolist())
    return met, None


def _checked(picture, file: Path, coding: Coding, ignored, problems):
    """A function that gives the label map, or None, and a problem is noted, where it cannot be used."""
    try:
        values, coloured = codes_of(file)
    except Exception as error:  # each format fails in its own way
        problems.add(file, f'is broken or no picture ({error}): copy it again')
        return None
    size = values.shape[1::-1]
    if size != picture.size:
        if size != picture.stored:
            problems.add(
                file,
                f'is {size[0]}x{size[1]}, its picture {picture.size[0]}x{picture.size[1]}: make them of one size',
            )
            return None
        picture.untag = True
        problems.note('pictures turned by an EXIF tag, labelled before turning: the tag is dropped from the copy')
    if coding.colours is not None and not coloured:  # grey, black and white are colours too
        values = values * 0x010101
    present = set(np.unique(values).tolist())
    unknown = sorted(present - set(coding.values) - ({IGNORE} if coding.colours is None else set()))
    if unknown:
        at = np.argwhere(values == unknown[0])[0]
        shown = f'{unknown[0] >> 16} {unknown[0] >> 8 & 255} {unknown[0] & 255}' if coding.colours else f'{unknown[0]}'
        what = 'colour' if coding.colours else 'value'
        cure = f'add it to --classes (and to --ignore if it is no class; {len(coding.names)} are listed)'
        if len(unknown) > 20:
            cure = 'label maps must not be JPEG, smoothed or resized: export them again as PNG'
        problems.add(file, f'{len(unknown)} unknown {what}s, the first is {shown} at x={at[1]}, y={at[0]}: {cure}')
        return None
    return partial(_decode, file, coding, frozenset(ignored))


def _decode(file: Path, coding: Coding, ignored) -> np.ndarray:
    """The (H, W) uint8 label map of a file."""
    values, coloured = codes_of(file)
    if coding.colours is not None and not coloured:
        values = values * 0x010101
    kept = [name for name in coding.names if name not in ignored]
    label_map = np.full(values.shape, IGNORE, dtype=np.uint8)
    for value, number in coding.values.items():
        if coding.names[number] not in ignored:
            label_map[values == value] = kept.index(coding.names[number])
    return label_map
