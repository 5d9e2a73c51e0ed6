"""docs/your-own-data.md, followed to the letter: every command of it, in its order, in one folder.

On the real pictures, where ``MMOVERLOCK_DATA_DIR`` names the folder of ``bccd`` and ``camvid``, unpacked or in ``.tar``
files, or where they are in ``data/``; else on pictures made up in the same form. What is smaller than the reader's is
asked for by flags that the tools document, added at the end of a command.
"""

import json
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / 'test_docs'), str(HERE / 'test_data_tools')]
import labelled  # noqa: E402
from pages import commands  # noqa: E402

PRELOAD = ['test_guide', 'mmpretrain.models', 'mmdet.apis', 'mmseg.apis', 'mmoverlock.engine', 'matplotlib.pyplot']
DET, SEG = 'retinanet_overlock-xt_fpn_cells', 'overlock-xt_upernet_streets'

LOADERS = [f'{split}_dataloader.{key}' for split in ('val', 'test') for key in ('num_workers=0', 'dataset.indices=3')]
TRAIN = ['train_dataloader.num_workers=0', 'train_dataloader.dataset.indices=4', *LOADERS]
LOW = 'model.test_cfg.score_thr=0'  # after four pictures no box is worth more
SMALL = ['--arch', 'demo', '--side', '96', '--epochs', '1']
#: Words of a command -> what is added to it.
FLAGS = {
    ('convert.py', 'data/cells'): [*SMALL, '--config', f'data/cells/{DET}.py'],
    ('convert.py', 'data/streets'): [*SMALL, '--config', f'data/streets/{SEG}.py'],
    ('contact_sheet.py',): ['--number', '4', '--columns', '2'],
    ('train.py', 'data/cells'): ['--cfg-options', *TRAIN, LOW],
    ('train.py', 'data/streets'): ['--cfg-options', *TRAIN, 'train_cfg.max_iters=2', 'train_cfg.val_interval=2'],
    ('test.py', 'data/cells'): ['--cfg-options', *LOADERS[2:], LOW],
    ('test.py', 'data/streets'): ['--cfg-options', *LOADERS[2:]],
    ('infer.py',): ['--device', 'cpu', '--score-thr', '0'],
}


def real(name, folder):
    """Put a real data set into the folder, by a link or unpacked; False where there is none."""
    for place in filter(None, (os.environ.get('MMOVERLOCK_DATA_DIR'), ROOT / 'data')):
        place = Path(place)
        if (place / name / 'annotations').is_dir():
            (folder / name).symlink_to((place / name).resolve())
            return True
        if (place / f'{name}.tar').is_file():
            with tarfile.open(place / f'{name}.tar') as archive:
                archive.extractall(folder, filter='data')
            return True
    return False


def made_up(folder):
    """Both data sets in the form of the real ones, with their names."""
    labelled.coco(folder / 'bccd', classes=('RBC', 'WBC', 'Platelets'))
    for path in (folder / 'bccd/images').iterdir():
        path.rename(path.with_name(f'BloodImage_{int(path.stem):05}.jpg'))
    for path in (folder / 'bccd/annotations').iterdir():
        data = json.loads(path.read_text())
        for image in data['images']:
            image['file_name'] = f'BloodImage_{int(Path(image["file_name"]).stem):05}.jpg'
        path.write_text(json.dumps(data))
    labelled.masks(folder / 'camvid', folder='annotations')


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A folder that looks like a checkout with the data in it. ``python`` in it writes down what it was called with."""
    folder = tmp_path_factory.mktemp('guide')
    for name in ('tools', 'configs', 'mmoverlock'):
        (folder / name).symlink_to(ROOT / name)
    (folder / 'data').mkdir()
    if not (real('bccd', folder / 'data') and real('camvid', folder / 'data')):
        for path in (folder / 'data').glob('*'):
            path.unlink() if path.is_symlink() else None
        made_up(folder / 'data')
    (folder / 'bin').mkdir()
    (folder / 'bin/python').write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" > called\n')
    (folder / 'bin/python').chmod(0o755)
    return folder


def run(folder, argv):
    """Run a tool in a process forked from one that has imported everything; give what it said."""
    log = folder / 'log'
    log.write_text('')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_run, args=(str(folder), argv, str(log)))
    process.start()
    process.join(900)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, f'{shlex.join(argv)}: exit code {process.exitcode}\n{log.read_text()}'
    return log.read_text()


def _run(folder, argv, log):
    with open(log, 'ab', buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(n, 'w', buffering=1, closefd=False) for n in (1, 2))
    os.chdir(folder)
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    import mmengine.config.config
    import torch
    from mmengine.runner import Runner

    torch.set_num_threads(1)
    # Seconds that show nothing: asking compilers for their versions, laying out the config's text.
    Runner._log_env = lambda self, env_cfg: None
    mmengine.config.config.FormatCode = lambda text, **kwargs: (text, True)
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)
    sys.path.insert(1, str(ROOT))
    runpy.run_path(argv[0], run_name='__main__')


@pytest.fixture(scope='module')
def followed(checkout):
    """Follow the guide; gives command -> what it said."""
    said = {}
    env = {**os.environ, 'PATH': f'{checkout / "bin"}:{os.environ["PATH"]}'}
    for command in commands(ROOT / 'docs/your-own-data.md'):
        subprocess.run(['bash', '-euc', command], cwd=checkout, env=env, check=True, timeout=60)
        argv = (checkout / 'called').read_text().split('\0')[:-1]
        flags = [f for words, f in FLAGS.items() if all(any(w in a for a in argv) for w in words)]
        said[command] = run(checkout, argv + [flag for f in flags for flag in f])
    return said


def output(followed, *words):
    """What the one command with these words said."""
    (found,) = [text for command, text in followed.items() if all(word in command for word in words)]
    return found


def test_every_command_is_followed(followed):
    tools = [Path(shlex.split(command)[1]).stem for command in followed]
    assert set(tools) == {'convert', 'check_dataset', 'contact_sheet', 'train', 'test', 'infer'}
    assert output(followed, 'check_dataset').strip().endswith('all there')


def test_the_numbers_in_the_guide(followed, checkout):
    """The table of objects, where the pictures are the real ones."""
    record = json.loads((checkout / 'data/cells/dataset.json').read_text())
    assert record['classes'][:2] == ['RBC', 'WBC'] and not record['left_out']
    if len(json.loads((checkout / 'data/bccd/annotations/train.json').read_text())['images']) == 205:
        table = output(followed, 'convert.py', ' data/cells').split('\n\n')[0]
        assert table.strip('\n') in (ROOT / 'docs/your-own-data.md').read_text()


@pytest.mark.parametrize('name', ['cells', 'streets'])
def test_sheet(followed, checkout, name):
    """Two rows of two pictures, no two of them alike, and none blank."""
    from PIL import Image

    sheet = np.asarray(Image.open(checkout / f'work_dirs/{name}.png')).astype(int)
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 2
    cells = [sheet[y : y + height - 30, x : x + width - 10] for y in (0, height) for x in (0, width)]
    assert all(cell[cell.shape[0] // 4 : -cell.shape[0] // 4].std() > 5 for cell in cells)
    assert all(np.abs(a - b).mean() > 1 for i, a in enumerate(cells) for b in cells[:i])


@pytest.mark.parametrize('name, figure', [(DET, 'coco/bbox_mAP:'), (SEG, 'mIoU:')])
def test_result(followed, checkout, name, figure):
    assert 'loss' in output(followed, 'train.py', name)
    assert figure in output(followed, 'tools/test.py', name)
    checkpoint = (checkout / 'work_dirs' / name / 'last_checkpoint').read_text().strip()
    assert Path(checkpoint).is_file()


def test_drawn_predictions(followed, checkout):
    inputs = {p.name for p in (checkout / 'data/cells/images/val').glob('BloodImage_0000*.jpg')}
    assert inputs and {p.name for p in (checkout / 'work_dirs/cells/vis').iterdir()} == inputs
    assert len(list((checkout / 'work_dirs/cells/preds').glob('*.json'))) == len(inputs)
    assert len(list((checkout / 'work_dirs/streets').rglob('vis_image/*.png'))) >= 2
