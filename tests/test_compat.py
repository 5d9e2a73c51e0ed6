import argparse
import os
import pickle
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import checkpoint

from mmoverlock import compat

ROOT = Path(__file__).resolve().parents[1]


def installed(monkeypatch, **versions):
    """Let compat see these major versions only; ``_`` in a name stands for ``-``."""
    known = {name.replace('_', '-'): version for name, version in versions.items()}
    monkeypatch.setattr(compat, 'major_version', known.get)


@pytest.fixture
def dependency(monkeypatch):
    """A stand-in for mmpretrain.utils.dependency, before mmpretrain.models was imported."""
    module = types.ModuleType('mmpretrain.utils.dependency')
    module.WITH_MULTIMODAL = True
    package, utils = types.ModuleType('mmpretrain'), types.ModuleType('mmpretrain.utils')
    package.__spec__ = types.SimpleNamespace(name='mmpretrain')
    package.utils, utils.dependency = utils, module
    for item in (package, utils, module):
        monkeypatch.setitem(sys.modules, item.__name__, item)
    monkeypatch.delitem(sys.modules, 'mmpretrain.models', raising=False)
    return module


def test_major_version():
    import torch

    assert compat.major_version('torch') == int(torch.__version__.split('.')[0])
    assert compat.major_version('no-such-distribution') is None


def test_multimodal_models_are_skipped_beside_transformers_5(monkeypatch, dependency):
    installed(monkeypatch, transformers=5)
    assert compat.skip_multimodal_models()
    assert dependency.WITH_MULTIMODAL is False
    assert not compat.skip_multimodal_models(), 'a second call has nothing to do'


@pytest.mark.parametrize('versions', [{}, {'transformers': 4}])
def test_multimodal_models_are_kept_where_they_import(monkeypatch, dependency, versions):
    installed(monkeypatch, **versions)
    assert not compat.skip_multimodal_models()
    assert dependency.WITH_MULTIMODAL is True


def test_multimodal_switch_is_left_alone_once_the_models_are_imported(monkeypatch, dependency):
    installed(monkeypatch, transformers=5)
    monkeypatch.setitem(sys.modules, 'mmpretrain.models', types.ModuleType('mmpretrain.models'))
    assert not compat.skip_multimodal_models()
    assert dependency.WITH_MULTIMODAL is True


def run_beside_transformers_5(tmp_path, code):
    """Runs code where transformers 5 is what it is to mmpretrain: a distribution that lacks the names it wants."""
    (tmp_path / 'transformers.py').touch()
    info = tmp_path / 'transformers-5.0.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: transformers\nVersion: 5.0.0\n')
    code = f'import sys\nsys.path.insert(0, {str(tmp_path)!r})\n' + textwrap.dedent(code)
    subprocess.run([sys.executable, '-c', code], check=True)


def test_mmpretrain_models_import_beside_transformers_5(tmp_path):
    run_beside_transformers_5(
        tmp_path,
        """
        from mmoverlock import compat
        assert compat.apply()[0] == 'skip_multimodal_models'
        assert compat.apply() == ()
        import mmpretrain.models
        """,
    )


def test_the_benchmark_reads_a_peer_beside_transformers_5(tmp_path):
    pytest.importorskip('mmdet')
    run_beside_transformers_5(
        tmp_path,
        f"""
        import runpy
        tool = runpy.run_path({str(ROOT / 'tools/analysis/benchmark.py')!r}, run_name='tool')
        tool['read_config'](tool['MASK_RCNN_CONVNEXT'])
        """,
    )


def test_unpatched_the_head_says_what_to_do(tmp_path):
    run_beside_transformers_5(
        tmp_path,
        """
        from mmoverlock import OverLoCKClsHead
        try:
            OverLoCKClsHead(num_classes=2, in_channels=(8, 8))
        except ImportError as error:
            assert 'call mmoverlock.compat.apply()' in str(error), error
        else:
            raise AssertionError('it imports')
        """,
    )


def test_mmseg_bases_are_found_in_the_fork(monkeypatch, tmp_path):
    installed(monkeypatch, onedl_mmsegmentation=1)
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    assert compat.find_mmseg_configs()
    assert not compat.find_mmseg_configs(), 'a second call has nothing to do'
    config = tmp_path / 'config.py'
    config.write_text("_base_ = 'mmseg::_base_/models/upernet_r50.py'\n")
    assert Config.fromfile(config).model.decode_head.type == 'UPerHead'


@pytest.mark.parametrize('versions', [{}, {'mmsegmentation': 1}, {'mmsegmentation': 1, 'onedl_mmsegmentation': 1}])
def test_mmseg_bases_are_left_alone_without_the_fork(monkeypatch, versions):
    installed(monkeypatch, **versions)
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    assert not compat.find_mmseg_configs()
    assert MODULE2PACKAGE['mmseg'] == 'mmsegmentation'


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_downloaded_checkpoint_is_not_executed(monkeypatch, tmp_path):
    def falls_back(file, map_location=None, weights_only=None):
        return torch.load(file, map_location=map_location, weights_only=False)

    monkeypatch.setattr(checkpoint, '_safe_torch_load', falls_back, raising=False)
    monkeypatch.setattr(checkpoint, 'get_torch_safe_globals', lambda: [argparse.Namespace], raising=False)
    target, path = tmp_path / 'executed', tmp_path / 'checkpoint.pth'
    torch.save(dict(args=Malicious(str(target))), path)
    assert compat.refuse_unsafe_checkpoints()
    assert not compat.refuse_unsafe_checkpoints(), 'a second call has nothing to do'
    with pytest.raises(pickle.UnpicklingError, match='mkdir'):
        checkpoint._safe_torch_load(path)
    assert not target.exists()
    torch.save(dict(args=argparse.Namespace(lr=1), weight=torch.ones(2)), path)
    assert checkpoint._safe_torch_load(path, map_location='cpu')['args'].lr == 1


def test_loader_is_left_alone_where_it_does_not_fall_back(monkeypatch):
    monkeypatch.delattr(checkpoint, '_safe_torch_load', raising=False)
    assert not compat.refuse_unsafe_checkpoints()


def test_zoo_names_are_loaded_safely(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, 'load_from_http', checkpoint.load_from_local)  # any that is not ours
    assert compat.refuse_unsafe_downloads()
    assert not compat.refuse_unsafe_downloads(), 'a second call has nothing to do'
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(checkpoint, 'get_torchvision_models', lambda: {'evil': 'https://example.org/evil.pth'})
    (tmp_path / 'checkpoints').mkdir()
    target = tmp_path / 'executed'
    torch.save(dict(args=Malicious(str(target))), tmp_path / 'checkpoints' / 'evil.pth')
    with pytest.raises(RuntimeError, match='mkdir, which could run code'):
        checkpoint.CheckpointLoader.load_checkpoint('torchvision://evil', map_location='cpu')
    assert not target.exists()


def test_apply_names_what_it_changed(monkeypatch):
    installed(monkeypatch, onedl_mmsegmentation=1)
    monkeypatch.delattr(checkpoint, '_safe_torch_load', raising=False)
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    compat.refuse_unsafe_downloads()  # these two are in force already where another test came first
    compat.focal_loss_in_float32()
    assert compat.apply() == ('find_mmseg_configs',)
    assert compat.apply() == ()


def test_bases_of_all_three_packages_load_on_this_line(tmp_path):
    compat.apply()
    for base in (
        'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
        'mmseg::_base_/models/upernet_r50.py',
        'mmpretrain::_base_/models/resnet18.py',
    ):
        config = tmp_path / 'config.py'
        config.write_text(f'_base_ = {base!r}\n')
        assert 'backbone' in Config.fromfile(config).model


def test_importing_the_package_patches_nothing():
    code = (
        'import sys, mmoverlock\n'
        'from mmengine.config.utils import MODULE2PACKAGE\n'
        "assert MODULE2PACKAGE['mmseg'] == 'mmsegmentation'\n"
        "assert not {'mmoverlock.compat', 'mmpretrain', 'mmcv'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_focal_loss_is_computed_in_float32(monkeypatch):
    """mmcv's kernel gives NaN in half precision; mmdet's RetinaNet must get the replacement, and a gradient in half."""
    import mmcv.ops
    from mmdet.models.losses import focal_loss

    seen = []

    def kernel(input, target, gamma, alpha, weight, reduction):
        seen.append(input.dtype)
        return input * 2

    for module, name in (
        (mmcv.ops, 'sigmoid_focal_loss'),
        (mmcv.ops.focal_loss, 'sigmoid_focal_loss'),
        (focal_loss, '_sigmoid_focal_loss'),
    ):
        monkeypatch.setattr(module, name, kernel)
    assert compat.focal_loss_in_float32()
    assert not compat.focal_loss_in_float32(), 'a second call has nothing to do'
    for dtype in (torch.float16, torch.bfloat16):
        pred = torch.full((3, 2), 18.0, dtype=dtype, requires_grad=True)
        loss = focal_loss.sigmoid_focal_loss(pred, torch.zeros(3, dtype=torch.long))
        loss.backward()
        assert loss.dtype == torch.float32 and pred.grad.dtype == dtype
    assert seen == [torch.float32] * 2
    assert mmcv.ops.sigmoid_focal_loss is mmcv.ops.focal_loss.sigmoid_focal_loss is focal_loss._sigmoid_focal_loss


def test_focal_loss_patch_leaves_an_mmcv_without_operators_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv.ops', None)
    assert not compat.focal_loss_in_float32()
