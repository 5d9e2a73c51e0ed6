"""Put finished runs in one table: ``tools/analysis/collect_results.py WORK_DIR [WORK_DIR ...]``.

Of each work directory it reads the latest run: its validation results, its mean step time and how
long it took by the clock, in Markdown.
"""

import argparse
import json
import os.path as osp
import re
import sys
from datetime import datetime
from glob import glob

STAMP = re.compile(r'^(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) - mmengine')
# What stands for a run: the metric, what it is multiplied by to be per cent, and one more to show
# in brackets.
METRICS = {
    'accuracy/top1': (1, None),
    'mIoU': (1, None),
    'coco/bbox_mAP': (100, 'coco/bbox_mAP_50'),
}


def latest_run(work_dir: str) -> str:
    """The folder of the latest run in a work directory (mmengine names it by the time).

    Raises:
        ValueError: There is none that logged anything.
    """
    runs = sorted(glob(osp.join(work_dir, '*', 'vis_data', 'scalars.json')))
    if not runs:
        raise ValueError(f'{work_dir} holds no run (no */vis_data/scalars.json); name a --work-dir of tools/train.py')
    return osp.dirname(osp.dirname(runs[-1]))


def seconds_by_the_clock(run: str) -> float:
    """Time between the first and the last line of a run's log."""
    stamps = []
    for path in glob(osp.join(run, '*.log')):
        with open(path, encoding='utf-8') as file:
            stamps += [m[1] for m in map(STAMP.match, file) if m]
    times = [datetime.strptime(s, '%Y/%m/%d %H:%M:%S') for s in stamps]
    return (max(times) - min(times)).total_seconds() if times else float('nan')


def read_run(work_dir: str) -> dict:
    """What the table says of a run.

    Args:
        work_dir (str): Work directory of one config.

    Returns:
        dict: ``name``, ``seconds``, ``steps``, ``step_time`` (s, mean), ``loss`` (last logged) and
        ``curve``, a list of (step, metrics).

    Raises:
        ValueError: There is no run, or it logged no training step.
    """
    run = latest_run(work_dir)
    with open(osp.join(run, 'vis_data', 'scalars.json'), encoding='utf-8') as file:
        records = [json.loads(line) for line in file if line.strip()]
    train = [r for r in records if 'loss' in r]
    if not train:
        raise ValueError(f'{run} logged no training step; it ended before the first')
    times = [r['time'] for r in train if 'time' in r]
    return dict(
        name=osp.basename(osp.abspath(work_dir)),
        seconds=seconds_by_the_clock(run),
        steps=train[-1]['step'],
        step_time=sum(times) / max(len(times), 1),
        loss=train[-1]['loss'],
        curve=[(r['step'], r) for r in records if any(m in r for m in METRICS)],
    )


def result(record: dict) -> str:
    """The metric of one validation, per cent."""
    name = next(m for m in METRICS if m in record)
    scale, further = METRICS[name]
    text = f'{record[name] * scale:.1f}'
    return f'{text} ({record[further] * scale:.1f})' if further in record else text


def row(run: dict) -> str:
    """One line of the table; a run without a validation at its end is said not to be finished."""
    curve = list(run['curve'])
    last = 'not finished'
    if curve and curve[-1][0] >= run['steps']:
        last = f'**{result(curve.pop()[1])}**'
    before = ', '.join(f'{step}: {result(record)}' for step, record in curve)
    return (
        f'| {run["name"]} | {last} | {before} | {run["steps"]} | {run["loss"]:.3f} '
        f'| {run["step_time"] * 1e3:.0f} | {run["seconds"]:.0f} |'
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description='Put finished runs in one table')
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR')
    args = parser.parse_args(argv)
    try:
        lines = [row(read_run(folder)) for folder in args.work_dirs]
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    print('| run | result | before, by step | steps | last loss | ms/step | s by the clock |')
    print('|---|---|---|---|---|---|---|')
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
