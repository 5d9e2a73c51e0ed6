"""Hooks that let a training survive what machines do; docs/reliability.md says what that covers."""

from .checkpoint import ReliableCheckpointHook
from .data import BadSampleError, ReliableDataHook

__all__ = ['BadSampleError', 'ReliableCheckpointHook', 'ReliableDataHook', 'make_reliable']


def make_reliable(cfg) -> None:
    """Puts both hooks into a config: CheckpointHook becomes the reliable one, the data hook is added if absent.

    Args:
        cfg (Config): Changed in place. Another checkpoint hook than mmengine's is left alone.
    """
    defaults = cfg.setdefault('default_hooks', {})
    checkpoint = defaults.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    if checkpoint is not None and checkpoint.get('type') in ('CheckpointHook', 'mmengine.CheckpointHook'):
        checkpoint['type'] = 'mmoverlock.ReliableCheckpointHook'
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(_is(hook, 'ReliableDataHook') for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='mmoverlock.ReliableDataHook')]


def _is(hook, name: str) -> bool:
    kind = hook.get('type') if isinstance(hook, dict) else type(hook)
    return (kind if isinstance(kind, str) else kind.__name__).split('.')[-1] == name
