"""Grad-CAM against a case computed by hand; the effective receptive field of convolutions whose reach is known."""

import numpy as np
import pytest
import torch
from common import TINY, randomise
from torch import nn

from mmoverlock import OverLoCK
from mmoverlock import visualization as vis


class Classifier(nn.Module):
    """Global pooling and a linear layer on Focus-Net's map: its Grad-CAM is known."""

    def __init__(self):
        super().__init__()
        self.backbone = OverLoCK(TINY, out_type='classification')
        self.fc = nn.Linear(40, 3)

    def forward(self, image):
        return self.fc(self.backbone(image)[1].mean((2, 3)))


@pytest.fixture(scope='module')
def model():
    return randomise(Classifier()).eval()


@pytest.fixture(scope='module')
def image():
    return torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('target', [0, 1, 2])
def test_grad_cam_by_hand(model, image, target):
    """The gradient of a pooled linear score is the class's weights over the number of cells, everywhere."""
    with torch.no_grad():
        focus = model.backbone(image)[1][0]
        cam = (model.fc.weight[target][:, None, None] * focus).sum(0).relu()
    expected = nn.functional.interpolate(cam[None, None], (96, 160), mode='bilinear')[0, 0]
    expected = expected / expected.max().clamp_min(1e-12)
    np.testing.assert_allclose(vis.grad_cam(model, image, target), expected.numpy(), atol=1e-4)


def test_grad_cam_of_the_predicted_class_and_of_other_layers(model, image):
    best = int(model(image).argmax())
    assert np.array_equal(vis.grad_cam(model, image), vis.grad_cam(model, image, best))
    frozen = Classifier().requires_grad_(False)
    frozen.load_state_dict(model.state_dict())
    for layer in ('stage4', 'stage1', 'focus3.0', 'stem'):
        heat = vis.grad_cam(frozen, image, 1, layer)
        assert heat.shape == (96, 160) and heat.min() >= 0 and heat.max() in (0, 1)
        np.testing.assert_allclose(heat, vis.grad_cam(model, image, 1, layer), atol=1e-5)
    with torch.no_grad():  # a page that serves predictions may be inside one
        assert vis.grad_cam(model, image).shape == (96, 160)


def test_grad_cam_mistakes(model, image):
    with pytest.raises(ValueError, match='class 3 is not among the 3'):
        vis.grad_cam(model, image, 3)
    with pytest.raises(ValueError, match="no layer 'stage9'.*stage1"):
        vis.grad_cam(model, image, 0, 'stage9')
    with pytest.raises(ValueError, match='is no classifier'):
        vis.grad_cam(model.backbone, image, 0)


def test_field_of_convolutions():
    """One 3x3 convolution reaches 3x3 pixels; a second one, 5x5; a dilated one leaves holes."""
    image = torch.ones(1, 2, 15, 21)
    for net, rows, cols in (
        (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), [6, 7, 8], [9, 10, 11]),
        (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)), range(5, 10), range(8, 13)),
        (nn.Sequential(nn.Conv2d(2, 3, 3, padding=2, dilation=2)), [5, 7, 9], [8, 10, 12]),
    ):
        for parameter in net.parameters():
            nn.init.constant_(parameter, 0.5)
        field = vis.effective_receptive_field(net, [image], layer=None)
        reached = np.zeros((15, 21), bool)
        reached[np.ix_(rows, cols)] = True
        assert np.array_equal(field > 0, reached)
    # d(sum of 3 channels)/d(pixel): 3 x 0.5 in each of 2 colours.
    assert field[7, 10] == pytest.approx(3.0)


def test_field_is_a_mean_of_positive_gradients():
    net = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(net.weight, 2.0)
    bright, dark = torch.ones(1, 1, 3, 3), -torch.ones(1, 1, 3, 3)  # the dark one's output is negative: no gradient
    field = vis.effective_receptive_field(net, [bright, dark], layer=None)
    assert field[1, 1] == 1.0 and field.sum() == 1.0
    nn.init.constant_(net.weight, -2.0)  # now the dark one's is positive, and falls with the pixel: not counted
    assert vis.effective_receptive_field(net, [bright, dark], layer=None).sum() == 0


def test_field_of_the_network(model, image):
    """Base-Net's first stage sees a part of the picture, Focus-Net all of it."""
    near = vis.effective_receptive_field(model, [image], 'stage1')
    far = vis.effective_receptive_field(model, [image, image.flip(3)], 'focus4')
    assert near.shape == far.shape == (96, 160) and far.min() >= 0 and (far > 0).mean() > 0.5
    assert 0 < near[0, 0] < 1e-4 * near.max()  # through squeeze-and-excitation and GRN, which see the whole map
    assert vis.contribution_area(near)[0.99] < vis.contribution_area(far)[0.99]
    with pytest.raises(ValueError, match='images of one size'):
        vis.effective_receptive_field(model, [image, image[..., :64]])
    with pytest.raises(ValueError, match='no picture'):
        vis.effective_receptive_field(model, [])


def test_contribution_area():
    flat = np.ones((101, 101))
    for threshold, area in vis.contribution_area(flat).items():
        side = next(n for n in range(1, 102, 2) if n**2 >= threshold * 101**2)  # a flat field: a share in as much area
        assert area == pytest.approx(side**2 / 101**2)
    point = np.zeros((101, 101))
    point[50, 50] = 1
    assert set(vis.contribution_area(point).values()) == {1 / 101**2}
    ring = np.zeros((101, 101))
    ring[48, 50] = 1  # two rows above the centre: the box reaches it with 5 x 5 pixels
    assert vis.contribution_area(ring, [0.5]) == {0.5: 25 / 101**2}
    wide = np.ones((50, 200))
    assert vis.contribution_area(wide, [0.25])[0.25] == pytest.approx(0.25, abs=0.02)
    large = np.where(point > 0, 1e6, 1.0)  # the logarithm takes the point's lead away
    assert vis.contribution_area(large)[0.2] < 0.001 < vis.contribution_area(large, log=True)[0.2]
    with pytest.raises(ValueError, match='nothing in the picture contributes'):
        vis.contribution_area(np.zeros((3, 3)))
