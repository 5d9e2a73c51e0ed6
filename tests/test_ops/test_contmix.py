"""The definition of ContMix against nested loops, and everything around it."""

import sys
import types

import pytest
import torch

from mmoverlock.ops import BackendError, contmix
from mmoverlock.ops.contmix import reference


def arguments(
    batch=2,
    groups=3,
    dim=4,
    height=7,
    width=9,
    small=3,
    large=5,
    cells=6,
    values=None,
    dtype=torch.float64,
):
    generator = torch.Generator().manual_seed(height * 100 + width)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        draw(batch, groups, dim, height, width),
        draw(batch, groups, dim, cells),
        draw(small**2 + large**2, cells),
        draw(small**2 + large**2),
        draw(groups, 2 * small - 1, 2 * small - 1),
        draw(groups, 2 * large - 1, 2 * large - 1),
        draw(batch, 2 * groups * (values or dim), height, width),
    ]


def by_loops(query, key, weight, bias, rpb1, rpb2, value):
    """ContMix as the paper words it: position by position, neighbour by neighbour."""
    batch, groups, _, height, width = query.shape
    halves = value.reshape(batch, 2, groups, -1, height, width)
    out = torch.zeros_like(halves)
    split = ((rpb1.shape[1] + 1) // 2) ** 2
    for b in range(batch):
        for g in range(groups):
            for i in range(height):
                for j in range(width):
                    logits = weight @ (key[b, g].T @ query[b, g, :, i, j]) + bias
                    for half, (part, rpb) in enumerate(((logits[:split], rpb1), (logits[split:], rpb2))):
                        window = (rpb.shape[1] + 1) // 2
                        top = min(max(i - window // 2, 0), height - window)
                        left = min(max(j - window // 2, 0), width - window)
                        places = [(top + a, left + c) for a in range(window) for c in range(window)]
                        biased = torch.stack(
                            [
                                part[n] + rpb[g, y - i + window - 1, x - j + window - 1]
                                for n, (y, x) in enumerate(places)
                            ]
                        )
                        for share, (y, x) in zip(biased.softmax(0), places):
                            out[b, half, g, :, i, j] += share * halves[b, half, g, :, y, x]
    return out.reshape(value.shape)


SHAPES = [
    dict(),
    dict(height=5, width=5),  # the window is the map
    dict(height=5, width=11),
    dict(height=11, width=6, values=3),
    dict(batch=1, groups=1, dim=1, cells=1, height=6, width=6),
    dict(small=5, large=5),
    dict(small=1, large=3, height=3, width=4),
]


@pytest.mark.parametrize('shape', SHAPES)
def test_definition_equals_loops(shape):
    args = arguments(**shape)
    torch.testing.assert_close(contmix(*args, backend='reference'), by_loops(*args), rtol=1e-12, atol=1e-12)


def test_gradients_equal_those_of_loops():
    args = [a.requires_grad_() for a in arguments(batch=1, groups=2, height=5, width=6)]
    cotangent = torch.randn_like(args[-1])
    ours = torch.autograd.grad(contmix(*args, backend='reference'), args, cotangent)
    loops = torch.autograd.grad(by_loops(*args), args, cotangent)
    for a, b in zip(ours, loops):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    args = [
        a.requires_grad_() for a in arguments(batch=1, groups=1, dim=2, height=3, width=4, small=1, large=3, cells=2)
    ]
    assert torch.autograd.gradcheck(lambda *a: contmix(*a, backend='reference'), args)
    assert torch.autograd.gradgradcheck(lambda *a: contmix(*a, backend='reference'), args, fast_mode=True)


@pytest.mark.parametrize('elements', [1, 700, 3000])
def test_rows_in_chunks_change_nothing(monkeypatch, elements):
    args = [a.requires_grad_() for a in arguments(height=13, width=8)]
    cotangent = torch.randn_like(args[-1])
    whole = contmix(*args, backend='reference')
    grads = torch.autograd.grad(whole, args, cotangent)
    monkeypatch.setattr(reference, '_CHUNK_ELEMENTS', elements)
    chunked = contmix(*args, backend='reference')
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(chunked, args, cotangent), grads):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype, tolerance):
    args = arguments(dtype=dtype)
    out = contmix(*args, backend='reference')
    assert out.dtype == dtype
    exact = contmix(*[a.double() for a in args], backend='reference')
    assert (out.double() - exact).abs().max() / exact.abs().max() <= tolerance


def test_large_logits_stay_finite():
    args = arguments()
    args[0] = args[0] * 1e4
    exact = contmix(*args, backend='reference')
    assert exact.isfinite().all()
    half = contmix(*[a.half() if i else (a / 10).half() for i, a in enumerate(args)], backend='reference')
    assert half.isfinite().all()


@pytest.mark.parametrize('elements', [2**24, 700])
def test_channels_last_and_strided_arguments(monkeypatch, elements):
    monkeypatch.setattr(reference, '_CHUNK_ELEMENTS', elements)
    args = arguments()
    expected = contmix(*args)
    args[-1] = args[-1].to(memory_format=torch.channels_last)
    args[0] = args[0].transpose(3, 4).contiguous().transpose(3, 4)
    torch.testing.assert_close(contmix(*args), expected)


@pytest.mark.parametrize(
    'index, shape, message',
    [
        (0, (2, 12, 7, 9), 'query has shape'),
        (1, (2, 3, 5, 6), 'key has shape'),
        (2, (34, 5), 'weight has shape'),
        (3, (33,), 'bias has shape'),
        (4, (3, 5, 4), 'rpb1 has shape'),
        (5, (3, 7, 7), 'rpb2 has shape'),  # an even window
        (6, (2, 25, 7, 9), 'value has shape'),
    ],
)
def test_shape_errors_name_the_argument(index, shape, message):
    args = arguments()
    args[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        contmix(*args)


def test_map_smaller_than_the_window():
    with pytest.raises(ValueError, match='4x9 map is smaller than the 5x5 window'):
        contmix(*arguments(height=4))


def test_unknown_backend():
    with pytest.raises(BackendError, match="no backend 'cuda'; choose from auto, .*reference"):
        contmix(*arguments(), backend='cuda')


def test_environment_variable_overrides_auto(monkeypatch):
    args = arguments()
    monkeypatch.setenv('MMOVERLOCK_BACKEND', 'natten')
    with pytest.raises(BackendError, match="'natten'.*cannot be used: needs NATTEN 0.17"):
        contmix(*args)
    contmix(*args, backend='reference')  # a named backend stands
    monkeypatch.setenv('MMOVERLOCK_BACKEND', 'implicit_gemm')  # another operator's: auto here
    contmix(*args)
    monkeypatch.setenv('MMOVERLOCK_BACKEND', 'feed_forward=triton')  # not of this operator
    contmix(*args)


@pytest.mark.parametrize(
    'text, message',
    [
        ('nattn', "MMOVERLOCK_BACKEND='nattn' names no backend"),
        ('reference,contmix=natten', "'natten'.*cannot be used"),
        ('feed_forward=natten', 'names no backend; known: auto, reference, triton'),
        ('conmix=natten', "no operator 'conmix'; known: contmix, "),
    ],
)
def test_environment_variable_that_does_not_fit(monkeypatch, text, message):
    monkeypatch.setenv('MMOVERLOCK_BACKEND', text)
    with pytest.raises(BackendError, match=message):
        contmix(*arguments())


def test_natten_backend_speaks_nattens_language(monkeypatch):
    """NATTEN 0.17 does not install beside a current torch: a stand-in of its documented meaning takes the calls."""

    def na2d_av(attn, value, kernel_size, dilation):
        batch, heads, height, width, dim = value.shape
        assert attn.shape == (batch, heads, height, width, kernel_size**2) and dilation == 1
        out = torch.zeros_like(value)
        for i in range(height):
            for j in range(width):
                top = min(max(i - kernel_size // 2, 0), height - kernel_size)
                left = min(max(j - kernel_size // 2, 0), width - kernel_size)
                window = value[:, :, top : top + kernel_size, left : left + kernel_size].flatten(2, 3)
                out[:, :, i, j] = (attn[:, :, i, j, :, None] * window).sum(2)
        return out

    functional = types.ModuleType('natten.functional')
    functional.na2d_av = na2d_av
    natten = types.ModuleType('natten')
    natten.functional = functional
    monkeypatch.setitem(sys.modules, 'natten', natten)
    monkeypatch.setitem(sys.modules, 'natten.functional', functional)
    args = arguments()
    torch.testing.assert_close(contmix(*args, backend='natten'), contmix(*args, backend='reference'))
