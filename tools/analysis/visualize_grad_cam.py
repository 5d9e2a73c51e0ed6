"""Grad-CAM of a classifier: ``visualize_grad_cam.py MODEL CHECKPOINT PICTURES... --out FILE.png``.

Where layers speak for a class: that of ``--target``, or the predicted one. Layers are named as in the backbone:
``focus4`` is Focus-Net's last map, which the classifier reads, ``stage4`` Overview-Net's.
"""

import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

from mmoverlock import compat, visualization  # noqa: E402
from mmoverlock.visualization import command  # noqa: E402


def parse_args(argv=None):
    parser = command.parser('Draw Grad-CAM')
    parser.add_argument('--target', metavar='CLASS', help='class by number or name; default: the predicted one')
    parser.add_argument(
        '--layers', nargs='+', default=['focus4', 'stage4'], metavar='LAYER', help='default: focus4 stage4'
    )
    return parser.parse_args(argv)


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    with command.one_line_errors():
        subject = command.build(args, classifier=True)
        model, wanted = subject.model, subject.class_number(args.target)

        def draw(figure, name, picture):
            image = visualization.normalize(model, picture)
            scores = visualization.class_scores(model, image)
            target = int(scores.argmax()) if wanted is None else wanted
            heats = [visualization.grad_cam(model, image, target, layer) for layer in args.layers]
            panels = [(f'{name}, {subject.class_name(target)}: {scores[target]:.2f}', picture)]
            panels += [(layer, visualization.overlay(picture, heat)) for layer, heat in zip(args.layers, heats)]
            command.show_row(figure, panels)

        shown = command.pictures(args, subject)
        return command.write_figures(args, shown, draw, 1, 1 + len(args.layers), '_grad_cam')


if __name__ == '__main__':
    main()
