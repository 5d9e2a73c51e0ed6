"""How an operator chooses among its implementations.

Every operator keeps a list of :class:`Backend`, best first and the plain definition last. ``backend='auto'`` takes
the first that does not refuse the call; a backend that was named is taken or the reason for its refusal is raised.
"""

import os
from dataclasses import dataclass
from typing import Callable, Dict, Optional, Sequence

import torch

ENV_VARIABLE = 'MMOVERLOCK_BACKEND'

_OPERATORS: Dict[str, Sequence['Backend']] = {}


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot take the call."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Args:
        name (str): What ``backend=`` and the environment variable call it.
        run (Callable): The implementation; takes the operator's arguments.
        refuse (Callable): Takes the same arguments and returns why the backend cannot serve them, in a few words
            for a person, or None when it can.
        auto (bool): Whether ``'auto'`` may choose it. Optional third-party code is used only when asked for.
    """

    name: str
    run: Callable
    refuse: Callable[..., Optional[str]]
    auto: bool = True


def records_graph() -> bool:
    """Whether operators are being compiled, traced or exported, and not run."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def refuse_but_on_cpu(x: torch.Tensor) -> Optional[str]:
    """Why a form for tensors on a CPU, which graphs do not have, cannot serve a call with ``x``, or None."""
    if x.device.type != 'cpu':
        return f'is for CPU tensors, these are on {x.device.type}'
    return 'a graph is being recorded' if records_graph() else None


def register(operator: str, backends: Sequence[Backend]) -> None:
    """Keeps the backends of one operator, in order of preference."""
    _OPERATORS[operator] = tuple(backends)


def available_backends(operator: str) -> tuple:
    """Names of an operator's backends in order of preference, whether or not this machine can run them.

    Args:
        operator (str): ``'contmix'`` or ``'depthwise_conv2d'``.
    """
    return tuple(b.name for b in _OPERATORS[operator])


def _wished(text: str, operator: str) -> str:
    """The backend that the environment variable says for an operator; 'auto' if none."""
    found = 'auto'
    for part in text.split(','):
        target, _, name = part.strip().rpartition('=')
        if target and target not in _OPERATORS:
            operators = ', '.join(sorted(_OPERATORS))
            raise BackendError(f'{ENV_VARIABLE}={text!r}: no operator {target!r}; known: {operators}')
        if name != 'auto':  # what nearly every call finds; the rest is not for a hot path
            known = {b.name for n, group in _OPERATORS.items() if target in ('', n) for b in group}
            if name not in known:
                raise BackendError(f'{ENV_VARIABLE}={text!r} names no backend; known: auto, {", ".join(sorted(known))}')
        if target == operator or (not target and name in {b.name for b in _OPERATORS[operator]}):
            found = name
    return found


def dispatch(operator: str, backend: str, *args):
    """Runs ``operator`` with the backend that was asked for, or with the best that accepts the call.

    Args:
        operator (str): Name given to :func:`register`.
        backend (str): ``'auto'`` or a backend's name. ``'auto'`` is overridden by the environment variable
            ``MMOVERLOCK_BACKEND``: a name, for the operators that have a backend of that name, or for single operators
            ``contmix=reference,feed_forward=triton``.
        *args: The operator's arguments.

    Raises:
        BackendError: The name is unknown, or the named backend refuses the call.
    """
    backends = _OPERATORS[operator]
    names = [b.name for b in backends]
    if backend == 'auto':
        backend = _wished(os.environ.get(ENV_VARIABLE, 'auto'), operator)
    if backend == 'auto':
        for candidate in backends:
            if candidate.auto and candidate.refuse(*args) is None:
                return candidate.run(*args)
        raise BackendError(f'no backend of {operator} accepts this call')  # the definition refuses nothing
    if backend not in names:
        raise BackendError(f'{operator} has no backend {backend!r}; choose from auto, {", ".join(names)}')
    chosen = backends[names.index(backend)]
    reason = chosen.refuse(*args)
    if reason is not None:
        raise BackendError(f'backend {backend!r} of {operator} cannot be used: {reason}')
    return chosen.run(*args)
