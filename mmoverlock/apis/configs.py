"""The configs that come with the package, by name."""

import difflib
import os.path as osp
from pathlib import Path
from typing import List

from mmengine.fileio import load

from ..cli import UserError


def _home() -> Path:
    """The folder of ``configs`` and ``model-index.yml``: the repository, or ``.mim`` of an installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / '.mim', package.parent):
        if (folder / 'configs').is_dir():
            return folder
    raise UserError(f'this installation of mmoverlock has no configs beside {package}; name a config file')


def _by_name() -> dict:
    files = sorted((_home() / 'configs').glob('*/*.py'))
    return {file.stem: str(file) for file in files if file.parent.name != '_base_'}


def list_configs() -> List[str]:
    """The names of all configs that come with the package."""
    return list(_by_name())


def find_config(name: str) -> str:
    """The file of a config.

    Args:
        name (str): A config file, or the name of one that comes with the package, such as ``overlock-t_8xb256_in1k``.

    Returns:
        str: Path of the file.

    Raises:
        mmoverlock.cli.UserError: There is none.
    """
    if osp.isfile(name):
        return name
    known = _by_name()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(osp.splitext(osp.basename(name))[0], known, n=3, cutoff=0.6)
    hint = f'; did you mean {" or ".join(close)}?' if close else '; the names are those of the files in configs/'
    raise UserError(f'{name} is neither a config file nor the name of a config{hint}')


def official_weights(config: str) -> str:
    """Where the official release has the weights of a config, as its metafile says.

    Args:
        config (str): Path of a config file.

    Returns:
        str: An https address.

    Raises:
        mmoverlock.cli.UserError: The release has none for it.
    """
    name = osp.splitext(osp.basename(config))[0]
    for metafile in load(str(_home() / 'model-index.yml'))['Import']:
        for model in load(str(_home() / metafile))['Models']:
            if model['Name'] == name and 'Weights' in model:
                return model['Weights']
    raise UserError(f'the official release has no weights for {name}: name a checkpoint file')
