"""Train a classifier, a detector or a segmentor: ``tools/train.py CONFIG``.

The config's ``default_scope`` (mmpretrain, mmdet or mmseg) says which. Everything that can be wrong
with the input is looked at before the work directory is made.
"""

import argparse
import importlib.util
import os.path as osp
import sys

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))

from mmoverlock import cli, compat  # noqa: E402
from mmoverlock.checkpoints import CheckpointError, latest_checkpoint  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Train a model')
    cli.add_run_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from a checkpoint of an earlier run; without a value, from the latest one in the work directory',
    )
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision (GPU only)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the actual batch size over auto_scale_lr.base_batch_size',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate while training')
    parser.add_argument(
        '--no-persistent-workers', action='store_true', help='let data loader workers end with each epoch'
    )
    return cli.parse(parser, argv)


def set_amp(cfg, wanted: bool) -> None:
    """Mixed precision as the flag or the config asks; full precision where there is no GPU."""
    wrapper = cfg.get('optim_wrapper') or {}
    kind = wrapper.get('type', 'OptimWrapper')
    mixed = kind == 'AmpOptimWrapper'
    if wanted and not cli.has_accelerator():
        raise cli.UserError('--amp needs a GPU: mmengine has no mixed precision on the CPU; leave it out')
    if wanted and not mixed:
        if kind != 'OptimWrapper':
            raise cli.UserError(f'--amp replaces an OptimWrapper, the config has {kind}')
        wrapper.type = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
    elif mixed and not cli.has_accelerator():
        cli.warn('no GPU here: training in full precision instead of mixed')
        wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)


def set_auto_scale_lr(cfg) -> None:
    """Switch on the scaling of the learning rate that the config describes."""
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise cli.UserError(
            '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=N) in the '
            'config: the total batch size its learning rate is for'
        )
    cfg.auto_scale_lr.enable = True


def drop_validation(cfg) -> None:
    """Train without evaluating, and without picking a best checkpoint by it."""
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint')
    if checkpoint:
        checkpoint.pop('save_best', None)


def set_resume(cfg, resume: str) -> None:
    """Point the config at the checkpoint to continue from."""
    if resume != 'auto':
        cfg.resume, cfg.load_from = True, resume
        return
    try:
        path = latest_checkpoint(cfg.work_dir)
    except CheckpointError as error:
        raise cli.UserError(str(error)) from error
    if path is None:
        cli.warn(f'nothing to resume in {cfg.work_dir}: starting from the beginning')
        return
    cfg.resume, cfg.load_from = True, path


def check_weights(cfg, backbone) -> None:
    """The checkpoints that the run starts from can be read, and the backbone's is of its variant."""
    init = (cli.overlock_of(cfg.get('model')) or {}).get('init_cfg') or {}
    for item in init if isinstance(init, (list, tuple)) else [init]:
        if item.get('type') == 'Pretrained' and not cfg.get('resume'):
            content = cli.check_checkpoint(item['checkpoint'])
            cli.check_fit(backbone, content, item['checkpoint'], item.get('prefix') or '', strict=True)
    if not cfg.get('load_from'):
        return
    content = cli.check_checkpoint(cfg.load_from)
    if cfg.get('resume') and content is not None and 'optimizer' not in content:
        raise cli.UserError(
            f'{cfg.load_from} holds weights only, no state of a run to resume; to start from its '
            f'weights use --cfg-options load_from={cfg.load_from}'
        )
    cli.check_fit(backbone, content, cfg.load_from)


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
    if not cfg.get('train_dataloader') or not cfg.get('model'):
        raise cli.UserError(f'{args.config} has no model or no train_dataloader; is it a base file?')
    cli.set_work_dir(cfg, args)
    set_amp(cfg, args.amp)
    if args.auto_scale_lr:
        set_auto_scale_lr(cfg)
    if args.no_validate:
        drop_validation(cfg)
    if args.resume is not None:
        set_resume(cfg, args.resume)
    cli.set_loader_defaults(cfg, args)

    cli.check_packages(cfg)
    backbone = cli.check_model(cfg)
    cli.check_data(cfg, ('train', 'val'))
    cli.check_batch_norm(cfg)
    check_weights(cfg, backbone)
    from mmoverlock.engine.hooks import make_reliable  # after the packages were checked

    make_reliable(cfg)
    cli.set_launcher(cfg, args.launcher)
    return cfg


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    with cli.one_line_errors():
        cfg = prepare(args)

        from mmengine.registry import RUNNERS
        from mmengine.runner import Runner

        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        with (
            cli.wait_for_the_cause(runner),
            cli.explain_single_value(),
            cli.explain_non_finite(),
            cli.explain_json(cfg),
        ):
            runner.train()


if __name__ == '__main__':
    main()
