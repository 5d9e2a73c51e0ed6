"""What every reader makes of a labelled picture, and the checks that all of them share."""

import math
from dataclasses import dataclass, field
from typing import Callable, List, Optional, Sequence, Tuple, Union

import numpy as np

from .pictures import Picture
from .problems import Problems

#: Labels that reach out of the picture by no more than this are cut off: rounding, and counting pixels from 1.
TOLERANCE = 1.0


@dataclass
class Instance:
    """One labelled object.

    Args:
        label (str): Its class.
        box (tuple[float, float, float, float]): Left, top, right, bottom in pixels.
        outline (list[list[float]] | dict, optional): Polygons ``[x, y, x, y, ...]`` in pixels, or COCO run lengths.
        ignore (bool): Neither trained on nor counted as missed (VOC's "difficult", COCO's crowds). Defaults to False.
    """

    label: str
    box: Tuple[float, float, float, float]
    outline: Optional[Union[List[List[float]], dict]] = None
    ignore: bool = False


@dataclass
class Sample:
    """A picture with its labels.

    Args:
        picture (Picture): The picture.
        name (str): What to call it in the data set: a relative path without ending.
        split (str, optional): 'train', 'val' or 'test' where the source says so.
        instances (list[Instance]): Objects, of a detection data set.
        label (str, optional): Class of the picture, of a classification data set.
        label_map (Callable[[], np.ndarray], optional): Gives (H, W) uint8 class numbers, 255 for "ignore".
        damaged (bool): Whether an object of it could not be read. Defaults to False.
    """

    picture: Picture
    name: str
    split: Optional[str] = None
    instances: List[Instance] = field(default_factory=list)
    label: Optional[str] = None
    label_map: Optional[Callable[[], np.ndarray]] = None
    damaged: bool = False


def check_box(box: Sequence[float], size: Tuple[int, int], where, problems: Problems):
    """A box that can be trained on, cut off at the edges of the picture.

    Args:
        box (Sequence[float]): Left, top, right, bottom in pixels.
        size (tuple[int, int]): Width and height of the picture.
        where (str | Path): The label, for messages.
        problems (Problems): Gets what is wrong.

    Returns:
        tuple[float, float, float, float] | None: None, and a problem is noted, where it cannot be used.
    """
    box = [float(v) for v in box]
    shown = ', '.join(f'{v:g}' for v in box)
    if not all(map(math.isfinite, box)):
        problems.add(where, f'box ({shown}) is not of finite numbers: label it again')
        return None
    left, top, right, bottom = box
    if right <= left or bottom <= top:
        problems.add(where, f'box ({shown}) has no area: label it again, or remove it')
        return None
    out = max(-left, -top, right - size[0], bottom - size[1])
    if out > TOLERANCE:
        problems.add(
            where,
            f'box ({shown}) reaches {out:g} pixels out of the picture of {size[0]}x{size[1]}: '
            'draw it within the picture, or look whether it belongs to another one',
        )
        return None
    if out > 1e-3:
        problems.note('boxes that reached out of the picture by a pixel or less, cut off')
    left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, size[0]), min(bottom, size[1])
    if right <= left or bottom <= top:
        problems.add(where, f'box ({shown}) has no area within the picture: label it again, or remove it')
        return None
    return left, top, right, bottom


def check_outline(polygons: Sequence[Sequence[float]], size: Tuple[int, int], where, problems: Problems):
    """Polygons that can be trained on, cut off at the edges of the picture, and the box around them.

    Args:
        polygons (Sequence[Sequence[float]]): ``[x, y, x, y, ...]`` in pixels each.
        size (tuple[int, int]): Width and height of the picture.
        where (str | Path): The label, for messages.
        problems (Problems): Gets what is wrong.

    Returns:
        tuple[list, tuple] | None: Polygons and box; None, and a problem is noted, where they cannot be used.
    """
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            problems.add(where, f'an outline of {len(polygon) // 2} points: three or more are needed')
            return None
    points = np.concatenate([np.asarray(p, dtype=float).reshape(-1, 2) for p in polygons])
    box = check_box((*points.min(0), *points.max(0)), size, where, problems)
    if box is None:
        return None
    inside = [np.asarray(p, dtype=float).reshape(-1, 2).clip(0, size) for p in polygons]
    if sum(map(polygon_area, inside)) <= 0:
        problems.add(where, 'the outline encloses no area: label it again, or remove it')
        return None
    return [p.ravel().round(2).tolist() for p in inside], box


def polygon_area(points: np.ndarray) -> float:
    """Area in square pixels of a polygon of (N, 2) points."""
    x, y = points[:, 0], points[:, 1]
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))


class Classes:
    """The class names: those given, or those met.

    Args:
        given (Sequence[str], optional): Names in their order; others are then mistakes.
        ignored (Sequence[str]): Names whose labels are left out.
        problems (Problems): Gets unknown names.
    """

    def __init__(self, given: Optional[Sequence[str]], ignored: Sequence[str], problems: Problems):
        self.given, self.ignored, self.problems = given and list(given), set(ignored), problems
        self.met: List[str] = []

    def take(self, name, where) -> Optional[str]:
        """The name as it is to be used; None where its label is left out or it is no name."""
        name = str(name if name is not None else '').strip()
        if name in self.ignored:
            self.problems.note(f"labels of class '{name}' left out, as --ignore says")
            return None
        if not name:
            self.problems.add(where, 'has no class name: label it again')
            return None
        if self.given is not None and name not in self.given:
            self.problems.add(
                where,
                f"class '{name}' is none of --classes ({', '.join(self.given)}): correct it, add it there, or leave it "
                f'out with --ignore',
            )
            return None
        if name not in self.met:
            self.met.append(name)
        return name

    @property
    def names(self) -> List[str]:
        """All classes: in the given order, else in alphabetical."""
        names = self.given if self.given is not None else sorted(self.met)
        return [name for name in names if name not in self.ignored]

    def check(self) -> None:
        """Note names that differ in nothing but case: usually one class written in two ways."""
        seen = {}
        for name in self.names:
            other = seen.setdefault(name.lower(), name)
            if other != name:
                self.problems.note(f"classes '{other}' and '{name}' differ in case alone: are they one?")
