"""What is imported when, and where the names are found."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_import_needs_no_mmcv_nor_task_package():
    """The backbone beside torch and mmengine alone; the head then says what it lacks."""
    code = (
        'import sys\n'
        'for name in ("mmcv", "mmdet", "mmseg", "mmpretrain", "natten", "triton"): sys.modules[name] = None\n'
        'import torch\n'
        'from mmoverlock import OverLoCK, ContMixBlock\n'
        'OverLoCK("xt", out_indices=(3,))\n'
        'from mmengine.registry import MODELS\n'
        'assert isinstance(MODELS.build(dict(type="mmoverlock.OverLoCK", arch="xt")), OverLoCK)\n'
        'from mmoverlock import OverLoCKClsHead\n'
        'try: OverLoCKClsHead(10, (336, 420))\n'
        'except ImportError as error: assert "pip install mmpretrain" in str(error), error\n'
        'else: raise SystemExit("no error")\n'
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_import_pulls_in_no_task_package():
    result = run(
        'import sys, mmoverlock; print([m for m in ("mmdet", "mmseg", "mmpretrain", "mmcv") if m in sys.modules])'
    )
    assert result.stdout.strip() == '[]', result.stderr


def test_ops_know_no_mm_package():
    for path in (ROOT / 'mmoverlock' / 'ops').rglob('*.py'):
        assert not any(name in path.read_text() for name in ('import mm', 'from mm')), path


def test_registry_imports():
    """mmengine swallows an error in registry.py at DEBUG level; here it shows."""
    from mmoverlock import registry

    assert registry.MODELS.get('OverLoCK').__name__ == 'OverLoCK'


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_found_from_every_default_scope(scope, tiny):
    pytest.importorskip(scope)
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(dict(type='mmoverlock.OverLoCK', arch=tiny))
    assert model.out_channels == (8, 16, 32, 40)
