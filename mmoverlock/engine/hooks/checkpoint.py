"""A checkpoint hook whose files are whole, whose runs continue exactly, and which stops in time when told to."""

import contextlib
import os
import os.path as osp
import shutil
import signal
import threading
from typing import Optional

import torch
from mmengine.dist import all_gather_object, all_reduce, barrier, get_rank, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook

from mmoverlock.checkpoints import CheckpointError
from mmoverlock.registry import HOOKS

from .random_state import random_state, set_random_state

PARTIAL = '.partial'
INTERRUPTED = 'interrupted.pth'


@HOOKS.register_module()
class ReliableCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, made to survive what machines do.

    * A checkpoint is written beside its place, flushed to the disk and renamed: it is there whole or not at all.
      ``last_checkpoint`` follows after it, and only then are outdated ones (``max_keep_ckpts``, the previous best)
      removed. A full disk ends the run with an error and takes no older file with it.
    * The random states of every process go into the checkpoint and come back with ``resume``. Validation leaves
      them as they were, so that a run that skips one by resuming goes on with the same numbers.
    * At a signal (SIGTERM: pre-emption, ``scancel``, a time limit) the run writes ``interrupted.pth`` after the
      iteration it is in and exits. Of several processes all stop after the same iteration. Resuming from the middle of
      an epoch needs :class:`ReliableDataHook`, which skips what had been seen. A second signal ends the run at once.

    The file formats, names and every argument of CheckpointHook are unchanged; files of either hook resume with the
    other.

    Args:
        stop_signals (tuple[str]): Names of the signals that stop the run. Defaults to ``('SIGTERM', )``.
        check_interval (int): Iterations between two times that the processes of a distributed run ask each other
            whether one of them got a signal. Defaults to 10.
        exit_code (int): Of a run that a signal stopped. Defaults to 0.
        **kwargs: As for :class:`mmengine.hooks.CheckpointHook`.
    """

    def __init__(self, *args, stop_signals=('SIGTERM',), check_interval: int = 10, exit_code: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        unknown = [name for name in stop_signals if not hasattr(signal, name)]
        if unknown:
            raise ValueError(f'stop_signals: there is no signal {unknown[0]!r} here')
        if check_interval < 1:
            raise ValueError(f'check_interval must be at least 1, got {check_interval}')
        self.stop_signals = tuple(getattr(signal, name) for name in stop_signals)
        self.check_interval = check_interval
        self.exit_code = exit_code
        self._received: Optional[int] = None
        self._previous_handlers: dict = {}
        self._random_states: Optional[list] = None  # of every process, while a checkpoint is written
        self._resumed_states: Optional[list] = None
        self._before_val: Optional[dict] = None
        self._saved_at = None

    # -- writing

    def _save_checkpoint_with_step(self, runner, step, meta):
        outdated = None
        if self.max_keep_ckpts > 0 and not (self.keep_ckpt_ids and self.keep_ckpt_ids[-1] == step):
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(self.keep_ckpt_ids[0]))
            self.keep_ckpt_ids.append(step)  # a deque of that length: the first one falls out
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self._write(runner, self.filename_tmpl.format(step), meta, self.by_epoch)
        if outdated is not None and is_main_process():
            _remove(self.file_backend, outdated)

    def _write(self, runner, filename: str, meta: dict, by_epoch: bool) -> None:
        """One checkpoint of the whole state, and then the pointer to it."""
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._random_states = all_gather_object(self._before_val or random_state())
        _Writer(runner).save_checkpoint(
            self.out_dir,
            filename,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self._random_states = None
        self._saved_at = meta['epoch'], meta['iter']
        if is_main_process():
            pointer = osp.join(runner.work_dir, 'last_checkpoint')
            with _explained(pointer, runner.work_dir):
                with open(pointer + PARTIAL, 'w', encoding='utf-8') as file:
                    file.write(self.last_ckpt)
                _publish(pointer + PARTIAL, pointer)

    def _save_best_checkpoint(self, runner, metrics):
        # mmengine removes the previous best before it writes the new one: the removal waits here.
        backend, writer = getattr(self, 'file_backend', None), _Writer(runner)
        if backend is None:  # validation without training
            return super()._save_best_checkpoint(runner, metrics)
        self.file_backend = waiting = _RemovesLater(backend)
        try:
            super()._save_best_checkpoint(writer, metrics)
        finally:
            self.file_backend = backend
        for path in waiting.removed:
            if path not in writer.written:
                _remove(backend, path)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Adds the random states to a checkpoint of the whole state."""
        if self._random_states is not None:
            checkpoint['random_states'] = self._random_states

    # -- resuming

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Keeps the random states of a checkpoint that is resumed from until training starts."""
        if getattr(runner, '_resume', False):
            self._resumed_states = checkpoint.get('random_states', [])

    def before_train(self, runner) -> None:
        """Clears what a killed run left half-written, puts the random states back, and listens for signals."""
        super().before_train(runner)
        if is_main_process() and isinstance(self.file_backend, LocalBackend):
            for folder in {self.out_dir, runner.work_dir}:
                for name in os.listdir(folder) if osp.isdir(folder) else ():
                    if name.endswith(PARTIAL):
                        path = osp.join(folder, name)
                        runner.logger.warning(f'{path} was being written when a run was killed: removed')
                        _remove(self.file_backend, path)
        self._restore(runner)
        if threading.current_thread() is threading.main_thread():  # only there can Python listen
            self._received = None
            for number in self.stop_signals:
                self._previous_handlers[number] = signal.signal(number, self._on_signal)

    def _restore(self, runner) -> None:
        states, self._resumed_states = self._resumed_states, None
        if states is None:
            return
        if len(states) == get_world_size():
            set_random_state(states[get_rank()])
        elif states:
            runner.logger.warning(
                f'the checkpoint is of {len(states)} processes, this run of {get_world_size()}: random states start '
                'anew, and the losses will not be those of an undisturbed run'
            )
        else:
            runner.logger.warning(
                'the checkpoint keeps no random states (another hook wrote it): they start anew, and the losses will '
                'not be those of an undisturbed run'
            )

    def before_val(self, runner) -> None:
        """Remembers the random states of training."""
        self._before_val = random_state()

    def after_val(self, runner) -> None:
        """Training goes on as if there had been no validation."""
        if self._before_val is not None:
            set_random_state(self._before_val)
        self._before_val = None

    # -- signals

    def _on_signal(self, number, frame) -> None:
        self._received = number
        # The next one means it: as if nobody had listened.
        signal.signal(number, self._previous_handlers.get(number) or signal.SIG_DFL)

    def _listen_no_more(self) -> None:
        for number, handler in self._previous_handlers.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler or signal.SIG_DFL)
        self._previous_handlers = {}

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Saves as the interval asks; after a signal, saves and exits."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if not self.stop_signals or not self._all_agree_to_stop(runner):
            return
        meta = dict(epoch=runner.epoch, iter=runner.iter + 1)
        if self._saved_at != (meta['epoch'], meta['iter']):
            self._write(runner, INTERRUPTED, meta, by_epoch=False)
        self._exit(runner, f'after iteration {runner.iter + 1}')

    @property
    def told_to_stop(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    def _all_agree_to_stop(self, runner) -> bool:
        if get_world_size() == 1:
            return self._received is not None
        if (runner.iter + 1) % self.check_interval:
            return False
        wanted = torch.tensor([int(self._received is not None)])
        all_reduce(wanted, op='max')
        return bool(wanted.item())

    def after_val_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """After a signal, exits if all that was trained is saved already; otherwise training's next iteration does."""
        if self._received is None or get_world_size() > 1 or self._before_val is None:
            return
        if self._saved_at == (runner.epoch, runner.iter):
            self._exit(runner, 'during validation, which a resumed run leaves out')

    def _exit(self, runner, when: str) -> None:
        number = self._received
        name = signal.Signals(number).name if number is not None else 'a signal to another process'
        runner.logger.warning(f'stopped by {name} {when}: {self.last_ckpt} is where --resume continues')
        barrier()
        self._listen_no_more()
        raise SystemExit(self.exit_code)

    def after_train(self, runner) -> None:
        """Publishes, as CheckpointHook does, and stops listening."""
        super().after_train(runner)
        self._listen_no_more()


class _Writer:
    """A runner whose checkpoints appear whole or not at all. All else about it is the runner's."""

    def __init__(self, runner):
        self._runner = runner._runner if isinstance(runner, _Writer) else runner
        self.written = [] if not isinstance(runner, _Writer) else runner.written

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def save_checkpoint(self, out_dir, filename, file_client_args=None, backend_args=None, **kwargs):
        kwargs.update(file_client_args=file_client_args, backend_args=backend_args)
        final = osp.join(out_dir, filename)
        self.written.append(final)
        if file_client_args or not isinstance(get_file_backend(out_dir, backend_args=backend_args), LocalBackend):
            return self._runner.save_checkpoint(out_dir, filename, **kwargs)  # an object store has no halves
        with _explained(final, self._runner.work_dir):
            self._runner.save_checkpoint(out_dir, filename + PARTIAL, **kwargs)
            barrier()  # a sharded checkpoint is a folder that all processes write to
            if is_main_process():
                _publish(final + PARTIAL, final)


class _RemovesLater:
    """A storage backend that only notes what it should remove."""

    def __init__(self, backend):
        self._backend, self.removed = backend, []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def remove(self, path):
        self.removed.append(path)

    rmtree = remove


def _remove(backend, path: str) -> None:
    if backend.isfile(path):
        backend.remove(path)
    elif backend.isdir(path):  # sharded checkpoints
        backend.rmtree(path)


def _publish(partial: str, final: str) -> None:
    """Makes sure that a file or folder is on the disk, then gives it its name."""
    files = [osp.join(root, name) for root, _, names in os.walk(partial) for name in names] or [partial]
    for path in files:
        with open(path, 'rb+') as file:
            os.fsync(file.fileno())
    if osp.isdir(final):
        shutil.rmtree(final)  # a folder cannot be replaced in one step
    os.replace(partial, final)
    if os.name == 'posix':  # the new name too
        folder = os.open(osp.dirname(osp.abspath(final)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def _explained(path: str, work_dir: str):
    """Takes the rests of a failed write away and says what the disk lacks.

    Raises:
        CheckpointError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        if osp.isdir(path + PARTIAL):
            shutil.rmtree(path + PARTIAL, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(path + PARTIAL)
        free = ''  # the disk may not even say
        with contextlib.suppress(OSError):
            free = f'; {shutil.disk_usage(osp.dirname(path) or ".").free / 2**30:.1f} GiB free there'
        raise CheckpointError(
            f'{path} cannot be written ({error.strerror or error}{free}). Older checkpoints are as they were: make '
            f'room and continue with --resume --work-dir {work_dir}'
        ) from error
