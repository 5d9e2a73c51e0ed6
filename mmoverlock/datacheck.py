"""Is a data set laid out as a config expects it?

Three kinds of split are known, one per task: a folder per class (ImageNet), a COCO annotation file
next to a folder of images, and a folder of images next to a folder of label maps (ADE20K). Each
says quickly which of its paths are missing (:meth:`Split.missing`, asked by ``tools/train.py``
before anything is written) and, on request, counts and decodes (:meth:`Split.inspect`, asked by
``tools/data/check_dataset.py``).
"""

import inspect
import json
import os
import os.path as osp
from collections import Counter
from dataclasses import dataclass
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

# Up to so many classes are counted one by one in a report.
MANY = 30

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')

# Data sets that fetch their own files when the folder is empty.
SELF_DOWNLOADING = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')

DEFAULT_ROOTS = dict(imagenet='data/imagenet', coco='data/coco', ade20k='data/ade/ADEChallengeData2016')

LAYOUTS = dict(
    folders='train/CLASS/*.JPEG and val/CLASS/*.JPEG (or train/, val/ with meta/train.txt, '
    'meta/val.txt that list "file label")',
    coco='annotations/instances_{train,val}2017.json, train2017/*.jpg, val2017/*.jpg',
    masks='images/{training,validation}/*.jpg and annotations/{training,validation}/*.png',
)


class Finding(NamedTuple):
    """One line of a report: ``level`` is 'ok', 'warning' or 'problem'."""

    level: str
    text: str


def is_remote(path: str) -> bool:
    """Whether a path names a storage server (``s3://…``), which cannot be looked at from here."""
    return '://' in str(path)


def _join(root: Optional[str], path: Optional[str]) -> Optional[str]:
    if not path:
        return root or None
    if not root or osp.isabs(path) or is_remote(path):
        return path
    return osp.join(root, path)


def _absent(path: str, what: str, is_kind) -> List[str]:
    if is_remote(path) or is_kind(path):
        return []
    return [f'{what} {path} does not exist']


def _cut_off(path: str) -> List[str]:
    """Whether a JSON file is empty or ends early, as one that was not copied to its end does."""
    with open(path, 'rb') as file:
        start = file.read(64).lstrip(b'\xef\xbb\xbf \t\r\n')[:1]
        file.seek(max(0, os.path.getsize(path) - 64))
        end = file.read().rstrip()[-1:]
    if not start:
        return [f'annotation file {path} is empty']
    pairs = {b'{': b'}', b'[': b']'}
    return [] if start in pairs and end == pairs[start] else [f'annotation file {path} is cut off or no JSON']


def list_files(folder: str, suffixes: Sequence[str]) -> List[str]:
    """All files below ``folder`` that end in one of ``suffixes`` (any case), as sorted relative
    paths."""
    suffixes = tuple(s.lower() for s in suffixes)
    found = []
    for base, _, names in os.walk(folder, followlinks=True):
        rel = osp.relpath(base, folder)
        found += [osp.normpath(osp.join(rel, n)) for n in names if n.lower().endswith(suffixes)]
    return sorted(found)


def _spread(items: Sequence, n: int) -> list:
    """``n`` items evenly spread over a sequence, so that a sample sees more than its start."""
    if n <= 0 or not items:
        return []
    step = max(1, len(items) // n)
    return list(items[::step][:n])


def config_of(target: str) -> str:
    """The config of a folder that ``tools/data/convert.py`` wrote; a path that is no folder is a config itself.

    Args:
        target (str): Folder or config.

    Returns:
        str: Path of the config.

    Raises:
        UserError: If the folder has no config of such a conversion.
    """
    from .cli import UserError

    if not osp.isdir(target):
        return target
    record = osp.join(target, 'dataset.json')
    if not osp.isfile(record):
        raise UserError(f'{target} was not written by tools/data/convert.py (no dataset.json): give a config')
    with open(record, encoding='utf-8') as file:
        config = json.load(file)['config']
    return config if osp.isfile(config) else osp.join(target, config)


def _open_image(path: str):
    """A decoded picture, upright as the pipelines read it."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        image.load()
        return ImageOps.exif_transpose(image) or image


def _open_map(path: str):
    """A decoded label map, as stored: the pipelines do not turn it."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return image


def _shares(counts: Counter, total: int, names: Sequence[str], n: int = 30) -> str:
    shown = ', '.join(f'{name} {counts[name] / total:.1%}' for name in names[:n])
    return shown + (', …' if len(names) > n else '')


def _per_class(counts: Counter, names: Sequence[str], n: int = 30) -> str:
    shown = ', '.join(f'{name} {counts[name]}' for name in names[:n])
    return shown + (', …' if len(names) > n else '')


def _sizes(sizes: Sequence[Tuple[int, int]]) -> str:
    """The usual size, and the range where there are others."""
    (width, height), number = Counter(sizes).most_common(1)[0]
    text = f'{width}x{height}'
    if number < len(sizes):
        low, high = [min(s[i] for s in sizes) for i in (0, 1)], [max(s[i] for s in sizes) for i in (0, 1)]
        text = f'most often {text}, sides {low[0]}-{high[0]} x {low[1]}-{high[1]}'
    return text


def _few(items: Sequence, n: int = 5) -> str:
    shown = ', '.join(str(i) for i in items[:n])
    return shown + (f', … ({len(items)} in all)' if len(items) > n else '')


@dataclass
class Split:
    """One split of a data set of which only the root folder is known.

    Args:
        name (str): What to call it in messages, e.g. 'train_dataloader'.
        root (str, optional): ``data_root``.
        images (str, optional): Folder of the images.
        annotations (str, optional): Annotation file, list file or folder of label maps.
        classes (tuple[str], optional): Class names the config trains on.
        expected (int, optional): The published number of images.
    """

    name: str
    root: Optional[str] = None
    images: Optional[str] = None
    annotations: Optional[str] = None
    classes: Optional[Tuple[str, ...]] = None
    expected: Optional[int] = None

    layout = ''

    def missing(self) -> List[str]:
        """Paths that the split needs and that are not there, or cut off. Reads no more of a file than its ends."""
        if self.root and not is_remote(self.root) and not osp.isdir(self.root):
            return [f'data root {self.root} does not exist (looked for {osp.abspath(self.root)})']
        return self._missing_parts()

    def _missing_parts(self) -> List[str]:
        return []

    def inspect(self, samples: int = 16) -> List[Finding]:
        """Count the files, compare them with the annotations and decode some of them.

        Args:
            samples (int): How many images to decode. Defaults to 16.

        Returns:
            list[Finding]: What was found, good and bad.
        """
        missing = self.missing()
        if missing:
            return [Finding('problem', f'{self.name}: {text}') for text in missing]
        if any(is_remote(p) for p in (self.root, self.images, self.annotations) if p):
            return [Finding('warning', f'{self.name}: is on a server; not looked at')]
        return [Finding(level, f'{self.name}: {text}') for level, text in self._inspect(samples)]

    def _inspect(self, samples: int) -> Iterator[Tuple[str, str]]:
        yield 'warning', f'of a kind not known here; only saw that {self.root} exists'

    def paths(self) -> set:
        """The paths of all images, where listing them costs little."""
        return set()

    def _count(self, number: int, what: str) -> Tuple[str, str]:
        if not number:
            return 'problem', f'no {what}'
        if self.expected is not None and number != self.expected:
            return 'problem', f'{number} {what}, the published data set has {self.expected}'
        return 'ok', f'{number} {what}'

    def _decode(self, paths: Sequence[str]) -> Iterator[Tuple[str, str]]:
        bad = []
        for path in paths:
            try:
                _open_image(path)
            except (OSError, SyntaxError, ValueError) as error:
                bad.append(f'{path} ({error})')
        if bad:
            yield 'problem', f'cannot decode {_few(bad)}'
        elif paths:
            yield 'ok', f'decoded {len(paths)} of them'


@dataclass
class FolderSplit(Split):
    """ImageNet form: ``images/CLASS/*``, or a list file of "file label" lines."""

    layout = LAYOUTS['folders']

    def _missing_parts(self):
        missing = []
        if self.images:
            missing += _absent(self.images, 'image folder', osp.isdir)
        if self.annotations:
            missing += _absent(self.annotations, 'list of images', osp.isfile)
        return missing

    def _inspect(self, samples):
        if self.annotations:
            yield from self._inspect_list(samples)
            return
        folder = self.images or self.root
        names = sorted(e.name for e in os.scandir(folder) if e.is_dir())
        if not names:
            yield 'problem', f'{folder} has no class folders (expected {self.layout})'
            return
        counts = {n: list_files(osp.join(folder, n), IMAGE_SUFFIXES) for n in names}
        if self.classes is not None and len(names) != len(self.classes):
            yield 'problem', (f'{len(names)} class folders in {folder}, the config has {len(self.classes)} classes')
        else:
            yield 'ok', f'{len(names)} class folders'
        empty = [n for n in names if not counts[n]]
        if empty:
            yield 'problem', f'no image in {_few(empty)}'
        paths = [osp.join(folder, n, f) for n in names for f in counts[n]]
        yield self._count(len(paths), f'images in {folder}')
        if paths and len(names) <= MANY:
            yield 'ok', f'images: {_per_class(Counter({n: len(f) for n, f in counts.items()}), names)}'
        yield from self._decode(_spread(paths, samples))

    def _inspect_list(self, samples):
        with open(self.annotations, encoding='utf-8') as file:
            rows = [line.strip().rsplit(' ', 1) for line in file if line.strip()]
        bad = [i + 1 for i, row in enumerate(rows) if len(row) != 2 or not row[1].isdigit()]
        if bad:
            yield 'problem', (f'{self.annotations}: line {_few(bad)} is not "file label" with an integer label')
            return
        yield self._count(len(rows), f'images in {self.annotations}')
        paths = [osp.join(self.images or self.root or '', row[0]) for row in rows]
        absent = [p for p in paths if not osp.isfile(p)]
        if absent:
            yield 'problem', f'listed but not there: {_few(absent)}'
        labels = {int(row[1]) for row in rows}
        if self.classes is not None and labels and max(labels) >= len(self.classes):
            yield 'problem', (f'labels go up to {max(labels)}, the config has {len(self.classes)} classes')
        present = [p for p in paths if p not in set(absent)] if absent else paths
        yield from self._decode(_spread(present, samples))


@dataclass
class CocoSplit(Split):
    """COCO form: an annotation file and a folder of images.

    Args:
        masks (bool): Whether the config trains on the instances' masks. Defaults to False.
    """

    masks: bool = False

    layout = LAYOUTS['coco']

    def paths(self):
        with open(self.annotations, encoding='utf-8') as file:
            return {osp.normpath(osp.join(self.images or self.root, i['file_name'])) for i in json.load(file)['images']}

    def _missing_parts(self):
        absent = _absent(self.annotations, 'annotation file', osp.isfile)
        if not absent and self.annotations and not is_remote(self.annotations):
            absent = _cut_off(self.annotations)
        return absent + _absent(self.images or self.root, 'image folder', osp.isdir)

    def _inspect(self, samples):
        try:
            with open(self.annotations, encoding='utf-8') as file:
                data = json.load(file)
            images, annotations, categories = (data['images'], data['annotations'], data['categories'])
        except (ValueError, KeyError, TypeError) as error:
            yield 'problem', (f'{self.annotations} is no COCO annotation file ({type(error).__name__}: {error})')
            return
        yield self._count(len(images), f'images in {self.annotations}')
        yield ('ok' if annotations else 'problem'), f'{len(annotations)} instances'

        names = [c['name'] for c in categories]
        lost = [c for c in self.classes or () if c not in names]
        if lost:
            # mmdet drops such classes without a word and trains on none of their instances.
            yield (
                'problem',
                (f'classes of the config that the file does not have: {_few(lost)}; the file has {_few(names)}'),
            )
        else:
            yield 'ok', f'{len(names)} categories'
        yield from self._inspect_boxes(data)

        known = {i['id'] for i in images}
        orphans = [a['id'] for a in annotations if a['image_id'] not in known]
        if orphans:
            yield 'problem', f'instances of images that are not listed: {_few(orphans)}'
        doubled = [i for i, n in Counter(a['id'] for a in annotations).items() if n > 1]
        if doubled:
            yield 'problem', f'annotation ids used twice: {_few(doubled)}'
        if self.masks:
            bare = [a['id'] for a in annotations if not a.get('segmentation')]
            if bare:
                yield 'problem', (f'instances without a mask: {_few(bare)}; the config loads masks (with_mask=True)')

        folder = self.images or self.root
        if images:
            yield 'ok', f'sizes: {_sizes([(i["width"], i["height"]) for i in images])}'
        present = set(list_files(folder, IMAGE_SUFFIXES))
        absent = [i['file_name'] for i in images if osp.normpath(i['file_name']) not in present]
        if absent:
            yield 'problem', f'listed but not in {folder}: {_few(absent)}'
        chosen = _spread([i for i in images if i['file_name'] not in set(absent)], samples)
        yield from self._decode([osp.join(folder, i['file_name']) for i in chosen])
        for info in chosen:
            try:
                size = _open_image(osp.join(folder, info['file_name'])).size
            except (OSError, SyntaxError, ValueError):
                continue  # reported by _decode
            if size != (info['width'], info['height']):
                yield (
                    'problem',
                    (
                        f'{info["file_name"]} is {size[0]}x{size[1]}, the annotation '
                        f'file says {info["width"]}x{info["height"]}'
                    ),
                )

    def _inspect_boxes(self, data: dict):
        """Boxes that cannot be trained on, instances of each class, and images that show none."""
        sizes = {i['id']: (i['width'], i['height']) for i in data['images']}
        names = {c['id']: c['name'] for c in data['categories']}
        counts, flat, out, shown = Counter(), [], [], set()
        for item in data['annotations']:
            counts[names.get(item.get('category_id'))] += 1
            shown.add(item.get('image_id'))
            x, y, w, h = item['bbox']
            width, height = sizes.get(item.get('image_id'), (float('inf'), float('inf')))
            if not (w > 0 and h > 0):  # NaN too
                flat.append(item['id'])
            elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
                out.append(item['id'])
        if flat:
            yield 'problem', f'instances with a box of no area: {_few(flat)}'
        if out:
            yield 'problem', f'instances that reach out of their image: {_few(out)}'
        used = [n for n in names.values() if self.classes is None or n in self.classes]
        if counts and len(used) <= MANY:
            yield 'ok', f'instances: {_per_class(counts, used)}'
        unseen = [n for n in used if not counts[n]]
        if counts and unseen:
            yield 'warning', f'no instance of {_few(unseen)}'
        empty = len(sizes) - len(shown & set(sizes))
        if empty and counts:
            yield 'warning', f'{empty} images without an instance (training leaves them out, unless told otherwise)'


@dataclass
class MaskSplit(Split):
    """ADE20K form: a folder of images and a folder of label maps with the same names.

    Args:
        image_suffix (str): Ending of the images. Defaults to '.jpg'.
        mask_suffix (str): Ending of the label maps. Defaults to '.png'.
        reduce_zero_label (bool): Whether 0 in a label map means "ignore" and classes start at 1.
            Defaults to False.
        list_file (str, optional): File that lists the names of the split.
    """

    image_suffix: str = '.jpg'
    mask_suffix: str = '.png'
    reduce_zero_label: bool = False
    list_file: Optional[str] = None

    layout = LAYOUTS['masks']

    def paths(self):
        folder = self.images or self.root
        return set() if self.list_file else {osp.join(folder, n) for n in self._names(folder, self.image_suffix)}

    def _missing_parts(self):
        missing = _absent(self.images or self.root, 'image folder', osp.isdir)
        if self.annotations:
            missing += _absent(self.annotations, 'folder of label maps', osp.isdir)
        if self.list_file:
            missing += _absent(self.list_file, 'list of images', osp.isfile)
        return missing

    def _names(self, folder, suffix):
        return [f[: -len(suffix)] for f in list_files(folder, [suffix])]

    def _inspect(self, samples):
        folder = self.images or self.root
        names = self._names(folder, self.image_suffix)
        if self.list_file:
            with open(self.list_file, encoding='utf-8') as file:
                listed = [line.strip() for line in file if line.strip()]
            listed = [n[: -len(self.image_suffix)] if n.endswith(self.image_suffix) else n for n in listed]
            absent = sorted(set(listed) - set(names))
            if absent:
                yield 'problem', f'listed but not in {folder}: {_few(absent)}'
            names = [n for n in listed if n not in set(absent)]
        yield self._count(len(names), f'images ({self.image_suffix}) in {folder}')
        if not self.annotations:
            yield from self._decode([osp.join(folder, n + self.image_suffix) for n in _spread(names, samples)])
            return

        masks = set(self._names(self.annotations, self.mask_suffix))
        bare = [n for n in names if n not in masks]
        if bare:
            yield 'problem', (f'images without a label map ({self.mask_suffix}) in {self.annotations}: {_few(bare)}')
        else:
            yield 'ok', 'each has a label map'
        chosen = _spread([n for n in names if n in masks], samples)
        yield from self._decode([osp.join(folder, n + self.image_suffix) for n in chosen])
        yield from self._inspect_masks(chosen)

    def _inspect_masks(self, names):
        import numpy as np

        folder, bad, pixels, sizes = self.images or self.root, [], Counter(), []
        for name in names:
            try:
                image = _open_image(osp.join(folder, name + self.image_suffix))
                mask = _open_map(osp.join(self.annotations, name + self.mask_suffix))
            except (OSError, SyntaxError, ValueError) as error:
                bad.append(f'{name} ({error})')
                continue
            if mask.mode not in ('L', 'P', 'I', 'I;16', '1'):
                bad.append(f'{name} (mode {mask.mode}, not one label per pixel)')
            elif mask.size != image.size:
                bad.append(f'{name} (map {mask.size}, image {image.size})')
            else:
                values, counts = np.unique(np.asarray(mask), return_counts=True)
                pixels.update(dict(zip(values.tolist(), counts.tolist())))
                sizes.append(image.size)
        if bad:
            yield 'problem', f'bad label maps: {_few(bad)}'
        labels = set(pixels) - {255} - ({0} if self.reduce_zero_label else set())
        first = 1 if self.reduce_zero_label else 0
        if self.classes is not None:
            over = sorted(v for v in labels if v >= len(self.classes) + first)
            if over:
                yield 'problem', (f'labels beyond the {len(self.classes)} classes (255 means ignore): {_few(over)}')
        if names and not labels:
            yield 'problem', 'the sampled label maps hold nothing but "ignore"'
        elif labels:
            yield 'ok', f'labels {min(labels)} to {max(labels)} in {len(names)} maps'
            yield 'ok', f'sizes: {_sizes(sizes)}'
        if labels and self.classes is not None and len(self.classes) <= MANY:
            shares = Counter({self.classes[v - first]: pixels[v] for v in labels if v < len(self.classes) + first})
            ignored = 1 - sum(shares.values()) / sum(pixels.values())
            text = _shares(shares, sum(pixels.values()), self.classes)
            yield 'ok', f'pixels in {len(names)} maps: {text}; ignored {ignored:.1%}'
            unseen = [c for c in self.classes if not shares[c]]
            if unseen:
                yield 'warning', f'no pixel of {_few(unseen)} in {len(names)} maps (--samples looks at more)'


def published(kind: str, root: Optional[str] = None) -> List[Split]:
    """The splits of a public data set in its published layout and size.

    Args:
        kind (str): 'imagenet' (ILSVRC 2012), 'coco' (2017) or 'ade20k'
            (ADEChallengeData2016).
        root (str, optional): Its folder. Defaults to the one the configs name.

    Returns:
        list[Split]: Train and validation split.
    """
    root = root or DEFAULT_ROOTS[kind]

    def at(*parts):
        return osp.join(root, *parts)

    if kind == 'imagenet':
        splits = []
        for name, number in (('train', 1281167), ('val', 50000)):
            listed = at('meta', f'{name}.txt')
            splits.append(
                FolderSplit(
                    name, root, at(name), listed if osp.isfile(listed) else None, tuple(map(str, range(1000))), number
                )
            )
        return splits
    if kind == 'coco':
        return [
            CocoSplit(
                name, root, at(f'{name}2017'), at('annotations', f'instances_{name}2017.json'), None, number, masks=True
            )
            for name, number in (('train', 118287), ('val', 5000))
        ]
    if kind == 'ade20k':
        return [
            MaskSplit(
                name,
                root,
                at('images', name),
                at('annotations', name),
                tuple(map(str, range(150))),
                number,
                reduce_zero_label=True,
            )
            for name, number in (('training', 20210), ('validation', 2000))
        ]
    raise ValueError(f'kind must be one of {", ".join(DEFAULT_ROOTS)}, got {kind!r}')


def shared(splits: Sequence[Split]) -> List[Finding]:
    """Images that two splits of COCO or ADE20K form share: results on them flatter.

    Args:
        splits (Sequence[Split]): Of one config.

    Returns:
        list[Finding]: One warning a pair of splits.
    """
    found, seen = [], []
    for split in splits:
        try:
            paths = split.paths()
        except (OSError, ValueError, KeyError, TypeError):
            continue  # told by inspect()
        for name, others in seen:
            if both := sorted(paths & others):
                found.append(
                    Finding('warning', f'{len(both)} images are in both {name} and {split.name}: {_few(both, 3)}')
                )
        seen.append((split.name, paths))
    return found


def from_config(cfg, loaders: Sequence[str] = ('train', 'val', 'test')) -> List[Split]:
    """The splits that a config's data loaders read.

    Args:
        cfg (Config): A config of mmpretrain, mmdet or mmseg.
        loaders (Sequence[str]): Which loaders to look at. Defaults to all three.

    Returns:
        list[Split]: One per leaf data set (wrappers such as ``ConcatDataset`` are opened), each
        distinct split once.
    """
    scope = cfg.get('default_scope')
    splits = {}
    for loader in loaders:
        field = f'{loader}_dataloader'
        if not cfg.get(field):
            continue
        for dataset in _leaves(cfg[field].get('dataset')):
            split = _split_of(field, dataset, scope)
            if split:
                splits.setdefault((split.root, split.images, split.annotations), split)
    return list(splits.values())


def _leaves(dataset) -> Iterator[dict]:
    if isinstance(dataset, (list, tuple)):
        for item in dataset:
            yield from _leaves(item)
    elif isinstance(dataset, dict):
        if 'dataset' in dataset:
            yield from _leaves(dataset['dataset'])
        elif 'datasets' in dataset:
            yield from _leaves(dataset['datasets'])
        else:
            yield dataset


def _type_name(cfg: dict) -> str:
    kind = cfg.get('type', '')
    return (kind if isinstance(kind, str) else kind.__name__).split('.')[-1]


def _class_of(dataset: dict, scope: Optional[str]):
    """The registered data set class, or None where its package is not installed."""
    from mmengine.registry import DATASETS

    kind = dataset.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(kind)
    return kind


def _classes(dataset: dict, cls) -> Optional[Tuple[str, ...]]:
    """The class names a data set is read with: those of the config, else those of its class."""
    meta = dataset.get('metainfo') or {}
    names = meta.get('classes') or dataset.get('classes')
    if names is None:
        names = (getattr(cls, 'METAINFO', None) or {}).get('classes')
    return tuple(names) if isinstance(names, (list, tuple)) else None


def _setting(dataset: dict, cls, name: str, fallback):
    """A setting of a data set: that of the config, else its class's own default."""
    if name in dataset:
        return dataset[name]
    for base in getattr(cls, '__mro__', ()):
        parameter = inspect.signature(base.__init__).parameters.get(name)
        if parameter is not None and parameter.default is not inspect.Parameter.empty:
            return parameter.default
    return fallback


def _split_of(name: str, dataset: dict, scope: Optional[str]) -> Optional[Split]:
    kind = _type_name(dataset)
    if kind in SELF_DOWNLOADING:
        return None
    root = dataset.get('data_root') or None
    prefix = dataset.get('data_prefix') or ''
    ann_file = dataset.get('ann_file') or None
    common = dict(name=name, root=root)
    cls = _class_of(dataset, scope)

    if scope == 'mmpretrain':
        folder = prefix if isinstance(prefix, str) else prefix.get('img_path', '')
        split = dataset.get('split')
        if split and kind == 'ImageNet':
            folder = folder or split
            listed = _join(root, osp.join('meta', f'{split}.txt'))
            if not ann_file and not is_remote(listed) and osp.isfile(listed):
                ann_file = osp.join('meta', f'{split}.txt')
        elif kind not in ('ImageNet', 'CustomDataset'):
            return Split(**common)
        return FolderSplit(
            images=_join(root, folder),
            annotations=_join(root, ann_file) if ann_file else None,
            classes=_classes(dataset, cls),
            **common,
        )
    if scope == 'mmdet' and ann_file and str(ann_file).endswith('.json'):
        folder = prefix.get('img', '') if isinstance(prefix, dict) else prefix
        steps = dataset.get('pipeline') or []
        masks = any(_type_name(s) == 'LoadAnnotations' and s.get('with_mask') for s in steps)
        return CocoSplit(
            images=_join(root, folder),
            annotations=_join(root, ann_file),
            classes=_classes(dataset, cls),
            masks=masks,
            **common,
        )
    if scope == 'mmseg' and isinstance(prefix, dict):
        maps = prefix.get('seg_map_path')
        steps = dataset.get('pipeline') or []
        reduce_zero = _setting(dataset, cls, 'reduce_zero_label', False) or any(
            s.get('reduce_zero_label') for s in steps if _type_name(s) == 'LoadAnnotations'
        )
        return MaskSplit(
            images=_join(root, prefix.get('img_path', '')),
            annotations=_join(root, maps) if maps else None,
            classes=_classes(dataset, cls),
            image_suffix=_setting(dataset, cls, 'img_suffix', '.jpg'),
            mask_suffix=_setting(dataset, cls, 'seg_map_suffix', '.png'),
            reduce_zero_label=bool(reduce_zero),
            list_file=_join(root, ann_file) if ann_file else None,
            **common,
        )
    return Split(**common)
