"""CUDA graphs of a network: its kernels are launched by one call each way instead of one by one from Python.

A CUDA graph is a recording for one size of input. Sizes that keep coming are recorded, others run as ever.
"""

import warnings
import weakref
from typing import Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor

_AFTER = 3  # calls with a size before it is recorded: by then kernels have been compiled and chosen
_MOST = 4  # recordings kept; each holds the activations of its size


class Graphs:
    """Recordings of a network's forward and backward passes.

    Args:
        network (nn.Module, optional): The network; ``None`` makes one that has to be replaced before use, which is what
            a copy is: recordings belong to one set of weights in memory.
        function (Callable, optional): What to record, a function of the image that returns a tuple of maps.
    """

    def __init__(self, network: Optional[nn.Module] = None, function: Optional[Callable] = None) -> None:
        self._network = None if network is None else weakref.ref(network)
        self._function = function
        self._seen: Dict[tuple, int] = {}
        self._recordings: Dict[tuple, '_Recording'] = {}
        self._tensors: Optional[list] = None
        self._parameters: list = []
        self._memory: list = []
        self._trained: list = []  # which parameters were, in the last call in training
        self._failed = False

    def __deepcopy__(self, memo) -> 'Graphs':
        return Graphs()

    def __reduce__(self):
        return Graphs, ()

    def forget(self) -> None:
        """Drops the recordings: the network has got other parameters."""
        self._recordings.clear()
        self._tensors = None

    def of(self, network: nn.Module) -> bool:
        """Whether the recordings are of this network."""
        return self._network is not None and self._network() is network

    def __call__(self, image: Tensor) -> Tuple[Tensor, ...]:
        """The network's maps, from a recording if there is one or it is time to make one."""
        network = self._network()
        if not self._takes(network, image):
            return self._function(image)
        autocast = torch.is_autocast_enabled('cuda') and torch.get_autocast_dtype('cuda')
        key = (image.shape, image.dtype, image.device, network.training, autocast, torch.is_inference_mode_enabled())
        recording = self._recordings.get(key)
        # To look first whether a thousand tensors are where they were would delay one picture by a tenth. A pass of
        # evaluation that turns out to be of old weights has changed nothing.
        maps = None if recording is None or network.training else recording(image)
        if self._moved(network):
            recording = None
        elif maps is not None:
            return maps
        if recording is None:
            seen = self._seen[key] = self._seen.get(key, 0) + 1
            if seen <= _AFTER or len(self._recordings) >= _MOST or any(map(_is_synced, network.modules())):
                return self._function(image)
            try:
                recording = self._recordings[key] = self._record(network, image, autocast)
            except RuntimeError as error:  # CUDA's are, and so is a lack of memory
                self._failed = True
                warnings.warn(f'OverLoCK(cuda_graphs=True) goes on without recordings: {error}', stacklevel=2)
                return self._function(image)
        return recording(image)

    def _moved(self, network: nn.Module) -> bool:
        """Whether weights have moved in memory, or others are frozen: recordings would use the old ones, and go."""
        if self._tensors is None:  # going through a thousand modules at every call would take longer than a small batch
            self._parameters = list(network.parameters())
            self._tensors = [*self._parameters, *network.buffers()]
        memory = [t.data_ptr() for t in self._tensors]
        trained = [p.requires_grad for p in self._parameters] if network.training else self._trained
        if memory == self._memory and trained == self._trained:
            return False
        self._memory, self._trained = memory, trained
        self._recordings.clear()
        self._seen.clear()  # where they move at every step, as sharded ones do, nothing is recorded
        return True

    def _takes(self, network: nn.Module, image: Tensor) -> bool:
        """Whether the call may be recorded at all."""
        if self._failed or image.device.type != 'cuda' or image.requires_grad or torch.compiler.is_compiling():
            return False
        if torch.cuda.is_current_stream_capturing() or torch.jit.is_tracing():
            return False
        # Training with gradients or evaluation without: what runs at every step.
        return torch.is_grad_enabled() == network.training

    def _record(self, network: nn.Module, image: Tensor, autocast) -> '_Recording':
        return _Recording(network, self._function, image, autocast)


def _is_synced(module: nn.Module) -> bool:
    return isinstance(module, nn.SyncBatchNorm)


class _Recording:
    """One recording: of the forward pass in evaluation, of both passes in training."""

    def __init__(self, network: nn.Module, function: Callable, image: Tensor, autocast) -> None:
        self.image = image.detach().clone(memory_format=torch.preserve_format)
        self.network = weakref.ref(network)
        named = {n: p for n, p in network.named_parameters() if p.requires_grad} if network.training else {}
        self.parameters = list(named.values())
        self.calls = 0
        # What the recording reads stays in memory as long as it does, whatever becomes of the network's own.
        self.held = [t.detach() for t in (*network.parameters(), *network.buffers())]
        # The recording differentiates by stand-ins in the same memory. The parameters themselves may still be leaves of
        # an earlier step's graph, whose stream the gradients would have to wait for, which no recording may.
        self.leaves = {f'network.{n}': nn.Parameter(p.detach()) for n, p in named.items()}
        function = _Function(network, function).call_with(self.leaves)
        # Warming up and recording run the network: what that changes is put back.
        kept = [(b, b.clone()) for b in network.buffers()]
        random = torch.cuda.get_rng_state(image.device)
        try:
            self._capture(function, autocast)
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)
            torch.cuda.set_rng_state(random, image.device)
        # Parameters that a map depends on, and their gradients.
        self.known = [(p, g) for p, g in zip(self.parameters, self.found) if g is not None] if self.parameters else []

    def _capture(self, function: Callable, autocast) -> None:
        # Casts of weights that autocast keeps would be made outside of the recording and be old at its next call.
        context = torch.autocast('cuda', autocast or None, bool(autocast), cache_enabled=False)
        here = torch.cuda.current_stream(self.image.device)
        stream = torch.cuda.Stream(self.image.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream), context:
            for _ in range(3):
                self._gradients(function(self.image))
        here.wait_stream(stream)
        # Other threads, such as the one that pins memory, may go on meanwhile.
        self.forward_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph, capture_error_mode='thread_local'), context:
            self.maps = function(self.image)
        if self.parameters:
            self.grads = [torch.zeros_like(m) for m in self.maps]
            self.backward_graph = torch.cuda.CUDAGraph()
            pool = self.forward_graph.pool()
            with torch.cuda.graph(self.backward_graph, pool=pool, capture_error_mode='thread_local'):
                self.found = self._gradients(self.maps, self.grads)
        self.maps = tuple(m.detach() for m in self.maps)

    def _gradients(self, maps, grads=None) -> List[Optional[Tensor]]:
        """Gradients of the stand-ins; None for one that no map depends on, and for all if no map has a gradient."""
        if not self.parameters:
            return []
        grads = [torch.zeros_like(m) for m in maps] if grads is None else grads
        pairs = [(m, g) for m, g in zip(maps, grads) if m.requires_grad]  # a map of frozen stages does not
        if not pairs:
            return [None] * len(self.parameters)
        maps, grads = zip(*pairs)
        return list(torch.autograd.grad(maps, list(self.leaves.values()), grads, allow_unused=True))

    def __call__(self, image: Tensor) -> Tuple[Tensor, ...]:
        if not self.parameters:
            return self.forward(image)
        if self.known and not _watched(self.network(), self.parameters):
            (first, _), *_ = self.known
            return _Replay.apply(self, image, True, first)
        return _Replay.apply(self, image, False, *self.parameters)

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        self.image.copy_(image)
        self.forward_graph.replay()
        self.calls += 1
        return tuple(m.clone() for m in self.maps)  # the next call overwrites these

    def backward(self, grads) -> None:
        for own, grad in zip(self.grads, grads):
            own.zero_() if grad is None else own.copy_(grad)
        self.backward_graph.replay()

    def copies(self) -> List[Optional[Tensor]]:
        """The gradients, in memory of their own: they may stay in .grad while the next call overwrites these."""
        copies = iter(_copied([g for _, g in self.known]))
        return [None if g is None else next(copies) for g in self.found]

    def hand_out(self) -> Tensor:
        """Adds the gradients to .grad, as autograd would one by one, but for the first, which it returns."""
        (_, own), *rest = self.known
        fresh = [(p, g) for p, g in rest if p.grad is None]
        old = [(p.grad, g) for p, g in rest if p.grad is not None]
        own, *copies = _copied([own, *(g for _, g in fresh)])
        for (parameter, _), copy in zip(fresh, copies):
            parameter.grad = copy
        if old:
            torch._foreach_add_(*map(list, zip(*old)))
        return own


def _copied(tensors: List[Tensor]) -> List[Tensor]:
    copies = [torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def _watched(network: nn.Module, parameters: List[nn.Parameter]) -> bool:
    """Whether somebody may want to hear of every gradient from autograd: a hook, or a wrapper such as DDP, whose hooks
    cannot be seen."""
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    if spread and not network.averaged_afterwards:
        return True
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


class _Function(nn.Module):
    """A function of a network's, as a module whose parameters can be others for one call."""

    def __init__(self, network: nn.Module, function: Callable) -> None:
        super().__init__()
        self.network, self.function = network, function
        self.training = network.training

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        return self.function(image)

    def call_with(self, leaves: Dict[str, Tensor]) -> Callable:
        """The function with these parameters in place of the network's own."""
        return lambda image: torch.func.functional_call(self, leaves, (image,))


class _Replay(torch.autograd.Function):
    """A recording of both passes, for autograd.

    A node with an edge to each of a thousand and more parameters takes autograd longer than the GPU takes for a small
    network's step. ``direct``: it has one to a single parameter, and the others' gradients are added to .grad here.
    """

    @staticmethod
    def forward(ctx, recording: _Recording, image: Tensor, direct: bool, *parameters: Tensor):
        maps = recording.forward(image)
        ctx.recording, ctx.call, ctx.direct = recording, recording.calls, direct
        ctx.set_materialize_grads(False)
        return maps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        if ctx.call != ctx.recording.calls:
            raise RuntimeError(
                'OverLoCK(cuda_graphs=True): the network ran again before the backward pass, and its activations are '
                'those of the later call. Call backward() after every forward pass, or leave cuda_graphs off'
            )
        ctx.recording.backward(grads)
        found = [ctx.recording.hand_out()] if ctx.direct else ctx.recording.copies()
        return (None, None, None, *found)
