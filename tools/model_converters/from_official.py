"""Rename an official checkpoint to this project's names: ``from_official.py SRC DST``.

Not needed to use one: official files load as they are, wherever a checkpoint is named.
"""

import argparse
import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))


from mmoverlock import checkpoints, cli, compat  # noqa: E402


def main(argv=None):
    compat.apply()
    parser = argparse.ArgumentParser(description="Official checkpoint -> this project's")
    parser.add_argument('src', help='official file or address')
    parser.add_argument('dst', help='file to write')
    args = parser.parse_args(argv)
    with cli.one_line_errors():
        try:
            state = checkpoints.from_official(checkpoints.load_state_dict_file(args.src))
        except checkpoints.CheckpointError as error:
            raise cli.UserError(str(error)) from error
        with cli.replacing(args.dst) as partial:
            checkpoints.write_checkpoint(dict(state_dict=state, meta=dict(source=osp.basename(args.src))), partial)
    print(f'{len(state)} tensors written to {args.dst}')


if __name__ == '__main__':
    main()
