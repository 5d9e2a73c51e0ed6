import sys
import types

import pytest
import torch

from mmoverlock.ops import BackendError, depthwise_conv2d, depthwise_conv2d_branches


def by_loops(x, weight, bias, dilation):
    batch, channels, height, width = x.shape
    size = weight.shape[-1]
    reach = dilation * (size // 2)
    padded = torch.zeros(batch, channels, height + 2 * reach, width + 2 * reach, dtype=x.dtype)
    padded[:, :, reach : reach + height, reach : reach + width] = x
    out = torch.zeros_like(x)
    for a in range(size):
        for b in range(size):
            shifted = padded[:, :, a * dilation : a * dilation + height, b * dilation : b * dilation + width]
            out += weight[:, 0, a, b].view(1, -1, 1, 1) * shifted
    return out if bias is None else out + bias.view(1, -1, 1, 1)


@pytest.mark.parametrize('size, dilation', [(5, 1), (7, 2), (17, 1), (3, 7)])
@pytest.mark.parametrize('shape', [(2, 3, 9, 14), (1, 1, 1, 1), (1, 4, 20, 5)])
@pytest.mark.parametrize('with_bias', [False, True])
def test_definition_equals_loops(size, dilation, shape, with_bias):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(shape[1], 1, size, size, dtype=torch.float64)
    bias = torch.randn(shape[1], dtype=torch.float64) if with_bias else None
    out = depthwise_conv2d(x, weight, bias, dilation)
    torch.testing.assert_close(out, by_loops(x, weight, bias, dilation), rtol=1e-10, atol=1e-10)


def test_gradcheck():
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: depthwise_conv2d(*a, 2), (x, weight, bias))


@pytest.mark.parametrize('shape', [(3, 1, 4, 4), (3, 1, 5, 3), (2, 1, 5, 5), (3, 3, 5, 5)])
def test_weight_that_does_not_fit(shape):
    with pytest.raises(ValueError, match='weight has shape'):
        depthwise_conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(shape))


def test_branches_are_single_convolutions():
    x = torch.randn(2, 3, 9, 8)
    weights, dilations = [torch.randn(3, 1, k, k) for k in (7, 3, 5)], [1, 3, 2]
    outs = depthwise_conv2d_branches(x, weights, dilations)
    for out, weight, dilation in zip(outs, weights, dilations):
        torch.testing.assert_close(out, depthwise_conv2d(x, weight, None, dilation))
    with pytest.raises(ValueError, match='3 weights, but 2 dilations'):
        depthwise_conv2d_branches(x, weights, dilations[:2])
    with pytest.raises(ValueError, match='expected'):
        depthwise_conv2d_branches(x, [weights[0], weights[1][:2]], dilations[:2])


def test_implicit_gemm_says_why_it_cannot(monkeypatch):
    x, weight = torch.zeros(1, 3, 8, 8), torch.zeros(3, 1, 5, 5)
    with pytest.raises(BackendError, match='needs the package depthwise_conv2d_implicit_gemm'):
        depthwise_conv2d(x, weight, backend='implicit_gemm')
    monkeypatch.setitem(sys.modules, 'depthwise_conv2d_implicit_gemm', types.ModuleType('x'))
    with pytest.raises(BackendError, match='CUDA tensors only'):
        depthwise_conv2d(x, weight, backend='implicit_gemm')
