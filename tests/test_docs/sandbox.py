"""A folder in which the commands of the documentation run as they stand, made small.

The folder looks like a checkout with data sets, official files and finished runs in it, all made up. ``python``,
``pip``, ``make`` and ``git`` on its PATH note how they were called. What ``python`` was called with then runs in a
process forked from a server that has imported everything once: seconds instead of ten for each command.

Made smaller in that process, and nowhere else: one block a stage in every variant, 64 pixels a side, one iteration or
epoch, small heads, nothing compiled. Everything else is what a reader gets.

Imported on both sides: nothing happens at import.
"""

import json
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PRELOAD = ['sandbox', 'mmpretrain.apis', 'mmdet.apis', 'mmseg.apis', 'mmoverlock.engine', 'matplotlib.pyplot']
SIZE = 64

RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$RECORDED"
printf '\\n' >> "$RECORDED"
"""


# -- the folder -------------------------------------------------------------------------------


def make(folder):
    """Fill the folder: the checkout by links, programs, data, nothing run yet."""
    for path in ROOT.iterdir():
        if path.name not in ('data', 'work_dirs', '.git') and not path.name.startswith('.venv'):
            (folder / path.name).symlink_to(path)
    programs = folder / '.programs'
    programs.mkdir()
    for name in ('python', 'pip', 'make', 'git'):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    _data(folder / 'data')
    _demo(folder / 'work_dirs' / 'demo')
    return folder


def _demo(root):
    """Of a finished demo, some pictures and the log of the classifier; checkpoints come with the first command."""
    rng = np.random.default_rng(0)
    for name in (
        'imagenet/val/star/000004',
        'coco/val2017/000001',
        'coco/val2017/000002',
        'ade/images/validation/000001',
    ):
        path = root / 'data' / f'{name}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8)).save(path)
    log = root / 'classification' / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    records = [dict(loss=2.0 - i, lr=1e-3, step=10 * (i + 1)) for i in range(2)]
    log.write_text(''.join(json.dumps(record) + '\n' for record in records))


def _data(root):
    rng = np.random.default_rng(0)

    def picture(path, size=SIZE):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        noise.resize((size, size), Image.BICUBIC).save(path, quality=90)

    def mask(path, classes):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, classes, (8, 8), dtype=np.uint8))
        noise.resize((SIZE, SIZE), Image.NEAREST).save(path)

    def coco(path, classes, numbers):
        box = dict(category_id=1, bbox=[8, 8, 32, 32], area=1024, iscrowd=0)
        box['segmentation'] = [[8, 8, 40, 8, 40, 40, 8, 40]]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(
                dict(
                    images=[dict(id=i, file_name=f'{i}.jpg', width=SIZE, height=SIZE) for i in numbers],
                    annotations=[dict(box, id=i + 1, image_id=i) for i in numbers],
                    categories=[dict(id=i + 1, name=name) for i, name in enumerate(classes)],
                )
            )
        )

    from mmdet.datasets import CocoDataset

    for split in ('train', 'val'):
        for i in range(1000):
            path = root / 'imagenet' / split / f'n{i:08d}' / '0.JPEG'
            path.parent.mkdir(parents=True)
            path.symlink_to(root / f'coco/{split}2017/0.jpg')
        for name in ('cat', 'dog'):
            for i in range(4):
                picture(root / 'cifar10' / split / name / f'{i}.jpg', 32)
        for i in range(4):
            picture(root / 'coco' / f'{split}2017' / f'{i}.jpg')
            picture(root / 'camvid/images' / split / f'{i}.jpg')
            mask(root / 'camvid/annotations' / split / f'{i}.png', 11)
        coco(root / f'coco/annotations/instances_{split}2017.json', CocoDataset.METAINFO['classes'], range(4))
        numbers = range(4) if split == 'train' else range(4, 8)
        coco(root / f'bccd/annotations/{split}.json', ('RBC', 'WBC', 'Platelets'), numbers)
        for i in numbers:
            picture(root / 'bccd/images' / f'{i}.jpg')
    for name in ('cifar10', 'bccd', 'camvid'):
        with tarfile.open(root.parent / f'{name}.tar', 'w') as archive:
            archive.add(root / name, name)
    for split in ('training', 'validation'):
        for i in range(4):
            picture(root / 'ade/ADEChallengeData2016/images' / split / f'{i}.jpg')
            mask(root / 'ade/ADEChallengeData2016/annotations' / split / f'{i}.png', 151)


# -- running a command --------------------------------------------------------------------------


def call(folder, command):
    """Run a command by the shell.

    Returns:
        list[list[str]]: What ``python``, ``pip``, ``make`` and ``git`` were called with, their names first.
    """
    recorded = folder / '.recorded'
    recorded.write_text('')
    env = {
        **os.environ,
        'PATH': f'{folder / ".programs"}:{os.environ["PATH"]}',
        'PYTHON': str(folder / '.programs/python'),  # of dist_train.sh
        'RECORDED': str(recorded),
    }
    done = subprocess.run(['bash', '-euc', command], cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f'{command}\n{done.stderr}'
    return [line.split('\0')[:-1] for line in recorded.read_text().split('\n') if line]


def run(folder, argv, extra=(), timeout=240):
    """Run ``python`` with these arguments in a process of its own.

    Args:
        folder (Path): Where.
        argv (list[str]): A script and its arguments, or ``-m torch.distributed.run ... SCRIPT ...``.
        extra (Sequence[str]): Flags that make it smaller, added at the end.

    Returns:
        str: What it said.
    """
    alone = {}  # what torchrun tells its processes
    if argv[:2] == ['-m', 'torch.distributed.run']:  # one process instead of several
        argv = argv[next(i for i, a in enumerate(argv) if a.endswith('.py')) :]
        if '--launcher' in argv:
            at = argv.index('--launcher')
            argv = argv[:at] + argv[at + 2 :]
        else:
            alone = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
    argv = [a for a in argv if a != '--amp'] + list(extra)  # AMP needs a GPU, which the tools say
    log = folder / '.log'
    log.unlink(missing_ok=True)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_run, args=(str(folder), argv, str(log), alone))
    process.start()
    process.join(timeout)
    said = log.read_text() if log.exists() else ''
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f'{shlex.join(argv)} is not done after {timeout} s:\n{said}')
    assert process.exitcode == 0, f'{shlex.join(argv)}: exit code {process.exitcode}\n{said}'
    return said


def _run(folder, argv, log, environment):
    with open(log, 'ab', buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, 'w', buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, 'w', buffering=1, closefd=False)
    os.chdir(folder)
    torch.set_num_threads(1)
    os.environ.update(environment, CUDA_VISIBLE_DEVICES='', TORCH_HOME=f'{folder}/.torch')
    make_smaller()
    for argument in argv[1:]:
        provide(argument, argv)
        provide_released(argument)
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    sys.path.insert(1, str(ROOT))
    runpy.run_path(argv[0], run_name='__main__')


# -- small ----------------------------------------------------------------------------------------


def make_smaller():
    """One block a stage; configs of one iteration on small pictures."""
    import mmengine.config.config
    from mmengine.config import Config
    from mmengine.runner import Runner

    from mmoverlock.models import ARCHS

    for settings in ARCHS.values():
        settings.update(depths=(1, 1, 1, 1), focus_depths=(1, 1))
    original = Config.fromfile

    def fromfile(*args, **kwargs):
        cfg = original(*args, **kwargs)
        shrink(cfg)
        return cfg

    Config.fromfile = staticmethod(fromfile)
    torch.compile = lambda model=None, **kwargs: model if model is not None else lambda function: function
    # Seconds that show nothing: formatting the config's text, asking compilers for their versions.
    mmengine.config.config.FormatCode = lambda text, **kwargs: (text, True)
    Runner._log_env = lambda self, env_cfg: None


def shrink(cfg):
    """Make a config of any task train, test and predict in seconds."""
    loop = cfg.get('train_cfg') or {}
    if 'max_epochs' in loop:
        loop.update(max_epochs=1, val_interval=1)
    if 'max_iters' in loop:
        loop.update(max_iters=2, val_interval=2)
    hooks = cfg.get('default_hooks') or {}
    if 'checkpoint' in hooks and not hooks['checkpoint'].get('by_epoch', True):
        hooks['checkpoint']['interval'] = 2
    _walk(cfg._cfg_dict)


def _walk(node):
    if isinstance(node, (list, tuple)):
        for item in node:
            _walk(item)
        return
    if not isinstance(node, dict):
        return
    kind = str(node.get('type', ''))
    if 'batch_size' in node and 'dataset' in node:
        node.update(batch_size=2, num_workers=0, persistent_workers=False)
    if kind.split('.')[-1] in ('Resize', 'RandomResize', 'RandomChoiceResize', 'RandomResizedCrop', 'ResizeEdge'):
        for key in ('scale', 'scales'):
            if key in node:
                node[key] = _small(node[key])
    if 'pipeline' in node and 'data_root' in node:
        node['indices'] = 4
    if 'crop_size' in node and 'allow_negative_crop' not in node:
        node['crop_size'] = _small(node['crop_size'])
    if 'size' in node and 'mean' in node:
        node['size'] = (SIZE, SIZE)
    if kind == 'UPerHead':
        node['channels'] = 16
    if kind == 'FCNHead':
        node['channels'] = 16
    if 'num' in node and 'pos_fraction' in node:
        node['num'] = 16
    if 'nms_pre' in node:
        node['nms_pre'] = 50
    for value in node.values():
        _walk(value)


def _small(value):
    if isinstance(value, (list, tuple)):
        return type(value)(_small(v) for v in value)
    return SIZE


# -- what a reader has downloaded or trained before ----------------------------------------------


def provide(path, argv):
    """Make the checkpoint that an argument names, if it is not there."""
    if not re.search(r'\.(pth|safetensors)$', path) or '://' in path or os.path.exists(path) or '=' in path:
        return
    if path in _outputs(argv):
        return
    from mmengine.config import Config

    from mmoverlock import checkpoints

    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    if variant := re.search(r'overlock_(xt|t|s|b)_in1k_224', path):
        config = f'configs/classification/overlock-{variant[1]}_8xb256_in1k.py'
    else:
        config = next((a for a in argv if a.endswith('.py') and a.startswith(('configs/', 'work_dirs/'))), None)
        name = re.search(r'work_dirs/([^/]+)/[^/]+$', path)
        config = config or next((str(p) for p in Path('configs').glob(f'*/{name and name[1]}.py')), None)
        assert config, f'do not know what {path} is'
    torch.manual_seed(0)
    model = _build(Config.fromfile(config))
    state = model.state_dict()
    if re.fullmatch(r'(overlock|maskrcnn|upernet).*\.pth', os.path.basename(path)):
        state = checkpoints.to_official(state)
    if path.endswith('.safetensors'):
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(dict(state_dict=state, meta=dict()), path)


def provide_released(config):
    """Make the released files that a config starts from, where a download would put them."""
    if not config.endswith('.py') or not config.startswith(('configs/', 'work_dirs/')):
        return
    from mmengine.config import Config

    from mmoverlock import compat

    compat.find_mmseg_configs()
    for url in set(re.findall(r'https://\S+?\.pth', Config.fromfile(config).pretty_text)):
        path = os.path.join(os.environ['TORCH_HOME'], 'hub/checkpoints', os.path.basename(url))
        provide(path, [])


def _outputs(argv):
    """Of the converters, the last argument is written."""
    return argv[-1:] if any('converter' in a or 'export' in a for a in argv[:1]) else []


def _build(cfg):
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(cfg.get('default_scope', 'mmengine'))
    return MODELS.build(cfg.model)
