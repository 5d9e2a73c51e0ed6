"""Training curves of one or many runs: ``plot_curves.py WORK_DIR [WORK_DIR ...] --out FILE.png``.

A work directory of tools/train.py is one curve, also where its training was resumed; a run's own folder in it, or a
log (``vis_data/scalars.json``), can be named instead. Without ``--keys``: the loss, the learning rate and the usual
metrics.
``tools/analysis/collect_results.py`` puts the last results in a table.
"""

import argparse
import importlib.util
import os
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

from mmoverlock import visualization  # noqa: E402
from mmoverlock.visualization import command  # noqa: E402

# Shown without being asked for, where a run has them.
METRICS = ('accuracy/top1', 'coco/bbox_mAP', 'coco/segm_mAP', 'pascal_voc/mAP', 'mIoU')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Draw training curves')
    parser.add_argument('runs', nargs='+', metavar='WORK_DIR', help='work directories, folders of runs, or logs')
    parser.add_argument('--out', required=True, metavar='FILE.png')
    parser.add_argument('--keys', nargs='+', metavar='KEY', help='what to draw, such as loss lr mIoU')
    parser.add_argument('--legend', nargs='+', metavar='NAME', help='names of the runs; default: their folders')
    parser.add_argument(
        '--smooth',
        type=float,
        default=0.0,
        metavar='S',
        help='exponential moving average of what is logged with every loss, but for learning rates, from 0 (none) to '
        'less than 1; the curve itself stays behind it, pale; default: 0',
    )
    args = parser.parse_args(argv)
    if args.legend and len(args.legend) != len(args.runs):
        parser.error(f'--legend names {len(args.legend)} of {len(args.runs)} runs')
    if not args.out.lower().endswith('.png'):
        parser.error(f'{args.out}: end the name in .png')
    return args


def names_of(runs):
    """The last folder of each run, and as many before it as tell them apart."""
    parts = [osp.normpath(osp.abspath(run)).split(os.sep) for run in runs]
    for number in range(1, max(map(len, parts))):
        names = ['/'.join(p[-number:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(runs)


def keys_of(curves, wanted):
    """What to draw.

    Raises:
        ValueError: A wanted key is in no run.
    """
    known = sorted({key for run in curves for key in run})
    for key in wanted or ():
        if key not in known:
            raise ValueError(f'no run logged {key}; there are {", ".join(known)}')
    return wanted or [key for key in ('loss', 'lr', *METRICS) if key in known]


def main(argv=None):
    args = parse_args(argv)
    with command.one_line_errors():
        curves = [visualization.read_curves(run) for run in args.runs]
        keys, names = keys_of(curves, args.keys), args.legend or names_of(args.runs)
        columns = min(len(keys), 3)
        rows = -(-len(keys) // columns)
        figure = command.new_figure(1.7 * columns, 1.2 * rows)
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in list(grid)[len(keys) :]:
            axes.set_axis_off()
        for axes, key in zip(figure.axes, keys):
            for i, (name, run) in enumerate(zip(names, curves)):
                if key not in run:
                    continue
                steps, values = run[key]
                few = len(steps) < len(run['loss'][0])  # a validation
                if args.smooth and not few and not key.endswith('lr'):
                    axes.plot(steps, values, color=f'C{i}', alpha=0.25, linewidth=0.8)
                    values = visualization.smooth(values, args.smooth)
                axes.plot(steps, values, color=f'C{i}', label=name, marker='.' if few else None, linewidth=1.2)
            axes.set_title(key, fontsize=9)
            axes.set_xlabel('step', fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
        figure.legend(*legend_of(figure), loc='outside lower center', ncols=min(len(names), 4), fontsize=8)
        return command.save(figure, args.out)


def legend_of(figure):
    """One entry a run, from whichever panels it is in."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    return list(entries.values()), list(entries)


if __name__ == '__main__':
    main()
