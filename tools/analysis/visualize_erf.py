"""Effective receptive field: ``visualize_erf.py MODEL CHECKPOINT PICTURES... --out FILE.png``.

How much each pixel of the input adds to the centre of a layer's map, averaged over the pictures; the more of them, the
smoother (RepLKNet takes 50 of ImageNet at 1024 x 1024). The figure is logarithmic: 0 is the greatest contribution, -1 a
tenth of it. The table gives the share of the picture's area, around its centre, that holds 20, 30, 50 and 99 per cent
of the contribution: RepLKNet's high-contribution area ratio (https://arxiv.org/abs/2203.06717), as SLaK reports it too
(https://arxiv.org/abs/2207.03620).

Of a network without OverLoCK, for comparison, the last map of its backbone is taken.
"""

import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

import cv2  # noqa: E402
import numpy as np  # noqa: E402

from mmoverlock import compat, visualization  # noqa: E402
from mmoverlock.visualization import command  # noqa: E402

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
DECADES = 4  # what is smaller is drawn as this


def parse_args(argv=None):
    parser = command.parser(
        'Draw the effective receptive field',
        out='FILE.png',
        size='side of the square that every picture is resized to; default: 256. In a multiple of 64 the '
        'middle of the maps is that of the picture',
    )
    parser.set_defaults(size=256)
    parser.add_argument(
        '--layers',
        nargs='+',
        default=['stage3', 'stage4', 'focus4'],
        metavar='LAYER',
        help='names in the backbone; default: stage3 stage4 focus4, the last of Base-Net, Overview-Net and Focus-Net',
    )
    parser.add_argument('--log', action='store_true', help="areas of log10(1 + contribution), as RepLKNet's script")
    args = parser.parse_args(argv)
    if not args.out.lower().endswith('.png'):
        parser.error(f'{args.out}: end the name in .png')
    return args


def squares(args, subject):
    """The pictures, resized to the square that the field is measured on."""
    for _, picture in command.pictures(args, subject):
        yield cv2.resize(picture, (args.size, args.size), interpolation=cv2.INTER_AREA)


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    with command.one_line_errors():
        subject = command.build(args)
        model, layers = subject.model, args.layers
        try:
            visualization.find_backbone(model)
        except ValueError:
            model, layers = model.backbone, [None]
        fields = {}
        for layer in layers:
            images = (visualization.normalize(subject.model, picture) for picture in squares(args, subject))
            fields[layer or 'last map'] = visualization.effective_receptive_field(model, images, layer)
        areas = {name: visualization.contribution_area(field, THRESHOLDS, args.log) for name, field in fields.items()}
        figure = command.new_figure(len(fields) + 0.3, 1)
        panels = figure.subplots(1, len(fields), squeeze=False)[0]
        for axes, (name, field) in zip(panels, fields.items()):
            relative = np.log10(np.maximum(field / field.max(), 10.0**-DECADES))
            command.show(axes, relative, name, cmap='viridis')
        figure.colorbar(panels[0].images[0], ax=panels, label='log10')
        command.save(figure, args.out)
    print('| layer | ' + ' | '.join(f'{t:.0%}' for t in THRESHOLDS) + ' |')
    print('|---|' + '---|' * len(THRESHOLDS))
    for name, area in areas.items():
        print(f'| {name} | ' + ' | '.join(f'{area[t]:.1%}' for t in THRESHOLDS) + ' |')
    return areas


if __name__ == '__main__':
    main()
