"""Every block of Python in docs/plain-pytorch.md runs, as one program, with a tiny network in place of OverLoCK-T."""

import re
from pathlib import Path

import pytest
import torch
from common import TINY

import mmoverlock

PAGE = (Path(__file__).parents[1] / 'docs/plain-pytorch.md').read_text()
BLOCKS = re.findall(r'^```python\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_as_one_program(monkeypatch):
    pytest.importorskip('torchvision')
    pytest.importorskip('timm')
    timm_models = pytest.importorskip('mmoverlock.timm')
    real = mmoverlock.OverLoCK
    monkeypatch.setattr(mmoverlock, 'OverLoCK', lambda arch, **kwargs: real(TINY, **kwargs))
    monkeypatch.setattr(timm_models, 'OverLoCK', lambda arch, **kwargs: real(TINY, **kwargs))
    # Smaller pictures inside the detector, and fewer channels after the pyramid.
    from torchvision.models import detection

    monkeypatch.setattr(detection, 'MaskRCNN', lambda body, num_classes: MASK_RCNN(body, num_classes, min_size=96))
    MASK_RCNN = detection.mask_rcnn.MaskRCNN
    torch.manual_seed(0)
    scope = {}
    for block in BLOCKS:
        exec(block.replace('out_channels=256', 'out_channels=16'), scope)
    assert len(BLOCKS) == 5
    assert set(scope['found']) == {'boxes', 'labels', 'scores', 'masks'}


def test_mask_rcnn_takes_fifteen_lines():
    block = next(b for b in BLOCKS if 'MaskRCNN' in b)
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
