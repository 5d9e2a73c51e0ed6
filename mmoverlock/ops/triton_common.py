"""What the operators in Triton share: whether they can serve a call, and the small arithmetic of launching."""

import contextlib
import importlib.util
import os
from functools import lru_cache
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
INSTALLED = importlib.util.find_spec('triton') is not None


def interpreted() -> bool:
    """Whether Triton was asked to run kernels on the CPU, slowly, to test them."""
    return os.environ.get('TRITON_INTERPRET', '0') == '1'


@torch.compiler.assume_constant_result
def capability(index: Optional[int]) -> Tuple[int, int]:
    """Compute capability of a GPU, which ``torch.compile`` need not look into."""
    return torch.cuda.get_device_capability(index)


def refuse_tensors(tensors: Dict[str, Tensor]) -> Optional[str]:
    """Why kernels in Triton cannot work on these tensors, whatever they compute, or None.

    Args:
        tensors (dict[str, Tensor]): Names for people, and tensors; the first says on which device to be.
    """
    if not INSTALLED:
        return 'Triton is not installed (it comes with PyTorch for Linux)'
    (first, device), *_ = ((name, tensor.device) for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        if tensor.device != device:
            return f'{first} is on {device}, {name} on {tensor.device}'
    if device.type != 'cuda' and not (device.type == 'cpu' and interpreted()):
        return f'it needs CUDA tensors, these are on {device.type}'
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, *HALF):
            return f'it computes float16, bfloat16 and float32, {name} is {str(tensor.dtype)[6:]}'
    if device.type == 'cuda' and capability(device.index) < (8, 0):
        return 'it needs a GPU of compute capability 8.0 (Ampere) or newer'
    return None


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def vector_of(n: int) -> int:
    """Elements that may be loaded at once, up to eight, where lines are ``n`` long."""
    return next(v for v in (8, 4, 2, 1) if n % v == 0)


def power_of_two(n: int) -> int:
    """The smallest power of two that is no less than ``n``."""
    return 1 << (n - 1).bit_length()


def on(device: torch.device):
    """A context in which kernels are launched on this device."""
    return torch.cuda.device(device) if device.type == 'cuda' else contextlib.nullcontext()


@lru_cache(maxsize=None)
def _side_streams(index: int) -> tuple:
    return tuple(torch.cuda.Stream(index) for _ in range(4))


class Lanes:
    """Streams beside the current one, for kernels that do not depend on each other and do not fill a GPU alone.

    Only while a CUDA graph is recorded. Elsewhere a call waits for Python rather than for the GPU, and everything
    runs in the current stream, in the order of the calls. A context; at its end the current stream waits for all.

    Args:
        device (torch.device): Where the kernels run.
        count (int): Streams, up to 4.
    """

    def __init__(self, device: torch.device, count: int = 4) -> None:
        recorded = device.type == 'cuda' and torch.cuda.is_current_stream_capturing()
        self._streams = _side_streams(device.index)[:count] if recorded else ()
        self._main = torch.cuda.current_stream(device) if recorded else None
        self._kept: list = []

    def __enter__(self) -> 'Lanes':
        for stream in self._streams:
            stream.wait_stream(self._main)
        return self

    def __exit__(self, *_) -> None:
        for stream in self._streams:
            self._main.wait_stream(stream)
        self._kept.clear()

    def lane(self, n: int):
        """A context whose kernels run in lane ``n``, counted round."""
        return torch.cuda.stream(self._streams[n % len(self._streams)]) if self._streams else contextlib.nullcontext()

    def keep(self, *tensors: Tensor) -> None:
        """Their memory is not for others before all lanes are done: of a tensor of one stream that another reads."""
        if self._streams:
            self._kept.extend(tensors)

    def wait_for(self, n: int) -> None:
        """What the current stream runs next comes after what lane ``n`` was given so far."""
        if self._streams:
            self._main.wait_stream(self._streams[n % len(self._streams)])

    def hold(self, n: int) -> None:
        """What lane ``n`` runs next comes after what the current stream was given so far."""
        if self._streams:
            self._streams[n % len(self._streams)].wait_stream(self._main)


def compute_input(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``x`` in the type to compute in, its own or autocast's, and in this memory format."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return x.contiguous(memory_format=memory_format)


def gradients_wanted(*tensors: Optional[Tensor]) -> bool:
    """Whether autograd will want the gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def differentiated_again() -> bool:
    """Whether the gradients being computed are to be differentiated in their turn (``create_graph=True``)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def definition_gradients(outputs, inputs: Sequence[Optional[Tensor]], grads) -> List[Optional[Tensor]]:
    """Gradients that can be differentiated again: those of an operator's definition.

    Args:
        outputs (Tensor | Sequence[Tensor]): What the definition gave.
        inputs (Sequence[Tensor | None]): What it was given; those that need no gradient get None.
        grads (Tensor | Sequence[Tensor]): Gradients of the outputs.
    """
    needed = [t is not None and t.requires_grad for t in inputs]
    wanted = [t for t, need in zip(inputs, needed) if need]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return [next(found) if need else None for need in needed]
