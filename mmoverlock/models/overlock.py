"""OverLoCK: overview first, look closely next.

Figure 3 of the paper, top to bottom::

    image - stem - stage1 - down2 - stage2 - down3 - stage3 -----------------.           Base-Net
                                               |             \\               |
                                               |              down4 - stage4 |           Overview-Net
                                               |                       |     |
                                               x                    context prior
                                               '------- focus3 - focus_down - focus4     Focus-Net
"""

from contextlib import contextmanager, nullcontext
from functools import partial
from types import FunctionType
from typing import Dict, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from mmengine.model import BaseModule
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..checkpoints import adapt_backbone_state_dict, load_pretrained
from ..ops.autocast import autocast_written_in, no_autocast
from ..registry import MODELS
from .blocks import BaseBlock, FocusBlock, init_weights, merge_large_kernels, switch_to_deploy
from .graphs import Graphs
from .layers import BRANCHES, ConvNorm, LayerNorm2d, LayerScale, OutputNorm, resize

#: The variants of the paper. ``depths`` and ``widths`` are of stages 1-3 (Base-Net) and 4 (Overview-Net).
ARCHS: Dict[str, dict] = {
    'xt': dict(
        depths=(2, 2, 3, 2),
        focus_depths=(6, 2),
        widths=(56, 112, 256, 336),
        mlp_ratios=(4, 4, 4, 4),
        focus_mlp_ratio=3,
        focus_heads=(4, 6),
        kernel_sizes=(17, 15, 13, 7),
        small_kernel=5,
    ),
    't': dict(depths=(4, 4, 6, 2), focus_depths=(12, 2), widths=(64, 128, 256, 512), focus_heads=(4, 8)),
    's': dict(depths=(6, 6, 8, 3), focus_depths=(16, 3), widths=(64, 128, 320, 512), focus_heads=(8, 16)),
    'b': dict(depths=(8, 8, 10, 4), focus_depths=(20, 4), widths=(80, 160, 384, 576), focus_heads=(6, 9)),
}
_COMMON = {k: ARCHS['xt'][k] for k in ('mlp_ratios', 'focus_mlp_ratio', 'kernel_sizes', 'small_kernel')}
ARCHS = {name: {**_COMMON, **arch} for name, arch in ARCHS.items()}
_LONG_NAMES = {'xtiny': 'xt', 'tiny': 't', 'small': 's', 'base': 'b'}
#: The parts that are made of blocks, in the order of the forward pass.
STAGES = ('stage1', 'stage2', 'stage3', 'stage4', 'focus3', 'focus4')
_LENGTHS = dict(depths=4, focus_depths=2, widths=4, mlp_ratios=4, focus_heads=2, kernel_sizes=4)


def resolve_arch(arch: Union[str, dict]) -> dict:
    """The settings of a variant, checked.

    Args:
        arch (str | dict): A name (``'xt' 't' 's' 'b'`` or ``'xtiny' 'tiny' 'small' 'base'``), or a dict with the keys
            ``depths`` (4), ``focus_depths`` (2), ``widths`` (4), ``focus_heads`` (2) and optionally ``mlp_ratios``
            (4), ``focus_mlp_ratio``, ``kernel_sizes`` (4), ``small_kernel``, which default to the paper's.

    Returns:
        dict: All eight settings.

    Raises:
        ValueError: The name is unknown, or the settings cannot make a network.
    """
    if isinstance(arch, str):
        name = _LONG_NAMES.get(arch.lower(), arch.lower())
        if name not in ARCHS:
            raise ValueError(
                f'arch {arch!r} is unknown; choose from {", ".join([*ARCHS, *_LONG_NAMES])}, or give a dict'
            )
        return dict(ARCHS[name])
    if not isinstance(arch, dict):
        raise ValueError(f'arch must be a name or a dict, not {type(arch).__name__}')
    unknown, missing = set(arch) - set(ARCHS['xt']), set(ARCHS['xt']) - set(_COMMON) - set(arch)
    if unknown or missing:
        raise ValueError(
            f'dict arch: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}; '
            f'required: {sorted(set(ARCHS["xt"]) - set(_COMMON))}, optional: {sorted(_COMMON)}'
        )
    arch = {**_COMMON, **arch}
    for key, length in _LENGTHS.items():
        if not isinstance(arch[key], Sequence) or len(arch[key]) != length:
            raise ValueError(f'dict arch: {key} needs {length} numbers, got {arch[key]!r}')
    for key in ('depths', 'focus_depths', 'widths', 'focus_heads'):
        if any(not isinstance(v, int) or v < 1 for v in arch[key]):
            raise ValueError(f'dict arch: {key} must be positive integers, got {arch[key]!r}')
    if any(k not in BRANCHES for k in arch['kernel_sizes']):
        raise ValueError(f'dict arch: kernel_sizes must be from {sorted(BRANCHES)}, got {arch["kernel_sizes"]!r}')
    small = arch['small_kernel']
    if not isinstance(small, int) or small % 2 == 0 or not 0 < small <= min(arch['kernel_sizes'][2:]):
        raise ValueError(
            f'dict arch: small_kernel must be odd and at most the large kernels of stages 3 and 4, got {small!r}'
        )
    if arch['widths'][0] % 2:
        raise ValueError(
            f'dict arch: the first width must be even (the stem starts with half), got {arch["widths"][0]}'
        )
    if arch['widths'][3] % 4:
        raise ValueError(f'dict arch: the last width must be a multiple of 4 (the context has a quarter of it), got '
                         f'{arch["widths"][3]}')  # fmt: skip
    for width, heads in zip(arch['widths'][2:], arch['focus_heads']):
        if width % (4 * heads):
            raise ValueError(f'dict arch: width {width} is not divisible by 4 * focus_heads = {4 * heads}')
    if any(int(r * w) < 1 for r, w in zip(arch['mlp_ratios'], arch['widths'])) or arch['focus_mlp_ratio'] <= 0:
        raise ValueError('dict arch: mlp_ratios and focus_mlp_ratio must be positive')
    return arch


@MODELS.register_module()
class OverLoCK(BaseModule):
    """OverLoCK backbone for classification, detection and segmentation.

    A PyTorch implementation of `OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic
    Kernels <https://arxiv.org/abs/2502.20087>`_ (CVPR 2025), compatible with the weights of the `official release
    <https://github.com/LMMMEng/OverLoCK>`_.

    Args:
        arch (str | dict): ``'xt' 't' 's' 'b'``, a long name, or a dict: see :func:`resolve_arch`.
        in_channels (int): Channels of the image. Defaults to 3.
        out_indices (Sequence[int]): Which of the maps at strides 4, 8, 16, 32 to return, for ``out_type='pyramid'``.
            Defaults to ``(0, 1, 2, 3)``.
        out_type (str): ``'pyramid'`` for a tuple of layer-normed maps; ``'classification'`` for the un-normed tuple
            ``(overview, focus)`` that :class:`OverLoCKClsHead` takes. As in the official dense code, the pyramid form
            goes on from the *normed* map of stage 2. Defaults to ``'pyramid'``.
        fuse_overview (bool): Add a branch from Overview-Net to the last map: the official detection form. Without it,
            the segmentation form. Defaults to False.
        drop_path_rate (float): Stochastic depth of the last block; it grows linearly from 0. Defaults to 0.
        deploy (bool): Build the large kernels merged, as the official "reparam" files have them. Defaults to False.
        with_cp (bool | Sequence[int] | dict): Recompute blocks in the backward pass to save memory: all, those of the
            stages named (1-4 as in the figure, 5 and 6 for focus3 and focus4), or the first so many of each stage,
            ``{stage: blocks}``; ``{1: a, 2: b, 3: c, 4: d, 5: c, 6: d}`` is the official ``--ckpt-stg a b c d``.
            Defaults to False.
        frozen_stages (int): Freeze everything up to this stage: 0 the stem, 1-3 Base-Net, 4 Overview-Net, 5 and 6
            Focus-Net; -1 nothing. Defaults to -1.
        norm_eval (bool): Keep batch norms in evaluation mode while training. Defaults to False.
        compile (bool | dict): Call :meth:`compile_blocks`, with these options if it is a dict. Defaults to False.
        cuda_graphs (bool): On a GPU, record the network as CUDA graphs for the sizes that keep coming, up to four: most
            of a training step or of a small batch is otherwise launching kernels. In training every forward pass needs
            its backward pass before the next, and gradients come by ``backward()``: ``torch.autograd.grad`` finds
            none by the network's parameters. A network with SyncBatchNorm runs as ever. Changing a batch norm's
            momentum after the recording has no effect. Defaults to False.
        init_cfg (dict, optional): ``dict(type='Pretrained', checkpoint=FILE_OR_URL)`` loads any official file and any
            checkpoint of ours. Defaults to None: the initialisation of the official code.

    Raises:
        ValueError: An argument cannot be; the message says which and what would do.

    Examples:
        >>> import torch
        >>> from mmoverlock import OverLoCK
        >>> model = OverLoCK('xt').eval()
        >>> with torch.no_grad():
        ...     maps = model(torch.rand(1, 3, 224, 224))
        >>> [tuple(m.shape) for m in maps]
        [(1, 56, 56, 56), (1, 112, 28, 28), (1, 340, 14, 14), (1, 420, 7, 7)]
    """

    memory_format = torch.channels_last  # of the maps inside; what the network returns is contiguous
    averaged_afterwards = False  # several processes average gradients once all are there, as FlatDataParallel does

    def __init__(
        self,
        arch: Union[str, dict],
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_type: str = 'pyramid',
        fuse_overview: bool = False,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
        with_cp: Union[bool, Sequence[int], Dict[int, int]] = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        compile: Union[bool, dict] = False,
        cuda_graphs: bool = False,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        self.arch = resolve_arch(arch)
        if out_type not in ('pyramid', 'classification'):
            raise ValueError(f"out_type must be 'pyramid' or 'classification', got {out_type!r}")
        out_indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        if (
            not out_indices
            or any(i not in range(4) for i in out_indices)
            or list(out_indices) != sorted(set(out_indices))
        ):
            raise ValueError(f'out_indices must be ascending numbers from 0, 1, 2, 3, got {out_indices}')
        if fuse_overview and (out_type != 'pyramid' or 3 not in out_indices):
            raise ValueError(
                "fuse_overview adds to map 3 of out_type='pyramid'; out_indices has no 3 or the type differs"
            )
        if not -1 <= frozen_stages <= 6:
            raise ValueError(f'frozen_stages must be from -1 to 6, got {frozen_stages}')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate}')
        self.out_type = out_type
        self.out_indices = out_indices
        self.fuse_overview = fuse_overview
        stages = tuple(range(1, 7)) if with_cp is True else tuple(with_cp or ())
        if any(stage not in range(1, 7) for stage in stages):
            raise ValueError(f'with_cp names stages 1 to 6, got {stages}')
        self.with_cp = dict(with_cp) if isinstance(with_cp, dict) else dict.fromkeys(stages, float('inf'))
        if cuda_graphs and self.with_cp:
            raise ValueError('cuda_graphs records a pass once, with_cp computes parts of it twice; choose one of them')
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.graphs = Graphs() if cuda_graphs else None

        widths, kernels = self.arch['widths'], self.arch['kernel_sizes']
        c0, c1, c2, c3 = widths
        context = c3 // 4
        all_depths = (*self.arch['depths'], *self.arch['focus_depths'])
        rates = iter(torch.linspace(0, drop_path_rate, sum(all_depths), device='cpu').tolist())

        def stage(i: int) -> nn.Sequential:
            # Stages 1 and 2 scale nothing; 3 and 4 scale their shortcuts.
            return nn.Sequential(
                *[
                    BaseBlock(
                        widths[i],
                        kernels[i],
                        self.arch['mlp_ratios'][i],
                        next(rates),
                        res_scale=i >= 2,
                        layer_scale=1.0 if i >= 2 else None,
                        deploy=deploy,
                    )
                    for _ in range(self.arch['depths'][i])
                ]
            )

        def focus(i: int) -> nn.ModuleList:
            return nn.ModuleList(
                [
                    FocusBlock(
                        widths[2 + i],
                        context,
                        self.arch['focus_heads'][i],
                        kernels[2 + i],
                        self.arch['small_kernel'],
                        self.arch['focus_mlp_ratio'],
                        next(rates),
                        first=i == 0 and j == 0,
                        deploy=deploy,
                    )
                    for j in range(self.arch['focus_depths'][i])
                ]
            )

        # Base-Net
        self.stem = nn.Sequential(
            ConvNorm(in_channels, c0 // 2, 3, 2),
            nn.GELU(),
            ConvNorm(c0 // 2, c0 // 2, 3),
            nn.GELU(),
            ConvNorm(c0 // 2, c0, 3, 2),
            nn.GELU(),
            ConvNorm(c0, c0, 3),
        )
        self.stage1 = stage(0)
        self.down2 = ConvNorm(c0, c1, 3, 2)
        self.stage2 = stage(1)
        self.down3 = ConvNorm(c1, c2, 3, 2)
        self.stage3 = stage(2)
        # Overview-Net
        self.down4 = ConvNorm(c2, c3, 3, 2)
        self.stage4 = stage(3)
        self.context_proj = nn.Conv2d(c3, context, 1)
        # Focus-Net
        self.focus3 = focus(0)
        self.focus_down = nn.ModuleDict(dict(x=ConvNorm(c2, c3, 3, 2), h=ConvNorm(context, context, 3, 2)))
        self.focus4 = focus(1)

        channels = (c0, c1, c2 + context, c3 + context)
        if out_type == 'pyramid':
            # norm1 stands in the network itself: the official dense code goes on from the normed map of stage 2 (its
            # classifier does not), and the released detectors and segmentors were trained so.
            for i in sorted({*out_indices, 1}):
                self.add_module(f'norm{i}', (LayerNorm2d if i == 1 else OutputNorm)(channels[i]))
            self.out_channels = tuple(channels[i] for i in out_indices)
            self.out_strides = tuple(4 * 2**i for i in out_indices)
        else:
            self.out_channels = (c3, c3 + context)
            self.out_strides = (32, 32)
        if fuse_overview:
            self.overview_norm = LayerNorm2d(c3)
            self.overview_proj = nn.Conv2d(c3, c3 + context, 1)
            self.overview_scale = LayerScale(c3 + context, 1e-5)
        init_weights(self)
        self._freeze()
        if compile:
            self.compile_blocks(**(compile if isinstance(compile, dict) else {}))

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Extracts features.

        Args:
            x (Tensor): Images, (B, in_channels, H, W).

        Returns:
            tuple[Tensor]: For ``'pyramid'``, the maps at ``out_indices``; for ``'classification'``,
            ``(overview, focus)``, both at stride 32.

        Raises:
            ValueError: While training, the batch is so small that a batch norm would see a single value.
        """
        self._check_batch(x)
        if self.graphs is None:
            return self._features(x)
        if not self.graphs.of(self):  # the first call, or that of a copy
            self.graphs = Graphs(self, self._features)
        return self.graphs(x)

    def _features(self, x: Tensor) -> Tuple[Tensor, ...]:
        # On CPU PyTorch's depthwise convolutions are up to 20 times faster in this format, on GPUs all 1x1 and 3x3 ones
        # are. The layers keep it; our operators that compute in NCHW order give that, and the next layers turn it back.
        x = x.contiguous(memory_format=self.memory_format)
        last = 3 if self.out_type == 'classification' else self.out_indices[-1]  # nothing after it is needed
        # Base-Net
        x1 = self._run(1, self.stage1, self.stem(x))
        if last == 0:
            return self._pyramid(x1)
        x2 = self._run(2, self.stage2, self.down2(x1))
        if self.out_type == 'pyramid':
            x2 = self.norm1(x2)
        if last == 1:
            return self._pyramid(x1, x2)
        x3 = self._run(3, self.stage3, self.down3(x2))
        # Overview-Net
        overview = self._run(4, self.stage4, self.down4(x3))
        prior = self.context_proj(overview)
        # Focus-Net
        prior_up = resize(prior, x3.shape[2:])
        x, h = self._focus(5, self.focus3, x3, prior_up, prior_up)
        focus3 = (x, h)
        if last == 2:
            return self._pyramid(x1, x2, focus3)
        x, h = self._focus(6, self.focus4, self.focus_down['x'](x), self.focus_down['h'](h), prior)
        focus4 = torch.cat([x, h], dim=1)
        if self.out_type == 'classification':
            return overview, focus4
        maps = self._pyramid(x1, x2, focus3, focus4)
        if self.fuse_overview:
            # In the weights' own precision, also under autocast: times 1e-5, half precision would round the gradient of
            # the branch, and at first the branch itself, to nothing.
            with no_autocast(overview.device.type):
                overview = self.overview_norm(overview.to(self.overview_proj.weight.dtype))
                branch = self.overview_scale(self.overview_proj(overview))
            maps = (*maps[:-1], (maps[-1] + branch.to(maps[-1].dtype)).contiguous())
        return maps

    def _pyramid(self, *features) -> Tuple[Tensor, ...]:
        """The normed maps at ``out_indices``; ``features`` are those of all levels up to the last one asked for."""
        maps = []
        for i in self.out_indices:
            feature = torch.cat(features[i], dim=1) if i == 2 else features[i]
            maps.append(feature.contiguous() if i == 1 else getattr(self, f'norm{i}')(feature))
        return tuple(maps)

    def _run(self, stage: int, blocks: nn.Sequential, x: Tensor) -> Tensor:
        for i, block in enumerate(blocks):
            x = self._call(stage, i, block, x)
        return x

    def _focus(self, stage: int, blocks: nn.ModuleList, x: Tensor, h: Tensor, prior: Tensor) -> Tuple[Tensor, Tensor]:
        for i, block in enumerate(blocks):
            x, h = self._call(stage, i, block, x, h, prior)
        return x, h

    def _call(self, stage: int, index: int, block: nn.Module, *args):
        if index < self.with_cp.get(stage, 0) and torch.is_grad_enabled():
            return checkpoint(
                block,
                *args,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), _statistics_kept(block)),
            )
        return block(*args)

    def _check_batch(self, x: Tensor) -> None:
        if not self.training or self.norm_eval:
            return
        height, width = (-(-s // 32) for s in x.shape[2:])
        if x.shape[0] * height * width == 1:
            raise ValueError(
                f'training on a batch of shape {tuple(x.shape)}: at stride 32 a single value a channel is left, of '
                'which batch norm cannot take statistics. Use more or larger images, or norm_eval=True'
            )

    def train(self, mode: bool = True) -> 'OverLoCK':
        """Sets the mode; frozen stages, and with ``norm_eval`` all batch norms, stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for m in self.modules():
                if isinstance(m, _BatchNorm):
                    m.eval()
        return self

    def _freeze(self) -> None:
        groups = (
            ('stem',),
            ('stage1',),
            ('down2', 'stage2'),
            ('down3', 'stage3'),
            ('down4', 'stage4', 'context_proj'),
            ('focus3',),
            ('focus_down', 'focus4'),
        )
        for names in groups[: self.frozen_stages + 1]:
            for name in names:
                getattr(self, name).eval().requires_grad_(False)
        if self.out_type == 'pyramid':
            # What comes after the last map asked for does not run. Distributed training would wait for its gradients.
            last = self.out_indices[-1]
            for names in (*groups[(2, 3, 6, 7)[last] :], *([('norm1',)] if last == 0 else [])):
                for name in names:
                    getattr(self, name).requires_grad_(False)

    def init_weights(self) -> None:
        """Loads the checkpoint that ``init_cfg`` names, whatever its layout.

        Raises:
            CheckpointError: The file is missing or damaged, or does not fit this model.
        """
        if isinstance(self.init_cfg, dict) and self.init_cfg.get('type') in (
            'Pretrained',
            'mmengine.Pretrained',
        ):
            load_pretrained(self, self.init_cfg['checkpoint'], self.init_cfg.get('prefix'))
            self._is_init = True
        else:
            super().init_weights()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs) -> None:
        if local_metadata.get('assign_to_params_buffers'):  # parameters become others, which recordings do not see
            self._forget_graphs()
        adapt_backbone_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def merge_large_kernels(self) -> None:
        """Merges the branches of every large kernel, in place: the official "reparam" form, and ``deploy=True``'s."""
        merge_large_kernels(self)
        self._forget_graphs()

    def switch_to_deploy(self) -> None:
        """Merges everything that merges, in place: large kernels, batch norms, residual 3x3 kernels. Inference only."""
        switch_to_deploy(self)
        self._forget_graphs()

    def _apply(self, *args, **kwargs) -> 'OverLoCK':
        self._forget_graphs()
        return super()._apply(*args, **kwargs)

    def _forget_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.forget()

    def compile_blocks(self, **options) -> None:
        """Compiles stem, blocks and output norms, in place; they are translated as they are first called.

        The blocks of a stage are alike: one is translated and the others share its code. That takes a fraction of the
        time that ``torch.compile`` takes for the whole network and gives nearly all of its speed.

        Args:
            **options: For ``torch.compile``, such as ``mode='max-autotune-no-cudagraphs'`` or ``dynamic=True`` for
                training on maps of many sizes.
        """
        parts = {name: [*getattr(self, name)] for name in STAGES}
        parts.update((name, [m]) for name, m in self.named_children() if isinstance(m, LayerNorm2d))
        for name, modules in parts.items():
            # A function of its own for every stage: what torch.compile translates anew is limited to eight times a
            # function, and six stages share two.
            kind = type(modules[0])
            run = autocast_written_in(kind.forward)
            code = run.__code__.replace(co_name=f'{kind.__name__}_{name}')
            run = FunctionType(code, run.__globals__, closure=run.__closure__)
            forward = torch.compile(run, fullgraph=True, **options)
            for module in modules:
                module.forward = partial(forward, module)
        stem = torch.compile(autocast_written_in(_in_order), fullgraph=True, **options)
        self.stem.forward = partial(stem, self.stem)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> Tuple[int, int]:
        """Depth of a parameter's layer, for layer-wise learning rate decay.

        Args:
            param_name (str): Name of the parameter, with ``prefix``.
            prefix (str): What stands before the backbone's own names, such as ``'backbone.'``. Defaults to ``''``.

        Returns:
            tuple[int, int]: Depth of the layer and number of layers. The stem is 0, every block one more in the order
            of the forward pass; parameters outside the backbone and its output norms are the last.
        """
        depths = (*self.arch['depths'], *self.arch['focus_depths'])
        num_layers = sum(depths) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        name, *rest = param_name[len(prefix) :].split('.')
        entry = dict(down2='stage2', down3='stage3', down4='stage4', focus_down='focus4')
        if name == 'stem':
            return 0, num_layers
        if name == 'context_proj':
            return sum(depths[:4]), num_layers
        stage = entry.get(name, name)
        if stage not in STAGES:
            return num_layers - 1, num_layers
        block = int(rest[0]) if name in STAGES else 0
        return 1 + sum(depths[: STAGES.index(stage)]) + block, num_layers


def _in_order(modules: nn.Sequential, x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


@contextmanager
def _statistics_kept(module: nn.Module):
    """Running statistics stay as they are: a recomputed block must not update them a second time."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    saved = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        # The same operation with the same saved tensors, which recomputation demands, and an update of weight zero. The
        # counter is a copy: SyncBatchNorm does not work without one.
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, saved):
            norm.momentum, norm.num_batches_tracked = momentum, batches
