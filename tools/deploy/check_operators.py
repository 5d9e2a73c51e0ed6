"""Will TensorRT read it? ``check_operators.py FILE.onnx ...``.

Holds the operators of ONNX files against TensorRT's own list. TensorRT itself is not needed, and not asked.
"""

import argparse
import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

from mmoverlock import cli, deploy  # noqa: E402
from mmoverlock.deploy import tensorrt  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Hold ONNX files against TensorRT's list of operators")
    parser.add_argument('files', nargs='+', metavar='FILE', help='ONNX file')
    return cli.parse(parser, argv)


def main(argv=None):
    args = parse_args(argv)
    bad = []
    with cli.one_line_errors():
        for path in args.files:
            try:
                counts, problems = tensorrt.operators(path), tensorrt.problems(path)
            except deploy.ExportError as error:
                raise cli.UserError(str(error)) from error
            except Exception as error:  # protobuf's errors have no common class
                raise cli.UserError(f'cannot read {path}: {cli._reason(error)}') from error
            print(f'{path}: {sum(counts.values())} nodes; ' + ', '.join(f'{n} {name}' for name, n in counts.items()))
            for problem in problems:
                print(f'  {problem}')
            bad += [f'{path}: {"; ".join(problems)}'] if problems else []
        if bad:
            raise cli.UserError(f'not for TensorRT ({tensorrt.SOURCE}): ' + ' | '.join(bad))
    print(f'nothing that the list forbids ({tensorrt.SOURCE}); no file has been through TensorRT here')


if __name__ == '__main__':
    main()
