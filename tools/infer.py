"""Run a model on pictures and videos: ``infer.py CONFIG CHECKPOINT INPUT... --out DIR``.

CONFIG is a config file or the name of a config of this package; CHECKPOINT a file, an https address, or ``official``
for the weights that the authors released for that config. INPUTs are files, folders, globs and https addresses.

DIR/vis gets drawn pictures and videos, DIR/preds what they show: a JSON file a picture, a JSON line a frame.
A picture that cannot be read is named and left out, and the exit code is 1; all else that is wrong stops the run before
it starts, with exit code 2. See docs/inference.md.
"""

import argparse
import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))

from mmengine.config import DictAction  # noqa: E402

from mmoverlock import apis, cli  # noqa: E402
from mmoverlock.apis.inputs import count  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Run a model on pictures and videos')
    parser.add_argument('config', help='config file, or the name of a config such as overlock-t_8xb256_in1k')
    parser.add_argument('checkpoint', help='checkpoint file or https address; "official" for the released weights')
    parser.add_argument('inputs', nargs='+', help='pictures, videos, folders, globs in quotes, https addresses')
    parser.add_argument('--out', required=True, help='folder for vis/ and preds/')
    parser.add_argument('--batch-size', type=int, default=1, help='pictures computed at once; default: 1')
    parser.add_argument('--device', help='cuda:0, cpu ...; default: the best there is')
    parser.add_argument('--score-thr', type=float, default=0.3, help='leave out boxes below; default: 0.3')
    parser.add_argument('--topk', type=int, default=5, help='classes a picture, of a classifier; default: 5')
    parser.add_argument('--amp', action='store_true', help='half precision: float16 on a GPU, bfloat16 on a CPU')
    parser.add_argument('--no-draw', action='store_true', help='write no pictures')
    parser.add_argument('--no-json', action='store_true', help='write no predictions')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='change settings of the config'
    )
    args = cli.parse(parser, argv)
    if args.no_draw and args.no_json:
        parser.error('--no-draw and --no-json together leave nothing to write')
    for name in ('batch_size', 'topk'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1')
    return args


def run(args) -> int:
    """Everything but the command line.

    Args:
        args (argparse.Namespace): The command line.

    Returns:
        int: How many inputs could not be read.

    Raises:
        mmoverlock.cli.UserError: If something is wrong with the command.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    sources = apis.expand(args.inputs)  # first: a mistyped path should not wait for a model
    inferencer = apis.Inferencer(
        args.config,
        None if args.checkpoint == 'official' else args.checkpoint,
        device=args.device,
        score_thr=args.score_thr,
        topk=args.topk,
        amp=args.amp,
        cfg_options=args.cfg_options,
    )
    writer = apis.Writer(inferencer, args.out, not args.no_draw, not args.no_json)
    bar = Progress(
        TextColumn(inferencer.task),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    done, bad = 0, []
    with bar, writer:
        progress = bar.add_task('', total=count(sources))
        for picture, sample in inferencer.stream(sources, args.batch_size):
            if picture.error:
                bad.append(picture)
                bar.console.print(f'left out: {picture.source.label} {picture.error}', markup=False, soft_wrap=True)
            else:
                writer.add(picture, sample)
                done += 1
            bar.advance(progress)
    print(f'pictures and frames in {args.out}: {done}' + (f'; inputs left out: {len(bad)}' if bad else ''))
    return len(bad)


def main(argv=None):
    args = parse_args(argv)
    with cli.one_line_errors():
        bad = run(args)
    if bad:
        sys.exit(1)


if __name__ == '__main__':
    main()
