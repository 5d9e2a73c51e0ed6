"""Checkpoints: the official names and ours, and loading files without running what is inside them.

:func:`from_official` and :func:`to_official` rename state dicts. The backbone and the head rename by themselves when
they load one (:func:`adapt_backbone_state_dict`, :func:`adapt_head_state_dict`), and :func:`register_loader` lets
mmengine read the official files, so that one can be named wherever a checkpoint can.
"""

import argparse
import contextlib
import hashlib
import importlib
import os
import pickle
import re
import tempfile
import urllib.error
import urllib.request
import zipfile
from typing import Dict, Iterable, Iterator, List, Optional, Tuple
from urllib.parse import urlparse

import torch
import torch.nn as nn
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader

OFFICIAL_RELEASE = 'https://github.com/LMMMEng/OverLoCK/releases/download/'

#: SHA-256 of the official files, by name. The release publishes none, so there is nothing to compare with yet: what a
#: download has is logged instead. A file that stands here with another sum is refused.
OFFICIAL_SHA256: Dict[str, str] = {}

SAFETENSORS = '.safetensors'


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


# --- names -----------------------------------------------------------------------------------------------------------
# Pairs (official, ours). ``{x}`` stands for a number and is carried over. A pair ending in '.' renames a prefix.

_LARGE_KERNEL = (
    ('lk_origin.', 'conv.'),
    ('origin_bn.', 'bn.'),
    ('dil_conv_k{k}_{r}.', 'branches.k{k}_r{r}.conv.'),
    ('dil_bn_k{k}_{r}.', 'branches.k{k}_r{r}.bn.'),
)
_BASE_BLOCK = (
    ('dwconv.', 'dwconv.'),
    ('proj.0.', 'norm.'),
    *((f'proj.1.{a}', f'large_kernel.{b}') for a, b in _LARGE_KERNEL),
    ('proj.2.', 'bn.'),
    ('proj.3.proj.1.', 'se.reduce.'),
    ('proj.3.proj.3.', 'se.expand.'),
    ('proj.4.', 'ffn.fc1.'),
    ('proj.6.', 'ffn.dwconv.'),
    ('proj.7.', 'ffn.grn.'),
    ('proj.8.', 'ffn.fc2.'),
    ('ls.', 'layer_scale.'),
)
_DYNAMIC_BLOCK = (
    ('dwconv1.', 'dwconv1.'),
    ('norm1.', 'norm1.'),
    ('weight_query.0.', 'mixer.query.conv.'),
    ('weight_query.1.', 'mixer.query.bn.'),
    ('weight_key.1.', 'mixer.key.conv.'),
    ('weight_key.2.', 'mixer.key.bn.'),
    ('weight_proj.', 'mixer.weight_proj.'),
    ('rpb1', 'mixer.rpb1'),
    ('rpb2', 'mixer.rpb2'),
    *((f'lepe.0.{a}', f'lepe.large_kernel.{b}') for a, b in _LARGE_KERNEL),
    ('lepe.1.', 'lepe.bn.'),
    ('se_layer.proj.1.', 'se.reduce.'),
    ('se_layer.proj.3.', 'se.expand.'),
    ('gate.0.', 'gate.conv.'),
    ('gate.1.', 'gate.bn.'),
    ('proj.0.', 'out_proj.bn.'),
    ('proj.1.', 'out_proj.conv.'),
    ('dwconv2.', 'dwconv2.'),
    ('norm2.', 'norm2.'),
    ('mlp.0.', 'ffn.fc1.'),
    ('mlp.2.', 'ffn.dwconv.'),
    ('mlp.3.', 'ffn.grn.'),
    ('mlp.4.', 'ffn.fc2.'),
    ('ls1.', 'layer_scale1.'),
    ('ls2.', 'layer_scale2.'),
)
_FOCUS_BLOCK = (
    *_DYNAMIC_BLOCK,
    ('x_scale.', 'context_scale.'),
    ('h_scale.', 'prior_scale.'),
    ('fusion.0.', 'fusion.dwconv.'),
    ('fusion.1.', 'fusion.bn.'),
    ('fusion.3.', 'fusion.conv.'),
    ('fusion.4.', 'fusion.grn.'),
    ('dyconv_proj.0.', 'mix_proj.conv.'),
    ('dyconv_proj.1.', 'mix_proj.bn.'),
)
_CONTMIX_BLOCK = (
    *_DYNAMIC_BLOCK,
    ('weight_value.0.', 'value.conv.'),
    ('weight_value.1.', 'value.bn.'),
    ('fusion_proj.0.', 'mix_proj.conv.'),
    ('fusion_proj.1.', 'mix_proj.bn.'),
)
_BACKBONE = (
    *((f'patch_embed1.{3 * i}.', f'stem.{2 * i}.conv.') for i in range(4)),
    *((f'patch_embed1.{3 * i + 1}.', f'stem.{2 * i}.bn.') for i in range(4)),
    ('patch_embedx.x_proj.0.', 'focus_down.x.conv.'),
    ('patch_embedx.x_proj.1.', 'focus_down.x.bn.'),
    ('patch_embedx.h_proj.0.', 'focus_down.h.conv.'),
    ('patch_embedx.h_proj.1.', 'focus_down.h.bn.'),
    ('patch_embed{s}.0.', 'down{s}.conv.'),
    ('patch_embed{s}.1.', 'down{s}.bn.'),
    ('high_level_proj.', 'context_proj.'),
    *((f'blocks{{s}}.{{i}}.{a}', f'stage{{s}}.{{i}}.{b}') for a, b in _BASE_BLOCK),
    *((f'sub_blocks{{s}}.{{i}}.{a}', f'focus{{s}}.{{i}}.{b}') for a, b in _FOCUS_BLOCK),
    ('extra_norm.4.', 'overview_norm.'),
    ('extra_norm.{s}.', 'norm{s}.'),
    ('h_proj.0.', 'overview_proj.'),
    ('h_proj.1.', 'overview_scale.'),
)
_HEAD = (
    ('head.0.', 'proj.conv.'),
    ('head.1.', 'proj.bn.'),
    ('head.4.', 'fc.'),
    ('aux_head.0.', 'aux_bn.'),
    ('aux_head.2.', 'aux_fc.'),
)

#: What an ImageNet file lacks and a dense backbone has.
DENSE_ONLY = re.compile(r'(norm[0-3]|overview_norm|overview_proj|overview_scale)\.')


class _Names:
    """Renames in both directions by a table of pairs."""

    def __init__(self, pairs: Iterable[Tuple[str, str]]) -> None:
        pairs = list(pairs)
        self._ours = [(self._pattern(a), self._template(b)) for a, b in pairs]
        self._official = [(self._pattern(b), self._template(a)) for a, b in pairs]

    @staticmethod
    def _pattern(text: str) -> 're.Pattern':
        return re.compile(re.sub(r'\\{(\w)\\}', r'(?P<\1>[0-9]+)', re.escape(text)))

    @staticmethod
    def _template(text: str) -> str:
        return re.sub(r'{(\w)}', r'\\g<\1>', text)

    @staticmethod
    def _rename(name: str, table: list) -> Optional[str]:
        for pattern, template in table:
            match = pattern.match(name)
            if match:
                return match.expand(template) + name[match.end() :]
        return None

    def ours(self, official: str) -> Optional[str]:
        """Our name of an official one, or None."""
        return self._rename(official, self._ours)

    def official(self, ours: str) -> Optional[str]:
        """The official name of one of ours, or None."""
        return self._rename(ours, self._official)


_BACKBONE_NAMES, _HEAD_NAMES, _BLOCK_NAMES = (
    _Names(_BACKBONE),
    _Names(_HEAD),
    _Names(_CONTMIX_BLOCK),
)
_OFFICIAL_MARK, _OUR_MARK = 'patch_embed1.0.weight', 'stem.0.conv.weight'
_OFFICIAL_BLOCK_MARK, _OUR_BLOCK_MARK = 'weight_value.0.weight', 'value.conv.weight'
_OFFICIAL_HEAD_KEY = re.compile(r'(aux_)?head\.\d')


def _prefix_of(state_dict: dict, mark: str) -> Optional[str]:
    """What stands before ``mark`` in the state dict's keys, or None if no key ends with it."""
    for key in state_dict:
        if key == mark or key.endswith('.' + mark):
            return key[: -len(mark)]
    return None


def is_official(state_dict: dict) -> bool:
    """Whether a state dict holds OverLoCK under its official names, at the top or below a prefix."""
    return _prefix_of(state_dict, _OFFICIAL_MARK) is not None


def _rename_backbone(state_dict: dict, prefix: str, rename, what: str) -> dict:
    out = {}
    for key, value in state_dict.items():
        new = key
        if key.startswith(prefix):
            name = rename(key[len(prefix) :])
            if name is not None:
                new = prefix + name
            elif prefix == '' or prefix == 'backbone.':
                raise CheckpointError(f'{what}: {key!r} is not a parameter of OverLoCK')
        out[new] = value
    return out


def from_official(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Renames an official state dict to our names.

    Args:
        state_dict (dict): A bare state dict: an ImageNet classifier (training or merged form), a dense backbone, a
            whole mmdet-2 or mmseg-0 detector with the backbone under ``backbone.``, or the stand-alone ContMix block.

    Returns:
        dict: The same tensors in the same order. A classifier's keys start with ``backbone.`` and ``head.``, as
        mmpretrain's ImageClassifier has them; others keep the prefix that they had.

    Raises:
        CheckpointError: The state dict is not an official one, or holds a key that OverLoCK does not have.
    """
    prefix = _prefix_of(state_dict, _OFFICIAL_MARK)
    if prefix is None:
        if _OFFICIAL_BLOCK_MARK in state_dict:
            return _rename_backbone(state_dict, '', _BLOCK_NAMES.ours, 'official ContMix block')
        raise CheckpointError(f'not an official OverLoCK state dict: no key ends with {_OFFICIAL_MARK!r}')
    head = {k: v for k, v in state_dict.items() if prefix == '' and _OFFICIAL_HEAD_KEY.match(k)}
    if not head:
        return _rename_backbone(state_dict, prefix, _BACKBONE_NAMES.ours, 'official checkpoint')

    def rename(key: str) -> Optional[str]:
        if key in head:
            name = _HEAD_NAMES.ours(key)
            return name and 'head.' + name
        name = _BACKBONE_NAMES.ours(key)
        return name and 'backbone.' + name

    return _rename_backbone(state_dict, '', rename, 'official checkpoint')


def to_official(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Renames a state dict of ours to the official names: the inverse of :func:`from_official`.

    Args:
        state_dict (dict): State dict of an :class:`OverLoCK`, of a classifier (``backbone.`` and ``head.``), of a
            detector or segmentor, or of a :class:`ContMixBlock`. Large kernels may be merged, batch norms not.

    Returns:
        dict: The same tensors in the same order.

    Raises:
        CheckpointError: The state dict is not one of ours, or its batch norms were folded, a form that the official
            code does not have.
    """
    prefix = _prefix_of(state_dict, _OUR_MARK)
    if prefix is None:
        if _OUR_BLOCK_MARK in state_dict:
            return _rename_backbone(state_dict, '', _BLOCK_NAMES.official, 'ContMix block')
        raise CheckpointError(f'not an OverLoCK state dict of ours: no key ends with {_OUR_MARK!r}')
    if prefix + 'stem.0.bn.weight' not in state_dict:
        raise CheckpointError(
            'the batch norms of this state dict are folded, which the official code cannot load; convert before '
            'switch_to_deploy(), or after merge_large_kernels() alone'
        )
    if prefix == 'backbone.' and 'head.proj.conv.weight' in state_dict:

        def rename(key: str) -> Optional[str]:
            names, part = (_HEAD_NAMES, 'head.') if key.startswith('head.') else (_BACKBONE_NAMES, 'backbone.')
            return names.official(key[len(part) :]) if key.startswith(part) else None

        return _rename_backbone(state_dict, '', rename, 'checkpoint')
    return _rename_backbone(state_dict, prefix, _BACKBONE_NAMES.official, 'checkpoint')


# --- fitting a state dict to a model ---------------------------------------------------------------------------------


def adapt_backbone_state_dict(model: nn.Module, state_dict: dict, prefix: str, strict: bool = False) -> None:
    """Rewrites ``state_dict`` in place so that an :class:`OverLoCK` loads it; called whenever one loads.

    Official names become ours; the wrapping ``backbone.`` of a classifier, detector or segmentor is taken off when the
    backbone is loaded alone. A state dict that holds no key of the backbone is left as it is.

    Args:
        model (nn.Module): The backbone.
        state_dict (dict): Changed in place.
        prefix (str): What stands before the backbone's names.
        strict (bool): Demand every key also of a state dict in our names. Official ones always are. Defaults to False.

    Raises:
        CheckpointError: It is of another variant, of another form, or lacks keys or has others (an ImageNet file loaded
            into a dense backbone may lack the output norms and the overview branch: all of them, and only them).
    """
    if prefix == '':
        inner = next(
            (_prefix_of(state_dict, m) for m in (_OFFICIAL_MARK, _OUR_MARK) if _prefix_of(state_dict, m)),
            '',
        )
        if inner:
            _replace(
                state_dict,
                {k[len(inner) :]: v for k, v in state_dict.items() if k.startswith(inner)},
            )
    official = prefix + _OFFICIAL_MARK in state_dict
    if official:
        renamed = {}
        for key, value in state_dict.items():
            name = key[len(prefix) :] if key.startswith(prefix) else None
            if name is None:
                renamed[key] = value
            elif not _OFFICIAL_HEAD_KEY.match(name):  # the head of a classifier: not the backbone's
                renamed[prefix + (_BACKBONE_NAMES.ours(name) or name)] = value
        _replace(state_dict, renamed)
    own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    if prefix + _OUR_MARK not in state_dict:
        if strict:
            raise CheckpointError('the checkpoint holds no OverLoCK: it has neither the official names nor ours')
        return

    _match_form(model, own)
    expected = model.state_dict()
    wrong = [k for k, v in expected.items() if k in own and own[k].shape != v.shape]
    if wrong:
        raise CheckpointError(
            f'the checkpoint is {_describe(own)}, the model is {_describe(expected)}: {wrong[0]} has shape '
            f'{tuple(own[wrong[0]].shape)} there and {tuple(expected[wrong[0]].shape)} here. Use the arch of the file'
        )
    if not (official or strict):
        return
    missing = [k for k in expected if k not in own and not k.endswith('num_batches_tracked')]
    # A backbone that returns fewer maps has fewer norms: those of the file that it does not use are left out.
    unused = [f'norm{i}.' for i in (0, 2, 3) if model.out_type == 'pyramid' and i not in model.out_indices]
    for key in [k for k in own if k.startswith(tuple(unused))] if unused else []:
        del own[key], state_dict[prefix + key]
    unexpected = [k for k in own if k not in expected]
    dense_only = [k for k in expected if DENSE_ONLY.match(k)]
    if sorted(missing) == sorted(dense_only):  # an ImageNet file into a dense backbone
        missing = []
    if missing or unexpected:
        overview = [k for k in missing + unexpected if k.startswith('overview_')]
        advice = ' (the detection form needs fuse_overview=True, the segmentation form False)' if overview else ''
        raise CheckpointError(
            f'the checkpoint is {_describe(own)}, the model is {_describe(expected)}: '
            f'{_some("missing", missing)}{_some("unexpected", unexpected)}they do not fit{advice}'
        )


def _match_form(model: nn.Module, own: dict) -> None:
    """Refuses a merged file for a training model and the reverse; folds a deploy model for a folded file."""
    kernel = next((k for k in own if k.endswith('large_kernel.conv.weight')), None)
    if kernel is None:
        return
    file_merged = kernel[: -len('weight')] + 'bias' in own
    model_merged = any(k.endswith('large_kernel.conv.bias') for k, _ in model.named_parameters())
    if file_merged and not model_merged:
        raise CheckpointError('the checkpoint is merged ("reparam") and the model is not: build it with deploy=True')
    if model_merged and not file_merged:
        raise CheckpointError(
            'the checkpoint is not merged and the model is: build it with deploy=False, load, then call '
            'switch_to_deploy()'
        )
    if file_merged and 'stem.0.bn.weight' not in own:
        model.switch_to_deploy()
    elif file_merged and not hasattr(model.stem[0], 'bn'):
        raise CheckpointError('the batch norms of this model are folded already: load before switch_to_deploy()')


def _describe(state_dict: dict) -> str:
    """An OverLoCK in a few words, read off the shapes of its state dict (our names)."""
    keys = ('stem.6', 'down2', 'down3', 'down4')
    widths = [state_dict[f'{k}.conv.weight'].shape[0] if f'{k}.conv.weight' in state_dict else '?' for k in keys]
    names = {
        (56, 112, 256, 336): 'XT',
        (64, 128, 256, 512): 'T',
        (64, 128, 320, 512): 'S',
        (80, 160, 384, 576): 'B',
    }
    blocks = {'.'.join(k.split('.')[:2]) for k in state_dict if re.match(r'(stage|focus)\d\.', k)}
    name = names.get(tuple(widths))
    return f'OverLoCK{"-" + name if name else ""} (widths {", ".join(map(str, widths))}; {len(blocks)} blocks)'


def _some(what: str, keys: List[str]) -> str:
    shown = ', '.join(keys[:4]) + (f' and {len(keys) - 4} more' if len(keys) > 4 else '')
    return f'{what} {shown}; ' if keys else ''


def _replace(state_dict: dict, new: dict) -> None:
    state_dict.clear()
    state_dict.update(new)


def adapt_head_state_dict(state_dict: dict, prefix: str) -> None:
    """Renames, in place, the official head below ``prefix`` to our names; called whenever the head loads."""
    renamed = {}
    for key, value in state_dict.items():
        name = _HEAD_NAMES.ours(key[len(prefix) :]) if key.startswith(prefix) else None
        renamed[prefix + name if name else key] = value
    _replace(state_dict, renamed)


def adapt_block_state_dict(state_dict: dict, prefix: str) -> None:
    """Renames, in place, an official stand-alone ContMix block below ``prefix`` to our names."""
    if prefix + _OFFICIAL_BLOCK_MARK not in state_dict:
        return
    renamed = {}
    for key, value in state_dict.items():
        name = _BLOCK_NAMES.ours(key[len(prefix) :]) if key.startswith(prefix) else None
        renamed[prefix + name if name else key] = value
    _replace(state_dict, renamed)


def load_pretrained(model: nn.Module, checkpoint: str, prefix: Optional[str] = None) -> None:
    """Loads a pretrained backbone, strictly but for what an ImageNet file cannot hold.

    Args:
        model (nn.Module): An :class:`OverLoCK`.
        checkpoint (str): A file or URL, in any layout.
        prefix (str, optional): Take only the keys below it. Defaults to None: found by itself.

    Raises:
        CheckpointError: The file cannot be read or does not fit; the model is unchanged.
    """
    state_dict = load_state_dict_file(checkpoint)
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        state_dict = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        if not state_dict:
            raise CheckpointError(f'{checkpoint}: no key starts with the prefix {prefix!r}')
    try:
        adapt_backbone_state_dict(model, state_dict, '', strict=True)
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from None
    result = model.load_state_dict(state_dict, strict=False)
    left = sorted({k.split('.')[0] for k in result.missing_keys if not k.endswith('num_batches_tracked')})
    print_log(
        f'OverLoCK: loaded {len(state_dict)} tensors from {checkpoint}'
        + (f'; at their initial values: {", ".join(left)}' if left else ''),
        logger='current',
    )


# --- reading files ---------------------------------------------------------------------------------------------------


def _allowed_globals() -> list:
    """What a checkpoint may hold besides tensors: plain records of options, logs and numbers, nothing that runs."""
    names = [
        'mmengine.logging.history_buffer.HistoryBuffer',  # training logs of mmengine's Runner
        'mmengine.config.config.ConfigDict',
    ]
    found = [argparse.Namespace]  # timm-style checkpoints keep their command line
    import numpy as np

    found += [
        np.ndarray,
        np.dtype,
        *(type(np.dtype(t)) for t in ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', '?')),
    ]
    for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):
        for attribute in ('_reconstruct', 'scalar'):
            try:
                # The names moved in numpy 2; files of both ages name theirs.
                function = getattr(importlib.import_module(module), attribute)
                found.append((function, f'{module}.{attribute}'))
            except (ImportError, AttributeError):
                continue
    for name in names:
        module, attribute = name.rsplit('.', 1)
        found.append(getattr(importlib.import_module(module), attribute))
    found += [(_history_method, name) for name in ('builtins.getattr', '__builtin__.getattr')]
    return found


def _history_method(owner: type, name: str):
    """What stands in for ``getattr`` while a checkpoint is read.

    A HistoryBuffer keeps its statistics as methods, which pickle as ``getattr(HistoryBuffer, 'mean')``. That, and no
    other use, is let through: a getattr on anything else would be a way to functions that run code.
    """
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'GLOBAL getattr({owner!r}, {name!r}) is not allowed')
    return getattr(owner, name)


def read_checkpoint(path: str, map_location='cpu') -> dict:
    """Reads a checkpoint file without executing what is in it.

    ``torch.load(weights_only=True)`` with a short list of harmless classes allowed on top: option namespaces, logs of
    mmengine, numpy numbers. Before that, the checksums that ``torch.save`` writes are compared, which ``torch.load``
    does not do: a flipped bit would be a wrong weight. A ``.safetensors`` file gives its bare state dict.

    Args:
        path (str): The file.
        map_location: As in ``torch.load``. Defaults to ``'cpu'``.

    Returns:
        dict: What the file holds.

    Raises:
        UnsafeCheckpointError: It holds objects that could run code, is compressed (``torch.save`` never does that; what
            unpacks to more than memory holds is), or claims a tensor larger than itself.
        CheckpointError: There is no such file, or it is damaged.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise CheckpointError(f'{path}: there is no such checkpoint file')
    try:
        if path.endswith(SAFETENSORS):
            return _read_safetensors(path, map_location)
        _check_archive(path)
        with torch.serialization.safe_globals(_allowed_globals()):
            content = torch.load(path, map_location=map_location, weights_only=True)
        _check_sizes(path, content)
        return content
    except pickle.UnpicklingError as error:
        refused = re.search(r'GLOBAL (\S+)', str(error))
        if refused:
            raise UnsafeCheckpointError(
                f'{path}: holds {refused.group(1)}, which could run code when loaded; not opened. If you trust the '
                'file, load it with torch yourself and save its state dict alone'
            ) from None
        raise CheckpointError(f'{path}: is not a checkpoint, or damaged ({_first_line(error)})') from None
    except CheckpointError:
        raise
    except (
        RuntimeError,
        EOFError,
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        OSError,
        IndexError,
        TypeError,
        AttributeError,
        AssertionError,
        NotImplementedError,
        MemoryError,
    ) as error:
        raise CheckpointError(f'{path}: is not a checkpoint, or damaged ({_first_line(error)})') from None


def _check_archive(path: str) -> None:
    """Refuses a zip file that is damaged, or that would unpack to more than its own size."""
    with open(path, 'rb') as file:
        if file.read(4) != b'PK\x03\x04':
            return  # the format before torch 1.6, or no checkpoint at all: torch.load will say
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise UnsafeCheckpointError(
                f'{path}: is compressed, which no checkpoint is, and could unpack to any size; not opened'
            )
        damaged = archive.testzip()
    if damaged:
        raise CheckpointError(f'{path}: is damaged (the checksum of {damaged} does not match its content)')


def _check_sizes(path: str, content) -> None:
    """Refuses tensors that claim more elements than a file of that size can hold (a view with strides of 0)."""
    limit = os.path.getsize(path)
    for tensor in _tensors(content):
        size = tensor.numel() * tensor.element_size()
        if size > limit:
            raise UnsafeCheckpointError(
                f'{path}: claims a tensor of shape {tuple(tensor.shape)}, {size / 2**30:.1f} GiB, and has '
                f'{limit / 2**20:.1f} MiB itself; not used'
            )


def _tensors(content) -> Iterator[torch.Tensor]:
    """Every tensor in a checkpoint, however deep. No recursion: a file may be deeper than Python's stack."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:  # a file may hold a loop
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise CheckpointError('a .safetensors file needs the package safetensors: pip install safetensors') from None
    return safetensors


def _read_safetensors(path: str, map_location) -> dict:
    package = _safetensors()
    device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
    try:
        return package.torch.load_file(path, device=str(device))
    except package.SafetensorError as error:
        raise CheckpointError(f'{path}: is not a safetensors file, or damaged ({_first_line(error)})') from None


def write_checkpoint(content: dict, path: str) -> None:
    """Writes a checkpoint: a ``.safetensors`` file if the path ends so, otherwise by ``torch.save``.

    Args:
        content (dict): A bare state dict, or one under ``state_dict`` (with ``meta``, as mmengine has it). A
            safetensors file takes the tensors, and of ``meta`` the entries that are text.
        path (str): Where to; written in place, so give a temporary name and rename, as ``cli.replacing`` does.

    Raises:
        CheckpointError: safetensors is asked for and not installed, or there are no tensors.
    """
    if not path.endswith(SAFETENSORS):
        torch.save(content, path)
        return
    package = _safetensors()
    # Clones: the format takes no two names for one memory.
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in unwrap(content).items()}
    meta = content.get('meta') if 'state_dict' in content else None
    package.torch.save_file(tensors, path, {k: v for k, v in (meta or {}).items() if isinstance(v, str)} or None)


def latest_checkpoint(work_dir: str) -> Optional[str]:
    """The checkpoint to resume a run from: the one that ``last_checkpoint`` names, if it is whole.

    If it is damaged or gone, the newest whole one of its folder takes its place; a warning says which was left out and
    why.

    Args:
        work_dir (str): Work directory of the run. It may have been moved since.

    Returns:
        str | None: A file that :func:`read_checkpoint` can read; None if the run left none.

    Raises:
        CheckpointError: There are checkpoints, and none of them can be read.
    """
    named, pointer = None, os.path.join(work_dir, 'last_checkpoint')
    with contextlib.suppress(OSError), open(pointer, encoding='utf-8', errors='replace') as file:
        named = file.read().strip() or None
    folders = [work_dir]
    if named is not None:
        if os.path.exists(named):
            folders.append(os.path.dirname(named))
        else:
            named = os.path.join(work_dir, os.path.basename(named))
    if named is not None and os.path.isdir(named):
        return named  # sharded: mmengine reads it
    others = {os.path.join(f, n) for f in folders if os.path.isdir(f) for n in os.listdir(f) if n.endswith('.pth')}
    # best_* and published files hold no optimizer: they are dropped below, where they are read.
    others = sorted((o for o in others if os.path.realpath(o) != os.path.realpath(named or '')), key=_age)
    problems = []
    for path in ([named] if named is not None else []) + others:
        try:
            content = read_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if path != named and not (isinstance(content, dict) and 'optimizer' in content):
            continue
        if problems:
            print_log(f'{"; ".join(problems)}. Resuming from {path} instead', logger='current', level=30)
        return path
    if problems:
        raise CheckpointError(f'no checkpoint to resume from: {"; ".join(problems)}')
    return None


def _age(path: str) -> Tuple[float, int]:
    """Sorts the newest first; of one moment (copied files) the one with the highest number."""
    numbers = re.findall(r'\d+', os.path.basename(path))
    return -os.path.getmtime(path), -int(numbers[-1]) if numbers else 0


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint holds objects outside the allow-list."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def unwrap(checkpoint: dict) -> dict:
    """The state dict inside a checkpoint: bare, or under a usual key, averaged weights first.

    Raises:
        CheckpointError: There is none.
    """
    for key in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, dict) or not any(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        raise CheckpointError('the file holds no state dict')
    state_dict = {k: v for k, v in checkpoint.items() if isinstance(v, torch.Tensor)}
    if all(k.startswith('module.') for k in state_dict):  # saved from DistributedDataParallel
        state_dict = {k[len('module.') :]: v for k, v in state_dict.items()}
    return state_dict


def load_state_dict_file(checkpoint: str) -> Dict[str, torch.Tensor]:
    """The state dict of a checkpoint file, names unchanged, on the CPU.

    Args:
        checkpoint (str): A path or an https URL; a download is kept in torch's hub cache.

    Returns:
        dict: Name to tensor, without wrapping and without DistributedDataParallel's ``module.``.

    Raises:
        CheckpointError: The file is missing, damaged, unsafe, or holds no state dict.
    """
    if checkpoint.startswith(('http://', 'https://')):
        path = _download(checkpoint)
    elif '://' in checkpoint:  # other schemes that mmengine knows: torchvision://, openmmlab://, s3://
        return unwrap(CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu'))
    else:
        path = checkpoint
    try:
        return unwrap(read_checkpoint(path))
    except CheckpointError as error:
        message = str(error)
        raise type(error)(message if message.startswith(os.path.expanduser(path)) else f'{path}: {message}') from None


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows a redirection to https, and to nothing else."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith('https://'):
            raise urllib.error.URLError(f'redirected to {newurl}, which is not https')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, path: str) -> str:
    """Downloads to a file that appears whole or not at all.

    Args:
        url (str): An https address; a redirection to anything else is not followed.
        path (str): Where to; the folder is there.

    Returns:
        str: The SHA-256.

    Raises:
        OSError: It cannot be fetched, or broke off.
    """
    digest = hashlib.sha256()
    partial = tempfile.NamedTemporaryFile(dir=os.path.dirname(path), suffix='.partial', delete=False)
    try:
        with partial, urllib.request.build_opener(_OnlyHttps).open(url, timeout=60) as answer:
            expected = answer.headers.get('Content-Length')
            print_log(f'downloading {url} ({int(expected or 0) / 2**20:.0f} MiB)', logger='current')
            while block := answer.read(1 << 20):
                digest.update(block)
                partial.write(block)
            if expected is not None and partial.tell() != int(expected):
                raise OSError(f'it broke off after {partial.tell()} of {expected} bytes')
        os.replace(partial.name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial.name)
        raise
    return digest.hexdigest()


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(url: str) -> str:
    """The file of a URL in torch's hub cache, fetched if it is not there yet, by the first process.

    Raises:
        CheckpointError: The URL is not https, the file cannot be fetched, or it is an official one with another SHA-256
            than the recorded one.
    """
    name = os.path.basename(urlparse(url).path)
    if not url.startswith('https://'):
        raise CheckpointError(
            f'{url}: only https is downloaded from, as anyone on the way could change the file. Download it yourself '
            'and name the file'
        )
    if name in ('', '.', '..'):
        raise CheckpointError(f'{url}: names no file')
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    path = os.path.join(folder, name)
    expected = OFFICIAL_SHA256.get(name) if url.startswith(OFFICIAL_RELEASE) else None
    if is_main_process():
        found = None
        if not os.path.isfile(path):
            os.makedirs(folder, exist_ok=True)
            try:
                found = fetch(url, path)
            except (urllib.error.URLError, OSError) as error:
                raise CheckpointError(
                    f'{url}: cannot be downloaded ({_first_line(error)}). Download it elsewhere and put it at {path}'
                ) from None
            note = '' if expected else '; none is on record to compare with'
            print_log(f'{path}: SHA-256 {found}{note}', logger='current')
        elif expected:
            found = _sha256(path)
        if expected and found != expected:
            raise CheckpointError(
                f'{path}: has SHA-256 {found}, the official file has {expected}: not used. Remove it to fetch it anew'
            )
    barrier()
    return path


def register_loader() -> None:
    """Lets mmengine read official files and Runner checkpoints wherever a checkpoint is named, and none unsafely.

    mmengine's ``CheckpointLoader`` keeps a loader a scheme. Ours, for local files and for http(s), read the file safely
    and prefix an official classifier's keys (``backbone.``, ``head.``) as mmpretrain's classifier has them. A file that
    our allow-list refuses is refused, on both lines of mmengine (whose loaders of addresses would execute it), unless
    the user set torch's variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD; any other file comes out as before.
    """
    schemes = CheckpointLoader._schemes
    if getattr(schemes.get(''), '_mmoverlock', False):
        return
    previous = schemes['']

    def load_from_local(filename: str, map_location=None):
        if not os.path.isfile(os.path.expanduser(filename)):
            return previous(filename, map_location=map_location)
        try:
            return _with_prefixes(_without_program(read_checkpoint(filename, map_location)))
        except UnsafeCheckpointError:
            if os.environ.get('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '0') in ('1', 'y', 'yes', 'true'):
                return previous(filename, map_location=map_location)
            raise

    def load_from_http(filename: str, map_location=None, **kwargs):
        return load_from_local(_download(filename), map_location)

    load_from_local._mmoverlock = load_from_http._mmoverlock = True
    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), load_from_http, force=True)


def _without_program(checkpoint: dict) -> dict:
    """Renames ``meta.config``, which mmengine's ``Runner.resume`` would run as Python; its own files have ``cfg``."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict) and 'config' in meta:
        meta.setdefault('cfg', meta.pop('config'))
    return checkpoint


def _with_prefixes(checkpoint: dict) -> dict:
    """An official ImageNet classifier with its keys under ``backbone.`` and ``head.``; all else unchanged."""
    try:
        state_dict = unwrap(checkpoint)
    except CheckpointError:
        return checkpoint
    if not is_official(state_dict):
        return checkpoint
    if _OFFICIAL_MARK in state_dict:
        state_dict = {('head.' if _OFFICIAL_HEAD_KEY.match(k) else 'backbone.') + k: v for k, v in state_dict.items()}
    return dict(state_dict=state_dict, meta={})
