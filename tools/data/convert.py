"""Labelled pictures of your own to a data set and a config that train: ``convert.py FORMAT SOURCE TARGET``.

FORMAT is what the labels are: voc, yolo, coco, labelme (objects), masks (a label map a picture), folders (a folder a
class). SOURCE is not changed; TARGET appears whole or not at all. docs/your-own-data.md goes through it.
"""

import argparse
import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

from mmoverlock import cli  # noqa: E402
from mmoverlock.dataprep import READERS, Options, convert  # noqa: E402

UNITS = dict(detection='objects', segmentation='pixels', classification='pictures')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Make a data set and a config of labelled pictures')
    parser.add_argument('format', choices=list(READERS), help='what the labels are')
    parser.add_argument('source', help='folder with pictures and labels')
    parser.add_argument('target', help='folder to write')
    where = parser.add_argument_group('where things are in SOURCE')
    where.add_argument(
        '--images', metavar='FOLDER', help='folder of the pictures; default: the usual one of the format'
    )
    where.add_argument('--labels', metavar='FOLDER', help='folder (coco: or file) of the labels; default: likewise')
    where.add_argument(
        '--label-suffix', default='.png', help="masks: what follows a picture's name in its mask's; default: .png"
    )
    what = parser.add_argument_group('classes')
    what.add_argument(
        '--classes',
        nargs='+',
        metavar='NAME',
        help='names in their order, or a file with one on each line (masks: "name red green blue" or "name value"); '
        'default: those met, or those of data.yaml',
    )
    what.add_argument(
        '--ignore', nargs='+', default=(), metavar='NAME', help='classes to leave out (masks: as "ignore")'
    )
    what.add_argument(
        '--background',
        default='background',
        metavar='NAME',
        help='labelme --task segmentation: class of pixels in no shape, or "ignore"; default: background',
    )
    what.add_argument(
        '--task', choices=['detection', 'segmentation'], help='labelme: objects (default), or label maps made of them'
    )
    split = parser.add_argument_group('splits (only where SOURCE has none of its own)')
    split.add_argument('--val', type=float, default=0.2, help='share to validate on; default: 0.2')
    split.add_argument(
        '--test', type=float, default=0.0, help='share to test on; default: 0, the same as to validate on'
    )
    split.add_argument('--seed', type=int, default=0, help='of the drawing; default: 0')
    split.add_argument('--resplit', action='store_true', help='disregard the split that SOURCE has')
    wrong = parser.add_argument_group('what is wrong or missing')
    wrong.add_argument('--skip-bad', action='store_true', help='leave out what is wrong, and say what')
    wrong.add_argument('--empty-ok', action='store_true', help='pictures without a label show nothing')
    out = parser.add_argument_group('what is written')
    out.add_argument('--link', action='store_true', help='link pictures in place of copying them')
    out.add_argument('--overwrite', action='store_true', help='replace TARGET if an earlier conversion wrote it')
    out.add_argument(
        '--arch',
        choices=['xt', 't', 's', 'b', 'demo'],
        default='xt',
        help='variant of OverLoCK; demo: a small one with small heads, to try things out on a CPU; default: xt',
    )
    out.add_argument(
        '--detector',
        choices=['retinanet', 'mask-rcnn'],
        help='default: mask-rcnn if every object has an outline, else retinanet',
    )
    out.add_argument(
        '--pretrained', metavar='FILE', help='what the backbone starts from, or "none"; default: the official weights'
    )
    out.add_argument('--side', type=int, help='longer side to show pictures at; default: their own (folders: 224)')
    out.add_argument('--epochs', type=int, help='how often each picture is seen; default: by their number')
    out.add_argument('--config', metavar='FILE', help='where to write the config; default: into TARGET')
    return parser.parse_args(argv)


def report(result) -> None:
    """Print what was written, by class and split."""
    width = max(len(name) for name in result.classes)
    print(f'{UNITS[result.task]:>{width}}  ' + '  '.join(f'{split:>10}' for split in result.counts))
    for name in result.classes:
        print(f'{name:>{width}}  ' + '  '.join(f'{result.labels[s][name]:>10}' for s in result.counts))
    print(f'{"pictures":>{width}}  ' + '  '.join(f'{n:>10}' for n in result.counts.values()))
    for line in result.problems.lines():
        print(f'note: {line}')
    if result.problems.found:
        print(f'left out: {len(result.problems.found)} (above, and in dataset.json)')
    print(f'\nlook at it:  python tools/data/contact_sheet.py {result.config}')
    print(f'train on it: python tools/train.py {result.config}')


def main(argv=None):
    args = vars(parse_args(argv))
    form, source, target = args.pop('format'), args.pop('source'), args.pop('target')
    with cli.one_line_errors():
        report(convert(form, source, target, Options(**args)))


if __name__ == '__main__':
    main()
