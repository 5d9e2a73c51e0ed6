"""Names that several test modules import: the golden folder and a network small enough to run in no time."""

import sys
from pathlib import Path

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


def randomise(module, seed=0):
    """Draws every parameter and statistic anew, so that no zero or one hides a mistake."""
    official = fill.fill(module.state_dict())
    module.load_state_dict({k: v.to(module.state_dict()[k].dtype) for k, v in official.items()})
    return module
