"""Test a classifier, a detector or a segmentor: ``tools/test.py CONFIG CHECKPOINT``.

The config's ``default_scope`` (mmpretrain, mmdet or mmseg) says which, and with it what ``--out``
and ``--tta`` mean. The checkpoint may be one of this project's runs or an official file.
"""

import argparse
import importlib.util
import os
import os.path as osp
import sys
from copy import deepcopy

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))

from mmoverlock import cli, compat  # noqa: E402

DET_META = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
FLIPS = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Test (and evaluate) a model')
    cli.add_run_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file or address')
    parser.add_argument(
        '--out',
        help='where to write predictions: a .pkl file (classification, detection) or a folder of '
        'label maps (segmentation)',
    )
    parser.add_argument(
        '--out-item',
        choices=['pred', 'metrics'],
        default='pred',
        help='what --out receives; metrics go to a .json, .yaml or .pkl file for every task',
    )
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for painted predictions (segmentation: DIR/vis_data/vis_image)')
    parser.add_argument('--interval', type=int, default=1, help='paint every n-th picture; default: 1')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show shows a picture')
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: tta_model and tta_pipeline of the config, else flipping',
    )
    parser.add_argument('--amp', action='store_true', help='test with automatic mixed precision')
    return cli.parse(parser, argv)


def check_out(args, scope: str) -> None:
    """``--out`` fits what is to be written, and can be written."""
    if args.out is None:
        if args.out_item == 'metrics':
            raise cli.UserError('--out-item metrics needs --out FILE')
        return
    ending = osp.splitext(args.out)[1].lower()
    if args.out_item == 'metrics':
        if ending not in ('.json', '.yaml', '.yml', '.pkl'):
            raise cli.UserError(f'--out {args.out}: metrics go to a .json, .yaml or .pkl file')
    elif scope == 'mmseg':
        if osp.isfile(args.out) or ending in ('.pkl', '.pickle'):
            raise cli.UserError(f'--out {args.out}: segmentation writes label maps into a folder; name one')
    elif ending not in ('.pkl', '.pickle'):
        raise cli.UserError(f'--out {args.out}: predictions go to a .pkl file')
    folder = args.out if args.out_item == 'pred' and scope == 'mmseg' else osp.dirname(args.out)
    while folder and not osp.exists(folder):
        folder = osp.dirname(folder)
    if not os.access(folder or '.', os.W_OK):
        raise cli.UserError(f'--out {args.out}: no permission to write there')


def set_visualization(cfg, args) -> None:
    """Turn on the task's visualization hook."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if not hook:
        raise cli.UserError(
            '--show and --show-dir need a visualization hook in the config, e.g. '
            "default_hooks.visualization=dict(type='DetVisualizationHook')"
        )
    if args.interval < 1:
        raise cli.UserError(f'--interval must be at least 1, got {args.interval}')
    # The three hooks name the same settings differently.
    hook['enable' if cfg.default_scope == 'mmpretrain' else 'draw'] = True
    hook.interval = args.interval
    if args.show:
        hook.show = True
        hook.wait_time = args.wait_time
    if args.show_dir:
        folder = osp.abspath(args.show_dir)
        if cfg.default_scope == 'mmpretrain':
            hook.out_dir = folder
        elif cfg.default_scope == 'mmdet':
            hook.test_out_dir = folder
        else:
            cfg.visualizer.save_dir = folder


def default_tta_pipeline(pipeline, scope: str):
    """The test pipeline, seen once as it is and once flipped.

    The label map of a segmentor must stay unflipped: there, loading it moves behind the flip.
    """
    steps = deepcopy(list(pipeline))
    tail = [steps.pop()]
    if scope == 'mmdet':
        tail[0]['meta_keys'] = DET_META
    if scope == 'mmseg' and steps and steps[-1]['type'].split('.')[-1] == 'LoadAnnotations':
        tail.insert(0, steps.pop())
    steps.append(dict(type='TestTimeAug', transforms=[FLIPS, *([step] for step in tail)]))
    return steps


def test_dataset(cfg):
    """The innermost data set of the test loader."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def drop_masks(cfg) -> None:
    """Test a mask detector on boxes only: mmdet cannot merge the masks of several views."""
    roi_head = cfg.model.get('roi_head') or {}
    if not roi_head.get('mask_head'):
        return
    cli.warn('--tta merges boxes only; masks are left out of this test')
    roi_head.mask_head = None
    roi_head.pop('mask_roi_extractor', None)
    evaluators = cfg.test_evaluator
    for metric in evaluators if isinstance(evaluators, list) else [evaluators]:
        if metric.type.split('.')[-1] == 'CocoMetric':
            metric.metric = 'bbox'


def set_tta(cfg) -> None:
    """Wrap the model and the test pipeline in test-time augmentation."""
    from mmengine.config import ConfigDict

    scope, dataset = cfg.get('default_scope'), test_dataset(cfg)
    models = dict(
        mmpretrain=dict(type='AverageClsScoreTTA'),
        mmdet=dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)),
        mmseg=dict(type='SegTTAModel'),
    )
    model = cfg.get('tta_model') or models.get(scope)
    if model is None:
        raise cli.UserError(
            f'--tta has no default for default_scope={scope!r}: give the config a tta_model and a tta_pipeline'
        )
    if scope == 'mmdet':
        drop_masks(cfg)
    pipeline = cfg.get('tta_pipeline') or default_tta_pipeline(dataset.pipeline, scope)
    cfg.model = ConfigDict(**model, module=cfg.model)
    dataset.pipeline = pipeline


def write_label_maps(cfg, folder: str) -> None:
    """Have mmseg's metric write the predicted label maps into a folder."""
    evaluators = cfg.test_evaluator
    metrics = [
        m
        for m in (evaluators if isinstance(evaluators, list) else [evaluators])
        if m.type.split('.')[-1] == 'IoUMetric'
    ]
    if not metrics:
        raise cli.UserError('--out needs an IoUMetric in test_evaluator to write label maps')
    metrics[0].output_dir = folder


def prepare(args):
    """Read the config, apply the flags and check all that can be checked.

    Args:
        args (argparse.Namespace): The command line.

    Returns:
        Config: Ready for a Runner.

    Raises:
        mmoverlock.cli.UserError: If something is wrong with the input.
    """
    cfg = cli.load_config(args.config, args.cfg_options)
    if not cfg.get('test_dataloader') or not cfg.get('model'):
        raise cli.UserError(f'{args.config} has no model or no test_dataloader; is it a base file?')
    cli.set_work_dir(cfg, args)
    check_out(args, cfg.get('default_scope'))
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show or args.show_dir:
        set_visualization(cfg, args)
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.out and args.out_item == 'pred' and cfg.get('default_scope') == 'mmseg':
        write_label_maps(cfg, args.out)
    cli.set_loader_defaults(cfg, args)

    cli.check_packages(cfg)
    cli.check_data(cfg, ('test',))
    cli.check_whole(cfg, args.checkpoint)
    if args.tta:
        set_tta(cfg)
    from mmoverlock.engine.hooks import make_reliable  # after the packages were checked

    make_reliable(cfg)  # names pictures that cannot be read
    cli.set_launcher(cfg, args.launcher)
    return cfg


def dump_metric(scope: str, out: str):
    """The metric that writes predictions to a pickle, as the task's users know it."""
    if scope == 'mmdet':
        from mmdet.evaluation import DumpDetResults

        return DumpDetResults(out_file_path=out)
    from mmengine.evaluator import DumpResults

    return DumpResults(out_file_path=out)


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    with cli.one_line_errors():
        cfg = prepare(args)

    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if args.out and args.out_item == 'pred' and cfg.get('default_scope') != 'mmseg':
        runner.test_evaluator.metrics.append(dump_metric(cfg.get('default_scope'), args.out))
    metrics = runner.test()
    if args.out and args.out_item == 'metrics' and cli.rank() == 0:
        import mmengine

        with cli.replacing(args.out) as partial:
            mmengine.dump(metrics, partial)
    return metrics


if __name__ == '__main__':
    main()
