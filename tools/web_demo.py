"""A web page to drop pictures on: ``web_demo.py CONFIG CHECKPOINT [--model CONFIG CHECKPOINT]...``.

It shows what the model finds, the overview map, and what ContMix looks at from the place you click on. Only this
machine reaches it unless --host says otherwise. See docs/inference.md.
"""

import argparse
import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))

from mmoverlock import apis, cli, web  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Serve a web page that runs models on pictures')
    parser.add_argument('config', help='config file, or the name of a config such as overlock-t_8xb256_in1k')
    parser.add_argument('checkpoint', help='checkpoint file or https address; "official" for the released weights')
    parser.add_argument(
        '--model',
        nargs=2,
        action='append',
        default=[],
        metavar=('CONFIG', 'CHECKPOINT'),
        help='one more model to choose from, of any task; may be given several times',
    )
    parser.add_argument('--device', help='cuda:0, cpu ...; default: the best there is')
    parser.add_argument('--score-thr', type=float, default=0.3, help='leave out boxes below; default: 0.3')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen at; default: 127.0.0.1, this machine')
    parser.add_argument('--port', type=int, help='default: the first free one from 7860 on')
    return cli.parse(parser, argv)


def main(argv=None):
    args = parse_args(argv)
    with cli.one_line_errors():
        models = [
            apis.Inferencer(
                config,
                None if checkpoint == 'official' else checkpoint,
                device=args.device,
                score_thr=args.score_thr,
            )
            for config, checkpoint in [(args.config, args.checkpoint), *args.model]
        ]
        web.launch(models, args.host, args.port)


if __name__ == '__main__':
    main()
