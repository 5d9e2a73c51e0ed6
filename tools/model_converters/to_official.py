"""Rename a checkpoint of this project to the official names: ``to_official.py SRC DST``.

The result is a bare state dict that the official code loads. Files merged by
``switch_to_deploy()`` have no official form; those of ``reparameterize.py`` do.
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
    parser = argparse.ArgumentParser(description="This project's checkpoint -> official names")
    parser.add_argument('src', help='checkpoint of a classifier, detector, segmentor or backbone')
    parser.add_argument('dst', help='file to write')
    args = parser.parse_args(argv)
    with cli.one_line_errors():
        try:
            state = checkpoints.to_official(checkpoints.load_state_dict_file(args.src))
        except checkpoints.CheckpointError as error:
            raise cli.UserError(str(error)) from error
        with cli.replacing(args.dst) as partial:
            checkpoints.write_checkpoint(state, partial)
    print(f'{len(state)} tensors written to {args.dst}')


if __name__ == '__main__':
    main()
