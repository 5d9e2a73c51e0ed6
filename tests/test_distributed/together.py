"""What two processes do together. Imported on both sides: nothing happens at import.

They are forked from the server of ``tests/test_faults``, or where there are two GPUs started anew, and meet at a file:
no port is involved.
"""

import multiprocessing
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.model import BaseModel, MMDistributedDataParallel, convert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / 'test_faults'), str(TESTS / 'test_tools')]
from common import TINY, randomise  # noqa: E402

#: The three task forms.
FORMS = dict(
    cls=dict(out_type='classification'),
    det=dict(fuse_overview=True),
    seg=dict(),
)


def call(function, folder, *args):
    """Runs ``function(device, *args)`` in two processes; gives what each returned.

    Raises:
        AssertionError: One of them failed, with its traceback.
    """
    import faults

    folder.mkdir()
    # The server's processes see no GPUs.
    context = multiprocessing.get_context('spawn') if torch.cuda.device_count() > 1 else faults.context()
    processes = [context.Process(target=_member, args=(rank, str(folder), function, args)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    errors = [path.read_text() for path in sorted(folder.glob('error*'))]
    assert not errors and [p.exitcode for p in processes] == [0, 0], '\n'.join(errors) or 'no end'
    return [torch.load(folder / f'{rank}.pth', weights_only=False) for rank in (0, 1)]


def _member(rank, folder, function, args):
    torch.set_num_threads(1)
    folder = Path(folder)
    try:
        cuda = torch.cuda.device_count() > 1
        if cuda:
            torch.cuda.set_device(rank)
        dist.init_process_group(
            'nccl' if cuda else 'gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2
        )
        result = function(torch.device('cuda', rank) if cuda else torch.device('cpu'), *args)
        torch.save(result, folder / f'{rank}.pth')
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f'error{rank}').write_text(traceback.format_exc())
        raise SystemExit(1) from None


class SyncBatchNormOnCPU(_BatchNorm):
    """torch's SyncBatchNorm in plain operators: torch's own, and DDP with it, refuse the CPU.

    A converted layer becomes one by changing its class.
    """

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        dims = (0, *range(2, x.dim()))
        count = x.new_tensor([x.numel() / x.shape[1]])
        sums = dist.nn.functional.all_reduce(torch.cat([x.sum(dims), x.square().sum(dims), count]))
        channels, total = x.shape[1], sums[-1].detach()
        mean, square = sums[:channels] / total, sums[channels:-1] / total
        variance = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * total / (total - 1), self.momentum)
            self.num_batches_tracked += 1
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale.view(shape) + (self.bias - mean * scale).view(shape)


class Model(BaseModel):
    """A task form with a loss that every output and every sample tells in."""

    def __init__(self, form, **settings):
        super().__init__()
        self.backbone = OverLoCK_(**{**FORMS[form], **settings})
        if form == 'cls':
            from mmoverlock import compat

            compat.apply()  # as the tools do, before anything imports mmpretrain
            from mmoverlock import OverLoCKClsHead

            self.head = OverLoCKClsHead(num_classes=5, in_channels=self.backbone.out_channels, hidden_channels=16)

    def forward(self, inputs, labels, mode):
        features = self.backbone(inputs)
        if hasattr(self, 'head'):
            from mmpretrain.structures import DataSample

            return self.head.loss(features, [DataSample().set_gt_label(label.view(1)) for label in labels])
        weights = (1 + labels.to(inputs.dtype)).view(-1, 1, 1, 1)
        return dict(loss=sum((weights * feature.relu()).square().mean() for feature in features))


def OverLoCK_(**settings):
    from mmoverlock import OverLoCK

    return OverLoCK(TINY, **settings)


def batches(number, size=4):
    """Micro-batches of pictures and labels in float64, the same for everybody."""
    generator = torch.Generator().manual_seed(0)
    return [
        dict(
            inputs=torch.randn(size, 3, 64, 64, generator=generator, dtype=torch.float64),
            labels=torch.randint(0, 5, (size,), generator=generator),
        )
        for _ in range(number)
    ]


class Recorder(OptimWrapper):
    """Keeps the gradients of every step, before they are clipped."""

    def __init__(self, model, **kwargs):
        super().__init__(**kwargs)
        self.model, self.gradients = model, []

    def step(self, **kwargs):
        self.gradients.append({n: p.grad.cpu().clone() for n, p in self.model.named_parameters() if p.requires_grad})
        super().step(**kwargs)


def _wrapped(model, device, flat, **options):
    """The model on its device in DDP, with these options, or in FlatDataParallel, which has none."""
    if flat:
        return MODEL_WRAPPERS.build(dict(type='mmoverlock.FlatDataParallel'), default_args=dict(module=model))
    ids = None if device.type == 'cpu' else [device]
    return MMDistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, **options)


def train(form, settings, accumulate=1, device='cpu', static_graph=False, flat=False):
    """Three optimizer steps of AdamW with clipping, on all pictures or, in a group, on this process's share.

    With ``flat`` by FlatDataParallel instead of DDP.

    Returns:
        dict: ``losses`` of the micro-batches, ``gradients`` of the steps, ``state`` at the end.
    """
    torch.manual_seed(0)
    model = bare = randomise(Model(form, **settings)).double().to(device)
    share = slice(None)
    if dist.is_initialized():
        bare = convert_sync_batchnorm(model)
        if device.type == 'cpu':
            for module in bare.modules():
                if isinstance(module, nn.SyncBatchNorm):
                    module.__class__ = SyncBatchNormOnCPU
        model = _wrapped(bare, device, flat, static_graph=static_graph)
        half = 2 * dist.get_rank()
        share = slice(half, half + 2)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-3)
    wrapper = Recorder(bare, optimizer=optimizer, accumulative_counts=accumulate, clip_grad=dict(max_norm=1.0))
    data = batches(3 * accumulate)
    wrapper.initialize_count_status(model, 0, len(data))
    model.train()
    losses = []
    for batch in data:
        batch = {key: value[share].to(device) for key, value in batch.items()}
        losses.append(float(model.train_step(batch, optim_wrapper=wrapper)['loss']))
    state = {key: value.cpu() for key, value in bare.state_dict().items()}
    return dict(losses=losses, gradients=wrapper.gradients, state=state)


#: Runs that two processes and one must share.
RUNS = dict(
    cls=dict(form='cls', settings={}),
    det=dict(form='det', settings=dict(with_cp=True), static_graph=True),
    seg=dict(form='seg', settings=dict(frozen_stages=1), accumulate=2),
    flat=dict(form='cls', settings={}, flat=True),
    flat_accumulated=dict(form='seg', settings=dict(frozen_stages=1), accumulate=2, flat=True),
)

#: Settings under which some parameter might go without a gradient.
SETTINGS = [
    ('cls', dict(drop_path_rate=0.9)),
    ('cls', dict(with_cp=[2, 5], frozen_stages=4)),
    ('det', dict(frozen_stages=2, norm_eval=True)),
    ('det', dict(out_indices=(3,), with_cp=True)),
    ('seg', dict(frozen_stages=6)),
    *[('seg', dict(out_indices=indices)) for indices in ((0,), (0, 1), (1, 2))],
]


def everything(device):
    """All the work of two processes.

    Returns:
        dict: ``runs``, by name; ``unused``, what DDP complained about for each of SETTINGS; ``control`` and
        ``flat_control``, its complaint and FlatDataParallel's about a model that does have an unused parameter.
    """
    runs = {name: train(device=device, **run) for name, run in RUNS.items()}
    unused = [_complaint(Model(form, **settings), device) for form, settings in SETTINGS]
    control = Model('seg')
    control.spare = nn.Linear(1, 1)
    found = dict(runs=runs, unused=unused, control=_complaint(control, device))
    return dict(found, flat_control=_complaint(control, device, flat=True))


def _complaint(model, device, flat=False):
    """What DDP says in two steps with ``find_unused_parameters=False``; empty if all is well."""
    model = _wrapped(model.to(device), device, flat)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-3))
    model.train()
    try:
        for batch in batches(2, size=2):
            batch['inputs'] = batch['inputs'].float()
            model.train_step({k: v.to(device) for k, v in batch.items()}, optim_wrapper=wrapper)
    except RuntimeError as error:
        return str(error)
    return ''


def scaling(device, argv):
    """tools/analysis/scaling.py.

    Returns:
        dict: ``lines`` that it printed, ``results`` of its configs.
    """
    import contextlib
    import io

    from tiny_configs import load_tool

    tool, results = load_tool('analysis/scaling.py'), []
    compare = tool.compare
    tool.compare = lambda *args: results.append(compare(*args)) or results[-1]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        tool.main(argv)
    return dict(lines=out.getvalue().splitlines(), results=results)
