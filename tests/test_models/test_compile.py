"""torch.compile of the whole network and of its blocks. The backend is Dynamo's own: what is tested is the tracing."""

import copy
import subprocess
import sys

import pytest
import torch
import torch._dynamo
from common import randomise
from torch import Tensor

from mmoverlock import OverLoCK
from mmoverlock.models import blocks
from mmoverlock.ops import contmix


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled_graphs():
    return torch._dynamo.utils.counters['stats']['unique_graphs']


def test_whole_network_without_a_graph_break(tiny):
    model = randomise(OverLoCK(tiny, fuse_overview=True, drop_path_rate=0.1)).train()
    image = torch.randn(2, 3, 160, 192)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    torch.manual_seed(0)
    maps = compiled(image)
    torch.manual_seed(0)
    for a, b in zip(maps, model(image)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert compiled_graphs() == 1


def test_blocks_alike_are_compiled_once(tiny):
    arch = dict(tiny, depths=(4, 1, 1, 1))
    model = randomise(OverLoCK(arch, drop_path_rate=0.3, compile=dict(backend='eager'))).train()
    plain = OverLoCK(arch, drop_path_rate=0.3).train()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    results = []
    for network in (model, plain):
        torch.manual_seed(0)
        results.append(network.stage1(torch.randn(2, 8, 24, 24)))
        results[-1].square().mean().backward()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(model.stage1.named_parameters(), plain.stage1.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert compiled_graphs() == 2  # the first block of four drops no path


def test_compiled_blocks_can_be_copied(tiny):
    model = randomise(OverLoCK(tiny, compile=dict(backend='eager'))).eval()
    double = copy.deepcopy(model)  # as an average of the weights does
    with torch.no_grad():
        for parameter in double.parameters():
            parameter.mul_(0.9)
    x = torch.randn(1, 8, 16, 16)
    assert not torch.allclose(double.stage1(x), model.stage1(x))
    assert double.stage1[0].forward.args[0] is double.stage1[0]
    assert double.stem.forward.args[0] is double.stem
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model.stem(image), torch.nn.Sequential.forward(model.stem, image))
    assert not torch.allclose(double.stem(image), model.stem(image))


@torch.library.custom_op('mmoverlock_test::contmix', mutates_args=())
def opaque_contmix(q: Tensor, k: Tensor, w: Tensor, b: Tensor, r1: Tensor, r2: Tensor, v: Tensor) -> Tensor:
    return contmix(q, k, w, b, r1, r2, v, backend='reference').contiguous()


@opaque_contmix.register_fake
def _(q, k, w, b, r1, r2, v):
    return v.new_empty(v.shape)


def test_many_sizes_share_a_graph(tiny, monkeypatch):
    """As multi-scale training needs it, on a GPU, where ContMix is an operator that is not looked into."""
    monkeypatch.setattr(blocks, 'contmix', opaque_contmix)
    model = randomise(OverLoCK(tiny)).eval()
    plain = copy.deepcopy(model)
    model.compile_blocks(backend='eager', dynamic=True)
    with torch.no_grad():
        for size in ((192, 224), (224, 256), (256, 192), (288, 256)):
            image = torch.randn(1, 3, *size)
            for a, b in zip(model(image), plain(image)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            if size == (224, 256):
                settled = compiled_graphs()
    assert compiled_graphs() == settled


PROGRAM = """
import sys, torch
from mmoverlock.ops.autocast import autocast_written_in

layer = torch.nn.Linear(8, 8)
forward = torch.compile(autocast_written_in(lambda module, x: module(x)), fullgraph=True)
with torch.autocast('cpu', getattr(torch, sys.argv[1])):
    out = forward(layer, torch.randn(4, 8))
print(out.dtype)
out.float().sum().backward()  # what has been compiled is kept from here on
"""


def test_another_precision_is_not_served_from_the_disk(tmp_path, monkeypatch):
    """torch 2.11 keeps compiled code by whether there is autocast, not by its type."""
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    for dtype in ('bfloat16', 'float16'):
        run = subprocess.run([sys.executable, '-c', PROGRAM, dtype], capture_output=True, text=True)
        assert run.stdout.strip() == f'torch.{dtype}', run.stderr


def test_blocks_have_their_autocast_written_in(tiny):
    seen = []

    def backend(graph, inputs):
        seen.extend(n.args[:3] for n in graph.graph.nodes if n.target is torch.amp.autocast_mode._enter_autocast)
        return graph.forward

    model = OverLoCK(tiny, compile=dict(backend=backend)).train()
    for dtype in (torch.bfloat16, torch.float16):
        for part in (model.stem, model.stage1):
            del seen[:]
            with torch.autocast('cpu', dtype):
                part(torch.randn(2, 3 if part is model.stem else 8, 24, 24))
            assert ('cpu', dtype, True) in seen
            assert all(entered == dtype for _, entered, enabled in seen if enabled)
