"""Feature maps of every stage: ``visualize_features.py MODEL CHECKPOINT PICTURES... --out FILE.png``.

A row a stage: Base-Net (stage1, stage2, stage3), Overview-Net (stage4), Focus-Net (focus3, focus4). First, over the
picture, the Euclidean norm over all channels; then the channels that vary most over the map, each from its least (dark)
to its greatest value (light).
"""

import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

from mmoverlock import compat, visualization  # noqa: E402
from mmoverlock.visualization import command  # noqa: E402


def parse_args(argv=None):
    parser = command.parser('Draw the feature maps of every stage')
    parser.add_argument('--channels', type=int, default=5, help='how many channels of a stage; default: 5')
    args = parser.parse_args(argv)
    if args.channels < 0:
        parser.error('--channels must not be negative')
    return args


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    with command.one_line_errors():
        subject = command.build(args)

        def draw(figure, name, picture):
            maps = visualization.feature_maps(subject.model, visualization.normalize(subject.model, picture))
            grid = figure.subplots(len(maps), 1 + args.channels, squeeze=False)
            for row, (stage, values) in zip(grid, maps.items()):
                heat = visualization.resized(values.norm(dim=0), picture.shape[:2])
                size = ' x '.join(map(str, values.shape))
                command.show(row[0], visualization.overlay(picture, heat), f'{stage}, {size}')
                liveliest = values.flatten(1).std(1).argsort(descending=True)
                for axes, channel in zip(row[1:], liveliest.tolist()):
                    command.show(axes, values[channel], f'channel {channel}', cmap='viridis')
            for axes in grid.flat:
                axes.set_axis_off()

        shown = command.pictures(args, subject)
        return command.write_figures(args, shown, draw, 6, 1 + args.channels, '_features')


if __name__ == '__main__':
    main()
