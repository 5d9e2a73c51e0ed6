# Copyright (c) mmoverlock authors. Licensed under Apache-2.0.
"""The whole of mmoverlock in a quarter of an hour, on two CPU cores and without a download.

Draws a data set of shapes, pretrains a small OverLoCK as a classifier, fine-tunes Mask R-CNN and
UPerNet from its backbone, tests all three on held-out pictures, and writes
``work_dirs/demo/report.html``. Every step is one of the repository's ordinary tools in a process
of its own; the report lists the commands.

What is done is kept: an interrupted demo goes on where it was, and a finished one only writes its
report again. A change of the code, the configs or the options starts the steps that it touches
anew. Exit status: 0 if every target is met, 1 if one is missed or a step failed.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_scenes import SceneParams  # noqa: E402
from report import write_report  # noqa: E402
from results import METRICS, PACKAGES, TASKS, build_report, version  # noqa: E402
from steps import ROOT, DemoError, Step, phases, read_json, run_steps, write_json  # noqa: E402

CONFIGS = dict(
    classification='configs/demo/overlock-demo_shapes.py',
    detection='configs/demo/mask-rcnn_overlock-demo_fpn_shapes.py',
    segmentation='configs/demo/overlock-demo_upernet_shapes-128x128.py',
)
MODELS = dict(classification='OverLoCK', detection='Mask R-CNN', segmentation='UPerNet')
# Seconds on 2 quiet cores: training, testing.
PLANNED = dict(classification=(180, 20), detection=(300, 25), segmentation=(300, 25))
# A few iterations on a few pictures: whether everything works, not how well.
SMOKE_SCENES = SceneParams(cls_train=32, cls_val=12, dense_train=8, dense_val=4)
SMOKE_OPTIONS = (
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
    'train_dataloader.num_workers=0',
    'val_dataloader.num_workers=0',
)


@functools.lru_cache
def _config(path):
    from mmengine.config import Config

    if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
        sys.path.insert(0, str(ROOT))
    from mmoverlock import compat

    compat.apply()  # or the onedl line does not find its `mmseg::` bases
    return Config.fromfile(ROOT / path)


def plan(work, smoke):
    """The steps of the demo, in order.

    Args:
        work (Path): Folder of the demo.
        smoke (bool): Whether it is only tried out.

    Returns:
        list[Step]: Eight steps in five phases.
    """
    scenes = SMOKE_SCENES if smoke else SceneParams()
    amounts = [
        f'--{f.name.replace("_", "-")}={getattr(scenes, f.name)}'
        for f in dataclasses.fields(scenes)
        if getattr(scenes, f.name) != f.default
    ]
    make = ['tools/demo/make_scenes.py', str(work / 'data'), *amounts]
    draw = ['tools/demo/draw_results.py', str(work / 'pictures')]
    trainings, tests, classifier = [], [], None
    for task in TASKS:
        config, folder = CONFIGS[task], work / task
        iterations = 2 if smoke else _config(config).train_cfg.max_iters
        checkpoint = folder / f'iter_{iterations}.pth'
        options = list(SMOKE_OPTIONS) if smoke else []
        if classifier:
            options.append(f'model.backbone.init_cfg.checkpoint={classifier}')
        trainings.append(
            Step(
                task,
                MODELS[task],
                'Fine-tune' if classifier else 'Pretrain',
                ['tools/train.py', config, '--work-dir', str(folder), '--resume']
                + (['--cfg-options', *options] if options else []),
                ('data', 'classification') if classifier else ('data',),
                iterations,
                tuple((key, name, factor) for owner, key, factor, name, _ in METRICS if owner == task),
                PLANNED[task][0],
            )
        )
        folder = work / f'{task}_test'
        out = str(folder / ('label_maps' if task == 'segmentation' else 'predictions.pkl'))
        tests.append(
            Step(
                f'{task}_test',
                MODELS[task],
                'Test',
                ['tools/test.py', config, str(checkpoint), '--work-dir', str(folder), '--out', out]
                + (['--cfg-options', 'test_dataloader.num_workers=0'] if smoke else []),
                (task,),
                planned=PLANNED[task][1],
            )
        )
        draw += [f'--{task}', config, out]
        classifier = classifier or checkpoint
    return [
        Step('data', 'scenes', 'Draw', make, planned=12),
        *trainings,
        *tests,
        Step('pictures', 'predictions', 'Paint', draw, tuple(s.key for s in tests), planned=12),
    ]


def add_digests(steps):
    """Fill in, for each step, a digest of all that its result depends on.

    That is: its command, the tool and the package's code, the configs with all that they inherit,
    the versions of the packages, and the digests of the steps that it needs.

    Args:
        steps (list[Step]): The plan, in order.
    """
    package = hashlib.sha256()
    for file in sorted((ROOT / 'mmoverlock').rglob('*.py')):
        package.update(file.read_bytes())
    versions = [f'{name} {version(name)}' for name in PACKAGES]
    digests = {}
    for step in steps:
        parts = [*step.command, (ROOT / step.command[0]).read_text(), *(digests[key] for key in step.needs)]
        if step.key != 'data':
            parts += [package.hexdigest(), *versions]
            parts += [repr(_config(part)) for part in step.command if part.startswith('configs/')]
        step.digest = digests[step.key] = hashlib.sha256('\0'.join(parts).encode()).hexdigest()


def _check_packages():
    missing = [name for name in PACKAGES if not version(name)]
    if missing:
        raise DemoError(
            f'not installed here: {", ".join(missing)}. `make demo` installs everything into .venv and then runs '
            'this; the README says how to install into an environment of yours'
        )


def _claim(work, smoke, fresh):
    """Make the folder of the demo, or check that the one that is there is of the same kind."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f'cannot write to {work}: {error.strerror}; name another folder with --work-dir') from error
    was = read_json(work / 'demo.json').get('smoke', smoke)
    if was != smoke:
        raise DemoError(
            f'{work} holds a {"smoke" if was else "full"} run; remove it, or name another folder with --work-dir'
        )
    write_json(work / 'demo.json', dict(smoke=smoke))
    if fresh:
        shutil.rmtree(work / 'steps', ignore_errors=True)


def run(work, smoke, fresh, gpu, limit):
    """Run the demo.

    Args:
        work (Path): Folder of the demo, relative to the repository or absolute.
        smoke (bool): Only try it out.
        fresh (bool): Do every step anew.
        gpu (bool): Let the tools use a GPU.
        limit (float): Minutes allowed.

    Returns:
        int: Exit status.

    Raises:
        DemoError: It cannot go on; the message says why.
    """
    _check_packages()
    _claim(work, smoke, fresh)
    environment = {}
    if not gpu:
        # A GPU would need an mmcv that is compiled for it, which the set-up does not promise.
        environment['CUDA_VISIBLE_DEVICES'] = '-1'
    if work != Path('work_dirs/demo'):
        environment['MMOVERLOCK_DEMO_DATA'] = str(work / 'data')
    os.environ.update(environment)  # the configs are read here too

    steps = plan(work, smoke)
    add_digests(steps)
    planned = sum(max(s.planned for s in group) for group in phases(steps))
    print('OverLoCK: pretrain a classifier, then detect and segment with its backbone.')
    print(
        ('A smoke run. ' if smoke else f'About {planned / 60:.0f} minutes on 2 CPU cores. ')
        + f'Everything goes to {work}. Ctrl-C stops; the same command goes on.\n',
        flush=True,
    )
    run_steps(steps, work, environment, limit)
    report = build_report(work, steps, smoke, limit)
    path = write_report(work / 'report.html', report)

    print()
    for target in report.targets:
        value = 'not measured' if target.value is None else f'{target.value:.1f} {target.unit}'
        verdict = '' if smoke else 'met' if target.met else 'MISSED'
        sign = '<=' if target.at_most else '>='
        print(f'  {target.name:<15}{value:>12}   target {sign} {target.target:g}   {verdict}')
    print(f'\nReport: {path}')
    missed = [] if smoke else [t.name for t in report.targets if not t.met]
    if missed:
        print(f'Missed: {", ".join(missed)}')
    return 1 if missed else 0


def _interrupt(signum, frame):
    raise KeyboardInterrupt


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=ROOT / 'work_dirs' / 'demo',
        help='folder for everything the demo makes (default: work_dirs/demo of the repository)',
    )
    parser.add_argument(
        '--smoke', action='store_true', help='a few iterations on a few pictures, to see that everything works'
    )
    parser.add_argument('--fresh', action='store_true', help='do every step anew')
    parser.add_argument('--gpu', action='store_true', help='use the GPU, if mmcv is compiled for it (default: CPU)')
    parser.add_argument(
        '--time-limit',
        type=float,
        default=20,
        metavar='MINUTES',
        help='time that the demo may take; if it takes longer it still goes to the end, and the target is missed '
        '(default: %(default)g)',
    )
    args = parser.parse_args(argv)
    # Inside the repository, paths on the screen and in the report are relative to it.
    work = args.work_dir.expanduser().resolve()
    work = work.relative_to(ROOT) if work.is_relative_to(ROOT) else work
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run(work, args.smoke, args.fresh, args.gpu, args.time_limit)
    except DemoError as error:
        print(f'\nrun_demo: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            '\nrun_demo: stopped. What is finished is kept; the same command goes on from here.',
            file=sys.stderr,
        )
        return 130


if __name__ == '__main__':
    sys.exit(main())
