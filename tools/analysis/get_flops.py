"""Parameters and multiply-accumulates: ``tools/analysis/get_flops.py xt`` or ``... CONFIG``.

Two counts are printed.

*Complete* counts every multiply-accumulate of convolutions and matrix products, and of ContMix the
affinity of queries and context cells, its projection to kernels, and the two window sums.

*As published* follows the figures of the paper (2.6, 5.5, 9.7, 16.7 G at 224 x 224, merged form).
They fit, for all four variants to the first decimal, a counter that looks at modules of the plain
types ``Conv2d`` and ``BatchNorm2d``: it counts their weights, biases (1 per value) and
normalisation (2 per value), and does not see the residual 3 x 3 depthwise convolutions (a class of
their own), the affinity, and the window sums (functions, not modules). How the authors counted is
not documented; this is our reading of it. Compare models by the complete count.

Nothing is computed: models are built without storage, and any input size costs the same.
"""

import argparse
import importlib.util
import os.path as osp
import sys
from collections import Counter
from contextlib import contextmanager
from typing import Callable
from unittest import mock

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))))

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
from mmengine.config import DictAction  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from mmoverlock import cli, compat  # noqa: E402

VARIANTS = ('xt', 't', 's', 'b', 'xtiny', 'tiny', 'small', 'base')
# In the order in which one is made of the other.
FORMS = dict(
    train='training form',
    merged='merged form (large kernels, as published)',
    deploy='deploy form (all that merges, no auxiliary head)',
)
PROPOSALS, MASK_PROPOSALS = 1000, 100


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Count parameters and multiply-accumulates')
    parser.add_argument('model', help=f'a variant ({", ".join(VARIANTS[:4])}) or a config file')
    parser.add_argument(
        '--task',
        choices=['cls', 'det', 'seg'],
        default='cls',
        help='for a variant: the classifier, or the detection or segmentation backbone',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='height and width of the input (one number: square); default: 224 for '
        'classification, 800 1280 for detection, 512 for segmentation',
    )
    parser.add_argument('--form', choices=FORMS, default='merged', help='default: merged')
    parser.add_argument('--deploy', action='store_const', dest='form', const='deploy', help='short for --form deploy')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='change settings of the config'
    )
    args = cli.parse(parser, argv)
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error('--shape takes one or two positive numbers')
    return args


def build_variant(arch: str, task: str) -> nn.Module:
    """A variant in training form, without storage."""
    from mmoverlock import OverLoCK

    with torch.device('meta'):
        if task != 'cls':
            return OverLoCK(arch, fuse_overview=task == 'det')
        from mmoverlock import OverLoCKClsHead

        backbone = OverLoCK(arch, out_type='classification')
        try:
            head = OverLoCKClsHead(1000, backbone.out_channels)
        except ImportError as error:
            raise cli.UserError(f'{error} (the backbones do without: --task det or seg)') from error
        return nn.ModuleDict(dict(backbone=backbone, head=head))


def build_config(cfg) -> nn.Module:
    """The model of a config in training form, without storage."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = cfg.model.copy()
    model.pop('train_cfg', None) if cfg.get('default_scope') == 'mmpretrain' else None
    return on_meta(lambda: revert_sync_batchnorm(MODELS.build(model)))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` gives, without storage."""
    try:
        with torch.device('meta'):
            return build()
    except Exception:  # a network that reads a value while it is built, as mmpretrain's ConvNeXt
        return build().to('meta')


def reshape_to(model: nn.Module, form: str) -> nn.Module:
    """Bring a model in training form into another form, in place."""
    for module in list(model.modules()):
        if form == 'merged' and hasattr(module, 'merge_large_kernels'):
            module.merge_large_kernels()
        elif (
            form == 'deploy'
            and type(module).__module__.startswith('mmoverlock.models')
            and hasattr(module, 'switch_to_deploy')
        ):
            module.switch_to_deploy()
    return model


def parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters; buffers do not count."""
    return sum(p.numel() for p in model.parameters())


@contextmanager
def counting():
    """Count what runs inside.

    Yields:
        Counter: Filled at the end: multiply-accumulates by kind. The kinds 'bias' and 'norm' are
        not multiply-accumulates of the complete count, they are only in the published one.
    """
    from mmoverlock.models import blocks
    from mmoverlock.models.layers import ConvFFN, ResDWConv, SELayer

    tally = Counter()

    def contmix(query, key, weight, bias, rpb1, rpb2, value, backend='auto'):
        batch, groups, dim, height, width = query.shape
        cells, logits = key.shape[3], weight.shape[0]
        places = batch * height * width
        tally['ContMix affinity'] += places * groups * dim * cells
        tally['ContMix projection'] += places * groups * cells * logits
        # Half of the channels take s² neighbours, half K²; together the projection's outputs.
        tally['ContMix window sums'] += places * value.shape[1] // 2 * logits
        tally['bias'] += places * groups * logits
        return torch.empty_like(value)

    def look(module, inputs, output):
        # Where convolutions are one function, no hook sees them.
        if isinstance(module, ConvFFN):
            hidden = output.numel() // output.shape[1] * module.fc1.out_channels
            tally['residual 3x3 depthwise'] += 9 * hidden
            tally['bias'] += hidden + output.numel()
        elif isinstance(module, SELayer):
            tally['bias'] += output.shape[0] * (module.reduce.out_channels + module.expand.out_channels)
        elif isinstance(module, ResDWConv):
            tally['residual 3x3 depthwise'] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            tally['bias'] += output.numel()
        elif isinstance(module, nn.BatchNorm2d):
            tally['norm'] += 2 * output.numel()

    hook = nn.modules.module.register_module_forward_hook(look)
    try:
        with mock.patch.object(blocks, 'contmix', contmix), torch.no_grad(), FlopCounterMode(display=False) as counter:
            yield tally
    finally:
        hook.remove()
    products = counter.get_total_flops() // 2  # it counts a multiply-accumulate as two
    tally['other convolutions and products'] = products - tally['residual 3x3 depthwise']


COMPLETE = (
    'other convolutions and products',
    'residual 3x3 depthwise',
    'ContMix affinity',
    'ContMix projection',
    'ContMix window sums',
)
PUBLISHED = ('other convolutions and products', 'ContMix projection', 'bias', 'norm')


def total(tally, kinds) -> int:
    """Sum of some kinds of a tally."""
    return sum(tally[k] for k in kinds)


def run(model: nn.Module, shape) -> str:
    """Send a picture of a size through a model; returns what of the model it went through."""
    image = torch.empty(1, 3, *shape, device='meta')
    if isinstance(model, nn.ModuleDict):
        model['head'](model['backbone'](image))
        return 'classifier (the auxiliary head does not run)'
    if hasattr(model, 'roi_head'):
        model.rpn_head(model.extract_feat(image))
        run_roi_head(model.roi_head)
        masks = f' and {MASK_PROPOSALS} masks' if model.roi_head.with_mask else ''
        return f'whole detector, {PROPOSALS} boxes{masks}'
    if hasattr(model, 'bbox_head'):
        model.bbox_head(model.extract_feat(image))
        return 'whole detector'
    if hasattr(model, 'decode_head'):
        model.decode_head(model.extract_feat(image))
        return 'whole segmentor (the auxiliary head does not run)'
    if hasattr(model, 'extract_feat'):
        model(image, mode='tensor')
        return 'whole model'
    model(image)
    return 'backbone'


def run_roi_head(roi_head: nn.Module) -> None:
    """Send regions, as the RoI extractors would cut them, through the box and mask heads.

    A cascade has a head for each of its stages, and every stage sees all regions.
    """

    def each(module):
        return module if isinstance(module, nn.ModuleList) else [module]

    for name, number in (('bbox', PROPOSALS), ('mask', MASK_PROPOSALS)):
        heads = getattr(roi_head, f'{name}_head', None)
        if heads is None:
            continue
        for head, extractor in zip(each(heads), each(getattr(roi_head, f'{name}_roi_extractor'))):
            size = extractor.roi_layers[0].output_size
            head(torch.empty(number, extractor.out_channels, *size, device='meta'))


def default_shape(task: str, shape):
    """The height and width asked for, or the task's usual ones."""
    shape = shape or dict(cls=[224], det=[800, 1280], seg=[512])[task]
    return tuple(shape * 2 if len(shape) == 1 else shape)


def report(build, name: str, form: str, shape) -> dict:
    """Count a model.

    Args:
        build (Callable[[], nn.Module]): Makes the model in training form, without storage.
        name (str): What to call it.
        form (str): Key of ``FORMS`` whose operations are counted.
        shape (tuple[int, int]): Height and width of the input.

    Returns:
        dict: ``params`` by form, ``macs`` by kind, ``complete`` and ``published`` totals.
    """
    model, params = build().eval(), {}
    for name_of_form in FORMS:  # each form is made of the one before
        params[name_of_form] = parameters(reshape_to(model, name_of_form))
        if name_of_form == form:
            with counting() as tally:
                part = run(model, shape)
    return dict(
        name=name,
        part=part,
        form=form,
        shape=shape,
        params=params,
        macs={k: tally[k] for k in COMPLETE},
        complete=total(tally, COMPLETE),
        published=total(tally, PUBLISHED),
    )


def show(result: dict) -> None:
    """Print a report."""
    height, width = result['shape']
    print(f'{result["name"]}: {result["part"]}, input 3 x {height} x {width}')
    print('parameters')
    for form, number in result['params'].items():
        print(f'  {number:>13,}  {FORMS[form]}')
    print(f'multiply-accumulates, {FORMS[result["form"]].split(" (")[0]}')
    print(f'  {result["published"] / 1e9:>11.1f} G  as the paper counts (see the top of this file)')
    print(f'  {result["complete"] / 1e9:>11.2f} G  complete, of which')
    for kind, number in result['macs'].items():
        print(f'  {number / 1e9:>13.3f} G  {kind}')


def main(argv=None) -> dict:
    compat.apply()
    args = parse_args(argv)
    with cli.one_line_errors():
        if args.model in VARIANTS:
            result = report(
                lambda: build_variant(args.model, args.task),
                f'OverLoCK-{args.model.upper()}',
                args.form,
                default_shape(args.task, args.shape),
            )
        else:
            if not osp.isfile(args.model):
                raise cli.UserError(f'{args.model} is neither a variant ({", ".join(VARIANTS[:4])}) nor a config file')
            cfg = cli.load_config(args.model, args.cfg_options)
            cli.check_packages(cfg)
            cli.check_model(cfg)
            task = dict(mmdet='det', mmseg='seg').get(cfg.get('default_scope'), 'cls')
            result = report(
                lambda: build_config(cfg), osp.basename(args.model), args.form, default_shape(task, args.shape)
            )
    show(result)
    return result


if __name__ == '__main__':
    main()
