"""The kernels that ContMix makes: ``visualize_contmix.py MODEL CHECKPOINT PICTURES... --position X Y --out FILE.png``.

Above: a place with its small (white) and large window (red), and the weights of each laid over the picture, as a mean
of all heads. Below: the kernels of every head, with their greatest weight; without preference it would be 1 / cells.
"""

import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

from mmoverlock import compat, visualization  # noqa: E402
from mmoverlock.visualization import command  # noqa: E402

PER_ROW = 8


def parse_args(argv=None):
    parser = command.parser('Draw the kernels that ContMix makes for a place')
    parser.add_argument(
        '--position',
        type=float,
        nargs=2,
        metavar=('X', 'Y'),
        help='the place, in pixels of the picture as drawn; default: its middle',
    )
    parser.add_argument('--block', default='-1', help='number or name, such as focus3.0; default: -1, the last')
    return parser.parse_args(argv)


def outline(axes, kernels, window, color):
    """Outline a window in the picture."""
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = kernels.box(window)  # a pixel's centre is at a whole number in matplotlib
    axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.5))


def draw_kernels(figure, kernels):
    """A row of small kernels and one of large ones for every eight heads."""
    rows = -(-kernels.heads // PER_ROW)
    grid = figure.subplots(2 * rows, min(kernels.heads, PER_ROW), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for head in range(kernels.heads):
        row, column = divmod(head, PER_ROW)
        for i, window in enumerate(visualization.contmix.WINDOWS):
            weights = getattr(kernels, window)[head]
            command.show(grid[2 * row + i, column], weights, f'head {head}: {weights.max():.3f}', cmap='viridis')


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    with command.one_line_errors():
        subject = command.build(args)
        model = subject.model
        block = int(args.block) if args.block.lstrip('-').isdigit() else args.block
        block = visualization.contmix.block_name(model, block)
        heads = visualization.contmix_blocks(model)[block].mixer.groups
        below = 0.9 * -(-heads // PER_ROW)  # height of the kernels, in pictures

        def draw(figure, name, picture):
            position = args.position or (picture.shape[1] // 2, picture.shape[0] // 2)
            kernels = visualization.contmix_kernels(model, visualization.normalize(model, picture), position, block)
            upper, lower = figure.subfigures(2, 1, height_ratios=[1, below])
            whole, *places = upper.subplots(1, 3)
            command.show(whole, picture, f'{name}, {block}, map {kernels.map_size[0]} x {kernels.map_size[1]}')
            whole.plot(*position, '+', color='white', markersize=8)
            outline(whole, kernels, 'small', 'white')
            outline(whole, kernels, 'large', 'red')
            for axes, window in zip(places, visualization.contmix.WINDOWS):
                size = getattr(kernels, window).shape[-1]
                heat = visualization.overlay(picture, kernels.heatmap(window))
                command.show(axes, heat, f'{window} window, {size} x {size}')
            draw_kernels(lower, kernels)

        shown = command.pictures(args, subject)
        return command.write_figures(args, shown, draw, 1 + below, 3, '_contmix')


if __name__ == '__main__':
    main()
