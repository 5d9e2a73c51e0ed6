"""Training curves from the logs that mmengine writes."""

import json
import os.path as osp
from glob import glob
from typing import Dict, List, Tuple

import numpy as np

Curve = Tuple[np.ndarray, np.ndarray]
# Where a line of the log stands, not what was measured.
PLACES = ('step', 'iter', 'epoch')


def log_files(path: str) -> List[str]:
    """The logs of a work directory, oldest first; a run's own folder or a log names itself.

    Args:
        path (str): Work directory of tools/train.py, one of the folders that runs have in it, or a ``scalars.json``.

    Raises:
        ValueError: There is no log.
    """
    if osp.isfile(path):
        return [path]
    files = sorted(glob(osp.join(path, '*', 'vis_data', 'scalars.json')))
    files = files or glob(osp.join(path, 'vis_data', 'scalars.json'))
    if not files:
        raise ValueError(f'{path} holds no run (no */vis_data/scalars.json); name a --work-dir of tools/train.py')
    return files


def read_curves(path: str) -> Dict[str, Curve]:
    """What a training logged, by step.

    A work directory holds a folder for every start. A later one takes over from its first step on: a resumed training
    is one curve, and a repeated one replaces what was there. Results that were logged by epoch are put at the last
    training step of their epoch.

    Args:
        path (str): Work directory, a run's folder in it, or a log of JSON lines.

    Returns:
        dict[str, tuple[np.ndarray, np.ndarray]]: Steps (int64) and values (float64) by name, such as ``loss``, ``lr``,
        ``accuracy/top1``, ``coco/bbox_mAP``, ``mIoU``.

    Raises:
        ValueError: There is no log, or no training step in it.
    """
    curves: Dict[str, Dict[int, float]] = {}
    for file in log_files(path):
        records = _records(file)
        trained = [r for r in records if 'loss' in r]
        if not trained:  # a test, or a training that ended before its first line
            continue
        for curve in curves.values():
            for step in [s for s in curve if s >= trained[0]['step']]:
                del curve[step]
        for step, record in _with_steps(records):
            for name, value in record.items():
                if name not in PLACES and isinstance(value, (int, float)):
                    curves.setdefault(name, {})[step] = value
    if not curves:
        raise ValueError(f'{path} logged no training step; it ended before the first')
    return {
        name: (np.array(list(curve), dtype=np.int64), np.array(list(curve.values()), dtype=np.float64))
        for name, curve in curves.items()
        if curve
    }


def _records(file: str) -> List[dict]:
    records = []
    with open(file, encoding='utf-8') as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                if not line.endswith('\n'):  # the last line of a training that was killed, or still runs
                    break
                raise ValueError(f'{file}, line {number}: not a log of mmengine (a JSON object a line)')
            records.append(record)
    return records


def _with_steps(records: List[dict]):
    """Yields (step, record). A validation by epoch has its epoch for a step: the training lines tell the real one."""
    by_epoch = any('epoch' in r for r in records if 'loss' in r)
    last = {}
    for record in records:
        if 'step' not in record:
            continue
        step = record['step']
        if 'loss' in record:
            last[record.get('epoch')] = step
        elif by_epoch:
            step = last.get(step, step)
        yield step, record


def smooth(values: np.ndarray, weight: float) -> np.ndarray:
    """Exponential moving average, without the pull towards the first value: ``weight`` 0 changes nothing.

    Args:
        values (np.ndarray): (N,).
        weight (float): Share of what came before, in [0, 1).

    Returns:
        np.ndarray: (N,). Each is the mean of the values so far, weighted by ``weight`` to the power of their age, as
        TensorBoard's smoothing does.

    Raises:
        ValueError: ``weight`` is not in [0, 1).
    """
    if not 0 <= weight < 1:
        raise ValueError(f'smoothing must be in [0, 1), got {weight}')
    mean, share, out = 0.0, 0.0, []
    for value in values:
        if not np.isfinite(value):  # shown as it is, and forgotten: one NaN would hide all that follows
            out.append(value)
            continue
        mean, share = weight * mean + (1 - weight) * value, weight * share + (1 - weight)
        out.append(mean / share)
    return np.array(out)
