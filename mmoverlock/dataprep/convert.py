"""From labelled pictures in a common form to a data set and a config that train."""

import json
import os
import shutil
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional, Sequence, Union

from ..cli import UserError, replacing
from ..version import __version__
from . import coco, configs, folders, labelme, masks, splits, voc, yolo
from .pictures import write as write_picture
from .problems import Problems
from .samples import Classes, Sample

#: Format -> function that reads it, and the task that it is for.
READERS = dict(
    voc=(voc.read, 'detection'),
    yolo=(yolo.read, 'detection'),
    coco=(coco.read, 'detection'),
    labelme=(labelme.read, 'detection'),
    masks=(masks.read, 'segmentation'),
    folders=(folders.read, 'classification'),
)
#: What a conversion leaves beside the data: a folder with it in may be written over.
RECORD = 'dataset.json'


@dataclass
class Options:
    """What a conversion is asked for.

    Args:
        images (str, optional): Folder of the pictures, relative to the source.
        labels (str, optional): Folder (COCO: or file) of the labels, relative to the source.
        label_suffix (str): What follows a picture's name in its label map's. Defaults to '.png'.
        classes (str | Sequence[str], optional): Names, or a file with one on each line.
        ignore (Sequence[str]): Classes to leave out.
        background (str): Name of the class of unlabelled pixels where label maps are made from outlines; 'ignore' for
            none. Defaults to 'background'.
        task (str, optional): 'segmentation' makes label maps of LabelMe's outlines.
        val (float): Share of pictures to validate on. Defaults to 0.2.
        test (float): Share of pictures to test on. Defaults to 0.
        seed (int): Of the drawing of splits. Defaults to 0.
        resplit (bool): Disregard the source's own split. Defaults to False.
        empty_ok (bool): Pictures without a label show nothing. Defaults to False.
        skip_bad (bool): Leave out what is wrong in place of stopping. Defaults to False.
        link (bool): Link pictures in place of copying them. Defaults to False.
        overwrite (bool): Replace a data set that an earlier conversion wrote. Defaults to False.
        arch (str): Variant of OverLoCK of the config, or 'demo' for the small one of configs/demo. Defaults to 'xt'.
        detector (str, optional): 'retinanet' or 'mask-rcnn'; by default the latter where all objects have outlines.
        pretrained (str, optional): Checkpoint that the backbone starts from; 'none' for none. Defaults to the official.
        side (int, optional): Longer side that pictures are shown at. Defaults to their own.
        epochs (int, optional): How often each picture is seen. Defaults to what suits their number.
        config (str, optional): Where to write the config. Defaults to the data set's folder.
    """

    images: Optional[str] = None
    labels: Optional[str] = None
    label_suffix: str = '.png'
    classes: Optional[Union[str, Sequence[str]]] = None
    ignore: Sequence[str] = ()
    background: str = 'background'
    task: Optional[str] = None
    val: float = 0.2
    test: float = 0.0
    seed: int = 0
    resplit: bool = False
    empty_ok: bool = False
    skip_bad: bool = False
    link: bool = False
    overwrite: bool = False
    arch: str = 'xt'
    detector: Optional[str] = None
    pretrained: Optional[str] = None
    side: Optional[int] = None
    epochs: Optional[int] = None
    config: Optional[str] = None
    class_lines: List[str] = field(default_factory=list, init=False)

    def __post_init__(self):
        if self.val <= 0 or self.test < 0 or self.val + self.test >= 1:
            raise UserError(
                f'--val {self.val:g} and --test {self.test:g} are shares: above 0 (test: 0 or more), below 1 both'
            )
        if self.side is not None and self.side < 32 or self.epochs is not None and self.epochs < 1:
            raise UserError('--side is 32 pixels or more, --epochs 1 or more')
        if self.classes:
            names = [self.classes] if isinstance(self.classes, str) else list(self.classes)
            if len(names) == 1 and Path(names[0]).is_file():
                self.class_lines = Path(names[0]).read_text(encoding='utf-8-sig').splitlines()
            elif len(names) == 1 and Path(names[0]).suffix in ('.txt', '.csv'):
                raise UserError(f'--classes: no file {names[0]}')
            else:
                self.class_lines = names

    @property
    def class_names(self) -> Optional[List[str]]:
        """The names that were given, or None."""
        names = [line.strip() for line in self.class_lines if line.strip() and not line.startswith('#')]
        doubled = [name for name, n in Counter(names).items() if n > 1]
        if doubled:
            raise UserError(f'--classes: {", ".join(doubled)} twice: each class once')
        return names or None

    @staticmethod
    def folder(source: Path, given: Optional[str], *usual: str) -> Path:
        """The folder that was given, else the first usual one that is there, else the source itself."""
        if given:
            if not (source / given).exists():
                raise UserError(f'no {given} in {source}')
            return source / given
        return next((source / name for name in usual if (source / name).is_dir()), source)


@dataclass
class Result:
    """What a conversion wrote.

    Args:
        config (Path): The config.
        counts (dict[str, int]): Pictures of each split.
        classes (list[str]): Class names.
        labels (dict[str, Counter]): Of each split, how many objects (detection), pictures (classification) or pixels
            (segmentation) of each class.
        problems (Problems): What was left out, and remarks.
        task (str): 'detection', 'segmentation' or 'classification'.
    """

    config: Path
    counts: dict
    classes: List[str]
    labels: dict
    problems: Problems
    task: str


def convert(form: str, source, target, options: Options) -> Result:
    """Turn labelled pictures into a data set and a config.

    Args:
        form (str): A key of :data:`READERS`.
        source (str | Path): The folder with them. It is not changed.
        target (str | Path): The folder to be. It appears whole or not at all.
        options (Options): The rest.

    Returns:
        Result: What was written.

    Raises:
        UserError: If something is wrong with the labels and not to be left out (the mistakes are printed before), or
            with the question.
    """
    source, target = Path(source), Path(target)
    _check_places(source, target, options)
    read, task = READERS[form]
    if options.task and options.task != task:
        if (form, options.task) != ('labelme', 'segmentation'):
            raise UserError(f'--task {options.task} is not what {form} labels are for ({task})')
        task = options.task
    problems = Problems()
    classes = Classes(None if form == 'masks' else options.class_names, options.ignore, problems)
    samples = read(source, options, classes, problems)
    if problems.found:
        problems.show()
        many = f'{len(problems.found)} problem{"s" if len(problems.found) > 1 else ""} in {source}'
        if not options.skip_bad:
            raise UserError(f'{many} (above): correct them, or leave them out with --skip-bad; nothing was written')
        # A picture that lost all its objects would teach that there are none.
        samples = [s for s in samples if s.instances or not s.damaged]
    if task == 'segmentation' and form == 'labelme':
        _paint(samples, classes, options)
    if not samples or not classes.names:
        raise UserError(f'nothing labelled is left in {source}')
    classes.check()
    splits.assign(samples, options.val, options.test, options.seed, options.resplit, problems)
    with _appearing(target) as partial:
        writer = dict(detection=_write_coco, segmentation=_write_maps, classification=_write_folders)[task]
        labels, facts = writer(samples, classes, partial, options, problems)
        counts = {split: n for split in splits.SPLITS if (n := sum(s.split == split for s in samples))}
        _warn_of_gaps(labels, classes.names, problems)
        (partial / 'classes.txt').write_text('\n'.join(classes.names) + '\n', encoding='utf-8')
        dataset = configs.DataSet(
            target,
            task,
            classes.names,
            getattr(classes, 'colours', None) and _kept_colours(classes),
            counts,
            sizes=[s.picture.labelled_size for s in samples],
            **facts,
        )
        config = Path(options.config or target / configs.name_of(dataset, options))
        text = configs.text_of(dataset, options, config)
        inside = config.parent.resolve() == target.resolve()
        if inside:
            (partial / config.name).write_text(text, encoding='utf-8')
        record = dict(
            made_by=f'mmoverlock {__version__}, tools/data/convert.py {form}',
            task=task,
            config=config.name if inside else str(config),
            classes=classes.names,
            pictures=counts,
            labels={split: {name: int(found[name]) for name in classes.names} for split, found in labels.items()},
            seed=options.seed,
            left_out=problems.found,
            remarks=problems.lines(),
        )
        (partial / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    if not inside:
        with replacing(str(config)) as path:
            Path(path).write_text(text, encoding='utf-8')
    return Result(config, counts, classes.names, labels, problems, task)


def _check_places(source: Path, target: Path, options: Options) -> None:
    if not source.is_dir():
        raise UserError(f'no folder {source}')
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise UserError(f'{target} and {source} lie within one another: write to a folder beside')
    if not target.exists():
        return
    if not (target / RECORD).is_file():
        raise UserError(f'{target} is there already, and no conversion made it: name another folder')
    if not options.overwrite:
        raise UserError(f'{target} is there already: name another folder, or replace it with --overwrite')


@contextmanager
def _appearing(target: Path):
    """A folder that takes its name when it is complete, and goes if an error comes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f'.{target.name}-'))
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)  # mkdtemp makes it private
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f'.{target.name}-old-'))
            os.replace(target, old / target.name)
            os.replace(partial, target)
            shutil.rmtree(old)
        else:
            os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _paint(samples: List[Sample], classes: Classes, options: Options) -> None:
    names = classes.names
    if options.background != 'ignore':
        names = [options.background, *(n for n in names if n != options.background)]
    classes.given = names
    numbers = {name: i for i, name in enumerate(names)}
    background = 255 if options.background == 'ignore' else 0

    def painter(sample):
        return lambda: labelme.paint(sample, numbers, background)

    for sample in samples:
        sample.label_map = painter(sample)


def _kept_colours(classes: Classes):
    colours = dict(zip(classes.given, classes.colours))
    return [colours[name] for name in classes.names]


def _warn_of_gaps(labels: dict, names: List[str], problems: Problems) -> None:
    for split, found in labels.items():
        lost = [name for name in names if not found[name]]
        if lost:
            what = 'cannot be learnt' if split == 'train' else 'is not measured'
            problems.note(f'{split} has nothing of {", ".join(lost)}: that {what}')


# -- writers --------------------------------------------------------------------------------------


def _write_coco(samples: List[Sample], classes: Classes, folder: Path, options: Options, problems: Problems):
    outlined = [i.outline is not None for s in samples for i in s.instances if not i.ignore]
    if not outlined:
        raise UserError('no object is labelled: there is nothing to train on')
    has_masks = all(outlined)
    if any(outlined) and not has_masks:
        problems.note(f'{sum(outlined)} of {len(outlined)} objects have an outline: all are written as boxes alone')
    if options.detector == 'mask-rcnn' and not has_masks:
        raise UserError('--detector mask-rcnn needs an outline of every object; these labels are boxes')
    numbers = {name: i for i, name in enumerate(classes.names, 1)}
    categories = [dict(id=i, name=name) for name, i in numbers.items()]
    labels, number = {}, 0
    (folder / 'annotations').mkdir()
    for split in splits.SPLITS:
        chosen = [s for s in samples if s.split == split]
        if not chosen:
            continue
        images, annotations, found = [], [], Counter()
        for image_id, sample in enumerate(chosen, 1):
            root = folder / 'images' / split
            name = sample.name.removeprefix(f'{split}/')
            path = write_picture(sample.picture, root / name, options.link)
            width, height = sample.picture.labelled_size
            images.append(dict(id=image_id, file_name=path.relative_to(root).as_posix(), width=width, height=height))
            for instance in sample.instances:
                number += 1
                left, top, right, bottom = (round(v, 2) for v in instance.box)
                item = dict(
                    id=number, image_id=image_id, category_id=numbers[instance.label], iscrowd=int(instance.ignore)
                )
                item['bbox'] = [left, top, round(right - left, 2), round(bottom - top, 2)]
                item['area'] = round((right - left) * (bottom - top), 2)
                if has_masks and instance.outline is not None:
                    item['segmentation'] = instance.outline
                    item['area'] = _area(instance.outline, width, height)
                annotations.append(item)
                found[instance.label] += not instance.ignore
        content = dict(images=images, annotations=annotations, categories=categories)
        (folder / 'annotations' / f'{split}.json').write_text(json.dumps(content), encoding='utf-8')
        labels[split] = found
    return labels, dict(has_masks=has_masks, has_empty=any(not s.instances for s in samples))


def _area(outline, width: int, height: int) -> float:
    """Area in pixels of polygons or run lengths."""
    from pycocotools import mask as coco_mask

    if isinstance(outline, list):
        runs = coco_mask.merge(coco_mask.frPyObjects(outline, height, width))
    elif isinstance(outline['counts'], list):
        runs = coco_mask.frPyObjects(outline, height, width)
    else:
        runs = outline
    return float(coco_mask.area(runs))


def _write_maps(samples: List[Sample], classes: Classes, folder: Path, options: Options, problems: Problems):
    import numpy as np
    from PIL import Image

    # mmseg finds pictures by one ending.
    endings = Counter('.png' if s.picture.rewrite else s.picture.path.suffix.lower() for s in samples)
    png = len(endings) > 1
    if png:
        problems.note(f'pictures of several formats ({", ".join(sorted(endings))}): all are written as PNG')
    labels = {split: Counter() for split in splits.SPLITS if any(s.split == split for s in samples)}
    for sample in samples:
        path = write_picture(sample.picture, folder / 'images' / sample.split / sample.name, options.link, png)
        label_map = sample.label_map()
        values, counts = np.unique(label_map, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist()):
            if value != masks.IGNORE:
                labels[sample.split][classes.names[value]] += count
        target = folder / 'annotations' / sample.split / f'{sample.name}.png'
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label_map).save(target)
    return labels, dict(suffix=path.suffix)


def _write_folders(samples: List[Sample], classes: Classes, folder: Path, options: Options, problems: Problems):
    labels = {}
    for sample in samples:
        write_picture(sample.picture, folder / sample.split / sample.name, options.link)
        labels.setdefault(sample.split, Counter())[sample.label] += 1
    for split in labels:  # a class without a picture is a class all the same
        for name in classes.names:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
    return labels, {}
