"""Official files of every wrapping into every kind of model, and what happens to those that do not fit."""

import argparse
import os
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from common import randomise
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from mmoverlock import ContMixBlock, OverLoCK, checkpoints
from mmoverlock.checkpoints import (
    CheckpointError,
    from_official,
    load_state_dict_file,
    read_checkpoint,
    to_official,
    unwrap,
    write_checkpoint,
)
from mmoverlock.models import ARCHS


def classifier(tiny, **kwargs):
    pytest.importorskip('mmpretrain')
    from mmengine.registry import MODELS

    config = dict(
        type='mmpretrain.ImageClassifier',
        backbone=dict(type='mmoverlock.OverLoCK', arch=tiny, out_type='classification', **kwargs),
        head=dict(
            type='mmoverlock.OverLoCKClsHead',
            num_classes=7,
            in_channels=(32, 40),
            hidden_channels=16,
        ),
    )
    return MODELS.build(config)


@pytest.fixture
def imagenet(tiny):
    """An official ImageNet state dict of the tiny network, every tensor drawn at random."""
    return to_official(randomise(classifier(tiny)).state_dict())


@pytest.fixture
def save(tmp_path):
    def write(obj, name='official.pth'):
        torch.save(obj, tmp_path / name)
        return str(tmp_path / name)

    return write


def same(a, b):
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


# --- names


@pytest.mark.parametrize('form', ['cls_{}', 'cls_{}_reparam', 'det_{}', 'seg_{}'])
@pytest.mark.parametrize('arch', list(ARCHS))
def test_round_trip_of_every_official_layout(official_shapes, arch, form):
    official = {k: torch.empty(s, device='meta') for k, s in official_shapes[form.format(arch)].items()}
    ours = from_official(official)
    assert len(ours) == len(official)
    back = to_official(ours)
    assert list(back) == list(official)
    assert all(back[k] is official[k] for k in official)


def test_round_trip_of_the_block(official_shapes):
    official = {k: torch.empty(s, device='meta') for k, s in official_shapes['contmix_block'].items()}
    ours = from_official(official)
    assert set(ours) == set(ContMixBlock(64).state_dict())
    assert list(to_official(ours)) == list(official)


def test_round_trip_of_a_detector(tiny):
    backbone = to_official(OverLoCK(tiny, fuse_overview=True).state_dict())
    official = {'backbone.' + k: v for k, v in backbone.items()}
    official['neck.lateral_convs.0.conv.weight'] = torch.zeros(1)
    ours = from_official(official)
    assert 'backbone.stem.0.conv.weight' in ours and 'neck.lateral_convs.0.conv.weight' in ours
    same(to_official(ours), official)


def test_foreign_state_dicts_are_refused(imagenet):
    with pytest.raises(CheckpointError, match='not an official OverLoCK'):
        from_official(dict(weight=torch.zeros(1)))
    with pytest.raises(CheckpointError, match='not an OverLoCK state dict of ours'):
        to_official(imagenet)
    with pytest.raises(CheckpointError, match="'blocks1.0.extra.weight' is not a parameter"):
        from_official({**imagenet, 'blocks1.0.extra.weight': torch.zeros(1)})


def test_folded_form_has_no_official_names(tiny):
    model = OverLoCK(tiny)
    model.switch_to_deploy()
    with pytest.raises(CheckpointError, match='folded'):
        to_official(model.state_dict())


# --- files, wherever a checkpoint is named


WRAPPINGS = {
    'bare': lambda sd: sd,
    'model': lambda sd: dict(model=sd, epoch=3),
    'state_dict': lambda sd: dict(state_dict=OrderedDict(sd), meta=dict(CLASSES=('a',))),
    'ddp': lambda sd: {'module.' + k: v for k, v in sd.items()},
    'ema': lambda sd: dict(state_dict={k: torch.zeros_like(v) for k, v in sd.items()}, state_dict_ema=sd),
    'timm': lambda sd: dict(
        epoch=299,
        arch='overlock_xt',
        state_dict=sd,
        args=argparse.Namespace(lr=1e-3, model='overlock_xt'),
        metric=82.7,
    ),
    'numpy': lambda sd: dict(state_dict=sd, metric=np.float64(82.7), history=np.arange(3)),
}


@pytest.mark.parametrize('wrapping', WRAPPINGS)
def test_classifier_by_load_checkpoint(tiny, imagenet, save, wrapping):
    path = save(WRAPPINGS[wrapping](imagenet))
    model = classifier(tiny)
    load_checkpoint(model, path, strict=True)
    if wrapping != 'ddp':  # whose prefix mmengine itself takes off
        same(to_official(model.state_dict()), imagenet)


@pytest.mark.parametrize('wrapping', WRAPPINGS)
def test_dense_backbone_by_init_cfg(tiny, imagenet, save, wrapping):
    path = save(WRAPPINGS[wrapping](imagenet))
    model = OverLoCK(tiny, fuse_overview=True, init_cfg=dict(type='Pretrained', checkpoint=path))
    norms = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(('norm', 'overview'))}
    model.init_weights()
    loaded = to_official(model.state_dict())
    assert all(torch.equal(loaded[k], v) for k, v in imagenet.items() if 'head.' not in k)
    assert norms and all(torch.equal(model.state_dict()[k], v) for k, v in norms.items())


def test_dense_file_with_norms(tiny, save):
    source = randomise(OverLoCK(tiny, fuse_overview=True))
    path = save(to_official(source.state_dict()))
    model = OverLoCK(tiny, fuse_overview=True, init_cfg=dict(type='Pretrained', checkpoint=path))
    model.init_weights()
    same(model.state_dict(), source.state_dict())
    fewer = OverLoCK(
        tiny,
        fuse_overview=True,
        out_indices=(2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=path),
    )
    fewer.init_weights()
    assert torch.equal(fewer.norm2.weight, source.norm2.weight)


def test_our_classifier_checkpoint_into_a_dense_backbone(tiny, save):
    source = randomise(classifier(tiny))
    path = save(dict(meta={}, state_dict=source.state_dict()))
    for prefix in (None, 'backbone', 'backbone.'):
        model = OverLoCK(tiny, init_cfg=dict(type='Pretrained', checkpoint=path, prefix=prefix))
        model.init_weights()
        assert torch.equal(model.focus3[0].mixer.rpb2, source.backbone.focus3[0].mixer.rpb2)


def test_plain_load_state_dict_takes_official_names(tiny, imagenet):
    model = OverLoCK(tiny, out_type='classification')
    model.load_state_dict(imagenet)  # strict
    assert torch.equal(model.stem[0].conv.weight, imagenet['patch_embed1.0.weight'])
    model.load_state_dict(from_official(imagenet))
    whole = classifier(tiny)
    whole.load_state_dict(from_official(imagenet))
    same(to_official(whole.state_dict()), imagenet)


class Detector(nn.Module):
    """Stands for any detector: a backbone and something of its own."""

    def __init__(self, tiny, **kwargs):
        super().__init__()
        self.backbone = OverLoCK(tiny, **kwargs)
        self.neck = nn.Conv2d(4, 4, 1)


def test_detector_file_of_mmdet_2(tiny, save):
    source = randomise(Detector(tiny, fuse_overview=True))
    official = {k: v for k, v in source.state_dict().items() if k.startswith('neck')}
    official.update({'backbone.' + k: v for k, v in to_official(source.backbone.state_dict()).items()})
    path = save(
        dict(
            meta=dict(mmdet_version='2.28.2'),
            state_dict=official,
            optimizer=dict(state={}, param_groups=[]),
        )
    )
    model = Detector(tiny, fuse_overview=True)
    load_checkpoint(model, path, strict=True)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    # and its backbone alone
    alone = OverLoCK(tiny, fuse_overview=True, init_cfg=dict(type='Pretrained', checkpoint=path))
    alone.init_weights()
    same(alone.state_dict(), source.backbone.state_dict())


def test_imagenet_file_as_load_from_of_a_detector(tiny, imagenet, save):
    model = Detector(tiny)
    load_checkpoint(model, save(imagenet))
    assert torch.equal(model.backbone.stem[0].conv.weight, imagenet['patch_embed1.0.weight'])


def test_merged_file_into_deploy(tiny, save):
    source = randomise(classifier(tiny)).eval()
    source.backbone.merge_large_kernels()
    official = to_official(source.state_dict())
    path = save(official, 'reparam.pth')
    model = classifier(tiny, deploy=True)
    load_checkpoint(model, path, strict=True)
    same(to_official(model.state_dict()), official)
    with pytest.raises(CheckpointError, match='build it with deploy=True'):
        load_checkpoint(classifier(tiny), path)


def test_unmerged_file_into_deploy_says_what_to_do(tiny, imagenet, save):
    with pytest.raises(CheckpointError, match='deploy=False, load, then call switch_to_deploy'):
        load_checkpoint(classifier(tiny, deploy=True), save(imagenet))


def test_folded_file_into_deploy(tiny, save):
    source = randomise(classifier(tiny)).eval()
    image = torch.randn(1, 3, 64, 64)
    source.backbone.switch_to_deploy()
    source.head.switch_to_deploy()
    model = classifier(tiny, deploy=True).eval()
    load_checkpoint(model, save(dict(state_dict=source.state_dict())), strict=True)
    with torch.no_grad():
        assert torch.equal(model(image), source(image))
    with pytest.raises(CheckpointError, match='folded already'):
        merged = randomise(classifier(tiny))
        merged.backbone.merge_large_kernels()
        model.load_state_dict(merged.state_dict())


# --- what does not fit


def pretrained(arch, path, **kwargs):
    model = OverLoCK(arch, init_cfg=dict(type='Pretrained', checkpoint=path), **kwargs)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    return model, before


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda sd: sd.pop('blocks3.0.proj.4.weight'), 'missing stage3.0.ffn.fc1.weight'),
        (lambda sd: sd.update({'blocks9.0.x': torch.zeros(1)}), 'unexpected blocks9.0.x'),
        (
            lambda sd: sd.update({'high_level_proj.bias': torch.zeros(5)}),
            r'context_proj.bias has shape \(5,\) there and',
        ),
        (lambda sd: sd.update({'extra_norm.0.weight': torch.zeros(8)}), 'missing'),
    ],
)
def test_an_official_file_that_does_not_fit(tiny, imagenet, save, change, message):
    change(imagenet)
    path = save(imagenet)
    model, before = pretrained(tiny, path)
    with pytest.raises(CheckpointError, match=f'official.pth: .*{message}'):
        model.init_weights()
    same(model.state_dict(), before)
    # the same file named in another place
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(Detector(tiny), path)


def test_another_variant_is_named(tiny, save, official_shapes):
    path = save({k: torch.zeros(s) for k, s in official_shapes['cls_xt_reparam'].items()})
    model, before = pretrained(tiny, path, deploy=True)
    with pytest.raises(
        CheckpointError,
        match=r'is OverLoCK-XT \(widths 56, 112, 256, 336; 17 blocks\), the model is',
    ):
        model.init_weights()
    same(model.state_dict(), before)


def test_another_variant_under_our_names(tiny, save):
    path = save(OverLoCK({**tiny, 'widths': (8, 16, 24, 64)}).state_dict())
    with pytest.raises(CheckpointError, match='Use the arch of the file'):
        load_checkpoint(OverLoCK(tiny), path)


def test_detection_and_segmentation_forms_are_told_apart(tiny, save):
    path = save(to_official(OverLoCK(tiny, fuse_overview=True).state_dict()))
    with pytest.raises(CheckpointError, match='unexpected overview_.*fuse_overview=True'):
        pretrained(tiny, path)[0].init_weights()


def test_not_an_overlock(tiny, save):
    with pytest.raises(CheckpointError, match='holds no OverLoCK'):
        pretrained(tiny, save(dict(weight=torch.zeros(3))))[0].init_weights()
    with pytest.raises(CheckpointError, match='holds no state dict'):
        pretrained(tiny, save(dict(epoch=3)))[0].init_weights()


# --- files


def test_missing_file(tiny):
    with pytest.raises(CheckpointError, match='nowhere.pth: there is no such checkpoint file'):
        pretrained(tiny, 'nowhere.pth')[0].init_weights()
    with pytest.raises(FileNotFoundError):  # as mmengine has it
        load_checkpoint(OverLoCK(tiny), 'nowhere.pth')


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'text', 'flipped'])
def test_damaged_file(tiny, imagenet, save, damage):
    path = save(imagenet)
    whole = open(path, 'rb').read()
    middle = len(whole) // 2
    content = dict(
        truncated=whole[:middle],
        empty=b'',
        text=b'<!DOCTYPE html><html>Not found</html>',
        flipped=b'XX' + whole[2:-200] + b'\0' * 200,
    )[damage]
    with open(path, 'wb') as file:
        file.write(content)
    with pytest.raises(CheckpointError, match='official.pth: is not a checkpoint, or damaged'):
        pretrained(tiny, path)[0].init_weights()
    with pytest.raises(CheckpointError, match='damaged'):
        load_checkpoint(OverLoCK(tiny), path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_malicious_pickle_is_not_executed(tiny, imagenet, save, tmp_path):
    target = tmp_path / 'executed'
    path = save(dict(state_dict=imagenet, args=Malicious(str(target))))
    with pytest.raises(CheckpointError, match='mkdir, which could run code'):
        load_state_dict_file(path)
    with pytest.raises(CheckpointError, match='mkdir, which could run code'):
        load_checkpoint(OverLoCK(tiny), path)
    assert not target.exists()


def test_user_who_forces_it_gets_mmengines_own_loader(monkeypatch, tiny, imagenet, save, tmp_path):
    target = tmp_path / 'executed'
    path = save(dict(state_dict=imagenet, args=Malicious(str(target))))
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    CheckpointLoader.load_checkpoint(path)
    assert target.exists()


def test_runner_checkpoints_resume_under_weights_only(save):
    """What mmengine's Runner saves beside the weights, and torch >= 2.6 refuses by default."""
    history = HistoryBuffer([0.5, 0.25], [1, 1])
    path = save(dict(state_dict={}, message_hub=dict(log_scalars={'train/loss': history}), lr=np.float64(0.1)))
    loaded = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    assert loaded['message_hub']['log_scalars']['train/loss'].mean() == 0.375
    assert loaded['lr'] == 0.1


def test_other_files_come_out_of_mmengines_loader_unchanged(save):
    checkpoint = dict(state_dict={'conv.weight': torch.arange(3.0)}, meta=dict(epoch=1))
    loaded = CheckpointLoader.load_checkpoint(save(checkpoint))
    assert loaded['meta'] == dict(epoch=1) and list(loaded['state_dict']) == ['conv.weight']


def test_reading_leaves_torchs_allow_list_alone(save):
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(save(dict(args=argparse.Namespace(a=1))))
    assert set(torch.serialization.get_safe_globals()) == before


def test_download_failure_names_the_cure(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))

    def fail(url, path):
        raise OSError('no route to host')

    monkeypatch.setattr(checkpoints, 'fetch', fail)
    url = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_xt_in1k_224.pth'
    with pytest.raises(CheckpointError, match='cannot be downloaded .no route to host.*put it at .*in1k_224.pth'):
        pretrained(tiny, url)[0].init_weights()


def test_release_url_is_read_once_downloaded(tiny, imagenet, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(checkpoints, 'fetch', lambda url, path: torch.save(imagenet, path))
    url = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_xt_in1k_224.pth'
    model = classifier(tiny)
    load_checkpoint(model, url, strict=True)
    same(to_official(model.state_dict()), imagenet)
    assert os.listdir(tmp_path / 'checkpoints') == ['overlock_xt_in1k_224.pth']


class Getattr:
    """Pickles as getattr(os, 'system'): the way from an allowed name to any function."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def test_getattr_reaches_only_the_methods_of_a_history(save):
    with pytest.raises(CheckpointError, match='getattr'):
        read_checkpoint(save(dict(a=Getattr())))


# --- safetensors


@pytest.mark.parametrize('into', ['bare', 'classifier', 'backbone'])
def test_safetensors_wherever_a_checkpoint_is_named(tiny, imagenet, tmp_path, into):
    pytest.importorskip('safetensors')
    path = str(tmp_path / 'official.safetensors')
    write_checkpoint(dict(state_dict=imagenet, meta=dict(source='here', epoch=3)), path)
    if into == 'bare':
        content = read_checkpoint(path)
        assert all(torch.equal(content[k], v) for k, v in imagenet.items()) and len(content) == len(imagenet)
        assert list(unwrap(content)) == list(content)
    elif into == 'classifier':
        model = classifier(tiny)
        load_checkpoint(model, path, strict=True)
        same(to_official(model.state_dict()), imagenet)
    else:
        model, _ = pretrained(tiny, path)
        model.init_weights()
        assert torch.equal(model.stem[0].conv.weight, imagenet['patch_embed1.0.weight'])


def test_safetensors_of_shared_and_strided_tensors(tmp_path):
    pytest.importorskip('safetensors')
    path, whole = str(tmp_path / 'a.safetensors'), torch.arange(6.0).reshape(2, 3)
    write_checkpoint(dict(a=whole, b=whole, c=whole.t()), path)
    assert torch.equal(read_checkpoint(path)['c'], whole.t()) and torch.equal(read_checkpoint(path)['b'], whole)


def test_damaged_safetensors(tmp_path):
    pytest.importorskip('safetensors')
    path = tmp_path / 'a.safetensors'
    write_checkpoint(dict(a=torch.arange(6.0)), str(path))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match='a.safetensors: is not a safetensors file, or damaged'):
        read_checkpoint(str(path))


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    (tmp_path / 'a.safetensors').write_bytes(b'')
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        read_checkpoint(str(tmp_path / 'a.safetensors'))
    with pytest.raises(CheckpointError, match='pip install safetensors'):
        write_checkpoint(dict(a=torch.zeros(1)), str(tmp_path / 'b.safetensors'))


# --- what torch.load does not look at


@pytest.mark.parametrize('place', [0.3, 0.5, 0.7])
def test_a_flipped_bit_in_a_weight_is_found(save, place):
    path = save(dict(a=torch.zeros(1000), b=torch.zeros(1000)))
    content = bytearray(open(path, 'rb').read())
    content[int(len(content) * place)] ^= 1
    with open(path, 'wb') as file:
        file.write(content)
    with pytest.raises(CheckpointError, match='the checksum of .*data/[01] does not match'):
        read_checkpoint(path)
