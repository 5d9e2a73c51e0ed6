"""What Overview-Net saw: ``visualize_overview.py MODEL CHECKPOINT PICTURES... --out FILE.png``.

Beside each picture lies the overview map: at each place the Euclidean norm over the channels of Overview-Net's last
map, from the least (blue) to the greatest value (red) in that picture. A classifier that kept its auxiliary head also
shows where Overview-Net sees a class (the head's class activation map): that of ``--target``, or the predicted one.
"""

import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

from mmoverlock import compat, visualization  # noqa: E402
from mmoverlock.visualization import command  # noqa: E402


def parse_args(argv=None):
    parser = command.parser('Draw what Overview-Net saw')
    parser.add_argument('--target', metavar='CLASS', help='class by number or name; default: the predicted one')
    return parser.parse_args(argv)


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    with command.one_line_errors():
        subject = command.build(args, classifier=args.target is not None)
        model, wanted = subject.model, subject.class_number(args.target)
        classifies = wanted is not None or getattr(getattr(model, 'head', None), 'with_aux', False)

        def draw(figure, name, picture):
            image = visualization.normalize(model, picture)
            heat = visualization.overview_map(model, image)
            panels = [(name, picture), ('overview', visualization.overlay(picture, heat))]
            if classifies:
                target = int(visualization.class_scores(model, image).argmax()) if wanted is None else wanted
                heat = visualization.overview_map(model, image, target)
                panels.append((f'overview: {subject.class_name(target)}', visualization.overlay(picture, heat)))
            command.show_row(figure, panels)

        shown = command.pictures(args, subject)
        return command.write_figures(args, shown, draw, 1, 3 if classifies else 2, '_overview')


if __name__ == '__main__':
    main()
