"""Parts of the network that choose their own precision."""

from contextlib import nullcontext

import torch


@torch.compiler.assume_constant_result  # torch.compile cannot look into it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def no_autocast(device_type: str):
    """A context without autocast: what is in it chooses its own precision."""
    if _has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
