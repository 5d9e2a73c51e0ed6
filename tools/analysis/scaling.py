"""How training scales: ``torchrun --nproc_per_node=N tools/analysis/scaling.py CONFIG [CONFIG ...]``.

Every config's training step is timed twice in one run, by the first process alone while the others wait, and by all
together; the efficiency is the one rate over the other. Batches are random and on the device: data loading is not
timed (``tools/analysis/feeding.py`` does that). What is sent is counted where it is sent, by a hook of DDP.

A classifier is trained whole. Of a detector or segmentor it is the backbone that is trained, by the mean of its maps.
"""

import argparse
import importlib.util
import os
import os.path as osp
import sys
import time
from contextlib import contextmanager

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

from mmoverlock import cli, compat  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Time training on one and on all processes of a torchrun job')
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='config files')
    parser.add_argument('--batch-size', type=int, default=64, help='pictures a process. Defaults to 64')
    parser.add_argument('--size', type=int, default=224, help='height and width of a picture. Defaults to 224')
    parser.add_argument('--iters', type=int, default=50, help='steps to time. Defaults to 50')
    parser.add_argument('--warmup', type=int, default=10, help='steps before the clock starts. Defaults to 10')
    parser.add_argument(
        '--bucket-mb', type=float, default=25, help="MiB of gradients sent at once. Defaults to DDP's 25"
    )
    parser.add_argument('--no-sync-bn', action='store_true', help="leave batch norms as they are, also if the config's "
                        'sync_bn says otherwise')  # fmt: skip
    parser.add_argument('--compile', action='store_true', help='compile the blocks of the backbone')
    parser.add_argument('--cuda-graphs', action='store_true', help='record the backbone as CUDA graphs; needs GPUs')
    parser.add_argument('--flat', action='store_true', help='average gradients by FlatDataParallel instead of DDP')
    args = parser.parse_args(argv)
    if min(args.iters, args.batch_size, args.size) < 1 or args.warmup < 0:
        parser.error('--iters, --batch-size and --size must be at least 1, --warmup at least 0')
    return args


class Traffic:
    """Counts what DDP sends: its :meth:`hook` averages gradients as DDP does by itself.

    Attributes:
        bytes (int): Bytes of gradients handed to all-reduce since the last :meth:`reset`.
        buckets (int): All-reduce calls they were handed over in.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts counting anew."""
        self.bytes = self.buckets = 0

    def hook(self, group, bucket):
        """The communication hook."""
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        buffer = bucket.buffer()
        self.bytes += buffer.numel() * buffer.element_size()
        self.buckets += 1
        return allreduce_hook(group, bucket)


def sync_bn_numbers(model: nn.Module, step) -> dict:
    """What torch's SyncBatchNorm sends in a training step: counted over the layers that run in it.

    Forward, every process gathers mean, inverse deviation and count of all: 2 C + 1 numbers each. Backward, two sums
    of C numbers are all-reduced.

    Args:
        model (nn.Module): With batch norms, converted or not.
        step (Callable): Runs the model once in training mode.

    Returns:
        dict: ``layers``, ``gathered`` numbers and ``reduced`` numbers a step.
    """
    ran = []
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [m.register_forward_hook(lambda m, *_: ran.append(m.num_features if m.training else 0)) for m in norms]
    step()
    for handle in handles:
        handle.remove()
    channels = [c for c in ran if c]
    return dict(layers=len(channels), gathered=sum(2 * c + 1 for c in channels), reduced=2 * sum(channels))


def build(path: str, args):
    """A config's model and one random batch for it, both on this process's device.

    Args:
        path (str): Config file.
        args (argparse.Namespace): ``batch_size``, ``size``, ``compile``, ``cuda_graphs``.

    Returns:
        tuple: The model, what its ``train_step`` takes, and the config.

    Raises:
        mmoverlock.cli.UserError: The config cannot be read, or has no OverLoCK.
    """
    from mmengine.registry import MODELS, init_default_scope

    cfg = cli.load_config(path)
    backbone = cli.overlock_of(cfg.get('model'))
    if backbone is None:
        raise cli.UserError(f'{path}: its model has no OverLoCK backbone')
    cli.check_model(cfg)
    backbone.init_cfg = None
    backbone.cuda_graphs = args.cuda_graphs
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    inputs = torch.randint(0, 256, (args.batch_size, 3, args.size, args.size), dtype=torch.uint8)
    if backbone.get('out_type') == 'classification':
        cli.check_packages(cfg)
        from mmpretrain.structures import DataSample

        cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
        model = MODELS.build(cfg.model)
        classes = cfg.model.head.num_classes
        samples = [DataSample().set_gt_label(i % classes) for i in range(args.batch_size)]
        data = dict(inputs=inputs, data_samples=samples)
    else:
        model = _backbone_model(MODELS.build(backbone))
        data = dict(inputs=inputs.float() / 255)
    device = torch.device('cuda', torch.cuda.current_device()) if torch.cuda.is_available() else torch.device('cpu')
    model = model.to(device)
    if args.compile:
        model.backbone.compile_blocks()
    return model, model.data_preprocessor.cast_data(data), cfg


def _backbone_model(backbone):
    """The backbone as a model of mmengine's, with a loss that reaches every output."""
    from mmengine.model import BaseModel

    class Backbone(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = backbone

        def forward(self, inputs, mode):
            return dict(loss=sum(feature.float().relu().mean() for feature in self.backbone(inputs)))

    return Backbone()


def measure(model, data, args) -> dict:
    """Times the training step of a model, wrapped by DDP or not.

    Args:
        model (BaseModel | MMDistributedDataParallel): On its device.
        data (dict): A batch.
        args (argparse.Namespace): ``iters``, ``warmup``.

    Returns:
        dict: ``seconds`` a step and ``step``, which runs one.
    """
    from mmengine.optim import AmpOptimWrapper, OptimWrapper

    # At a rate of 0 the work is the same and the loss stays finite. Fused as in the configs.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    kind = AmpOptimWrapper if torch.cuda.is_available() else OptimWrapper
    wrapper = kind(optimizer=optimizer, clip_grad=dict(max_norm=5.0))
    model.train()

    def step():
        model.train_step(data, optim_wrapper=wrapper)

    for _ in range(args.warmup):
        step()
    _synchronize()
    start = time.perf_counter()
    for _ in range(args.iters):
        step()
    _synchronize()
    return dict(seconds=(time.perf_counter() - start) / args.iters, step=step)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(path: str, args) -> dict:
    """Times one config on one process and on all.

    Args:
        path (str): Config file.
        args (argparse.Namespace): The command line.

    Returns:
        dict: In the first process: ``one`` and ``all``, pictures a second; ``efficiency``; ``bytes`` and ``buckets`` of
        gradients a step; ``sync_bn``, see :func:`sync_bn_numbers`; ``params`` that are trained. Elsewhere the same but
        for ``one`` and ``efficiency``.

    Raises:
        mmoverlock.cli.UserError: See :func:`build`.
    """
    from mmengine.model import MMDistributedDataParallel, convert_sync_batchnorm

    from mmoverlock.engine.flat import FlatDataParallel

    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    model, data, cfg = build(path, args)
    result = {}
    if rank == 0:
        result['one'] = args.batch_size / measure(model, data, args)['seconds']
    dist.barrier()
    if cfg.get('sync_bn') == 'torch' and torch.cuda.is_available() and not args.no_sync_bn:
        model = convert_sync_batchnorm(model)
    traffic = Traffic()
    if args.flat:
        wrapped = FlatDataParallel(model)
    else:
        wrapped = MMDistributedDataParallel(
            model,
            device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None,
            broadcast_buffers=False,
            bucket_cap_mb=args.bucket_mb,
        )
        wrapped.register_comm_hook(None, traffic.hook)
    timed = measure(wrapped, data, args)
    traffic.reset()
    result['sync_bn'] = sync_bn_numbers(model, timed['step'])
    slowest = torch.tensor(timed['seconds'], device=data['inputs'].device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    result['all'] = world * args.batch_size / slowest.item()
    if rank == 0:
        result['efficiency'] = result['all'] / (world * result['one'])
    if args.flat:
        traffic.bytes, traffic.buckets = sum(wrapped.sent), len(wrapped.sent)
    result.update(bytes=traffic.bytes, buckets=traffic.buckets)
    result['params'] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return result


def main(argv=None):
    compat.apply()
    args = parse_args(argv)
    with cli.one_line_errors(), _process_group():
        world = dist.get_world_size()
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
        say = print if dist.get_rank() == 0 else lambda *_, **__: None
        say(f'{device}, torch {torch.__version__}, batch {args.batch_size} x {args.size}x{args.size} a process, '
            f'{"fp16" if torch.cuda.is_available() else "fp32"}, {args.iters} steps after {args.warmup}')  # fmt: skip
        say(f'| config | params, M | img/s on 1 | img/s on {world} | efficiency | gradients, MB a step (buckets) '
            '| SyncBN layers | SyncBN, numbers gathered + reduced |')  # fmt: skip
        say('|---|---|---|---|---|---|---|---|')
        for path in args.configs:
            r = compare(path, args)
            if dist.get_rank() == 0:
                name, norm = osp.splitext(osp.basename(path))[0], r['sync_bn']
                say(
                    f'| {name} | {r["params"] / 1e6:.2f} | {r["one"]:.1f} | {r["all"]:.1f} | {r["efficiency"]:.1%} '
                    f'| {r["bytes"] / 1e6:.2f} ({r["buckets"]}) | {norm["layers"]} '
                    f'| {norm["gathered"]} + {norm["reduced"]} |',
                    flush=True,
                )


@contextmanager
def _process_group():
    """The job's process group, made here if nobody has and taken down at the end.

    Raises:
        mmoverlock.cli.UserError: This is no torchrun job.
    """
    if dist.is_initialized():
        yield
        return
    if 'WORLD_SIZE' not in os.environ:
        raise cli.UserError('start it with torchrun --nproc_per_node=N tools/analysis/scaling.py CONFIG')
    if torch.cuda.is_available():
        local, gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if local >= gpus:
            raise cli.UserError(f'more processes than GPUs: this machine has {gpus}; start {gpus} at most')
        torch.cuda.set_device(local)
    dist.init_process_group('nccl' if torch.cuda.is_available() else 'gloo')
    try:
        yield
    finally:
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
