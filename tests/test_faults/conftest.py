"""The data, and runs that nothing happened to, to compare with."""

import sys
from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')
sys.path.insert(0, str(Path(__file__).parent))
import faults  # noqa: E402
from tiny_configs import imagenet_folders  # noqa: E402


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    return imagenet_folders(tmp_path_factory.mktemp('imagenet'))


@pytest.fixture
def own_data(tmp_path):
    """Data that a test may damage."""
    return imagenet_folders(tmp_path / 'data')


@pytest.fixture(scope='session')
def undisturbed(data, tmp_path_factory):
    """Gives (config, work directory) of a run that nothing happened to: 'epochs', 'iterations' or 'two'."""
    runs = {}

    def run(kind):
        if kind not in runs:
            folder = tmp_path_factory.mktemp(kind)
            config = faults.config(folder / f'{kind}.py', data, faults.BY_ITERATION if kind == 'iterations' else '')
            if kind == 'two':
                faults.train_two(config, folder / 'work', '--cfg-options', 'train_cfg.max_epochs=2')
            else:
                code, said = faults.train(config, folder / 'work')
                assert code == 0, said
            runs[kind] = config, folder / 'work'
        return runs[kind]

    return run
