"""Speed and memory of OverLoCK and its peers, every row checked against float32 before it counts.

    python tools/analysis/benchmark.py t convnext_tiny --batch 1 128 --dtype fp16 --run eager compile
    python tools/analysis/benchmark.py t convnext_tiny --task det --shape 800 1280 --mode eval train --batch 2
    python tools/analysis/benchmark.py --config configs/detection/mask-rcnn_overlock-t_fpn_1x_coco.py
    python tools/analysis/benchmark.py --suite cpu --device cpu --in-turn
    python tools/analysis/benchmark.py --suite targets --parallel --csv targets.csv --plot targets.png

All combinations of the options are rows. A name is a variant of ours (xt, t, s, b), or a model of timm or mmpretrain;
these packages, and mmdet and mmseg for ``--config``, are imported only where a row needs them.

What is in a row:

*eval* is one forward pass without gradients: the classifier with its head, the backbone alone (``--task det`` or
``seg``: a pyramid of maps), or with ``--config`` the network of a detector or segmentor.
*train* is forward, loss and backward into fresh gradients. No data loading, copy to the device, optimizer or stochastic
depth. The classifier's loss is cross entropy (ours: with 0.4 of the auxiliary head's); a pyramid's is a random weighted
sum of its maps. (``train_speed.py`` times whole training steps of a config.)
A *config*'s network is everything but the choice of boxes (decoding, NMS), whose time depends on what a trained model
finds: two-stage detectors put 1000 fixed random boxes a picture through RoIAlign and box head, and 100 through the mask
head; a segmentor's logits are resized to the picture.

Inputs are random. Parameters that start constant (norms, LayerScale, biases) are drawn at random and batch norms take
statistics, so that no zero or one hides a mistake. The check compares what is timed with the same network in float32,
without TF32, as trained, eager, from the plain definitions of our operators: for *eval* the largest relative error of
an output, for *train* the larger of the loss's relative error and of the gradients' (root mean square over the
parameters, each relative to its own norm). A row beyond the tolerance is marked WRONG and the exit code is 1.

Precision: ``fp16`` and ``bf16`` are autocast (fp16 with a fixed loss scale), ``fp16-pure`` and ``bf16-pure`` convert
the model. ``fp32`` is PyTorch's, which on a GPU lets convolutions use TF32. Times are medians: between CUDA events, or
on a CPU the time of all threads of the process (``--clock wall`` for the other), which neighbours disturb little. On a
GPU a step of evaluation is waited for; steps of training follow each other, as in a training, and Python runs ahead.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import gc
import importlib
import importlib.util
import itertools
import multiprocessing
import multiprocessing.connection
import os
import os.path as osp
import shlex
import statistics
import subprocess
import sys
import time

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, ROOT)

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: E402

from mmoverlock import OverLoCK, cli, compat  # noqa: E402

compat.apply()  # before the head imports mmpretrain, of which half would stay imported beside transformers 5
from mmoverlock import OverLoCKClsHead  # noqa: E402
from mmoverlock.models.graphs import Graphs  # noqa: E402
from mmoverlock.models.layers import ConvNorm  # noqa: E402
from mmoverlock.ops.autocast import autocast_written_in  # noqa: E402
from mmoverlock.ops.backends import ENV_VARIABLE  # noqa: E402


def sibling(name: str):
    """Another tool of this folder as a module; the folder itself is no package."""
    key = f'mmoverlock_tool_{name}'
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, osp.join(osp.dirname(osp.abspath(__file__)), f'{name}.py'))
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


get_flops = sibling('get_flops')

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
DTYPES |= {'fp16-pure': torch.float16, 'bf16-pure': torch.bfloat16}
RUNS = ('eager', 'compile', 'blocks', 'reduce-overhead', 'max-autotune-no-cudagraphs')
MASK_RCNN_CONVNEXT = 'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'
UPERNET_CONVNEXT = 'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'
RECORDED = ('graphs', 'blocks+graphs')
CAPTURED = ('cudagraph', 'compile+cudagraph', 'blocks+cudagraph')
RUNS += (*RECORDED, *CAPTURED)
GRAPHS = ('reduce-overhead', *RECORDED, *CAPTURED)
# Two to four times what the plain definitions give at these precisions: see docs/benchmark.md.
TOLERANCE = {
    'eval': {'fp32': 1e-4, 'tf32': 5e-3, 'fp16': 1e-2, 'bf16': 6e-2},
    'train': {'fp32': 1e-3, 'tf32': 2e-2, 'fp16': 4e-2, 'bf16': 2.5e-1},
}
LOSS_SCALE = 256.0
SEED = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """One row to be.

    Args:
        model (str): Name of a variant or of a peer, or path of a config.
        mode (str): 'eval' or 'train'.
        task (str): 'cls' for a classifier, 'det' or 'seg' for a backbone's pyramid, 'config' for a config's network.
        shape (tuple[int, int]): Height and width.
        batch (int): Pictures.
        dtype (str): Key of ``DTYPES``.
        run (str): One of ``RUNS``.
        form (str): Key of ``get_flops.FORMS``; '-' for a peer, which has one form.
        layout (str): Memory format of model and input: 'nchw' or 'nhwc'.
        backend (str): Of our operators, as the environment variable says it.
    """

    model: str
    mode: str = 'eval'
    task: str = 'cls'
    shape: tuple = (224, 224)
    batch: int = 1
    dtype: str = 'fp32'
    run: str = 'eager'
    form: str = 'deploy'
    layout: str = 'nchw'
    backend: str = 'auto'

    @property
    def compiled(self) -> bool:
        """bool: Whether torch.compile is in it."""
        return self.run not in ('eager', 'graphs', 'cudagraph')

    @property
    def case(self) -> 'Job':
        """Job: What rows with the same expected result share."""
        return dataclasses.replace(self, dtype='fp32', run='eager', form='train', layout='nchw', backend='reference')


def grid(**options) -> list:
    """Jobs of all combinations; a value that is no list is the same for all. Forms follow from model and mode."""
    lists = {k: v if isinstance(v, list) else [v] for k, v in options.items()}
    jobs = [Job(**dict(zip(lists, values))) for values in itertools.product(*lists.values())]
    fixed = []
    for job in jobs:
        form = '-' if is_peer(job) else 'train' if job.mode == 'train' else job.form
        fixed.append(dataclasses.replace(job, form=form))
    return list(dict.fromkeys(fixed))


def is_peer(job: Job) -> bool:
    return job.task != 'config' and job.model not in get_flops.VARIANTS


def suites() -> dict:
    """Lists of jobs that have a name."""
    ways = ['eager', 'graphs', 'blocks+graphs']
    detection = dict(task='det', shape=(800, 1280), batch=2, dtype='fp16')
    detectors = [
        osp.join(ROOT, 'configs', 'detection', f'{m}_overlock-t_fpn_1x_coco.py') for m in ('mask-rcnn', 'retinanet')
    ]
    upernet = osp.join(ROOT, 'configs', 'segmentation', 'overlock-t_upernet_8xb2-160k_ade20k-512x512.py')
    pictures = [(512, 512), (512, 2048)]
    return dict(
        # The deep ones first: with --parallel they take longest to compile.
        targets=[
            *grid(model=['b', 's', 't', 'xt'], batch=128, dtype='fp16-pure', run='blocks+graphs'),
            *grid(model='t', mode='train', batch=64, dtype='fp16', run=ways),
            *grid(model='t', mode=['eval', 'train'], **detection, run=ways),
            *grid(model='t', batch=128, dtype='fp16-pure', run=['eager', 'graphs']),
            *grid(model='t', dtype='fp16-pure', run=['eager', 'blocks+graphs', 'blocks+cudagraph']),
            *grid(model='convnext_tiny', batch=128, dtype='fp16-pure', run=['eager', 'compile+cudagraph']),
            *grid(model='convnext_tiny', mode='train', batch=64, dtype='fp16', run=['eager', 'compile']),
            *grid(model='convnext_tiny', mode=['eval', 'train'], **detection, run=['eager', 'compile']),
            *grid(model='convnext_tiny', dtype='fp16-pure', run=['eager', 'compile+cudagraph']),
        ],
        # What the fused ContMix changes for whole networks.
        contmix=[
            job
            for model in ('b', 's', 't', 'xt')
            for known in (
                dict(mode='train', batch=64, dtype='fp16'),
                dict(mode='train', **detection),
                dict(batch=128, dtype='fp16-pure'),
                detection,
            )
            for job in grid(model=model, **known, run='graphs', backend=['auto', 'contmix=reference'])
        ],
        cpu=[
            *grid(model=['xt', 'convnext_tiny']),
            *grid(model='xt', mode='train', shape=(96, 96), batch=8, backend=['auto', 'reference']),
        ],
        papers=[
            *grid(model=detectors, task='config', shape=(800, 1280), dtype=['fp32', 'fp16'], run=['eager', 'graphs']),
            *grid(model=upernet, task='config', shape=pictures, dtype=['fp32', 'fp16'], run=['eager', 'graphs']),
            *grid(model=MASK_RCNN_CONVNEXT, task='config', shape=(800, 1280), dtype=['fp32', 'fp16']),
            *grid(model=UPERNET_CONVNEXT, task='config', shape=pictures, dtype=['fp32', 'fp16']),
        ],
    )


# -- networks -----------------------------------------------------------------------------------


class PlainHead(OverLoCKClsHead):
    """The classifier's head where mmpretrain is not installed: its layers and methods, without ``ClsHead`` below."""

    def __init__(self, num_classes, in_channels, hidden_channels=1024):
        nn.Module.__init__(self)
        overview, focus = in_channels
        self.proj = ConvNorm(focus, hidden_channels)
        self.fc = nn.Conv2d(hidden_channels, num_classes, 1)
        self.aux_bn = nn.BatchNorm2d(overview)
        self.aux_fc = nn.Conv2d(overview, num_classes, 1)


class Classifier(nn.Module):
    """Our backbone and head. Logits, or with labels the loss."""

    def __init__(self, arch):
        super().__init__()
        self.backbone = OverLoCK(arch, out_type='classification')
        try:
            self.head = OverLoCKClsHead(1000, self.backbone.out_channels)
        except ImportError:
            self.head = PlainHead(1000, self.backbone.out_channels)

    def forward(self, x, target=None):
        feats = self.backbone(x)
        logits = self.head(feats)
        if target is None:
            return (logits,)
        return F.cross_entropy(logits, target) + 0.4 * F.cross_entropy(self.head.aux_forward(feats), target)


class PeerClassifier(nn.Module):
    """A classifier of timm or mmpretrain. Logits, or with labels the loss."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, target=None):
        logits = self.body(x)
        return (logits,) if target is None else F.cross_entropy(logits, target)


class Pyramid(nn.Module):
    """A backbone. Its maps, or with weights of their sizes their weighted sum."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, target=None):
        maps = tuple(self.body(x))
        if target is None:
            return maps
        return sum((m.float() * t).sum() / t.numel() ** 0.5 for m, t in zip(maps, target))


class ConfigNetwork(nn.Module):
    """The network of a config's detector, segmentor or classifier; what it computes is said at the top."""

    def __init__(self, path, job):
        super().__init__()
        from mmengine.model import revert_sync_batchnorm
        from mmengine.registry import MODELS, init_default_scope

        cfg = read_config(path)
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        self.model = revert_sync_batchnorm(MODELS.build(cfg.model))
        device = torch.get_default_device()
        for name, number in (('boxes', get_flops.PROPOSALS), ('masks', get_flops.MASK_PROPOSALS)):
            self.register_buffer(name, random_boxes(job.batch, number, job.shape).to(device), persistent=False)

    def forward(self, x):
        model = self.model
        if hasattr(model, 'roi_head'):
            feats = model.extract_feat(x)
            return (*flatten(model.rpn_head(feats)), *flatten(self.regions(feats)))
        if hasattr(model, 'bbox_head'):
            return flatten(model.bbox_head(model.extract_feat(x)))
        if hasattr(model, 'decode_head'):
            logits = model.decode_head(model.extract_feat(x))
            return (F.interpolate(logits, size=x.shape[2:], mode='bilinear', align_corners=model.align_corners),)
        return flatten(model(x, mode='tensor'))

    def regions(self, feats):
        roi_head = self.model.roi_head
        for name, rois in (('bbox', self.boxes), ('mask', self.masks)):
            heads = getattr(roi_head, f'{name}_head', None)
            extractors = getattr(roi_head, f'{name}_roi_extractor', None)
            if heads is None:
                continue
            if not isinstance(heads, nn.ModuleList):
                heads, extractors = [heads], [extractors]
            for head, extractor in zip(heads, extractors):
                yield head(extractor(feats[: extractor.num_inputs], rois))


def random_boxes(batch, number, shape):
    """(batch * number, 5): picture and corners; corners in eighths, which half precision holds exactly."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.device('cpu'):  # whatever the default is: the boxes are the same on every device
        scale = torch.tensor([shape[1], shape[0]]) // 8
        one, other = (torch.rand(batch * number, 2, generator=generator) for _ in range(2))
        size = 0.02 + 0.6 * torch.rand(batch * number, 1, generator=generator) ** 3  # most boxes are small
        low = (one * (1 - size) * scale).floor()
        high = low + ((0.5 + 0.5 * other) * size * scale).floor() + 1
        index = torch.arange(batch).repeat_interleave(number).float()
        return torch.cat([index[:, None], 8 * low, 8 * high], dim=1)


def flatten(outputs) -> tuple:
    """The tensors of nested tuples and lists, in order."""
    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    return tuple(itertools.chain.from_iterable(flatten(o) for o in outputs)) if outputs is not None else ()


@functools.lru_cache(maxsize=None)
def read_config(path):
    """A config whose packages are there, or one of a package, ``mmdet::retinanet/retinanet_r50_fpn_1x_coco.py``."""
    if '::' in path:
        from mmengine.hub import get_config

        try:
            cfg = get_config(path)
        except Exception as error:  # a package or a config that is not there, or one that does not read
            raise cli.UserError(f'--config {path}: {error}') from error
    else:
        cfg = cli.load_config(path)
    cli.check_packages(cfg)
    cli.check_model(cfg)
    return cfg


@functools.lru_cache(maxsize=None)
def family(name: str) -> str:
    """Where a name is known: 'overlock', 'timm' or 'mmpretrain'.

    Raises:
        mmoverlock.cli.UserError: Nowhere; says which packages are missing.
    """
    if name in get_flops.VARIANTS:
        return 'overlock'
    missing = []
    for package in ('timm', 'mmpretrain'):
        try:
            module = importlib.import_module(package)
            if package == 'timm' and module.is_model(name):
                return package
            if package == 'mmpretrain' and name in module.list_models():
                return package
        except ImportError as error:
            missing.append(f'{package} cannot be imported ({str(error).splitlines()[0]}): pip install {package}')
    raise cli.UserError(
        f'{name} is neither a variant ({", ".join(get_flops.VARIANTS[:4])}) nor a model of timm or mmpretrain'
        + ''.join(f'; {m}' for m in missing)
    )


def build(job: Job) -> nn.Module:
    """The network of a job as trained, on the device that torch builds on."""
    if job.task == 'config':
        return ConfigNetwork(job.model, job)
    dense = job.task != 'cls'
    kind = family(job.model)
    if kind == 'overlock':
        return Pyramid(OverLoCK(job.model, fuse_overview=job.task == 'det')) if dense else Classifier(job.model)
    if kind == 'timm':
        import timm

        body = timm.create_model(job.model, pretrained=False, features_only=dense)
    else:
        import mmpretrain

        options = dict(backbone=dict(out_indices=(0, 1, 2, 3))) if dense else {}
        body = mmpretrain.get_model(job.model, pretrained=False, **options)
        body = body.backbone if dense else nn.Sequential(body.backbone, body.neck or nn.Identity(), body.head)
    for m in body.modules():  # a random step cannot be checked
        if hasattr(m, 'drop_prob'):
            m.drop_prob = 0.0
        elif isinstance(m, nn.Dropout):
            m.p = 0.0
    return Pyramid(body) if dense else PeerClassifier(body)


def reshape(model: nn.Module, form: str) -> nn.Module:
    """Bring ours, in place, into a form of ``get_flops.FORMS``."""
    get_flops.reshape_to(model, form)
    if form == 'deploy' and isinstance(getattr(model, 'head', None), PlainHead):
        model.head.switch_to_deploy()  # the line above only knows the package's own classes
    return model


@functools.lru_cache(maxsize=None)
def count(model: str, task: str, form: str, shape: tuple) -> tuple:
    """Parameters and multiply-accumulates a picture, both complete as ``get_flops.py`` counts; None where it cannot."""
    if task == 'config':
        name = 'train' if form == '-' else form
        result = get_flops.report(lambda: get_flops.build_config(read_config(model)), model, name, shape)
        return result['params'][name], result['complete']
    job = Job(model, task=task, shape=shape)
    network = get_flops.on_meta(lambda: build(job))
    with torch.device('meta'):
        network = reshape(network, form).eval()
        parameters = get_flops.parameters(network)
        try:
            with get_flops.counting() as tally:
                network(torch.empty(1, 3, *shape, device='meta'))
        except Exception:  # a peer that cannot run without values
            return parameters, None
    return parameters, get_flops.total(tally, get_flops.COMPLETE)


# -- the check ----------------------------------------------------------------------------------


def awaken(model: nn.Module, device) -> None:
    """Draw what starts constant at random: norms, LayerScales, biases; nothing that is zero or one hides a mistake."""
    generator = torch.Generator(device).manual_seed(SEED)
    for p in model.parameters():
        start = p.detach().flatten()[0].item()
        if p.numel() < 2 or not (p == start).all():
            continue
        with torch.no_grad():
            if start == 0:
                p.normal_(0, 0.1, generator=generator)
            else:  # a LayerScale's 1e-6 would leave its branch out
                p.uniform_(0.8, 1.2, generator=generator).mul_(start if abs(start) > 0.01 else 0.2)


@torch.no_grad()
def calibrate(model: nn.Module, image: torch.Tensor) -> None:
    """Give batch norms the statistics of a few pictures, so that folding them is not folding ones and zeros."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 1.0
    model.train()
    model(image)
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum


@contextlib.contextmanager
def backend(name: str):
    """Our operators' backend inside; 'auto' leaves what the environment says."""
    before = os.environ.get(ENV_VARIABLE)
    if name != 'auto':
        os.environ[ENV_VARIABLE] = name
    try:
        yield
    finally:
        if name != 'auto':
            os.environ.pop(ENV_VARIABLE) if before is None else os.environ.update({ENV_VARIABLE: before})


@contextlib.contextmanager
def exactly():
    """float32 without TF32."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def gradients(model: nn.Module) -> dict:
    """Gradients by name of the parameter; what got none is left out."""
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖; infinite where the shapes differ."""
    if ours.shape != exact.shape:
        return float('inf')
    ours, exact = ours.detach().double(), exact.detach().double().to(ours.device)
    return ((ours - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def gradient_error(ours: dict, exact: dict) -> float:
    """Root mean square of the parameters' relative errors.

    Parameters whose gradient is nought but for rounding (a bias before a batch norm) are left out. One that is quite
    wrong counts as 1, so all layers count alike.
    """
    if set(ours) != set(exact):
        return float('inf')
    norms = {n: (g.double().norm() / g.numel() ** 0.5).item() for n, g in exact.items()}
    floor = 1e-5 * max(norms.values())
    errors = [relative(ours[n], exact[n]) for n in exact if norms[n] > floor]
    if not all(e == e for e in errors):
        return float('nan')
    return statistics.mean(min(e, 1.0) ** 2 for e in errors) ** 0.5


class Expected:
    """A job's network as trained, its input and its result in float32 from the definitions."""

    def __init__(self, job: Job, device: str):
        torch.manual_seed(SEED)
        size = job.shape if job.shape[0] * job.shape[1] <= 320**2 or job.task == 'config' else (224, 224)
        with torch.device(device):
            model = build(job)
            self.image = torch.randn(job.batch, 3, *job.shape)
            awaken(model, device)
            with exactly(), backend('reference'):
                calibrate(model, torch.randn(min(max(job.batch, 2), 8), 3, *size))
                self.state = {k: v.clone() for k, v in model.state_dict().items()}
                self.target = self.draw_target(model.eval(), job)
                if job.mode == 'eval':
                    with torch.no_grad():
                        self.outputs = [o.float() for o in model(self.image)]
                else:
                    loss = model.train()(self.image, self.target)
                    loss.backward()
                    self.loss, self.gradients = loss.detach(), gradients(model)
        self.built = model

    def draw_target(self, model, job):
        if job.mode == 'eval':
            return None
        if job.task == 'cls':
            return torch.randint(0, 1000, (job.batch,))
        with torch.no_grad():
            return [torch.randn(job.batch, *m.shape[1:]) for m in model(self.image[:1])]

    def network(self, job: Job, device: str) -> nn.Module:
        """The network anew, with the same values."""
        model, self.built = self.built, None  # the first row takes the one that is there
        if model is None:
            with torch.device(device):
                model = build(job)
        model.load_state_dict(self.state)
        model.zero_grad(set_to_none=True)
        return model


# -- one row ------------------------------------------------------------------------------------


class Row:
    """A job from its network to its figures: :meth:`prepare` builds and compiles, :meth:`finish` checks and times.

    Args:
        job (Job): What to run.
        options (argparse.Namespace): ``device``, ``iters``, ``clock``, ``cudnn_benchmark``.
    """

    expected = (None, None)  # the last case and its result: neighbours in the list share it

    def __init__(self, job: Job, options):
        self.job, self.options, self.cuda = job, options, options.device.startswith('cuda')

    def memory(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0

    def prepare(self, lock=contextlib.nullcontext()) -> None:  # noqa: B008 one null context serves all
        """Builds the network and runs the step once; compilation falls into it.

        Args:
            lock: Held while float32 results are made, the largest use of memory.
        """
        job, device = self.job, self.options.device
        with lock:
            if Row.expected[0] != job.case:
                Row.expected = (None, None)
                self.empty()
                Row.expected = (job.case, Expected(job, device))
            self.truth = Row.expected[1]
            model = self.truth.network(job, device)
            self.empty()
        if job.form in ('merged', 'deploy'):
            reshape(model, job.form)
        model.train(job.mode == 'train')
        dtype = DTYPES[job.dtype] if job.dtype.endswith('-pure') else torch.float32
        self.model, self.image = model.to(dtype), self.truth.image.to(dtype)
        if job.layout == 'nhwc':  # the model otherwise as it comes: switch_to_deploy has put weights in this order
            self.model = self.model.to(memory_format=torch.channels_last)
            self.image = self.image.to(memory_format=torch.channels_last)
        backbones = [m for m in self.model.modules() if isinstance(m, OverLoCK)]
        if not self.cuda and job.backend == 'reference':
            for backbone in backbones:  # the plain definition: PyTorch's own order of memory, too
                backbone.memory_format = torch.contiguous_format
        if job.run in RECORDED:
            for backbone in backbones:
                backbone.graphs = Graphs()  # what OverLoCK(cuda_graphs=True) has
        if job.compiled:
            torch.compiler.reset()  # rows do not make each other recompile
            if job.run.startswith('blocks') and backbones:
                for backbone in backbones:
                    backbone.compile_blocks()
                self.network = self.model
            else:
                mode = job.run if job.run in ('reduce-overhead', 'max-autotune-no-cudagraphs') else None
                network = autocast_written_in(type(self.model).forward)
                self.network = functools.partial(torch.compile(network, fullgraph=True, mode=mode), self.model)
        else:
            self.network = self.model
        self.step = self.train_step if job.mode == 'train' else self.eval_step
        with backend(job.backend):
            self.step()
        self.model.zero_grad(set_to_none=True)
        self.empty()

    def autocast(self):
        kind = 'cuda' if self.cuda else 'cpu'
        return torch.autocast(kind, DTYPES[self.job.dtype], enabled=self.job.dtype in ('fp16', 'bf16'))

    def eval_step(self):
        with torch.no_grad(), self.autocast():
            return self.network(self.image)

    def train_step(self):
        self.model.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.network(self.image, self.truth.target)
        (loss * self.scale).backward()
        return loss

    @property
    def scale(self) -> float:
        return LOSS_SCALE if self.job.dtype == 'fp16' else 1.0

    def capture(self):
        """The step as a CUDA graph; returns the function that replays it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.step()

        def replay():
            graph.replay()
            return outputs

        return replay

    def finish(self, times=None) -> dict:
        """Checks, then times.

        Args:
            times (list[float], optional): Milliseconds of single steps, if they have been taken already.

        Returns:
            dict: ``img_s``, ``ms``, ``gib`` (network, input and what a step allocates; None where it is not
            known), ``error``, ``tolerance``, ``status``.
        """
        job = self.job
        if self.cuda:
            torch.backends.cudnn.benchmark = self.options.cudnn_benchmark
        peak = None
        with backend(job.backend):
            if job.run in RECORDED:  # torch's counter does not see a graph's memory: of a step before the recording
                peak = self.peak(self.step)
            step = self.capture() if job.run in CAPTURED else self.step
            if job.run in GRAPHS:
                for _ in range(4):  # what is checked is a recording
                    step()
            result = dict(error=self.error(step()), tolerance=self.tolerance)
            if result['error'] > result['tolerance'] and job.backend != 'reference':
                # A deeper network, or a larger picture, than the tolerance was found with: what do definitions lose?
                result['tolerance'] = max(result['tolerance'], 2 * self.plain_error())
            times = times or self.times(step)
            if self.cuda and job.run not in GRAPHS:
                peak = self.peak(step)
        ms = statistics.median(times)
        good = result['error'] <= result['tolerance']  # not so for NaN
        return dict(result, img_s=job.batch / ms * 1e3, ms=ms, gib=peak, status='ok' if good else 'WRONG')

    def plain_error(self) -> float:
        """Error of the network as trained at the same precision, from the plain definitions."""
        form = self.job.form if is_peer(self.job) else 'train'
        row = Row(dataclasses.replace(self.job, run='eager', backend='reference', form=form), self.options)
        kept, Row.expected = Row.expected, (self.job.case, self.truth)
        try:
            row.prepare()
        finally:
            Row.expected = kept
        with backend('reference'):
            return row.error(row.step())

    def peak(self, step) -> float:
        """GiB of network, input and what a step allocates."""
        self.model.zero_grad(set_to_none=True)
        self.empty()
        held = self.memory()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        network = (*self.model.parameters(), *self.model.buffers(), self.image)
        return (torch.cuda.max_memory_allocated() - held + sum(t.nbytes for t in network)) / 2**30

    @property
    def tolerance(self) -> float:
        dtype = self.job.dtype.removesuffix('-pure')
        return TOLERANCE[self.job.mode]['tf32' if dtype == 'fp32' and self.cuda else dtype]

    def error(self, outcome) -> float:
        """Of the step's outcome against what was expected; see the top."""
        if self.job.mode == 'eval':
            if len(outcome) != len(self.truth.outputs):
                return float('inf')
            errors = [relative(a, b) for a, b in zip(outcome, self.truth.outputs)]
        else:
            found = {n: g / self.scale for n, g in gradients(self.model).items()}
            errors = [relative(outcome, self.truth.loss), gradient_error(found, self.truth.gradients)]
        return max(errors) if all(e == e for e in errors) else float('nan')

    def pace(self, step, iters: int, least: float) -> list:
        """Milliseconds from the end of a step to the end of the next, nobody waiting between them."""
        ends, start = [], time.perf_counter()
        while len(ends) <= iters or (time.perf_counter() - start < least and len(ends) <= 20 * iters):
            step()
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(ends, ends[1:])]

    def times(self, step) -> list:
        """Milliseconds of single steps: ``iters`` of them, on a GPU more when they are short.

        A step of evaluation is waited for; one of training on a GPU is not, as a training does not.
        """
        iters, least = self.options.iters, 0.5 if self.cuda else 0.0
        start = time.perf_counter()
        done = 0
        while done < self.options.warmup or time.perf_counter() - start < least:  # also brings the clocks up
            step()
            done += 1
            if self.cuda:
                torch.cuda.synchronize()
        times, start = [], time.perf_counter()
        if self.cuda and self.job.mode == 'train':
            return self.pace(step, iters, least)
        while len(times) < iters or (time.perf_counter() - start < least and len(times) < 20 * iters):
            times.append(self.time(step))
        return times

    def time(self, step) -> float:
        """Milliseconds of one step that is waited for."""
        if self.cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            step()
            last.record()
            last.synchronize()
            return first.elapsed_time(last)
        clock = time.process_time if self.options.clock == 'process' else time.perf_counter
        before = clock()
        step()
        return (clock() - before) * 1e3

    def empty(self) -> None:
        if self.cuda:
            empty()


def empty() -> None:
    """Gives memory back to the GPU that nothing here uses."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def guarded(function, *args) -> dict:
    """A row's figures, or ``status`` and ``note`` when it could not be run: the others go on."""
    try:
        return function(*args) or {}
    except (Exception, SystemExit) as error:
        text = ' '.join(str(error).split()) or type(error).__name__
        if isinstance(error, torch.OutOfMemoryError) or 'not enough memory' in text or "can't allocate memory" in text:
            return dict(status='OOM', note='')
        return dict(status='failed', note=f'{type(error).__name__}: {text}'[:400])
    finally:
        empty()


def describe(job: Job) -> dict:
    """The columns that are known before anything runs."""
    row = dict(dataclasses.asdict(job), shape='x'.join(map(str, job.shape)), status='', note='')
    if job.task == 'config':
        row['model'] = osp.splitext(osp.basename(job.model))[0]
    counted = guarded(lambda: dict(zip(('params', 'macs'), count(job.model, job.task, job.form, job.shape))))
    row.update(params=counted.get('params'), macs=counted.get('macs'))
    if job.task == 'cls' and not is_peer(job) and not importlib.util.find_spec('mmpretrain'):
        row['note'] = 'plain head'
    return row


def one_by_one(jobs, options):
    """Yields the figures of every job, in order."""
    for job in jobs:
        row = Row(job, options)
        yield guarded(row.prepare) or guarded(row.finish)
        del row


def in_turn(jobs, options):
    """As :func:`one_by_one`, but all rows are built first, and steps of them timed in turn.

    What else happens on the machine, and changes within minutes, then meets all of them alike.
    """
    rows = [Row(job, options) for job in jobs]
    problems = [guarded(row.prepare) for row in rows]
    times = [[] for _ in rows]
    for _ in range(options.warmup + options.iters):
        for row, problem, taken in zip(rows, problems, times):
            if not problem:
                with backend(row.job.backend):
                    taken.append(row.time(row.step))
    for row, problem, taken in zip(rows, problems, times):
        yield problem or guarded(row.finish, taken[options.warmup :])


# -- many rows side by side -----------------------------------------------------------------------


def worker(pipe, jobs, options, lock) -> None:
    """Prepares its rows, reports each, then times the one it is asked for."""
    compat.apply()
    torch.set_num_threads(1)
    rows = []
    for i, job in enumerate(jobs):
        rows.append(Row(job, options))
        pipe.send((i, guarded(rows[i].prepare, lock)))
    Row.expected = (None, None)
    while (i := pipe.recv()) is not None:
        result = guarded(rows[i].finish)
        rows[i] = None
        empty()  # what a row held, a recording above all, is for the rows of other processes
        pipe.send(result)


def side_by_side(jobs, options):
    """As :func:`one_by_one`, but all rows are built and compiled at once in processes; only then timed, one at a time.

    Kernels that are chosen by timing them while others compile (Triton's autotuning) may be chosen worse than alone.
    """
    context = multiprocessing.get_context('spawn')
    groups = {}
    # Compiled rows each in a process; others with those that are checked with the same result.
    for i, job in enumerate(jobs):
        groups.setdefault(i if job.compiled else job.case, []).append(i)
    os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', '2')
    lock = context.Semaphore(3)
    workers, problems, pending = {}, {}, {}
    for group in groups.values():
        near, far = context.Pipe()
        process = context.Process(target=worker, args=(far, [jobs[i] for i in group], options, lock), daemon=True)
        process.start()
        far.close()
        workers[near] = process
        pending[near] = list(group)
    for job in jobs:  # counting takes seconds: now, not between the rows that are timed
        describe(job)
    homes = {i: (pipe, n) for pipe, group in zip(workers, groups.values()) for n, i in enumerate(group)}
    try:
        deadline = time.monotonic() + options.prepare_seconds
        while any(pending.values()) and time.monotonic() < deadline:
            waiting = [pipe for pipe, rows in pending.items() if rows]
            for pipe in multiprocessing.connection.wait(waiting, timeout=max(0, deadline - time.monotonic())):
                try:
                    _, problem = pipe.recv()
                    problems[pending[pipe].pop(0)] = problem
                except EOFError:
                    problems.update({i: dict(status='failed', note='its process died') for i in pending[pipe]})
                    pending[pipe] = []
        for pipe, rows in pending.items():
            if rows:  # nothing else may run while the others are timed, and its other rows are lost with it
                workers[pipe].terminate()
                late = dict(status='failed', note=f'not ready after {options.prepare_seconds:g} s')
                problems.update({i: late for i, (home, _) in homes.items() if home is pipe})
        for i in range(len(jobs)):
            pipe, n = homes[i]
            if not problems[i]:
                try:
                    pipe.send(n)
                    problems[i] = pipe.recv()
                except (EOFError, OSError):
                    problems[i] = dict(status='failed', note='its process died')
            yield problems[i]
    finally:
        for pipe, process in workers.items():
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(timeout=5)
            process.terminate()


# -- output -------------------------------------------------------------------------------------

COLUMNS = ('model', 'form', 'task', 'mode', 'shape', 'batch', 'dtype', 'layout', 'backend', 'run', 'params', 'macs')
COLUMNS += ('img_s', 'ms', 'gib', 'error', 'tolerance', 'status', 'note')


def machine(device: str) -> dict:
    """Card, driver and versions."""
    if device.startswith('cuda'):
        card, cuda = torch.cuda.get_device_name(device), f'+CUDA {torch.version.cuda}'
        query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split('\n')[0].strip()
        except (OSError, subprocess.TimeoutExpired):
            driver = ''
    else:
        card, cuda, driver = f'CPU ({processor()})', '', ''
    return dict(card=card, driver=driver or '-', torch=torch.__version__.split('+')[0] + cuda)


def processor() -> str:
    try:
        with open('/proc/cpuinfo') as file:
            return next(line.split(':', 1)[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return 'unknown'


class Table:
    """Prints rows as they come, aligned."""

    def __init__(self, jobs):
        names = [osp.splitext(osp.basename(j.model))[0] if j.task == 'config' else j.model for j in jobs]
        self.widths = dict(
            model=max(5, *map(len, names)), form=6, what=12, shape=9, batch=5, dtype=9,
            run=max(len(self.run(dataclasses.asdict(j))) for j in jobs), params=7, macs=7, img_s=9, ms=9, gib=6,
            error=8, status=0,
        )  # fmt: skip
        titles = dict(what='mode', params='M par.', macs='GMACs', img_s='img/s', gib='GiB', status='check')
        self.write({k: titles.get(k, k) for k in self.widths})

    @staticmethod
    def run(row) -> str:
        extras = [row['layout'] if row['layout'] != 'nchw' else '', row['backend'] if row['backend'] != 'auto' else '']
        return ' '.join([row['run'], *filter(None, extras)])

    def write(self, cells) -> None:
        left = ('model', 'form', 'what', 'dtype', 'run', 'status')
        text = (f'{cells[k]:<{w}}' if k in left else f'{cells[k]:>{w}}' for k, w in self.widths.items())
        print('  '.join(text).rstrip(), flush=True)

    def add(self, row) -> None:
        def number(key, digits, scale=1.0):
            return '-' if row.get(key) is None else f'{row[key] / scale:.{digits}f}'

        error = '-' if row.get('error') is None else f'{row["error"]:.1e}'
        status = row['status'] + (f' (over {row["tolerance"]:g})' if row['status'] == 'WRONG' else '')
        what = f'{row["mode"]} {row["task"]}' if row['task'] != 'cls' else row['mode']
        cells = dict(
            row, what=what, run=self.run(row), params=number('params', 1, 1e6), macs=number('macs', 2, 1e9),
            img_s=number('img_s', 1), ms=number('ms', 2), gib=number('gib', 2), error=error,
            status='  '.join(filter(None, [status, row['note'][:100]])),
        )  # fmt: skip
        self.write(cells)


def write_csv(path: str, rows, about: dict) -> None:
    """All rows with the machine's columns, whole or not at all."""
    with cli.replacing(path) as partial, open(partial, 'w', newline='') as file:
        writer = csv.DictWriter(file, [*COLUMNS, *about], extrasaction='ignore')
        writer.writeheader()
        writer.writerows(dict(row, **about) for row in rows)


def read_csv(path: str) -> list:
    """Rows that :func:`write_csv` wrote."""
    try:
        with open(path, newline='') as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise cli.UserError(f'cannot read {path}: {error.strerror}') from error
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise cli.UserError(f'{path} is no table of this tool')
    for row in rows:
        row.update({k: float(row[k]) if row[k] else None for k in ('img_s', 'ms', 'params', 'macs')})
    return rows


@functools.lru_cache(maxsize=None)
def published_top1(name: str):
    """Published ImageNet top-1 accuracy in percent from a metafile, ours or mmpretrain's; None where there is none."""
    import yaml

    if name in get_flops.VARIANTS:
        long = dict(zip(get_flops.VARIANTS[4:], get_flops.VARIANTS[:4]))
        with open(osp.join(ROOT, 'configs', 'classification', 'metafile.yml')) as file:
            for entry in yaml.safe_load(file)['Models']:
                if entry['Name'].startswith(f'overlock-{long.get(name, name)}_'):
                    return float(entry['Results'][0]['Metrics']['Top 1 Accuracy'])
        return None
    try:
        from mmpretrain.apis import ModelHub

        results = ModelHub.get(name).results or []
    except (ImportError, ValueError):  # not there, or knows no such model
        return None
    return next((float(r.metrics['Top 1 Accuracy']) for r in results if 'Top 1 Accuracy' in (r.metrics or {})), None)


def plot(path: str, rows, given: dict) -> None:
    """Draws the best checked throughput of every classifier against its published top-1.

    Args:
        path (str): Picture to write.
        rows (list[dict]): With ``img_s``; of several rows of a model the fastest is taken.
        given (dict): Top-1 of models that no metafile here knows.

    Raises:
        mmoverlock.cli.UserError: matplotlib is missing, or no row can be drawn.
    """
    try:
        import matplotlib

        matplotlib.use('Agg')
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise cli.UserError('--plot needs matplotlib: pip install matplotlib') from error
    best, unknown = {}, set()
    for row in rows:
        if row['status'] != 'ok' or row['task'] != 'cls' or row['mode'] != 'eval' or not row['img_s']:
            continue
        top1 = given.get(row['model'], published_top1(row['model']))
        if top1 is None:
            unknown.add(row['model'])
        elif row['model'] not in best or row['img_s'] > best[row['model']][0]:
            best[row['model']] = (row['img_s'], top1, row)
    for name in sorted(unknown):
        cli.warn(f'{name} is not in the plot: no metafile here has its top-1 (--top1 {name}=PERCENT gives it)')
    if not best:
        raise cli.UserError('--plot: no checked row of a classifier has a published top-1')
    figure, axes = plt.subplots(figsize=(7, 5), layout='constrained')
    ours = sorted(v[:2] for name, v in best.items() if name in get_flops.VARIANTS)
    if ours:
        axes.plot(*zip(*ours), 'o-', color='tab:red', label='OverLoCK')
    peers = [v[:2] for name, v in best.items() if name not in get_flops.VARIANTS]
    if peers:
        axes.plot(*zip(*peers), 's', color='tab:gray', label='peers')
    for name, (speed, top1, row) in best.items():
        label = f'{name}\nb{row["batch"]} {row["dtype"]} {row["run"]}'
        axes.annotate(label, (speed, top1), xytext=(6, -4), textcoords='offset points', fontsize=7, va='top')
    axes.set(xscale='log', xlabel='img/s, forward, best checked row', ylabel='published ImageNet-1K top-1, %')
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3, which='both')
    axes.legend()
    first = rows[0]
    axes.set_title(f'{first.get("card", "")}, torch {first.get("torch", "")}', fontsize=9)
    with cli.replacing(path) as partial:
        figure.savefig(partial, dpi=150)
    plt.close(figure)


# -- command line -------------------------------------------------------------------------------


def add_job_arguments(parser, several=True) -> None:
    """Flags of a :class:`Job`; with ``several`` each takes a list."""
    many = dict(nargs='+') if several else {}

    def default(value):
        return [value] if several else value

    parser.add_argument('--mode', choices=['eval', 'train'], default=default('eval'), **many)
    parser.add_argument(
        '--task', choices=['cls', 'det', 'seg'], default='cls', help='the classifier, or the backbone for a dense task'
    )
    parser.add_argument(
        '--shape',
        type=shape,
        default=None,
        metavar='HxW',
        help='224 or 800x1280 (height x width); default: 224, 800x1280 for det, 512 for seg and configs of mmseg',
        **many,
    )
    parser.add_argument('--batch', type=positive, default=default(1), help='default: 1', **many)
    parser.add_argument('--dtype', choices=DTYPES, default=default('fp32'), help='default: fp32', **many)
    parser.add_argument('--run', choices=RUNS, default=default('eager'), help='default: eager', **many)
    parser.add_argument('--form', choices=get_flops.FORMS, default=default('deploy'), help='of ours, for eval', **many)
    parser.add_argument('--layout', choices=['nchw', 'nhwc'], default=default('nchw'), help='memory format', **many)
    parser.add_argument('--backend', default=default('auto'), help='of our operators, as in MMOVERLOCK_BACKEND', **many)
    parser.add_argument('--device', help='cuda or cpu; default: cuda where there is one')
    parser.add_argument('--threads', type=positive, help='of the CPU')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description='Time models, each checked against float32; every combination of the options is a row'
    )
    parser.add_argument('models', nargs='*', help='variants (xt, t, s, b) and models of timm or mmpretrain')
    parser.add_argument('--config', nargs='+', default=[], help='configs, timed as whole networks (eval)')
    parser.add_argument('--suite', choices=suites(), help='a list of rows made beforehand, instead of models')
    add_job_arguments(parser)
    parser.add_argument('--compile', action='store_true', help='short for --run eager compile')
    parser.add_argument('--iters', type=positive, default=10, help='steps to time at least; default: 10')
    parser.add_argument('--warmup', type=positive, default=3, help='steps before; default: 3')
    parser.add_argument('--clock', choices=['process', 'wall'], default='process', help='on a CPU')
    parser.add_argument('--no-cudnn-benchmark', dest='cudnn_benchmark', action='store_false')
    parser.add_argument('--parallel', action='store_true', help='build and compile all rows at once, then time')
    parser.add_argument(
        '--in-turn', action='store_true', help='on a CPU: build all rows, then time steps of them in turn'
    )
    parser.add_argument('--prepare-seconds', type=float, default=600, help='with --parallel: wait no longer')
    parser.add_argument('--csv', help='also write the rows here')
    parser.add_argument('--read', metavar='CSV', help='run nothing, take the rows of an earlier run (for --plot)')
    parser.add_argument('--plot', metavar='PNG', help='throughput against published top-1')
    parser.add_argument('--top1', nargs='+', default=[], metavar='NAME=PERCENT', help='for names without a metafile')
    args = parser.parse_args(argv)
    if bool(args.models or args.config) + bool(args.suite) + bool(args.read) != 1:
        parser.error('name models and configs, or --suite, or --read')
    if args.compile:
        args.run = ['eager', 'compile']
    try:
        args.top1 = {name: float(value) for name, value in (t.split('=') for t in args.top1)}
    except ValueError:
        parser.error('--top1 takes NAME=PERCENT')
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text} is not positive')
    return value


def shape(text: str) -> tuple:
    """'224' or '800x1280' as height and width."""
    numbers = [positive(n) for n in text.lower().split('x')]
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f'{text} is not HxW')
    return tuple(numbers * 2 if len(numbers) == 1 else numbers)


def jobs_of(args) -> list:
    """The rows asked for.

    Raises:
        mmoverlock.cli.UserError: A model or config is not there, or a combination cannot be.
    """
    if args.suite:
        jobs = suites()[args.suite]
    else:
        same = {k: getattr(args, k) for k in ('mode', 'batch', 'dtype', 'run', 'form', 'layout', 'backend')}
        jobs = []
        if args.models:
            sizes = args.shape or [get_flops.default_shape(args.task, None)]
            jobs += grid(model=args.models, task=args.task, shape=sizes, **same)
        for path in args.config:
            scope = read_config(path).get('default_scope')
            task = dict(mmdet='det', mmseg='seg').get(scope, 'cls')
            jobs += grid(model=path, task='config', shape=args.shape or [get_flops.default_shape(task, None)], **same)
    for job in jobs:
        check_job(job, args.device)
    return sorted(jobs, key=lambda j: [k.case for k in jobs].index(j.case))  # rows that share a result follow


def check_job(job: Job, device: str) -> None:
    """Raises UserError where a job's options do not go together, or its model is not known."""
    if job.task == 'config':
        read_config(job.model)
        if job.mode == 'train':
            raise cli.UserError('--config is for eval; tools/analysis/train_speed.py times training steps of configs')
    else:
        family(job.model)
    if job.mode == 'train' and job.dtype.endswith('-pure'):
        raise cli.UserError(f'{job.dtype} is for eval: training keeps float32 parameters (fp16, bf16)')
    if job.run in (*RECORDED, *CAPTURED) and device == 'cpu':
        raise cli.UserError(f'{job.run} needs a GPU')


def set_device(args) -> None:
    """Fill in and check ``device``; set the threads."""
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if args.device.split(':')[0] not in ('cuda', 'cpu'):
        raise cli.UserError(f'--device {args.device}: cuda or cpu')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        raise cli.UserError('--device cuda: torch sees no GPU here')
    if args.device != 'cpu' and getattr(args, 'in_turn', False):
        raise cli.UserError('--in-turn is for --device cpu, whose memory holds all rows at once')
    if args.threads:
        torch.set_num_threads(args.threads)


def main(argv=None) -> int:
    args = parse_args(argv)
    with cli.one_line_errors():
        if args.read:
            rows = read_csv(args.read)
        else:
            set_device(args)
            jobs = jobs_of(args)
            rows = measure(jobs, args, argv)
        if args.plot:
            plot(args.plot, rows, args.top1)
    return 1 if any(row['status'] in ('WRONG', 'failed') for row in rows) else 0


def measure(jobs, args, argv=None) -> list:
    """Runs the jobs, printing every row as it is there and keeping the CSV up to date."""
    about = machine(args.device)
    print(f'{about["card"]}, driver {about["driver"]}, torch {about["torch"]}', end='')
    if args.device.startswith('cuda'):
        print(f', cudnn.benchmark {"on" if args.cudnn_benchmark else "off"}')
    else:
        print(f', {torch.get_num_threads()} threads, ms of {args.clock} time')
    words = sys.argv[1:] if argv is None else argv
    about['command'] = shlex.join(['benchmark.py', *map(str, words)])
    print(about['command'])
    table, rows = Table(jobs), []
    started = time.monotonic()
    results = (side_by_side if args.parallel else in_turn if args.in_turn else one_by_one)(jobs, args)
    for job, result in zip(jobs, results):
        row = describe(job)
        note = '  '.join(filter(None, [row['note'], result.get('note', '')]))
        rows.append({**dict.fromkeys(COLUMNS), **row, **result, 'note': note, **about})
        table.add(rows[-1])
        if args.csv:
            write_csv(args.csv, rows, about)
    bad, oom = (sum(row['status'] in kinds for row in rows) for kinds in (('WRONG', 'failed'), ('OOM',)))
    short = f', {oom} without enough memory' if oom else ''
    print(f'{len(rows)} rows in {time.monotonic() - started:.0f} s, {bad} wrong or failed{short}')
    return rows


if __name__ == '__main__':
    sys.exit(main())
