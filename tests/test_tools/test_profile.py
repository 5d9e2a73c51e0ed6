import json
import subprocess
import sys

import pytest
import torch
from common import TINY
from tiny_configs import TOOLS, load_tool

from mmoverlock.models import overlock

FAST = ['--shape', '64', '--batch', '2', '--device', 'cpu', '--steps', '1', '--threads', '1']


@pytest.fixture(scope='module')
def tool():
    return load_tool('analysis/profile.py')


@pytest.fixture
def tiny_variant(tool, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setitem(overlock.ARCHS, 'xt', {**overlock.ARCHS['xt'], **TINY})
    monkeypatch.setattr(tool.benchmark().Row, 'expected', (None, None))
    yield
    torch.set_num_threads(threads)


def table(out, title):
    """Label to the numbers of its line in the table with this title."""
    lines = iter(out.splitlines())
    next(line for line in lines if line.startswith(title))
    rows = {}
    for line in lines:
        if not line:
            break
        rows[line[:28].strip()] = line[28:].split()
    return rows


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_tables(tool, tiny_variant, mode, capsys, tmp_path):
    trace = tmp_path / 'trace.json'
    assert tool.main(['xt', '--mode', mode, '--trace', str(trace), *FAST]) == 0
    out = capsys.readouterr().out
    assert 'check ok' in out
    kinds = table(out, 'kind of kernel')
    assert {'matmul and convolution', 'elementwise', 'norms'} <= set(kinds)
    assert float(kinds.pop('sum')[0]) == pytest.approx(sum(float(v[0]) for v in kinds.values()), abs=0.01)
    parts = table(out, 'part')
    assert list(parts) == [
        *('stem', 'stage1', 'down2', 'stage2', 'down3', 'stage3', 'down4', 'stage4', 'context_proj'),
        *('focus3', 'focus_down', 'focus4', 'head', 'sum'),
    ]
    for label, (forward, backward, *_) in parts.items():
        assert float(forward) > 0, label
        if label != 'sum':
            assert (float(backward) > 0) if mode == 'train' else backward == '-', label
    # One block each in the tiny stages, two in focus3.
    assert parts['stage1'][-1] == '1' and parts['focus3'][-1] == '2'
    layers = table(out + '\n', 'layers by class')
    assert {'ConvFFN', 'LayerNorm2d', 'LargeKernelConv', 'ContMixer'} <= set(layers)
    assert json.loads(trace.read_text())['traceEvents']


def test_a_wrong_result_is_said(tool, tiny_variant, monkeypatch, capsys):
    monkeypatch.setattr(tool.benchmark().Row, 'error', lambda self, outcome: 1.0)
    monkeypatch.setattr(tool.benchmark().Row, 'plain_error', lambda self: 0.0)
    assert tool.main(['xt', *FAST]) == 1
    assert 'check WRONG' in capsys.readouterr().out


def test_parts_of_a_peer(tool, capsys):
    pytest.importorskip('timm')
    assert tool.main(['test_convnext', '--task', 'det', '--depth', '2', *FAST]) == 0
    parts = table(capsys.readouterr().out, 'part')
    assert any(p.startswith('stages') for p in parts), parts


@pytest.mark.parametrize(
    'name, kind',
    [
        ('triton_poi_fused_convolution_gelu_native_layer_norm_3', 'elementwise'),
        ('triton_red_fused_native_layer_norm_5', 'norms'),
        ('triton_per_fused_linalg_vector_norm_mul_2', 'norms'),
        ('triton_red_fused_mean_silu_1', 'reductions'),
        (
            'void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel_generic<c10::Half, int>',
            'depthwise',
        ),
        ('sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128', 'matmul and convolution'),
        ('nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT', 'matmul and convolution'),
        ('void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<GeluCUDA>>', 'elementwise'),
        ('Memcpy DtoD (Device -> Device)', 'copies and casts'),
        ('aten::mkldnn_convolution', 'matmul and convolution'),
        ('shared_forward_kernel', 'contmix'),
        ('anything', 'other'),
    ],
)
def test_kinds(tool, name, kind):
    assert tool.group(name) == kind


def test_the_library_s_profile_is_still_found():
    """Python looks in the folder of a script first, and torch needs cProfile, which needs the other profile."""
    code = 'import sys; sys.path.insert(0, sys.argv[1])\nimport cProfile, profile\nprofile.Profile, cProfile.run'
    done = subprocess.run([sys.executable, '-c', code, TOOLS + '/analysis'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
