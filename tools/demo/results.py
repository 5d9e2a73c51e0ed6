# Copyright (c) mmoverlock authors. Licensed under Apache-2.0.
"""Collect what the demo's steps left behind into a report."""

import importlib.metadata
import math
import platform
import subprocess
import time
from pathlib import Path

from make_scenes import BACKGROUND, CLASSES, read_stamp
from report import BLUE, GREEN, ORANGE, Chart, Command, Gallery, Picture, Report, Series, Target, Task
from steps import ROOT, cores, phases, read_json, read_scalars

TASKS = ('classification', 'detection', 'segmentation')
# (task, key in the logs, factor to percent, name, target)
METRICS = (
    ('classification', 'accuracy/top1', 1, 'Top-1 accuracy', 90),
    ('detection', 'coco/bbox_mAP_50', 100, 'Box AP50', 50),
    ('detection', 'coco/segm_mAP_50', 100, 'Mask AP50', 45),
    ('segmentation', 'mIoU', 1, 'Mean IoU', 60),
)
FORKS = dict(
    mmengine='onedl-mmengine',
    mmcv='onedl-mmcv',
    mmdet='onedl-mmdetection',
    mmsegmentation='onedl-mmsegmentation',
    mmpretrain='onedl-mmpretrain',
)
PACKAGES = ('torch', *FORKS)


def version(distribution):
    """Version of an installed distribution, of either OpenMMLab line; '' if there is none."""
    for name in filter(None, (distribution, FORKS.get(distribution))):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ''


def _processor():
    try:
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit():
    def git(*args):
        return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git('status', '--porcelain', '--untracked-files=no')
        return git('rev-parse', '--short', 'HEAD') + (' with changes' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return ''


def _facts():
    facts = [
        ('Packages', ', '.join(f'{n} {version(n)}' for n in PACKAGES if version(n))),
        ('Python', platform.python_version()),
        ('System', platform.platform()),
        ('Processor', f'{_processor()}, {cores()} cores'),
        ('Commit', _commit()),
        ('Written', time.strftime('%Y-%m-%d %H:%M:%S %Z')),
    ]
    return [(name, value) for name, value in facts if value]


def read_metrics(folder):
    """The metrics of the last ``tools/test.py`` in a work directory, a dict."""
    files = sorted(folder.glob('*/[0-9]*.json'))
    return read_json(files[-1]) if files else {}


def _charts(folder, task, losses):
    """Loss and metric charts of a task; ``losses`` are (key, name, colour)."""
    scalars = read_scalars(folder)
    curves = [Series(name, scalars.get(key, []), colour, smooth=True) for key, name, colour in losses]
    held, targets = [], []
    for (owner, key, factor, name, target), colour in zip(METRICS, (GREEN, GREEN, ORANGE, GREEN)):
        if owner == task:
            points = [(x, y * factor) for x, y in scalars.get(key, [])]
            held.append(Series(name, points, colour, dots=True))
            targets.append(target)
    return [
        Chart('Training loss by iteration', curves),
        Chart('Held-out pictures, % by iteration', held, target=max(targets), low=0, high=100),
    ]


def _classification(work, result, iterations):
    def named(entries):
        for e in entries:
            right = e['guess'] == e['truth']
            caption = f'{e["guess"]} {e["score"]:.0%}' + ('' if right else f', is a {e["truth"]}')
            yield Picture(work / 'pictures' / e['file'], caption, 'good' if right else 'bad')

    note = (
        'The first ones of the held-out set, not chosen. Below each, what the classifier calls it and how sure it is.'
    )
    galleries = [Gallery('Held-out pictures', note, list(named(result['pictures'])))]
    wrong = result['total'] - result['right']
    if wrong:
        which = 'All of them' if wrong <= len(result['mistakes']) else 'Those it was surest of'
        galleries.append(
            Gallery(
                'Mistakes',
                f'{wrong} of {result["total"]} are wrong. {which}, the surest first.',
                list(named(result['mistakes'])),
            )
        )
    rows = [['Truth', *(f'said {c}' for c in result['classes']), 'right, %']]
    for i, (name, row) in enumerate(zip(result['classes'], result['confusion'])):
        rows.append([name, *map(str, row), 100 * row[i] / sum(row) if sum(row) else None])
    return Task(
        'Classification: OverLoCK',
        f'A small OverLoCK learns from scratch, in {iterations} iterations, to name the dominant shape. Its backbone '
        'is where the other two models start.',
        _charts(
            work / 'classification',
            'classification',
            [('loss', 'main head', BLUE), ('aux_loss', 'overview head × 0.4', ORANGE)],
        ),
        rows,
        'Held-out pictures, counted by what they show and what the classifier says.',
        galleries,
    )


def _detection(work, result, iterations, metrics):
    def mean(kind):
        return 100 * metrics.get(f'coco/{kind}', math.nan)

    return Task(
        'Detection and instance segmentation: Mask R-CNN',
        f'Mask R-CNN with a feature pyramid on that backbone, {iterations} iterations.',
        _charts(work / 'detection', 'detection', [('loss', 'all', BLUE), ('loss_mask', 'of it, masks', ORANGE)]),
        [
            ['', *result['classes'], 'mean'],
            ['Box AP50', *result['box_ap50'], mean('bbox_mAP_50')],
            ['Mask AP50', *result['mask_ap50'], mean('segm_mAP_50')],
            ['Held-out instances', *map(str, result['instances']), str(sum(result['instances']))],
        ],
        "AP at an overlap of one half, in %. COCO's own AP, the average over ten overlaps, is "
        f'{mean("bbox_mAP"):.1f} for boxes and {mean("segm_mAP"):.1f} for masks.',
        [
            Gallery(
                'Held-out scenes: truth left, prediction right',
                f'The first ones, not chosen; predictions with a score of at least {result["threshold"]:g}.',
                [Picture(work / 'pictures' / name) for name in result['pictures']],
                wide=True,
            )
        ],
    )


def _segmentation(work, result, iterations, metrics):
    shapes = [v for v in result['iou'][1:] if v == v]
    return Task(
        'Semantic segmentation: UPerNet',
        f'UPerNet on that backbone, {iterations} iterations. The background is a class like the others.',
        _charts(
            work / 'segmentation',
            'segmentation',
            [('loss', 'all', BLUE), ('aux.loss_ce', 'of it, auxiliary head', ORANGE)],
        ),
        [['', *result['classes'], 'mean'], ['IoU, %', *result['iou'], metrics.get('mIoU')]],
        f'Without the {BACKGROUND}, the mean over the {len(CLASSES)} shapes is '
        f'{sum(shapes) / max(len(shapes), 1):.1f}.',
        [
            Gallery(
                'Held-out scenes: picture, truth, prediction',
                'The first ones, not chosen.',
                [Picture(work / 'pictures' / name) for name in result['pictures']],
                wide=True,
                legend=[(c, 'rgb({},{},{})'.format(*p)) for c, p in zip(result['classes'], result['palette'])],
            )
        ],
    )


def build_report(work, steps, smoke, limit):
    """Collect what the steps left behind.

    Args:
        work (Path): Folder of the demo.
        steps (list[Step]): The plan; all steps done.
        smoke (bool): Whether it was only tried out.
        limit (float): Minutes allowed.

    Returns:
        Report: For :func:`report.write_report`.
    """
    records = {s.key: read_json(work / 'steps' / f'{s.key}.json') for s in steps}
    # Steps of a phase run side by side: the longest counts.
    wall = sum(max(records[s.key]['wall'] for s in group) for group in phases(steps))
    metrics = {task: read_metrics(work / f'{task}_test') for task in TASKS}
    result = read_json(work / 'pictures' / 'summary.json')
    iterations = {s.key: s.iterations for s in steps}
    stamp = read_stamp(work / 'data')
    amount = stamp['params']

    targets = []
    for task, key, factor, name, target in METRICS:
        value = metrics[task].get(key)
        targets.append(Target(name, None if value is None else value * factor, target))
    targets.append(Target('Time', wall / 60, limit, 'min', at_most=True))

    return Report(
        title='OverLoCK learns shapes',
        lead='One small OverLoCK, pretrained as a classifier and then fine-tuned inside Mask R-CNN and UPerNet, on '
        'pictures drawn a moment before. All numbers are of held-out pictures, from the last checkpoint of each '
        'training.',
        targets=targets,
        tasks=[
            _classification(work, result['classification'], iterations['classification']),
            _detection(work, result['detection'], iterations['detection'], metrics['detection']),
            _segmentation(work, result['segmentation'], iterations['segmentation'], metrics['segmentation']),
        ],
        commands=[
            Command(s.phase, s.title, records[s.key]['command'], records[s.key]['wall'], records[s.key]['cpu'])
            for s in steps
        ],
        wall=wall,
        facts=_facts(),
        flow=(
            'scenes',
            'OverLoCK classifier',
            'its backbone in Mask R-CNN and in UPerNet',
            'tests on held-out scenes',
            'this page',
        ),
        data_text=f'{amount["cls_train"]} + {amount["cls_val"]} pictures of one dominant shape '
        f'({amount["cls_size"]} px) for classification, and {amount["dense_train"]} + {amount["dense_val"]} scenes of '
        f'one to five shapes ({amount["dense_size"]} px) for the other two; the second number is held out. '
        f'The scenes hold {stamp["instances"]["train"]} + {stamp["instances"]["val"]} shapes of {len(CLASSES)} '
        'classes, which vary in place, size, turn, stretch, colour, surface, overlap, shadow, light, blur and noise. '
        'Held-out pictures come from random streams of their own; they are never trained on, nor used to choose a '
        'checkpoint.',
        banner='A smoke run: a few iterations on a few pictures, to see that everything works. Its numbers mean '
        'nothing, and no target is judged.'
        if smoke
        else '',
    )
