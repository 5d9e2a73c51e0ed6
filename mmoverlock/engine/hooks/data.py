"""Data loading that resumes exactly where it was, and that says which file is broken."""

import os
import os.path as osp
import signal
import threading
from typing import Optional

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch.utils.data import get_worker_info

from mmoverlock.registry import HOOKS

from .random_state import random_state, seed_all, set_random_state

MAX_REPLACED = 10


class BadSampleError(RuntimeError):
    """A sample cannot be read or prepared; the message names its files."""


@HOOKS.register_module()
class ReliableDataHook(Hook):
    """Gives each training sample random numbers of its own, skips what a resumed run has seen, names broken files.

    * The random numbers of a sample's augmentation follow from the seed, the process, the epoch and its place in the
      epoch alone: not from the number of workers, nor from what was drawn before. (mmengine seeds each worker once,
      with the same number every time it starts: without ``persistent_workers`` every epoch draws the same numbers, with
      them a resumed run draws others.)
    * A run that is resumed starts at the very batch that comes next, also in the middle of an epoch, and without
      loading what it skips. (mmengine's iteration-based loop loads and drops every batch seen so far.) The sampler's
      seed comes out of the checkpoint where the config sets none.
    * A picture or label map that cannot be read, or prepared, is named, and by choice replaced.
    * Workers survive the first SIGTERM, which slurm sends to every process of a job, until the checkpoint that
      :class:`ReliableCheckpointHook` then writes is whole.

    Args:
        on_bad_sample (str): ``'raise'`` stops with the name of the file. ``'skip'`` logs it, and another sample, drawn
            at random, takes its place; after 10 bad ones in a row it stops after all. Validation always stops: a
            metric over fewer pictures is another metric. Defaults to ``'raise'``.
    """

    priority = 'NORMAL'  # before the checkpoint hook, which puts back the random states that are drawn from here

    def __init__(self, on_bad_sample: str = 'raise') -> None:
        if on_bad_sample not in ('raise', 'skip'):
            raise ValueError(f"on_bad_sample must be 'raise' or 'skip', got {on_bad_sample!r}")
        self.on_bad_sample = on_bad_sample
        self._resumed: Optional[dict] = None

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Remembers where the data of a resumed run were."""
        if getattr(runner, '_resume', False):
            self._resumed = checkpoint.get('data_position', {})

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keeps the seeds and the length of an epoch."""
        if 'optimizer' in checkpoint and hasattr(self, '_seed'):
            loader = runner.train_dataloader
            checkpoint['data_position'] = dict(
                seed=self._seed, sampler_seed=getattr(_sampler(loader), 'seed', None), batches=len(loader)
            )

    def before_train(self, runner) -> None:
        """Prepares the loaders, now that it is known where training starts."""
        loop = runner.train_loop
        loader = loop.dataloader
        resumed, self._resumed = self._resumed or {}, None
        self._seed = resumed.get('seed', runner.seed or 0)
        _name_bad_samples(loader, self.on_bad_sample, (self._seed, get_rank()))
        if loader.batch_sampler is None:
            runner.logger.warning('the train loader has no batches (batch_size=None): its position is not kept')
            return
        if resumed.get('sampler_seed') is not None:
            _sampler(loader).seed = resumed['sampler_seed']
        # Not one of torch's attributes that a loader lets go of by assignment, but read anew for every epoch.
        batches = loader.batch_sampler
        if not isinstance(batches, _KeyedBatches):
            vars(loader)['batch_sampler'] = batches = _KeyedBatches(batches)
        loader.generator = torch.Generator().manual_seed(self._seed)  # not a draw from the model's numbers an epoch

        by_iter = hasattr(loop, 'dataloader_iterator')
        if by_iter:
            self._start_iterations(loop, batches)
        elif runner.iter:
            seen = runner.iter - runner.epoch * len(loader)
            if resumed.get('batches', len(loader)) != len(loader) or not 0 <= seen <= len(loader):
                runner.logger.warning(
                    f'an epoch was {resumed.get("batches", "?")} batches and is {len(loader)} now: this epoch starts '
                    'at its first one'
                )
            elif seen:
                batches.skip = seen
                runner.logger.info(f'epoch {runner.epoch + 1} continues after {seen} of its {len(loader)} batches')

    def before_val(self, runner) -> None:
        """Prepares the loader of a validation."""
        _name_bad_samples(runner.val_dataloader, 'raise')

    def before_test(self, runner) -> None:
        """Prepares the loader of a test."""
        _name_bad_samples(runner.test_dataloader, 'raise')

    @staticmethod
    def _start_iterations(loop, batches) -> None:
        """The loop holds an iterator that may have drawn already: a new one, at the place where training continues."""
        loader, done = loop.dataloader, loop.iter
        loop.dataloader_iterator = loader._iterator = None  # ends its workers
        sampler, skip, epoch = _sampler(loader), done, 0
        if isinstance(sampler, InfiniteSampler):
            sampler.indices = sampler._indices_of_rank()  # the one stream that all its iterators share
        elif len(loader):
            epoch, skip = divmod(done, len(loader))
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(epoch)
        batches.skip = skip
        from mmengine.runner.loops import _InfiniteDataloaderIterator

        iterator = _InfiniteDataloaderIterator(loader)
        iterator._epoch = epoch
        loop.dataloader_iterator = _AlreadyAdvanced(iterator, done)


class _AlreadyAdvanced:
    """An iterator that answers the first calls with nothing: those by which the loop would load and drop batches."""

    def __init__(self, iterator, calls: int) -> None:
        self._iterator, self._calls = iterator, calls

    def __iter__(self):
        return self

    def __next__(self):
        if self._calls:
            self._calls -= 1
            return None
        return next(self._iterator)

    def skip_iter(self, num_iters: int) -> None:
        """As onedl-mmengine's loop asks for the same thing."""
        self._calls = max(0, self._calls - num_iters)


class _KeyedBatches:
    """A batch sampler's batches from the ``skip``-th on, each index with the key of its random numbers."""

    def __init__(self, batches) -> None:
        self.batches, self.skip = batches, 0

    def __iter__(self):
        skip, self.skip = self.skip, 0
        epoch = getattr(_sampler(self), 'epoch', 0)
        for position, batch in enumerate(self.batches):
            if position >= skip:
                yield [(index, (epoch, position, place)) for place, index in enumerate(batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name):
        if name == 'batches':
            raise AttributeError(name)
        return getattr(self.batches, name)


class _Samples:
    """What a loader's worker calls for the samples of a batch (torch's ``Dataset.__getitems__``)."""

    def __init__(self, dataset, on_bad_sample: str, seeds: Optional[tuple]) -> None:
        self.dataset, self.on_bad_sample, self.seeds = dataset, on_bad_sample, seeds

    def __call__(self, batch) -> list:
        # In the main process the generators are the model's too.
        kept = random_state(cuda=False) if self.seeds and get_worker_info() is None else None
        try:
            return [self._sample(item) for item in batch]
        finally:
            if kept is not None:
                set_random_state(kept)

    def _sample(self, item):
        index = item
        if isinstance(item, tuple):
            index, key = item
            seed_all(*self.seeds, *key)
        for left in reversed(range(MAX_REPLACED)):
            try:
                return self.dataset[index]
            except Exception as error:  # decoders, transforms and data sets raise whatever they like
                reason = f'{type(error).__name__}: {(str(error).strip() or "no reason given").splitlines()[0]}'
                text = f'{_files(self.dataset, index)} cannot be read or prepared ({reason})'
                if self.on_bad_sample == 'raise':
                    raise BadSampleError(
                        f'{text}. Mend or remove it, or have such samples replaced with '
                        "dict(type='mmoverlock.ReliableDataHook', on_bad_sample='skip') in custom_hooks"
                    ) from error
                if not left:
                    raise BadSampleError(f'{text}, and so were {MAX_REPLACED - 1} others before it') from error
                print_log(f'{text}: another sample takes its place', logger='current', level=30)
                index = int(np.random.randint(len(self.dataset)))


class _Worker:
    """What a worker process starts with: its own initialisation, and one SIGTERM from outside that does not count."""

    def __init__(self, initialise) -> None:
        self.initialise = initialise

    def __call__(self, number: int) -> None:
        if self.initialise is not None:
            self.initialise(number)
        if hasattr(signal, 'sigwaitinfo'):
            # Held back from the main thread, a signal waits for the one thread that can ask who sent it: a handler
            # cannot, and the training process ends its workers with SIGTERM too.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_outlive_one_signal, args=(os.getppid(),), daemon=True).start()


def _outlive_one_signal(parent: int) -> None:
    if signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        signal.sigwaitinfo({signal.SIGTERM})
    os._exit(0)


def _name_bad_samples(loader, on_bad_sample: str, seeds: Optional[tuple] = None) -> None:
    loader.dataset.__getitems__ = _Samples(loader.dataset, on_bad_sample, seeds)
    if not isinstance(loader.worker_init_fn, _Worker):
        loader.worker_init_fn = _Worker(loader.worker_init_fn)


def _sampler(loader_or_batches):
    """The sampler of single indices."""
    batches = getattr(loader_or_batches, 'batch_sampler', None) or loader_or_batches
    return getattr(batches, 'sampler', None)


def _files(dataset, index: int) -> str:
    """The files of a sample, for people."""
    try:
        info = dataset.get_data_info(index)
        names = [info[key] for key in ('img_path', 'seg_map_path') if isinstance(info.get(key), str)]
        return ' with '.join(osp.normpath(n) for n in names) or f'sample {index}'
    except Exception:  # not all data sets can say
        return f'sample {index}'
