"""Is a data set where it should be, and complete?

``tools/data/check_dataset.py KIND [ROOT]`` holds a folder against the published data set (KIND is
imagenet, coco or ade20k); ``tools/data/check_dataset.py CONFIG`` looks at what a config reads, and a folder that
``convert.py`` wrote is looked at through its config: what is missing or wrong, how much there is of each class, sizes.
Exit code 0: all there; 1: something is missing or wrong; 2: the question itself was wrong.
"""

import argparse
import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

from mmengine.config import DictAction  # noqa: E402

from mmoverlock import cli, compat, datacheck  # noqa: E402

MARKS = dict(ok='ok     ', warning='WARNING', problem='PROBLEM')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Check the layout of a data set')
    parser.add_argument(
        'target',
        help='imagenet, coco or ade20k (published layout and size), a config file, or a folder that convert.py wrote',
    )
    parser.add_argument('root', nargs='?', help='folder of the data set; default: the one that the configs name')
    parser.add_argument('--samples', type=int, default=16, help='pictures to decode per split; default: 16')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='change settings of the config'
    )
    return cli.parse(parser, argv)


def splits_of(args):
    """What to look at."""
    if args.target in datacheck.DEFAULT_ROOTS:
        return datacheck.published(args.target, args.root)
    if args.root is not None:
        raise cli.UserError(
            f'{args.target} is no kind of data set: give imagenet, coco or ade20k '
            'with a folder, or a config without one'
        )
    cfg = cli.load_config(datacheck.config_of(args.target), args.cfg_options)
    cli.check_packages(cfg)
    splits = datacheck.from_config(cfg)
    if not splits:
        raise cli.UserError(f'{args.target} reads no data set')
    return splits


def main(argv=None) -> int:
    compat.apply()
    args = parse_args(argv)
    problems, layouts = 0, []
    with cli.one_line_errors():
        splits = splits_of(args)
        for split in splits:
            for finding in split.inspect(args.samples):
                print(f'{MARKS[finding.level]} {finding.text}')
                if finding.level == 'problem':
                    problems += 1
                    layouts += [split.layout] if split.layout not in layouts else []
        for finding in datacheck.shared(splits) if args.target not in datacheck.DEFAULT_ROOTS else []:
            print(f'{MARKS[finding.level]} {finding.text}')
    if problems:
        print(f'{problems} problem{"s" if problems > 1 else ""} found')
        for layout in filter(None, layouts):
            print(f'expected layout: {layout}')
    else:
        print('all there')
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
