"""The state of every random number generator that a training draws from, in plain tensors and numbers."""

import random

import numpy as np
import torch


def random_state(cuda: bool = True) -> dict:
    """The generators of Python, numpy and torch.

    Args:
        cuda (bool): Also the current GPU's, where there is one in use. Defaults to True.

    Returns:
        dict: Of tensors, numbers and tuples only, so that a checkpoint that holds it loads with ``weights_only``.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state = dict(
        python=random.getstate(),
        numpy=(torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        torch=torch.get_rng_state(),
    )
    if cuda and torch.cuda.is_available() and torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Puts back what :func:`random_state` returned.

    Args:
        state (dict): May have been through a checkpoint, and be on any device.
    """
    version, numbers, gauss = state['python']
    random.setstate((version, tuple(numbers), gauss))
    keys, position, has_gauss, cached = state['numpy']
    np.random.set_state(('MT19937', keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def seed_all(*words: int) -> None:
    """Seeds Python, numpy and torch (CPU only) from a few non-negative numbers.

    Other than ``torch.manual_seed`` it does not touch a GPU's generator, which belongs to the model.

    Args:
        words (int): Any change in any of them gives unrelated random numbers.
    """
    first, second, third = (int(n) for n in np.random.SeedSequence(words).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)
