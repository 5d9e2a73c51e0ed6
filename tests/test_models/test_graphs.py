"""CUDA graphs of the network: when sizes are recorded; on a GPU, that recordings train as the network does."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from common import randomise

from mmoverlock import OverLoCK
from mmoverlock.models import graphs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


class OnCPU(graphs._Recording):
    """A recording whose graphs are functions that do the same anew, in the same memory."""

    def __init__(self, network, function, image, autocast):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, 'get_rng_state', lambda device: None)
            patch.setattr(torch.cuda, 'set_rng_state', lambda state, device: None)
            super().__init__(network, function, image, autocast)

    def _capture(self, function, autocast):
        maps = function(self.image)
        self.maps = tuple(m.detach().clone() for m in maps)
        self.grads = [torch.zeros_like(m) for m in maps]
        self.found = self._gradients(maps, self.grads)

        def forward():
            with torch.enable_grad():
                self.live = function(self.image)
            for own, m in zip(self.maps, self.live):
                own.copy_(m.detach())

        def backward():
            for own, g in zip(self.found, self._gradients(self.live, self.grads)):
                own.copy_(g) if own is not None else None

        self.forward_graph, self.backward_graph = (SimpleNamespace(replay=f) for f in (forward, backward))


class FakeRecording:
    """Counts its calls, and runs the network."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, image):
        self.calls += 1
        return self.function(image)


@pytest.fixture
def network(tiny, monkeypatch):
    """A network that records on the CPU."""
    monkeypatch.setattr(graphs.Graphs, '_takes', lambda self, network, image: not self._failed)
    monkeypatch.setattr(graphs.Graphs, '_record', lambda self, *_: FakeRecording(self._function))
    return randomise(OverLoCK(tiny, cuda_graphs=True)).eval()


@pytest.fixture
def trained(tiny, monkeypatch):
    """A network that trains by recordings on the CPU, and one that does not."""
    monkeypatch.setattr(graphs, '_AFTER', 1)
    monkeypatch.setattr(graphs.Graphs, '_takes', lambda self, network, image: network.training)
    monkeypatch.setattr(graphs.Graphs, '_record', lambda self, *args: OnCPU(args[0], self._function, *args[1:]))
    network = randomise(OverLoCK(tiny, cuda_graphs=True)).train()
    plain = OverLoCK(tiny).train()
    plain.load_state_dict(network.state_dict())
    return network, plain


def recordings(network):
    return {key[0][-1]: r.calls for key, r in network.graphs._recordings.items()}


@torch.no_grad()
def test_sizes_that_keep_coming_are_recorded(network):
    for width in (32, 64, 32, 96, 32, 32, 32):
        network(torch.rand(1, 3, 32, width))
    assert recordings(network) == {32: 2}
    for width in range(64, 64 + 32 * 8, 32):
        for _ in range(4):
            network(torch.rand(1, 3, 32, width))
    assert len(recordings(network)) == graphs._MOST


@torch.no_grad()
def test_recordings_end_with_the_weights_they_use(network):
    for _ in range(4):
        network(torch.rand(1, 3, 32, 32))
    assert recordings(network) == {32: 1}
    network.stage1[0].norm.weight.data = network.stage1[0].norm.weight.data.clone()
    network(torch.rand(1, 3, 32, 32))
    assert recordings(network) == {}  # if they move at every call, none is made
    for _ in range(3):
        network(torch.rand(1, 3, 32, 32))
    assert recordings(network) == {32: 1}
    network.load_state_dict(network.state_dict())  # in place
    network(torch.rand(1, 3, 32, 32))
    assert recordings(network) == {32: 2}
    network.stem[0].conv.weight.requires_grad_(False)  # in evaluation all the same
    network(torch.rand(1, 3, 32, 32))
    assert recordings(network) == {32: 3}
    network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)
    assert recordings(network) == {}
    for change in (network.double, network.float, network.switch_to_deploy):
        change()
        assert recordings(network) == {}
        image = torch.rand(1, 3, 32, 32, dtype=network.stem[0].conv.weight.dtype)
        for _ in range(4):
            network(image)
        assert len(recordings(network)) == 1


@torch.no_grad()
def test_recordings_in_training_end_with_what_is_trained(network):
    network.train()
    for expected in ({}, {}, {}, {32: 1}, {32: 2}):
        network(torch.rand(2, 3, 32, 32))
        assert recordings(network) == expected
    network.stem[0].conv.weight.requires_grad_(False)
    network(torch.rand(2, 3, 32, 32))
    assert recordings(network) == {}


@torch.no_grad()
def test_a_recording_of_old_weights_is_not_believed(network):
    """In evaluation it has run before anybody looks."""
    image = torch.rand(1, 3, 32, 32)
    for _ in range(4):
        network(image)
    (recording,) = network.graphs._recordings.values()
    recording.function = lambda image: (torch.full((1,), float('nan')),)
    assert network(image)[0].isnan().all()
    network.stage1[0].norm.weight.data = 2 * network.stage1[0].norm.weight.data
    found, network.graphs = network(image), None
    assert recording.calls == 3
    for a, b in zip(found, network(image)):
        assert torch.equal(a, b)


@torch.no_grad()
def test_copies_record_for_themselves(network):
    for _ in range(4):
        network(torch.rand(1, 3, 32, 32))
    for double in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        image = torch.rand(1, 3, 32, 32)
        for parameter in double.parameters():
            parameter.mul_(0.9)
        assert not torch.allclose(double(image)[0], network(image)[0])
        assert recordings(double) == {}


@torch.no_grad()
def test_a_recording_that_fails_is_told_and_done_without(network, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError('too little')

    monkeypatch.setattr(graphs.Graphs, '_record', fail)
    image = torch.rand(1, 3, 32, 32)
    for _ in range(3):
        expected = network(image)
    with pytest.warns(UserWarning, match='goes on without recordings: too little'):
        torch.testing.assert_close(network(image), expected)
    network(image)  # and not again


@pytest.mark.parametrize('frozen, maps', [(2, (0, 3)), (6, (0, 1))])
def test_gradients_of_maps_that_have_some(tiny, frozen, maps):
    """Maps of frozen stages have none, which is no error."""
    network = randomise(OverLoCK(tiny, frozen_stages=frozen, out_indices=maps)).train()
    recording = graphs._Recording.__new__(graphs._Recording)
    named = {n: p for n, p in network.named_parameters() if p.requires_grad}
    recording.parameters = list(named.values())
    recording.leaves = {f'network.{n}': torch.nn.Parameter(p.detach()) for n, p in named.items()}
    function = graphs._Function(network, network._features).call_with(recording.leaves)
    found = recording._gradients(function(torch.rand(2, 3, 64, 64)))
    assert len(found) == len(named)
    assert all((g is None) == (frozen == 6 and not n.startswith('norm')) for n, g in zip(named, found)), [
        n for n, g in zip(named, found) if g is None
    ]


def test_what_is_not_recorded(tiny):
    """On a CPU nothing is; and a pass that is computed twice cannot be."""
    network = randomise(OverLoCK(tiny, cuda_graphs=True)).eval()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for _ in range(6):
            maps = network(image)
    assert recordings(network) == {}
    plain = OverLoCK(tiny).eval()
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(maps, plain(image))
    with pytest.raises(ValueError, match='choose one'):
        OverLoCK(tiny, cuda_graphs=True, with_cp=True)


def test_recordings_differentiate_by_stand_ins(tiny):
    """A parameter may be a leaf of an earlier step's graph, on a stream that a recording must not wait for."""
    network = randomise(OverLoCK(tiny)).train()
    named = dict(network.named_parameters())
    leaves = {f'network.{n}': torch.nn.Parameter(p.detach()) for n, p in named.items()}
    before = [p.data_ptr() for p in named.values()]
    maps = graphs._Function(network, network._features).call_with(leaves)(torch.rand(2, 3, 64, 64))
    found, seen, todo = set(), set(), [m.grad_fn for m in maps]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [after for after, _ in node.next_functions]
        found |= {id(node.variable)} if hasattr(node, 'variable') else set()
    assert found == {id(leaf) for leaf in leaves.values()}
    assert all(p is q for p, q in zip(named.values(), network.parameters()))  # all are back in place
    assert before == [leaf.data_ptr() for leaf in leaves.values()]


def steps(network, images, amp):
    """Losses and gradients of some training steps."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-2)
    losses = []
    for image in images:
        with torch.autocast('cuda', torch.bfloat16, enabled=amp):
            maps = network(image)
        loss = sum(m.float().square().mean() for m in maps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('watched', [None, 'hook', 'post hook', 'group'])
def test_replays_train_as_the_network_does(trained, monkeypatch, watched):
    """Gradients that go to .grad past autograd, and those of parameters that somebody may be watching."""
    network, plain = trained
    seen, images = [], [torch.randn(4, 3, 32, 32) for _ in range(4)]
    if watched == 'group':
        monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    if watched in ('hook', 'post hook'):
        parameter = network.stage1[0].norm.weight
        hook = parameter.register_hook if watched == 'hook' else parameter.register_post_accumulate_grad_hook
        hook(lambda tensor: seen.append(tensor.shape))
    handed = []
    original = graphs._Recording.hand_out
    monkeypatch.setattr(graphs._Recording, 'hand_out', lambda self: handed.append(1) or original(self))
    torch.testing.assert_close(steps(network, images, False), steps(plain, images, False), rtol=1e-5, atol=0)
    assert len(network.graphs._recordings) == 1
    assert len(handed) == (3 if watched is None else 0)
    assert len(seen) == (4 if watched in ('hook', 'post hook') else 0)
    for (name, a), b in zip(network.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_replays_of_what_is_averaged_afterwards(trained, monkeypatch):
    network, _ = trained
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    parameters = list(network.parameters())
    assert graphs._watched(network, parameters)
    network.averaged_afterwards = True
    assert not graphs._watched(network, parameters)


@pytest.mark.parametrize('frozen', [-1, 2])
def test_replayed_gradients_add_up(trained, frozen):
    """Two backward passes before a step; and what was handed out stays as it was when the next comes."""
    network, plain = trained
    for model in trained:
        model.frozen_stages = frozen
        model.train()
    image = torch.randn(4, 3, 32, 32)
    for _ in range(2):
        for model in trained:
            model.zero_grad()
            for factor in (1, 3):
                (factor * sum(m.square().mean() for m in model(factor * image))).backward()
    kept = [(p, p.grad, p.grad.clone()) for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    sum(m.square().mean() for m in network(2 * image)).backward()
    assert network.graphs._recordings
    others = dict(plain.named_parameters())
    assert all((p.grad is None) == (others[n].grad is None) for n, p in network.named_parameters())
    names = {p: n for n, p in network.named_parameters()}
    for parameter, grad, before in kept:
        assert torch.equal(grad, before) and grad is not parameter.grad
        torch.testing.assert_close(grad, others[names[parameter]].grad, rtol=1e-3, atol=1e-6, msg=names[parameter])


@needs_gpu
@pytest.mark.parametrize('amp', [False, True])
def test_trains_as_the_network_does(tiny, amp):
    network = randomise(OverLoCK(tiny, cuda_graphs=True)).cuda().train()
    plain = OverLoCK(tiny).cuda().train()
    plain.load_state_dict(network.state_dict())
    images = [torch.randn(2, 3, 128, 128, device='cuda') for _ in range(8)]
    # TF32 rounds to three digits, and cuDNN may choose it for the one and not for the other.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected, found = steps(plain, images, amp), steps(network, images, amp)
    assert len(network.graphs._recordings) == 1
    torch.testing.assert_close(found, expected, rtol=2e-2 if amp else 1e-4, atol=0)
    state = plain.state_dict()
    for name, a in network.state_dict().items():
        b, rtol = state[name], 5e-2 if amp else 1e-3
        # A channel's mean may be near nought: it is as precise as the values are that it is the mean of.
        size = state[name.replace('mean', 'var')].sqrt() if name.endswith('running_mean') else b.abs()
        assert (a - b).abs().max() <= rtol * size.max(), name
    network.eval(), plain.eval()
    with torch.no_grad():
        for image in images:
            a, b = network(image), plain(image)
            torch.testing.assert_close(a[0], b[0], rtol=5e-2, atol=5e-2)
    assert len(network.graphs._recordings) == 2


@needs_gpu
def test_gradients_add_up(tiny):
    """Two backward passes before a step: the second must not overwrite what the first left."""
    network = randomise(OverLoCK(tiny, cuda_graphs=True)).cuda().train()
    plain = copy.deepcopy(network)
    plain.graphs = None
    image = torch.randn(2, 3, 96, 96, device='cuda')
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(5):
            for model in (network, plain):
                model.zero_grad()
                for factor in (1, 3):
                    (factor * sum(m.square().mean() for m in model(factor * image))).backward()
    assert network.graphs._recordings
    sizes = [p.grad.abs().max().item() for p in plain.parameters()]
    compared = 0
    for (name, a), b, size in zip(network.named_parameters(), plain.parameters(), sizes):
        if size > 1e-5 * max(sizes):  # that of a bias before a batch norm is nought, but for rounding
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-3 * size, msg=name)
            compared += 1
    assert compared > 0.8 * len(sizes)


@needs_gpu
def test_a_second_forward_pass_is_an_error(tiny):
    network = randomise(OverLoCK(tiny, cuda_graphs=True)).cuda().train()
    image = torch.randn(2, 3, 96, 96, device='cuda')
    for _ in range(5):
        network(image)[0].sum().backward()
    first = network(image)[0].sum()
    network(image)
    with pytest.raises(RuntimeError, match='ran again before the backward pass'):
        first.backward()
