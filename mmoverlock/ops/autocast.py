"""Parts of the network that choose their own precision."""

from contextlib import nullcontext
from typing import Callable

import torch


@torch.compiler.assume_constant_result  # torch.compile cannot look into it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def no_autocast(device_type: str):
    """A context without autocast: what is in it chooses its own precision."""
    if _has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def autocast_written_in(forward: Callable) -> Callable:
    """``forward(module, x, ...)`` that enters the autocast which is already on, for torch.compile to write down.

    torch 2.11 keeps compiled code on disk under a key that says whether autocast is on, but not in which type: what a
    training in float16 has compiled would serve the next one in bfloat16, which then runs in float16 without a word.
    """

    def run(module, x, *others):
        kind = x.device.type
        if not (_has_autocast(kind) and torch.is_autocast_enabled(kind)):
            return forward(module, x, *others)
        with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind)):
            return forward(module, x, *others)

    return run
