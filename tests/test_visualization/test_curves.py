"""Curves read back from logs as mmengine writes them, after every kind of start."""

import json

import numpy as np
import pytest

from mmoverlock import visualization as vis


def write(work, name, records, end=''):
    folder = work / name / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text(''.join(json.dumps(r) + '\n' for r in records) + end)


def train(step, loss, **more):
    return dict(lr=1e-3 / step, loss=loss, time=0.1, iter=step, step=step, **more)


def points(curve):
    return [(int(s), float(v)) for s, v in zip(*curve)]


def test_by_iteration(tmp_path):
    write(tmp_path, '20260101_000000', [train(10, 2.0), train(20, 1.5), {'mIoU': 30.0, 'step': 20}, train(30, 1.0)])
    curves = vis.read_curves(tmp_path)
    assert points(curves['loss']) == [(10, 2.0), (20, 1.5), (30, 1.0)]
    assert points(curves['mIoU']) == [(20, 30.0)] and points(curves['lr'])[1] == (20, 5e-5)
    assert not {'step', 'iter', 'epoch'} & set(curves)
    assert points(vis.read_curves(tmp_path / '20260101_000000')['mIoU']) == [(20, 30.0)]


def test_by_epoch(tmp_path):
    """Validation lines then have the epoch for a step."""
    records = [train(5, 2.0, epoch=1), train(10, 1.5, epoch=1), {'accuracy/top1': 40.0, 'step': 1}]
    records += [train(15, 1.2, epoch=2), train(20, 1.0, epoch=2), {'accuracy/top1': 60.0, 'step': 2}]
    write(tmp_path, '20260101_000000', records)
    assert points(vis.read_curves(tmp_path)['accuracy/top1']) == [(10, 40.0), (20, 60.0)]


def test_a_resumed_run_is_one_curve(tmp_path):
    write(tmp_path, '20260101_000000', [train(10, 2.0), train(20, 9.0), {'mIoU': 9.0, 'step': 20}], end='{"loss": 1')
    write(tmp_path, '20260102_000000', [train(20, 1.5), train(30, 1.0), {'mIoU': 50.0, 'step': 30}])
    write(tmp_path, '20260103_000000', [{'mIoU': 51.0, 'step': 0}])  # a test
    curves = vis.read_curves(tmp_path)
    assert points(curves['loss']) == [(10, 2.0), (20, 1.5), (30, 1.0)] and points(curves['mIoU']) == [(30, 50.0)]


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match='holds no run'):
        vis.read_curves(tmp_path)
    write(tmp_path, '20260101_000000', [{'mIoU': 51.0, 'step': 0}])
    with pytest.raises(ValueError, match='logged no training step'):
        vis.read_curves(tmp_path)
    other = tmp_path / 'a.txt'
    other.write_text('hello\nworld\n')
    with pytest.raises(ValueError, match='a.txt, line 1: not a log'):
        vis.read_curves(str(other))


def test_smooth():
    values = np.array([1.0, 3.0, 5.0])
    assert np.array_equal(vis.smooth(values, 0), values)
    np.testing.assert_allclose(vis.smooth(values, 0.5), [1, (0.5 * 1 + 3) / 1.5, (0.25 * 1 + 0.5 * 3 + 5) / 1.75])
    np.testing.assert_allclose(vis.smooth(np.full(50, 7.0), 0.9), 7.0)
    gap = vis.smooth(np.array([1.0, np.nan, 1.0]), 0.5)
    assert np.isnan(gap[1]) and gap[2] == 1.0
    with pytest.raises(ValueError, match=r'in \[0, 1\)'):
        vis.smooth(values, 1)
