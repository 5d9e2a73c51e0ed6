"""The kernels shown are the kernels used."""

import numpy as np
import pytest
import torch
from common import TINY, randomise
from torch import nn

from mmoverlock import ContMixBlock, OverLoCK
from mmoverlock import visualization as vis


@pytest.fixture(scope='module')
def model():
    return randomise(OverLoCK(TINY, out_type='classification')).eval()


@pytest.fixture(scope='module')
def image():
    return torch.randn(1, 3, 128, 192, generator=torch.Generator().manual_seed(0))


def mix_by_hand(kernels, value):
    """What ContMix makes of the values at the kernels' cell, from the weights and windows shown."""
    half, heads = value.shape[0] // 2, kernels.heads
    out = []
    for window, channels in (('small', value[:half]), ('large', value[half:])):
        weights = torch.from_numpy(getattr(kernels, window))
        (top, left), size = kernels.start(window), weights.shape[-1]
        values = channels[:, top : top + size, left : left + size].unflatten(0, (heads, -1))
        out.append((weights[:, None] * values).sum((2, 3)).flatten())
    return torch.cat(out)


# The corners, the middle, and the last pixel; on maps that are larger than the window and on one that is enlarged.
@pytest.mark.parametrize('position', [(0, 0), (191, 127), (100, 50), (191, 0), (70.5, 127)])
@pytest.mark.parametrize('block', ['focus3.1', 'focus4.0'])
def test_weights_are_the_networks_own(model, image, position, block):
    seen = []
    handle = model.get_submodule(block).mixer.register_forward_hook(lambda _, args, out: seen.append((args[2], out)))
    with torch.no_grad():
        model(image)
    handle.remove()
    (value, mixed), kernels = seen[0], vis.contmix_kernels(model, image, position, block)
    assert kernels.map_size == tuple(value.shape[2:]) and kernels.small.shape == (kernels.heads, 3, 3)
    assert kernels.large.shape == (kernels.heads, 5, 5) and kernels.block == block
    for weights in (kernels.small, kernels.large):
        np.testing.assert_allclose(weights.sum((1, 2)), 1, rtol=1e-5)
    row, col = kernels.cell
    torch.testing.assert_close(mix_by_hand(kernels, value[0]), mixed[0, :, row, col], rtol=1e-4, atol=1e-5)


def test_where_the_windows_lie(model, image):
    kernels = vis.contmix_kernels(model, image, (191, 50), 'focus3.0')
    assert kernels.map_size == (8, 12) and kernels.cell == (3, 11) and kernels.image_size == (128, 192)
    assert kernels.start('small') == (2, 9) and kernels.start('large') == (1, 7)  # shifted inward at the right border
    assert kernels.box('small') == (144, 32, 192, 80) and kernels.box('large') == (112, 16, 192, 96)


def test_heatmap(model, image):
    kernels = vis.contmix_kernels(model, image, (100, 50), 'focus3.0')
    for window, size in (('small', 3), ('large', 5)):
        heat = kernels.heatmap(window, head=1)
        assert heat.shape == (128, 192) and heat.max() == 1
        x1, y1, x2, y2 = map(int, kernels.box(window))
        cells = heat[y1:y2:16, x1:x2:16]
        weights = getattr(kernels, window)[1]
        np.testing.assert_allclose(cells, weights / weights.max(), rtol=1e-5)
        assert cells.size == size**2 and heat.sum() == pytest.approx(heat[y1:y2, x1:x2].sum(), rel=1e-5)
    both = kernels.heatmap()
    row, col = kernels.cell
    shares = [getattr(kernels, w)[:, getattr(kernels, w).shape[1] // 2, getattr(kernels, w).shape[1] // 2].mean()
              for w in ('small', 'large')]  # fmt: skip
    corner = kernels.large[:, 0, 0].mean()
    assert both[row * 16, col * 16] / both[16, 64] == pytest.approx(sum(shares) / corner, rel=1e-4)


def test_blocks_by_number_and_in_other_networks(model, image):
    assert list(vis.contmix_blocks(model)) == ['focus3.0', 'focus3.1', 'focus4.0']
    assert vis.contmix_kernels(model, image, (1, 1)).block == 'focus4.0'
    assert vis.contmix_kernels(model, image, (1, 1), 1).block == 'focus3.1'
    other = nn.Sequential(nn.Conv2d(3, 8, 4, 4), ContMixBlock(8, num_heads=1, kernel_size=7, smk_size=3))
    kernels = vis.contmix_kernels(other, image, (1, 1))
    assert kernels.block == '1' and kernels.map_size == (32, 48) and kernels.large.shape == (2, 7, 7)


def test_merged_model_has_the_same_kernels(model, image):
    merged = OverLoCK(TINY, out_type='classification')
    merged.load_state_dict(model.state_dict())
    merged.switch_to_deploy()
    a, b = (vis.contmix_kernels(m, image, (100, 50)) for m in (model, merged))
    np.testing.assert_allclose(a.large, b.large, rtol=1e-3, atol=1e-5)


def test_mistakes(model, image):
    for position in ((192, 0), (0, 128), (-1, 0)):
        with pytest.raises(ValueError, match='outside the picture of 192 x 128'):
            vis.contmix_kernels(model, image, position)
    with pytest.raises(ValueError, match='3 blocks with ContMix, no number 3'):
        vis.contmix_kernels(model, image, (0, 0), 3)
    with pytest.raises(ValueError, match="no block 'stage1.0'"):
        vis.contmix_kernels(model, image, (0, 0), 'stage1.0')
    with pytest.raises(ValueError, match='no block with ContMix'):
        vis.contmix_kernels(nn.Conv2d(3, 3, 1), image, (0, 0))
    kernels = vis.contmix_kernels(model, image, (0, 0))
    with pytest.raises(ValueError, match="'small' and 'large', not 'middle'"):
        kernels.heatmap('middle')
    with pytest.raises(ValueError, match='heads 0 to 3, not 4'):
        kernels.heatmap('small', head=4)
