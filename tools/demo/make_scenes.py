# Copyright (c) mmoverlock authors. Licensed under Apache-2.0.
"""Draw a small data set of coloured shapes, in the three layouts that the demo trains on.

One scene is one to five shapes of six classes over a textured background, with varied size,
rotation, stretch, colour, surface, overlap, shadow and light::

    ROOT/imagenet/{train,val}/CLASS/*.jpg                     one dominant shape a picture
    ROOT/coco/{train2017,val2017}/*.jpg                       scenes, with
    ROOT/coco/annotations/instances_{train,val}2017.json      boxes and masks (run lengths)
    ROOT/ade/{images,annotations}/{training,validation}/*     the same scenes, as label maps

Label maps follow ADE20K: 0 is "nothing" and ignored (no pixel has it here), 1 is the background,
which counts as a class, and 2... are the shapes.

Every picture is drawn from a random stream of its own, keyed by (seed, split, form, number):
held-out pictures share no stream with training ones, and asking for more pictures leaves the
first ones as they were.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np

# In alphabetical order, that of class folders: a class has the same number in all three layouts.
CLASSES = ('circle', 'cross', 'ring', 'square', 'star', 'triangle')
BACKGROUND = 'background'
STAMP = 'scenes.json'
# Raise it whenever the drawing changes: data sets drawn before are then made anew.
VERSION = 1
SPLITS = ('train', 'val')

SUPERSAMPLING = 4  # shapes are filled on a grid this much finer, then averaged: smooth edges
TURN = np.radians(30)  # how far a shape may be turned from upright, either way
MIN_VISIBLE = 0.55  # in a scene, fraction of every shape that no other one hides


@dataclasses.dataclass(frozen=True)
class SceneParams:
    """What a data set is made from; equal parameters give equal pictures.

    Args:
        seed (int): Start of every random stream. Defaults to 0.
        cls_train (int): Training pictures for classification. Defaults to 3600.
        cls_val (int): Held-out pictures for classification. Defaults to 600.
        dense_train (int): Training scenes for detection and segmentation. Defaults to 1200.
        dense_val (int): Held-out scenes for detection and segmentation. Defaults to 200.
        cls_size (int): Edge of a classification picture in pixels. Defaults to 64.
        dense_size (int): Edge of a scene in pixels. Defaults to 128.
    """

    seed: int = 0
    cls_train: int = 3600
    cls_val: int = 600
    dense_train: int = 1200
    dense_val: int = 200
    cls_size: int = 64
    dense_size: int = 128

    def __post_init__(self):
        for name in ('cls_train', 'cls_val'):
            if getattr(self, name) < len(CLASSES):
                raise ValueError(
                    f'{name} must be at least {len(CLASSES)}, one picture a class, but is {getattr(self, name)}'
                )
        for name in ('dense_train', 'dense_val'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, but is {getattr(self, name)}')
        for name in ('cls_size', 'dense_size'):
            if getattr(self, name) < 64:
                raise ValueError(f'{name} must be at least 64 pixels, but is {getattr(self, name)}')


@dataclasses.dataclass
class Shape:
    """One drawn shape.

    Args:
        label (int): Index into ``CLASSES``.
        mask (np.ndarray): Its visible pixels, (H, W) bool.
    """

    label: int
    mask: np.ndarray


# ---------------------------------------------------------------- geometry


def _ngon(points, radius=1.0, phase=-np.pi / 2):
    angle = phase + 2 * np.pi * np.arange(points) / points
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _outlines(label, rng):
    """Closed outlines of a class around the origin, radius about 1; a second one is a hole."""
    name = CLASSES[label]
    if name == 'circle':
        return [_ngon(72)]
    if name == 'square':
        return [_ngon(4, 1.1)]
    if name == 'triangle':
        return [_ngon(3, 1.2)]
    if name == 'star':
        star = np.empty((10, 2))
        star[0::2] = _ngon(5, 1.2)
        star[1::2] = _ngon(5, rng.uniform(0.45, 0.58), -np.pi / 2 + np.pi / 5)
        return [star]
    if name == 'cross':
        a, b = rng.uniform(0.26, 0.38), 1.05
        return [
            np.array(
                [
                    (a, a),
                    (a, b),
                    (-a, b),
                    (-a, a),
                    (-b, a),
                    (-b, -a),
                    (-a, -a),
                    (-a, -b),
                    (a, -b),
                    (a, -a),
                    (b, -a),
                    (b, a),
                ]
            )
        ]
    if name == 'ring':
        return [_ngon(72), _ngon(72, rng.uniform(0.45, 0.65))]
    raise ValueError(f'no outline for {name}')


def _coverage(outlines, centre, radius, rng, size):
    """Fraction of every pixel that a turned and stretched shape covers, (size, size) float."""
    turn = rng.uniform(-TURN, TURN)
    stretch = rng.uniform(0.8, 1.0)
    lean = rng.uniform(0, np.pi)  # the stretch has a direction of its own

    def rotation(angle):
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    matrix = rotation(lean) @ np.diag([1, stretch]) @ rotation(-lean) @ rotation(turn) * radius
    polygons = [np.round((o @ matrix.T + centre) * SUPERSAMPLING).astype(np.int32) for o in outlines]
    fine = np.zeros((size * SUPERSAMPLING,) * 2, np.uint8)
    # Filling all outlines at once fills by parity, so the inner one becomes a hole.
    cv2.fillPoly(fine, polygons, 255)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


# ---------------------------------------------------------------- surfaces


def _colour(rng, saturation=(0.5, 1.0), value=(0.65, 1.0)):
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]


def _ramp(size, rng):
    """A linear ramp from 0 to 1 in a random direction, (size, size)."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    ramp = x * np.cos(angle) + y * np.sin(angle)
    return (ramp - ramp.min()) / np.ptp(ramp)


def _cloud(size, rng, octaves=(3, 6, 12, 24)):
    """Smooth noise from 0 to 1, (size, size)."""
    cloud = np.zeros((size, size), np.float32)
    for i, cells in enumerate(octaves):
        grid = rng.random((cells, cells), dtype=np.float32)
        cloud += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC) * 0.6**i
    return (cloud - cloud.min()) / np.ptp(cloud)


def _pattern(size, rng, kinds):
    """A grey pattern from 0 to 1, (size, size), of one of the kinds."""
    kind = kinds[rng.integers(len(kinds))]
    if kind == 'flat':
        return np.full((size, size), rng.random(), np.float32)
    if kind == 'ramp':
        return _ramp(size, rng)
    if kind == 'cloud':
        return _cloud(size, rng)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    if kind == 'glow':
        centre = rng.uniform(0, size, 2)
        return np.clip(np.hypot(x - centre[0], y - centre[1]) / (size * rng.uniform(0.5, 1)), 0, 1)
    wave = size * _ramp(size, rng) * 2 * np.pi / rng.uniform(6, 24) + rng.uniform(0, 2 * np.pi)
    if kind == 'stripes':
        return 0.5 + 0.5 * np.clip(np.sin(wave) * rng.uniform(1, 4), -1, 1)
    if kind == 'checks':
        other = size * np.rot90(_ramp(size, rng)) * 2 * np.pi / rng.uniform(10, 24)
        return 0.5 + 0.5 * np.clip(3 * np.sin(wave) * np.sin(other), -1, 1)
    raise ValueError(f'no pattern {kind}')


def _background(size, rng):
    pattern = _pattern(size, rng, ('ramp', 'cloud', 'cloud', 'glow', 'stripes', 'checks'))
    low, high = (_colour(rng, (0.05, 0.4), (0.1, 0.6)) for _ in range(2))
    # Two colours that are too far apart make a background louder than any shape on it.
    high = low + (high - low) * rng.uniform(0.3, 1.0)
    picture = low + (high - low) * pattern[..., None]
    return picture + (_cloud(size, rng, (8, 16, 32))[..., None] - 0.5) * rng.uniform(0, 0.2)


def _surface(size, rng, behind):
    """Colours for a shape, (size, size, 3), that stand out from the mean colour behind it."""
    for _ in range(20):
        colour = _colour(rng)
        if np.abs(colour - behind).max() > 0.45:
            break
    pattern = _pattern(size, rng, ('flat', 'flat', 'ramp', 'glow', 'stripes'))
    return colour * (1 + (pattern[..., None] - 0.5) * rng.uniform(0, 0.5))


# ---------------------------------------------------------------- scenes


def _paint(picture, coverage, rng):
    """Lay one shape on a picture, with a soft shadow below it and sometimes an outline."""
    size = len(picture)
    if rng.random() < 0.6:
        dx, dy = rng.integers(-4, 5, 2)
        shadow = cv2.GaussianBlur(np.roll(coverage, (dy, dx), (0, 1)), (0, 0), rng.uniform(0.8, 2.5))
        picture = picture * (1 - rng.uniform(0.2, 0.6) * shadow[..., None])
    inside = coverage > 0.5
    surface = _surface(size, rng, picture[inside].mean(0))
    if rng.random() < 0.3:
        core = cv2.erode(coverage, np.ones((3, 3), np.uint8))
        surface = surface * (0.45 + 0.55 * core[..., None])
    alpha = coverage[..., None]
    return picture * (1 - alpha) + surface * alpha


def _light_and_lens(picture, rng):
    """Light falling from one side, exposure, blur and sensor noise; to uint8."""
    size = len(picture)
    picture = picture * (1 + (_ramp(size, rng)[..., None] - 0.5) * rng.uniform(0, 0.7))
    picture = (picture - 0.5) * rng.uniform(0.75, 1.15) + 0.5 + rng.uniform(-0.1, 0.1)
    if rng.random() < 0.4:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 0.9))
    picture = picture + rng.normal(0, rng.uniform(0, 0.04), picture.shape)
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)


def _draw(size, wanted, rng, min_visible):
    """Draw shapes one over the other.

    Args:
        size (int): Edge of the picture in pixels.
        wanted (list[tuple]): (label, smallest radius, largest radius, reach) of each shape, in
            painting order; radii in pixels; reach is how far from the middle, as a fraction of
            half the edge, its centre may lie.
        rng (np.random.Generator): The picture's random stream.
        min_visible (float): Fraction of its area that every shape keeps; a shape that would hide
            more of another one is placed elsewhere, and left out after some tries.

    Returns:
        tuple: The picture (size, size, 3) uint8 RGB, and the shapes as a list of :class:`Shape`.
    """
    picture = _background(size, rng)
    shapes, areas = [], []
    for label, small, large, reach in wanted:
        for _ in range(12):
            radius = rng.uniform(small, large)
            room = np.minimum(reach * size / 2, size / 2 - 0.8 * radius)
            centre = size / 2 + rng.uniform(-room, room, 2)
            coverage = _coverage(_outlines(label, rng), centre, radius, rng, size)
            mask = coverage > 0.5
            left = [s.mask & ~mask for s in shapes]
            if all(m.sum() >= min_visible * a for m, a in zip(left, areas)):
                for shape, visible in zip(shapes, left):
                    shape.mask = visible
                shapes.append(Shape(label, mask))
                areas.append(mask.sum())
                picture = _paint(picture, coverage, rng)
                break
    return _light_and_lens(picture, rng), shapes


def draw_single(label, size, rng):
    """Draw a picture with one dominant shape and at most one small other.

    Args:
        label (int): Class of the dominant shape, an index into ``CLASSES``.
        size (int): Edge of the picture in pixels.
        rng (np.random.Generator): The picture's random stream.

    Returns:
        np.ndarray: (size, size, 3) uint8, RGB.
    """
    others = [(int(rng.integers(len(CLASSES))), 0.07 * size, 0.11 * size, 0.95) for _ in range(rng.integers(0, 2))]
    # The dominant shape is painted last and may hide the others: it is always there, whole.
    return _draw(size, [*others, (label, 0.24 * size, 0.40 * size, 0.30)], rng, 0)[0]


def draw_scene(size, rng):
    """Draw a scene of one to five shapes that may overlap.

    Args:
        size (int): Edge of the picture in pixels.
        rng (np.random.Generator): The picture's random stream.

    Returns:
        tuple: The picture (size, size, 3) uint8 RGB, and the visible shapes as a list of
        :class:`Shape`.
    """
    wanted = [(int(rng.integers(len(CLASSES))), 0.09 * size, 0.24 * size, 0.95) for _ in range(rng.integers(1, 6))]
    return _draw(size, wanted, rng, MIN_VISIBLE)


# ---------------------------------------------------------------- the three layouts


def run_lengths(mask):
    """Encode a mask the way COCO does: run lengths down the columns, zeros first.

    Args:
        mask (np.ndarray): (H, W) bool.

    Returns:
        dict: ``size`` as [H, W] and ``counts`` as a list of ints, summing to H * W.
    """
    flat = np.concatenate([[False], mask.ravel(order='F'), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    ends = np.concatenate([[0], edges, [mask.size]])
    counts = np.diff(ends).tolist()
    # A mask that reaches the last pixel has an edge there already: no empty run after it.
    if counts and counts[-1] == 0:
        counts.pop()
    return dict(size=list(mask.shape), counts=counts)


def _stream(params, split, form, number):
    return np.random.default_rng([params.seed, SPLITS.index(split), form, number])


def _save(path, picture):
    """Write an RGB or grey picture; opencv returns False instead of raising."""
    bgr = picture if picture.ndim == 2 else picture[..., ::-1]
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if path.suffix == '.jpg' else []
    if not cv2.imwrite(str(path), bgr, options):
        raise OSError(f'cannot write {path}: is the disk full, or the folder read-only?')


def _write_single(root, params, split, number):
    label = number % len(CLASSES)
    picture = draw_single(label, params.cls_size, _stream(params, split, 0, number))
    _save(root / 'imagenet' / split / CLASSES[label] / f'{number:06d}.jpg', picture)


def _write_scene(root, params, split, number):
    """Write one scene for COCO and ADE; returns its COCO image and annotations."""
    picture, shapes = draw_scene(params.dense_size, _stream(params, split, 1, number))
    name, (height, width) = f'{number:06d}', picture.shape[:2]
    coco = root / 'coco' / f'{split}2017' / f'{name}.jpg'
    ade_split = dict(train='training', val='validation')[split]
    labels = np.ones((height, width), np.uint8)
    annotations = []
    for shape in shapes:
        labels[shape.mask] = shape.label + 2
        ys, xs = np.nonzero(shape.mask)
        left, top = int(xs.min()), int(ys.min())
        annotations.append(
            dict(
                image_id=number,
                category_id=shape.label + 1,
                iscrowd=0,
                area=len(xs),
                bbox=[left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top],
                segmentation=run_lengths(shape.mask),
            )
        )
    _save(coco, picture)
    shutil.copyfile(coco, root / 'ade' / 'images' / ade_split / coco.name)
    _save(root / 'ade' / 'annotations' / ade_split / f'{name}.png', labels)
    return dict(id=number, file_name=coco.name, height=height, width=width), annotations


def _write_split(root, params, split, pool):
    for name in CLASSES:
        (root / 'imagenet' / split / name).mkdir(parents=True)
    ade_split = dict(train='training', val='validation')[split]
    for folder in (f'coco/{split}2017', f'ade/images/{ade_split}', f'ade/annotations/{ade_split}'):
        (root / folder).mkdir(parents=True)
    (root / 'coco' / 'annotations').mkdir(exist_ok=True)

    list(pool(partial(_write_single, root, params, split), range(getattr(params, f'cls_{split}'))))
    scenes = list(pool(partial(_write_scene, root, params, split), range(getattr(params, f'dense_{split}'))))
    annotations = [a for _, per_scene in scenes for a in per_scene]
    for i, annotation in enumerate(annotations, 1):
        annotation['id'] = i
    content = dict(
        info=dict(description='mmoverlock demo: shapes', seed=params.seed, version=VERSION),
        images=[image for image, _ in scenes],
        annotations=annotations,
        categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)],
    )
    path = root / 'coco' / 'annotations' / f'instances_{split}2017.json'
    path.write_text(json.dumps(content))
    return len(annotations)


def read_stamp(root):
    """Return the stamp of a finished data set, or None if there is none at ``root``."""
    try:
        return json.loads((Path(root) / STAMP).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def make_scenes(root, params=None, workers=None):
    """Write the data set, or recognise that it is there already.

    Everything is drawn into a hidden folder beside ``root`` that takes its name at the very end,
    so a data set is whole or absent.

    Args:
        root (str | Path): Folder of the data set.
        params (SceneParams): What to draw. Defaults to ``SceneParams()``.
        workers (int): Processes that draw. Defaults to the number of CPU cores, at most 8.

    Returns:
        tuple: The stamp (a dict with ``params``, ``instances`` and more), and whether the data
        set was there already (bool).

    Raises:
        FileExistsError: ``root`` holds something else than a data set of this generator.
    """
    root, params = Path(root), params or SceneParams()
    stamp = read_stamp(root)
    recipe = dict(version=VERSION, classes=list(CLASSES), params=dataclasses.asdict(params))
    if stamp is not None and all(stamp.get(k) == v for k, v in recipe.items()):
        return stamp, True
    if stamp is None and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(
            f'{root} exists and is not a data set of this generator: name another folder, or move it away'
        )

    workers = min(workers or os.cpu_count() or 1, 8)
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent))
    try:
        with ProcessPoolExecutor(workers) as executor:
            pool = partial(executor.map, chunksize=16)
            instances = {s: _write_split(draft, params, s, pool) for s in SPLITS}
        stamp = dict(recipe, instances=instances)
        (draft / STAMP).write_text(json.dumps(stamp, indent=2))
        draft.chmod(0o755)  # mkdtemp makes it private
        if root.exists():
            shutil.rmtree(root)
        draft.rename(root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return stamp, False


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('root', nargs='?', default='work_dirs/demo/data', help='folder to write')
    for field in dataclasses.fields(SceneParams):
        parser.add_argument(f'--{field.name.replace("_", "-")}', type=int, default=field.default, metavar='N', help=' ')
    parser.add_argument('--workers', type=int, help='processes that draw (default: CPU cores)')
    args = vars(parser.parse_args(argv))
    root, workers = args.pop('root'), args.pop('workers')
    try:
        stamp, there = make_scenes(root, SceneParams(**args), workers)
    except (ValueError, OSError) as error:
        sys.exit(f'make_scenes: {error}')
    print(f'{root}: {"already there" if there else "written"}; shapes in scenes: {stamp["instances"]}')


if __name__ == '__main__':
    main()
