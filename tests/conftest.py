"""What the tests share: the golden numbers of the official code and a network small enough to run in no time."""

import json
import sys
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / 'golden'
sys.path.insert(0, str(GOLDEN))
import fill  # noqa: E402

#: Every part of the network, nothing in size.
TINY = dict(
    depths=(1, 1, 1, 1),
    focus_depths=(2, 1),
    widths=(8, 16, 24, 32),
    mlp_ratios=(2, 2, 2, 2),
    focus_mlp_ratio=2,
    focus_heads=(1, 2),
    kernel_sizes=(7, 7, 5, 5),
    small_kernel=3,
)


@pytest.fixture(scope='session')
def official_shapes():
    """Key to shape of every official state dict, and the counts of parameters under ``params``."""
    shapes = json.loads((GOLDEN / 'official_keys.json').read_text())
    shapes['contmix_block'] = json.loads((GOLDEN / 'official_keys_contmix_block.json').read_text())
    return shapes


@pytest.fixture(scope='session')
def official_state_dict(official_shapes):
    """Function from a name such as ``cls_xt`` to the filled official state dict."""

    def make(name):
        return fill.fill(
            {
                key: torch.empty(
                    shape,
                    dtype=torch.long if key.endswith('num_batches_tracked') else torch.float32,
                )
                for key, shape in official_shapes[name].items()
            }
        )

    return make


@pytest.fixture
def tiny():
    """Settings of a tiny network, a fresh dict."""
    return dict(TINY)


def randomise(module, seed=0):
    """Draws every parameter and statistic anew, so that no zero or one hides a mistake."""
    official = fill.fill(module.state_dict())
    module.load_state_dict({k: v.to(module.state_dict()[k].dtype) for k, v in official.items()})
    return module
