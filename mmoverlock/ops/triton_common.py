"""What the operators in Triton share: whether they can serve a call, and the small arithmetic of launching."""

import contextlib
import importlib.util
import os
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


def power_of_two(n: int) -> int:
    """The smallest power of two that is no less than ``n``."""
    return 1 << (n - 1).bit_length()


def on(device: torch.device):
    """A context in which kernels are launched on this device."""
    return torch.cuda.device(device) if device.type == 'cuda' else contextlib.nullcontext()


def compute_input(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``x`` in the type to compute in, its own or autocast's, and in this memory format."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return x.contiguous(memory_format=memory_format)


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
