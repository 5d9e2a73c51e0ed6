"""Overview map, feature maps, overlay, and the way a picture takes into a model."""

import numpy as np
import pytest
import torch
from common import TINY, randomise
from torch import nn

from mmoverlock import OverLoCK
from mmoverlock import visualization as vis


class Aux(nn.Module):
    """An auxiliary head, as OverLoCKClsHead has it."""

    def __init__(self):
        super().__init__()
        self.aux_bn, self.aux_fc = nn.BatchNorm2d(32), nn.Conv2d(32, 3, 1)


@pytest.fixture(scope='module')
def model():
    backbone = OverLoCK(TINY, out_type='classification')
    return randomise(nn.ModuleDict(dict(backbone=backbone, head=Aux())))


@pytest.fixture(scope='module')
def image():
    return torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))


def test_feature_maps_are_the_networks_own(model, image):
    maps = vis.feature_maps(model, image)
    assert {name: tuple(m.shape) for name, m in maps.items()} == dict(
        stage1=(8, 24, 40),
        stage2=(16, 12, 20),
        stage3=(24, 6, 10),
        stage4=(32, 3, 5),
        focus3=(32, 6, 10),
        focus4=(40, 3, 5),
    )
    with torch.no_grad():
        overview, focus = model.eval()['backbone'](image)
    torch.testing.assert_close(maps['stage4'], overview[0])
    torch.testing.assert_close(maps['focus4'], focus[0])


def test_the_pyramid_form_too(image):
    backbone = randomise(OverLoCK(TINY, fuse_overview=True)).eval()
    with torch.no_grad():
        third = backbone(image)[2]
        torch.testing.assert_close(backbone.norm2(vis.feature_maps(backbone, image)['focus3'][None]), third)


def test_a_look_changes_nothing(image):
    model = randomise(OverLoCK(TINY, with_cp=True, norm_eval=True, compile=dict(backend='eager'))).train()
    modes, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    forwards = [block.forward for block in model.focus3]
    vis.overview_map(model, image)
    vis.contmix_kernels(model, image, (0, 0))
    vis.effective_receptive_field(model, [image])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [block.forward for block in model.focus3] == forwards and model.with_cp
    assert not model.stage4[-1]._forward_hooks and all(p.grad is None for p in model.parameters())


def test_overview_map(model, image):
    found = vis.overview_map(model, image)
    assert found.shape == (96, 160) and found.dtype == np.float32 and found.min() == 0 and found.max() == 1
    with torch.no_grad():
        norm = model['backbone'].eval()(image)[0][0].square().sum(0).sqrt()
    large = nn.functional.interpolate(norm[None, None], (96, 160), mode='bilinear')[0, 0]
    expected = (large - large.min()) / (large.max() - large.min())
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_class_activation_of_the_auxiliary_head(model, image):
    """The mean of a class activation map is that class's score: the map says where the score comes from."""
    with torch.no_grad():
        overview = model.eval()['backbone'](image)[0]
        head = model['head']
        score = head.aux_fc(head.aux_bn(overview).mean((2, 3), keepdim=True))[0, 2, 0, 0]
        cells = head.aux_fc(head.aux_bn(overview))[:, 2:3]
    torch.testing.assert_close(cells.mean(), score)
    large = nn.functional.interpolate(cells, (96, 160), mode='bilinear')[0, 0]
    expected = (large - large.min()) / (large.max() - large.min())
    np.testing.assert_allclose(vis.overview_map(model, image, target=2), expected.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match='class 3 is not among the 3'):
        vis.overview_map(model, image, target=3)
    with pytest.raises(ValueError, match='no auxiliary head'):
        vis.overview_map(model['backbone'], image, target=0)


def test_overlay():
    pytest.importorskip('matplotlib')
    picture = np.full((2, 2, 3), 100, np.uint8)
    heat = np.array([[0.0, 1.0], [0.5, 0.5]], np.float32)
    assert (vis.overlay(picture, heat, alpha=0) == picture).all()
    full = vis.overlay(picture, heat, alpha=1, colormap='gray')
    assert full[0, 0].tolist() == [0] * 3 and full[0, 1].tolist() == [255] * 3
    assert vis.overlay(picture, heat, alpha=0.5, colormap='gray')[0, 1].tolist() == [178] * 3
    assert full.dtype == np.uint8
    with pytest.raises(ValueError, match='does not lie on'):
        vis.overlay(picture, heat[:1])


def test_normalize(model):
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    found = vis.normalize(model, picture)
    assert found.shape == (1, 3, 40, 50) and found.dtype == torch.float32
    assert found[0, 0, 3, 4].item() == pytest.approx((float(picture[3, 4, 0]) - 123.675) / 58.395)
    with pytest.raises(ValueError, match='uint8'):
        vis.normalize(model, picture / 255)


@pytest.mark.parametrize('package', ['mmpretrain.models.utils', 'mmdet.models', 'mmseg.models'])
def test_normalize_by_the_models_own_preprocessor(package):
    """Each package's preprocessor gets BGR, as from its own loading, and turns and pads as it is told."""
    module = pytest.importorskip(package)
    names = {'mmpretrain.models.utils': 'ClsDataPreprocessor', 'mmdet.models': 'DetDataPreprocessor'}
    cls = getattr(module, names.get(package, 'SegDataPreProcessor'))
    turn = {'to_rgb' if 'mmpretrain' in package else 'bgr_to_rgb': True}
    pad = dict(pad_size_divisor=32) if package != 'mmseg.models' else dict(test_cfg=dict(size_divisor=32))
    model = nn.Module()
    picture = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    for rgb in (True, False):
        model.data_preprocessor = cls(mean=[10, 20, 30], std=[1, 2, 4], **(turn if rgb else {}), **pad)
        found = vis.normalize(model, picture)[0].numpy()
        seen = (picture if rgb else picture[:, :, ::-1]).astype(np.float32)
        np.testing.assert_allclose(found, ((seen - [10, 20, 30]) / [1, 2, 4]).transpose(2, 0, 1), rtol=1e-5)


def test_mistakes(model, image):
    with pytest.raises(ValueError, match='Linear holds no OverLoCK'):
        vis.overview_map(nn.Linear(1, 1), image)
    with pytest.raises(ValueError, match='holds 2 OverLoCK backbones'):
        vis.find_backbone(nn.ModuleList([OverLoCK(TINY), OverLoCK(TINY)]))
    for wrong in (image[0], image.repeat(2, 1, 1, 1), image.numpy()):
        with pytest.raises(ValueError, match='one normalised image'):
            vis.feature_maps(model, wrong)
