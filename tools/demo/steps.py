# Copyright (c) mmoverlock authors. Licensed under Apache-2.0.
"""Run the demo's steps: processes side by side, their progress, and what is known of each later.

A step is a command with a digest of all that its result depends on. When a step with the same
digest is done, it is not run again; when the digest is another one, its folder is emptied first.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# More threads than this only wait for each other on models so small.
MOST_THREADS = 8


class DemoError(Exception):
    """Something that ends the demo, told in a line or two."""


@dataclasses.dataclass
class Step:
    """One command of the demo.

    Args:
        key (str): Name of its records and of the folder it fills.
        title (str): Name on the screen and in the report.
        phase (str): Steps of one phase run side by side.
        command (list[str]): What Python runs, relative to the repository.
        needs (tuple[str]): Keys of the steps whose results it uses.
        iterations (int): Training iterations; 0 for a step that does not train. Defaults to 0.
        shown (tuple): (key in the logs, name, factor) of metrics to show. Defaults to none.
        planned (float): Seconds that it took on 2 quiet cores; only for guesses of the time left.
        digest (str): What its result depends on, in short.
    """

    key: str
    title: str
    phase: str
    command: list
    needs: tuple = ()
    iterations: int = 0
    shown: tuple = ()
    planned: float = 0.0
    digest: str = ''


def write_json(path, content):
    """Write a file whole or not at all."""
    draft = path.with_name(f'.{path.name}.tmp')
    draft.write_text(json.dumps(content, indent=1))
    os.replace(draft, path)


def read_json(path):
    """Content of a file; an empty dict if there is none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def read_scalars(folder):
    """The scalars that mmengine logged in a work directory, over all its runs.

    Args:
        folder (Path): Work directory of ``tools/train.py``.

    Returns:
        dict[str, list[tuple]]: Name to (iteration, value) pairs. Where a resumed run repeats an
        iteration, the later value counts.
    """
    found = {}
    for file in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # half a line: the run is writing it
                continue
            step = entry.pop('step', None)
            for name, value in entry.items():
                if step is not None and isinstance(value, (int, float)):
                    found.setdefault(name, {})[step] = value
    return {name: sorted(values.items()) for name, values in found.items()}


def cores():
    """CPU cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def clock(seconds):
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'


class Screen:
    """Progress: on a terminal a line that changes, in a log a line now and then."""

    def __init__(self, every=20.0):
        self.live = sys.stdout.isatty()
        self.every = every
        self._last = 0.0

    def progress(self, text):
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f'\r\033[K{text[:width]}', end='', flush=True)
        elif time.monotonic() - self._last > self.every:
            self._last = time.monotonic()
            print(text, flush=True)

    def line(self, text=''):
        print(f'\r\033[K{text}' if self.live else text, flush=True)
        self._last = time.monotonic()


class Job:
    """A step on its way, and its record on disk (``STEPS/KEY.json``, ``STEPS/KEY.log``).

    Args:
        step (Step): The step.
        work (Path): Folder of the demo.
    """

    def __init__(self, step, work):
        self.step, self.folder = step, work / step.key
        self.record = work / 'steps' / f'{step.key}.json'
        self.log = self.record.with_suffix('.log')
        self.state = read_json(self.record)
        self.process = None
        if self.state.get('digest') != step.digest:
            self.state = dict(digest=step.digest, done=False, wall=0.0, cpu=0.0)
            if step.key != 'data':  # the generator recognises its own data set
                shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, environment):
        """Start the command, with some environment variables changed."""
        self.state['command'] = ' '.join(
            [*(f'{k}={v}' for k, v in environment.items()), 'python', *map(shlex.quote, self.step.command)]
        )
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.begun, self.before = time.monotonic(), self.state['wall']
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.step.command],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, 'PYTHONUNBUFFERED': '1'},
            )

    def running(self):
        """Whether the command still runs; the first time that it does not, the record is written."""
        if self.process is None or self.process.returncode is not None:
            return False
        self.state['wall'] = self.before + time.monotonic() - self.begun
        # Popen.poll would not tell the CPU time of this one process.
        pid, status, used = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return True
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.state['cpu'] += used.ru_utime + used.ru_stime
        self.state['done'] = self.process.returncode == 0
        write_json(self.record, self.state)
        return False

    def stop(self):
        """End the command if it runs; it must not outlive the demo."""
        if self.running():
            self.process.terminate()
            patience = time.monotonic() + 10
            while self.running():
                if time.monotonic() > patience:
                    self.process.kill()
                time.sleep(0.1)

    def progress(self):
        """Fraction that is done, and the latest numbers in words."""
        scalars = read_scalars(self.folder) if self.step.iterations else {}
        fraction, words = float(self.state['done']), []
        if 'loss' in scalars:
            iteration, loss = scalars['loss'][-1]
            fraction = max(fraction, min(iteration / self.step.iterations, 1.0))
            words = [f'{iteration}/{self.step.iterations}', f'loss {loss:.2f}']
        for key, name, factor in self.step.shown:
            if key in scalars:
                words.append(f'{name} {scalars[key][-1][1] * factor:.1f}')
        return fraction, ' '.join(words)

    def failure(self):
        """What to tell when the command failed."""
        tail = self.log.read_text(errors='replace').splitlines()[-12:]
        return (
            f'"{self.step.title}" failed with exit status {self.process.returncode}. The end of {self.log}:\n'
            + '\n'.join(f'    {line}' for line in tail)
            + f'\nTo try it by hand:\n    {self.state["command"]}'
        )


@contextlib.contextmanager
def _uninterrupted():
    """Whoever is impatient and interrupts twice must not leave commands running on their own."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(s, signal.SIG_IGN) for s in signals]
    try:
        yield
    finally:
        for s, handler in zip(signals, before):
            signal.signal(s, handler)


def phases(steps):
    """Steps by phase, in order: a list of lists."""
    groups = {}
    for step in steps:
        groups.setdefault(step.phase, []).append(step)
    return list(groups.values())


def _guess(steps, done, spent, fraction, current):
    """Guess of the whole demo's seconds: the plan, stretched by how long it took so far."""
    planned = [max(s.planned for s in group) for group in phases(steps)]
    covered = sum(planned[:done]) + fraction * planned[done]
    pace = (spent + current) / covered if covered > 30 else 1.0
    return spent + current + pace * max(sum(planned) - covered, 0)


def run_steps(steps, work, environment, limit):
    """Run all steps, phase by phase; those that are done already are not run again.

    Args:
        steps (list[Step]): What to run, in order.
        work (Path): Folder of the demo.
        environment (dict[str, str]): Environment variables to change.
        limit (float): Minutes after which the whole is too slow; it is told, not ended.

    Raises:
        DemoError: A command failed. The others of its phase were ended.
    """
    screen, spent, warned, groups = Screen(), 0.0, False, phases(steps)
    for number, group in enumerate(groups):
        head = f'[{number + 1}/{len(groups)}] {group[0].phase:<10}'
        jobs = [Job(step, work) for step in group]
        waiting = [job for job in jobs if not job.state['done']]
        shared = dict(environment)
        if 'OMP_NUM_THREADS' not in os.environ:
            # One share stays free, for data loaders and whatever else runs here: threads that wait for a busy core
            # cost far more than they bring (seen: 6 times slower with two threads on two cores, one of them busy).
            shared['OMP_NUM_THREADS'] = str(max(1, min(MOST_THREADS, cores() // (len(waiting) + 1))))
        failed = []
        marks = {}  # job to (time, fraction) when its first progress was seen
        try:
            for job in waiting:
                job.start(shared)
            while any([job.running() for job in waiting]):
                failed = [job for job in waiting if job.process.returncode]
                if failed:
                    break  # the others are ended below
                now, left, seen = time.monotonic(), 0.0, {}
                for job in waiting:
                    seen[job.step.key] = fraction, _ = job.progress()
                    if fraction and job not in marks:
                        marks[job] = now, fraction
                    if job in marks and fraction > marks[job][1]:
                        since, first = marks[job]
                        left = max(left, (now - since) / (fraction - first) * (1 - fraction))
                wall = max(job.state['wall'] for job in jobs)
                slowest = min(fraction for fraction, _ in seen.values())
                total = _guess(steps, number, spent, slowest, wall)
                cells = round(10 * slowest)
                words = ' · '.join(f'{job.step.title} {seen[job.step.key][1]}'.rstrip() for job in waiting)
                screen.progress(
                    f'{head} {"█" * cells}{"░" * (10 - cells)} {clock(wall)}'
                    + (f', {clock(left)} left' if left else '')
                    + f' (demo {clock(spent + wall)} of about {clock(total)}) {words}'
                )
                if total > 60 * limit and slowest > 0.3 and not warned:
                    warned = True
                    screen.line(
                        f'      Slower than planned: about {clock(total)} in all, more than the {limit:g} minutes '
                        'allowed. It goes on to the end.'
                    )
                time.sleep(0.5)
        finally:
            with _uninterrupted():
                for job in waiting:
                    job.stop()
        failed = failed or [job for job in waiting if job.process.returncode]
        if failed:
            raise DemoError(failed[0].failure())
        for job in jobs:
            note = '' if job in waiting else ', done before'
            screen.line(f'{head} {job.step.title:<13} {clock(job.state["wall"])}{note}  {job.progress()[1]}'.rstrip())
        spent += max(job.state['wall'] for job in jobs)
