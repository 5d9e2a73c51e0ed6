"""Pictures as the pipelines of mmdet, mmseg and mmpretrain will read them.

They decode with OpenCV: 8 bit, three channels, turned as the EXIF tag says. Label maps are read with Pillow, which does
not turn them.
"""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from ..datacheck import IMAGE_SUFFIXES, list_files

ORIENTATION = 0x0112  # the EXIF tag
#: Files taken for pictures. Those that mmpretrain and mmdet would not list are written anew as PNG.
SUFFIXES = (*IMAGE_SUFFIXES, '.tiff', '.webp', '.gif', '.heic', '.avif', '.jp2')


@dataclass
class Picture:
    """A picture file that was decoded once.

    Args:
        path (Path): The file.
        size (tuple[int, int]): Width and height in pixels, upright.
        stored (tuple[int, int]): Width and height before the EXIF tag is obeyed.
        orientation (int): The EXIF tag: 1 is upright. Defaults to 1.
        rewrite (bool): Whether its format is not one that the pipelines list. Defaults to False.
        untag (bool): Whether the labels are for the pixels as stored: the EXIF tag is then dropped. Defaults to False.
        digest (str): Of the file's bytes.
        problem (str): Why it cannot be used, or nothing.
        note (str): What to know about it, or nothing.
    """

    path: Path
    size: Tuple[int, int] = (0, 0)
    stored: Tuple[int, int] = (0, 0)
    orientation: int = 1
    rewrite: bool = False
    untag: bool = False
    digest: str = ''
    problem: str = ''
    note: str = ''

    @property
    def labelled_size(self) -> Tuple[int, int]:
        """Width and height that the labels are for."""
        return self.stored if self.untag else self.size


def inspect(path: Path) -> Picture:
    """Decode a picture and say what the pipelines would make of it.

    Args:
        path (Path): The file.

    Returns:
        Picture: With ``problem`` set where it cannot be used.
    """
    from PIL import Image

    picture = Picture(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        picture.problem = f'cannot be read ({error.strerror})'
        return picture
    if not content:
        picture.problem = 'the picture is empty (0 bytes): copy it again, or remove it with its label'
        return picture
    picture.digest = hashlib.sha1(content).hexdigest()
    try:
        with Image.open(path) as image:
            picture.stored = picture.size = image.size
            picture.orientation = image.getexif().get(ORIENTATION, 1)
            mode, frames = image.mode, getattr(image, 'n_frames', 1)
            deep = _is_deep(image, content)
            image.load()
    except Image.DecompressionBombError as error:
        picture.problem = f'the picture is too large to be safe ({error}): make it smaller'
        return picture
    except Exception as error:  # each format fails in its own way
        picture.problem = f'is broken or no picture ({error}): copy it again, or remove it with its label'
        return picture
    if picture.orientation in (5, 6, 7, 8):
        picture.size = picture.stored[::-1]
    if deep:
        picture.problem = (
            f'has more than 8 bits a channel (mode {mode}), of which training would see the upper 8 alone: '
            'bring all pictures to 8 bit by one and the same scale first'
        )
    elif mode == 'CMYK':
        picture.note = 'CMYK pictures: read as RGB, without their colour profile'
    elif 'A' in mode:
        picture.note = 'transparent pictures: transparency is dropped, the colours beneath it are seen'
    picture.rewrite = path.suffix.lower() not in IMAGE_SUFFIXES or frames > 1
    return picture


def _is_deep(image, content: bytes) -> bool:
    """Whether a channel has more than 8 bits; Pillow reduces a 48-bit PNG without a word."""
    if image.mode.startswith(('I', 'F')):
        return True
    if image.format == 'PNG':
        return content[24] == 16  # bit depth in the header
    if image.format == 'TIFF':
        return max(image.tag_v2.get(258, (8,))) > 8  # BitsPerSample
    return False


class Pictures:
    """The pictures below a folder, decoded once, on all cores.

    Args:
        folder (Path): Where to look, at any depth.
        problems (Problems): Gets those that cannot be used.
    """

    def __init__(self, folder: Path, problems):
        from ..cli import UserError

        self.folder, self.problems = folder, problems
        if not folder.is_dir():
            raise UserError(f'no folder of pictures {folder}: name it with --images, relative to the source folder')
        paths = [folder / name for name in list_files(str(folder), SUFFIXES)]
        if not paths:
            raise UserError(f'no picture below {folder}: name the folder of pictures with --images')
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.all: Dict[Path, Picture] = {p.path: p for p in pool.map(inspect, paths)}
        self.used = set()
        self.by_stem: Dict[str, List[Path]] = {}
        for path in paths:
            self.by_stem.setdefault(self.name(path), []).append(path)

    def name(self, path: Path) -> str:
        """A picture's path below the folder, without its ending."""
        return path.relative_to(self.folder).with_suffix('').as_posix()

    def find(self, name: str) -> List[Path]:
        """Pictures of a name without ending, or, where there is none, with that name in any folder below."""
        if name in self.by_stem:
            return self.by_stem[name]
        tail = f'/{name}'
        return [path for stem, paths in self.by_stem.items() if stem.endswith(tail) for path in paths]

    def claim(self, name: str) -> None:
        """The pictures of a label that is broken: they are not without one."""
        self.used.update(self.find(name))

    def of_label(self, label, names: Sequence[str]) -> Optional[Picture]:
        """The usable picture that a label belongs to.

        Args:
            label (Path | str): The label, for messages.
            names (Sequence[str]): Names to look for, in this order: with or without ending.

        Returns:
            Picture | None: None, and a problem is noted, where there is none or more than one.
        """
        found: List[Path] = []
        for name in names:
            stem, dot, ending = name.replace('\\', '/').rpartition('.')
            is_file = dot and f'.{ending.lower()}' in SUFFIXES
            found = self.find(stem if is_file else name)
            exact = [p for p in found if is_file and p.suffix == f'.{ending}']
            found = exact or found
            if found:
                break
        if not found:
            self.problems.add(label, f'no picture {names[0]} below {self.folder}: add it, or remove the label')
            return None
        if len(found) > 1:
            names = ', '.join(str(p.relative_to(self.folder)) for p in found[:3])
            self.problems.add(label, f'pictures of one name ({names}): rename or remove one')
            self.used.update(found)
            return None
        self.used.add(found[0])
        return self.usable(found[0])

    def usable(self, path: Path) -> Optional[Picture]:
        """The picture of a file, or None, and a problem is noted, where it cannot be used."""
        picture = self.all[path]
        self.used.add(path)
        if picture.problem:
            self.problems.add(path, picture.problem)
            return None
        if picture.note:
            self.problems.note(picture.note)
        return picture

    def unlabelled(self, empty_ok: bool, problems) -> List[Picture]:
        """Pictures that no label named: with ``empty_ok`` they show nothing, else each is a problem."""
        left = [path for path in self.all if path not in self.used]
        if empty_ok:
            problems.note(f'pictures without a label, taken as showing nothing: {len(left)}') if left else None
            return [p for p in map(self.usable, left) if p]
        for path in left:
            if not self.all[path].problem:
                problems.add(path, 'has no label: add one, remove the picture, or say --empty-ok if it shows nothing')
            else:
                problems.add(path, self.all[path].problem)
        return []


def match_size(picture: Picture, size: Tuple[int, int], where, problems) -> bool:
    """Whether a label's size is the picture's; finds out whether it was drawn before or after turning.

    Args:
        picture (Picture): The picture; ``untag`` is set where the label is for the pixels as stored.
        size (tuple[int, int]): Width and height in the label.
        where (str | Path): The label, for messages.
        problems (Problems): Gets a mismatch.

    Returns:
        bool: Whether they fit.
    """
    if tuple(size) == picture.size:
        if picture.orientation != 1:
            problems.note('pictures turned by an EXIF tag: labels are for the upright picture, as training reads it')
        return True
    if tuple(size) == picture.stored:
        picture.untag = True
        problems.note('pictures turned by an EXIF tag, labelled before turning: the tag is dropped from the copy')
        return True
    problems.add(
        where,
        f'is for a picture of {size[0]}x{size[1]} pixels, {picture.path.name} has {picture.size[0]}x{picture.size[1]}: '
        'the picture was resized after labelling, or another one has its name',
    )
    return False


def write(picture: Picture, target: Path, link: bool = False, png: bool = False) -> Path:
    """Copy, link or, where the pipelines would misread it, re-encode a picture.

    Args:
        picture (Picture): The picture.
        target (Path): Where, without ending; folders are made.
        link (bool): Whether to make a symbolic link in place of a copy. Defaults to False.
        png (bool): Whether to re-encode it as PNG in any case. Defaults to False.

    Returns:
        Path: The file that was written.
    """
    from PIL import Image, ImageOps

    target.parent.mkdir(parents=True, exist_ok=True)
    ending = picture.path.suffix.lower()
    if not (picture.rewrite or picture.untag or png):
        path = target.with_name(target.name + ending)
        if link:
            path.symlink_to(picture.path.resolve())
        else:
            shutil.copyfile(picture.path, path)
        return path
    with Image.open(picture.path) as image:
        if picture.untag and image.format == 'JPEG' and not png:
            path = target.with_name(target.name + ending)
            image.save(path, 'JPEG', quality='keep')  # the same tables: next to nothing is lost
        else:
            upright = image if picture.untag else ImageOps.exif_transpose(image)
            path = target.with_name(target.name + '.png')
            upright.convert('RGB').save(path, exif=Image.Exif())
    return path
