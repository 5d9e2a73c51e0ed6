"""Fixtures that the tests share."""

import json

import pytest
import torch
from common import GOLDEN, TINY, fill
from mmengine.registry import DefaultScope

#: What takes minutes, marked ``slow``, longest first: with several processes, a long file that starts last keeps one of
#: them busy alone.
LONG = (
    'test_docs/test_commands.py',
    'test_demo/test_run_demo.py',
    'test_docs/test_commands_real_data.py',
    'test_ops/test_contmix_triton.py',
    'test_ops/test_depthwise_triton.py',
    'test_ops/test_feed_forward_triton.py',
    'test_guide.py',
    'test_tools/test_train.py',
    'test_faults/test_resume.py',
    'test_models/test_compile.py',
    'test_distributed/test_ddp.py',
    'test_distributed/test_fsdp.py',
    'test_tools/test_launchers.py',
    'test_tools/test_benchmark.py',
    'test_ops/test_excite.py',
)


def pytest_collection_modifyitems(items):
    order = {name: n for n, name in enumerate(LONG)}
    place = {item: order.get(item.nodeid.split('::')[0].removeprefix('tests/'), len(LONG)) for item in items}
    for item in items:
        if place[item] < len(LONG):
            item.add_marker(pytest.mark.slow)
    items.sort(key=place.get)


@pytest.fixture
def full_precision():
    """Definitions on a GPU in float32: cuDNN's convolutions are TF32 by PyTorch's default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


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


@pytest.fixture(autouse=True)
def no_default_scope():
    """Whose registry names are looked up in is the whole process's in mmengine: no test sees what another set."""
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture
def tiny():
    """Settings of a tiny network, a fresh dict."""
    return dict(TINY)
