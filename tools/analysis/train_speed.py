"""Time training steps: ``tools/analysis/train_speed.py CONFIG [CONFIG ...]``.

A step is what training does with a batch: copy to the device, forward, loss, backward, clipping,
optimizer, in the precision that the config asks for. The batch is the config's first one, read
once: data loading is not timed. Run it with nothing else on the device.
"""

import argparse
import importlib.util
import os.path as osp
import sys
import tempfile
import time

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

import torch  # noqa: E402

from mmoverlock import cli, compat  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Time training steps')
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='config files')
    parser.add_argument('--iters', type=int, default=20, help='steps to time. Defaults to 20')
    parser.add_argument('--warmup', type=int, default=5, help='steps before the clock starts. Defaults to 5')
    parser.add_argument('--batch-size', type=int, help="instead of the config's")
    cli.add_config_options(parser)
    args = cli.parse(parser, argv)
    if args.iters < 1 or args.warmup < 0:
        parser.error('--iters must be at least 1, --warmup at least 0')
    return args


def synchronize() -> None:
    """Wait for the device; timing without it would time the launches."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(path: str, iters: int, warmup: int, batch_size=None, options=None) -> dict:
    """Times the training step of one config.

    Args:
        path (str): Config file.
        iters (int): Steps to time.
        warmup (int): Steps before (cudnn's choice of kernels, lazy initialisation).
        batch_size (int, optional): Pictures a step. Defaults to the config's.
        options (dict, optional): Changes to the config, as of ``--cfg-options``.

    Returns:
        dict: ``images_per_second``, ``ms`` per step, ``params`` of the backbone and of the whole
        model, ``size`` of the padded batch, peak memory ``gib`` (None without a GPU).

    Raises:
        mmoverlock.cli.UserError: The config or its data is not there.
    """
    from mmengine.runner import Runner

    cfg = cli.load_config(path, options)
    cli.check_packages(cfg)
    cli.check_data(cfg, ('train',))
    if batch_size:
        cfg.train_dataloader.batch_size = batch_size
    cfg.train_dataloader.num_workers = 0
    cfg.train_dataloader.persistent_workers = False
    if cfg.get('default_scope') == 'mmpretrain':
        cfg.train_dataloader.setdefault('collate_fn', dict(type='default_collate'))
    if not cli.has_accelerator() and cfg.optim_wrapper.type == 'AmpOptimWrapper':
        cli.warn('no GPU here: timing full precision instead of mixed')
        cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.optimizer.lr = 0.0  # the same work, and the loss stays finite
    cfg.log_level = 'ERROR'
    cfg.experiment_name = osp.abspath(path)
    cfg.visualizer = None  # those of the configs share a name: the second would write into the first one's folder
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        runner = Runner.from_cfg(cfg)
        model = runner.model
        model.init_weights()
        model.train()
        optim_wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
        batch = next(iter(runner.build_dataloader(cfg.train_dataloader, seed=0)))
        for _ in range(warmup):
            model.train_step(batch, optim_wrapper=optim_wrapper)
        synchronize()
        start = time.perf_counter()
        for _ in range(iters):
            model.train_step(batch, optim_wrapper=optim_wrapper)
        synchronize()
        seconds = (time.perf_counter() - start) / iters
        inputs = model.data_preprocessor(batch, training=True)['inputs']
    number, size = len(inputs), tuple(inputs.shape[2:])
    return dict(
        images_per_second=number / seconds,
        ms=seconds * 1e3,
        batch=number,
        size=f'{size[0]}x{size[1]}',
        backbone=sum(p.numel() for p in model.backbone.parameters()),
        params=sum(p.numel() for p in model.parameters()),
        gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    )


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    print(f'{device}, torch {torch.__version__}, {args.iters} steps after {args.warmup}')
    print('| config | params of backbone / all, M | batch | img/s | ms/step | peak GiB |')
    print('|---|---|---|---|---|---|')
    with cli.one_line_errors():
        for path in args.configs:
            r = measure(path, args.iters, args.warmup, args.batch_size, args.cfg_options)
            name = osp.splitext(osp.basename(path))[0]
            memory = '-' if r['gib'] is None else f'{r["gib"]:.1f}'
            print(
                f'| {name} | {r["backbone"] / 1e6:.1f} / {r["params"] / 1e6:.1f} '
                f'| {r["batch"]} x {r["size"]} | {r["images_per_second"]:.0f} | {r["ms"]:.1f} '
                f'| {memory} |',
                flush=True,
            )


if __name__ == '__main__':
    main()
