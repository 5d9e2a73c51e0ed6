"""The demo as a whole: every step on a few pictures, from nothing to the report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TASKS = ('classification', 'detection', 'segmentation')

pytest.importorskip('mmpretrain')
pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmcv._ext', reason='mmcv has no operators here')

import run_demo  # noqa: E402
from make_scenes import BACKGROUND, CLASSES  # noqa: E402
from mmengine.config import Config  # noqa: E402


def demo(*args):
    env = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'}
    return subprocess.run(
        [sys.executable, str(ROOT / 'tools/demo/run_demo.py'), *args], env=env, capture_output=True, text=True
    )


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    work = tmp_path_factory.mktemp('demo') / 'work'
    result = demo('--smoke', '--work-dir', str(work))
    assert result.returncode == 0, result.stdout + result.stderr
    return work, result.stdout


def test_every_step_is_told(smoke):
    _, screen = smoke
    for phase in ('Draw', 'Pretrain', 'Fine-tune', 'Test', 'Paint'):
        assert phase in screen
    for number in ('Top-1 accuracy', 'Box AP50', 'Mask AP50', 'Mean IoU', 'Time'):
        assert re.search(rf'{number} +\d+\.\d', screen), number
    assert 'report.html' in screen


def test_trainings_start_from_the_classifier(smoke):
    work, _ = smoke
    for task in ('detection', 'segmentation'):
        log = (work / 'steps' / f'{task}.log').read_text()
        assert re.search(rf'loaded \d+ tensors from {re.escape(str(work))}/classification/iter_2.pth', log)


def test_every_task_leaves_a_checkpoint_curves_and_metrics(smoke):
    work, _ = smoke
    from results import METRICS, read_metrics
    from steps import read_scalars

    for task in TASKS:
        assert (work / task / 'iter_2.pth').is_file()
        assert [i for i, _ in read_scalars(work / task)['loss']] == [1, 2]
    for task, key, *_ in METRICS:
        assert 0 <= read_metrics(work / f'{task}_test')[key] <= 100


def test_recounted_numbers_are_those_of_the_tests(smoke):
    work, _ = smoke
    from results import read_metrics

    summary = json.loads((work / 'pictures/summary.json').read_text())
    cls, seg = summary['classification'], summary['segmentation']
    top1 = read_metrics(work / 'classification_test')['accuracy/top1']
    assert 100 * cls['right'] / cls['total'] == pytest.approx(top1, abs=0.01) and cls['total'] == 12
    iou = [v for v in seg['iou'] if v == v]
    assert sum(iou) / len(iou) == pytest.approx(read_metrics(work / 'segmentation_test')['mIoU'], abs=0.02)
    assert summary['detection']['classes'] == list(CLASSES) and seg['classes'] == [BACKGROUND, *CLASSES]


def test_report(smoke):
    work, _ = smoke
    page = (work / 'report.html').read_text()
    assert not re.search(r'<script|<link|(src|href)="(?!data:)', page)
    assert 'A smoke run' in page and 'Every target met' not in page
    assert page.count('<svg') == 6
    # 12 held-out pictures (and mistakes), 4 scenes of detection and of segmentation.
    assert page.count('<img') >= 12 + 4 + 4
    for tool in ('make_scenes.py', 'draw_results.py', 'tools/train.py configs/demo/', 'tools/test.py configs/demo/'):
        assert tool in page
    assert page.count('tools/train.py') == page.count('tools/test.py') == 3
    assert 'torch 2' in page and 'Mask R-CNN' in page and 'UPerNet' in page


def test_a_finished_demo_runs_nothing_again(smoke):
    work, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in work.rglob('*.pth')}
    (work / 'report.html').unlink()
    result = demo('--smoke', '--work-dir', str(work))
    assert result.returncode == 0 and result.stdout.count('done before') == 8
    assert (work / 'report.html').is_file()
    assert {p: p.stat().st_mtime_ns for p in work.rglob('*.pth')} == before


def test_smoke_and_full_runs_do_not_mix(smoke):
    work, _ = smoke
    result = demo('--work-dir', str(work))
    assert result.returncode == 1 and 'holds a smoke run' in result.stderr and 'Traceback' not in result.stderr


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / 'file').write_text('')
    result = demo('--work-dir', str(tmp_path / 'file' / 'demo'))
    assert result.returncode == 1 and 'name another folder' in result.stderr and 'Traceback' not in result.stderr


def test_digests_follow_what_matters(tmp_path, monkeypatch):
    def digests():
        plan = run_demo.plan(tmp_path, smoke=False)
        run_demo.add_digests(plan)
        return {step.key: step.digest for step in plan}

    first = digests()
    assert len(first) == 8 and digests() == first
    monkeypatch.setitem(run_demo.CONFIGS, 'detection', 'configs/demo/overlock-demo_upernet_shapes-128x128.py')
    changed = {key for key, digest in digests().items() if digest != first[key]}
    assert changed == {'detection', 'detection_test', 'pictures'}


@pytest.mark.parametrize('task', TASKS)
def test_configs_inherit_and_agree(task):
    cfg = Config.fromfile(ROOT / run_demo.CONFIGS[task])
    assert cfg.model.backbone.type == 'mmoverlock.OverLoCK'
    assert isinstance(cfg.model.backbone.arch, dict) and cfg.train_cfg.max_iters == cfg.max_iters
    assert tuple(cfg.demo_classes) == CLASSES
    # Held-out pictures only: no loader but the training one sees the training folder.
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert 'train' not in str(loader.dataset.get('data_prefix', '')) + str(loader.dataset.get('split', ''))
    # The last weights are tested, not those that were best on the held-out pictures.
    assert cfg.default_hooks.checkpoint.save_best is None
