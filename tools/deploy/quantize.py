"""INT8 of an exported file, and what it costs: ``quantize.py CONFIG FILE.onnx OUT.onnx``.

FILE is what export.py wrote for the same config. Ranges of activations are learned from pictures of the config's
training set; then both files run over its test set, and accuracy, size and time stand side by side.
"""

import argparse
import collections
import importlib.util
import numbers
import os.path as osp
import re
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))
sys.path.insert(0, osp.dirname(osp.abspath(__file__)))

import torch  # noqa: E402
from export import build  # noqa: E402
from mmengine.config import DictAction  # noqa: E402

from mmoverlock import cli, compat, deploy  # noqa: E402
from mmoverlock.deploy import quantize  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='INT8 of an exported ONNX file')
    parser.add_argument('model', metavar='config', help='config file')
    parser.add_argument('file', help='ONNX file that export.py wrote for it')
    parser.add_argument('out', help='file to write')
    parser.add_argument('--samples', type=int, default=64, help='training pictures to learn from; default: 64')
    parser.add_argument('--target', choices=quantize.TARGETS, default='onnxruntime', help='who will run the file')
    parser.add_argument(
        '--operators',
        nargs='+',
        choices=quantize.OPERATORS,
        default=list(quantize.OPERATORS),
        help='which become INT8; default: all of these',
    )
    parser.add_argument(
        '--keep', nargs='+', default=[], metavar='REGEX', help='nodes with such a name stay float32, e.g. "focus"'
    )
    parser.add_argument(
        '--method',
        choices=['MinMax', 'Percentile', 'Entropy'],
        default='MinMax',
        help='how ranges are taken; the last two need much memory',
    )
    parser.add_argument('--time', type=int, default=5, metavar='N', help='time N calls of both, on one thread')
    parser.add_argument('--no-test', action='store_true', help='do not run the test set')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='change settings of the config'
    )
    args = cli.parse(parser, argv)
    if args.samples < 1:
        parser.error('--samples must be at least 1')
    for pattern in args.keep:
        try:
            re.compile(pattern)
        except re.error as error:
            parser.error(f'--keep {pattern}: {error}')
    args.checkpoint = 'none'  # the weights are in the file
    return args


def takes_pictures(path: str) -> bool:
    """Whether the file has the normalisation inside.

    Raises:
        mmoverlock.cli.UserError: It cannot be read, or is INT8 already.
    """
    deploy.exporters.need('onnx')
    import onnx

    try:
        proto = onnx.load(path)
    except Exception as error:  # protobuf's errors have no common class
        raise cli.UserError(
            f'cannot read {path}: {cli._reason(error)}; write it with tools/deploy/export.py'
        ) from error
    if any(node.op_type == 'QuantizeLinear' for node in proto.graph.node):
        raise cli.UserError(f'{path} is quantised already; start from the float32 file')
    return any(p.key == 'input' and p.value == 'RGB 0-255' for p in proto.metadata_props)


def show_operators(nodes) -> None:
    """Print how many of each kind of node became INT8."""
    kinds = collections.Counter(name.split('/')[-1].split('_')[0] for name in nodes)
    print('INT8: ' + ', '.join(f'{number} {kind}' for kind, number in sorted(kinds.items())))


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    torch.set_num_threads(1)
    with cli.one_line_errors():
        try:
            pictures = takes_pictures(args.file)
            cfg = cli.load_config(args.model, args.cfg_options)
            if cfg.get('default_scope') == 'mmpretrain':
                cfg.test_dataloader.setdefault('collate_fn', dict(type='default_collate'))
            cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
            cli.check_data(cfg, ['train'] if args.no_test else ['train', 'test'])
            whole = build(args).eval()
            model = deploy.deployable(whole)
            batches = quantize.calibration_batches(cfg, whole, args.samples)
            mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in deploy.models.statistics(whole) or ([0.0], [1.0]))
            feed = (lambda image: image * std + mean) if pictures else (lambda image: image)
            with cli.replacing(args.out) as partial:
                nodes = quantize.quantize(
                    args.file,
                    partial,
                    map(feed, batches),
                    args.target,
                    args.operators,
                    lambda name: any(re.search(pattern, name) for pattern in args.keep),
                    args.method,
                )
                files = dict(float32=args.file, INT8=partial)
                runs = {key: deploy.load(path, 'onnx') for key, path in files.items()}
                rows = {key: {'MiB': quantize.size_on_disk(path)} for key, path in files.items()}
                if args.time:
                    image = feed(batches[0][:1])
                    times = deploy.check.time_in_turns([lambda r=run: r(image) for run in runs.values()], args.time)
                    for key, milliseconds in zip(rows, times):
                        rows[key][f'ms, 1x{"x".join(map(str, image.shape[1:]))}'] = milliseconds
                if not args.no_test:
                    wrapped = [lambda image, run=run: run(feed(image)) for run in runs.values()]
                    for key, metrics in zip(rows, quantize.evaluate(cfg, model, whole, wrapped)):
                        rows[key].update((k, v) for k, v in metrics.items() if isinstance(v, numbers.Real))
        except (deploy.ExportError, ValueError) as error:
            raise cli.UserError(str(error)) from error
    show_operators(nodes)
    print(f'{"":>28} {"float32":>9} {"INT8":>9} {"change":>9}')
    for name, before in rows['float32'].items():
        after = rows['INT8'][name]
        print(f'{name:>28} {before:9.2f} {after:9.2f} {after - before:+9.2f}')
    print(f'{args.out} written')
    return rows


if __name__ == '__main__':
    main()
