"""Draw a sheet of labelled pictures, to see at once whether the labels fit: ``contact_sheet.py CONFIG|FOLDER``.

FOLDER is one that ``convert.py`` wrote. The pictures come through the config's own data set: what the sheet shows is
what a training gets.
"""

import argparse
import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

from mmengine.config import DictAction  # noqa: E402
from PIL import Image  # noqa: E402

from mmoverlock import cli, compat, datacheck  # noqa: E402
from mmoverlock.dataprep import contact_sheet  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Draw a sheet of labelled pictures')
    parser.add_argument('target', help='a config, or a folder that tools/data/convert.py wrote')
    parser.add_argument('--out', help='PNG to write; default: work_dirs/CONFIG_NAME/SPLIT.png')
    parser.add_argument('--split', choices=['train', 'val', 'test'], default='train', help='default: train')
    parser.add_argument('--number', type=int, default=24, help='how many pictures; default: 24')
    parser.add_argument('--columns', type=int, default=6, help='pictures in a row; default: 6')
    parser.add_argument('--cell', type=int, default=320, help='longer side of a picture in pixels; default: 320')
    parser.add_argument(
        '--augmented', action='store_true', help="through the config's pipeline, as the network sees them"
    )
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='change settings of the config'
    )
    args = cli.parse(parser, argv)
    for name in ('number', 'columns', 'cell'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1')
    return args


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    with cli.one_line_errors():
        if args.out and osp.splitext(args.out)[1].lower() not in Image.registered_extensions():
            raise cli.UserError(f'--out {args.out}: name a picture, such as sheet.png')
        path = datacheck.config_of(args.target)
        cfg = cli.load_config(path, args.cfg_options)
        cli.check_packages(cfg)
        cli.check_data(cfg, (args.split,))
        sheet = contact_sheet(cfg, args.split, args.number, args.columns, args.cell, args.augmented)
        out = args.out or osp.join('work_dirs', osp.splitext(osp.basename(path))[0], f'{args.split}.png')
        with cli.replacing(out) as partial:
            Image.fromarray(sheet).save(partial)
    print(out)


if __name__ == '__main__':
    main()
