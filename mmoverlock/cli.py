"""What the command-line tools share: flags, reading a config, and the checks made before a run.

Every check runs before anything is written and raises :class:`UserError`, which the tools print as
one line and turn into exit code 2: a mistake in a path should not cost a traceback, nor leave a
work directory behind.
"""

import argparse
import contextlib
import importlib
import json
import os
import os.path as osp
import signal
import sys
import tempfile
import time
from typing import Optional, Sequence

import torch
from mmengine.config import Config, DictAction

from . import datacheck

# Scope of a config -> (package to import, what to install for it).
PACKAGES = dict(
    mmpretrain=('mmpretrain', 'mmpretrain==1.2.0'),
    mmdet=('mmdet', 'mmdet==3.3.0'),
    mmseg=('mmseg', 'mmsegmentation==1.2.2 ftfy regex'),
)

SINGLE_VALUE_CURE = (
    'raise train_dataloader.batch_size, enlarge the pictures, or (for a small last '
    'batch) set train_dataloader.drop_last=True'
)

# Parts of a model that a checkpoint of a backbone lacks.
HEADS = ('head', 'bbox_head', 'rpn_head', 'roi_head', 'decode_head')

# What gloo and NCCL say when the process at the other end is gone.
LOST_CONNECTION = (
    'Connection reset by peer',
    'Connection closed by peer',
    'Broken pipe',
    'ncclRemoteError',
    'ncclSystemError',
    'NCCL communicator was aborted',
)


class UserError(Exception):
    """A mistake in what the user asked for, told in one line that also says what to do."""


def rank() -> int:
    """This process's rank under torchrun, slurm or MPI, known before anything is initialised."""
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def world_size() -> int:
    """The number of processes of the job, known before anything is initialised."""
    for name in ('WORLD_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
        if name in os.environ:
            return int(os.environ[name])
    return 1


@contextlib.contextmanager
def one_line_errors():
    """Turn a :class:`UserError` into one line on stderr (of the first process) and exit code 2."""
    try:
        yield
    except UserError as error:
        if rank() == 0:
            print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


def warn(text: str) -> None:
    """Print a one-line warning on stderr, once per job."""
    if rank() == 0:
        print(f'warning: {text}', file=sys.stderr)


@contextlib.contextmanager
def replacing(path: str):
    """Write a file so that it appears whole or not at all.

    Args:
        path (str): The file to be; its folder is made.

    Yields:
        str: Where to write; moved to ``path`` at the end, removed if an error comes.
    """
    folder = osp.dirname(osp.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder, suffix=osp.splitext(path)[1])
    os.close(handle)
    try:
        yield partial
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(error: Exception) -> str:
    """The first line of an error's text; for an error without one, its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# -- flags ------------------------------------------------------------------------------------


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG and ``--cfg-options``."""
    parser.add_argument('config', help='config file')
    add_config_options(parser)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='change settings of the config, e.g. train_dataloader.batch_size=8; lists as '
        'key="[a,b]" or key=a,b, without spaces',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that training and testing share."""
    add_config_arguments(parser)
    parser.add_argument(
        '--work-dir',
        help="folder for logs, checkpoints and metrics; default: the config's work_dir, else ./work_dirs/CONFIG_NAME",
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher of a distributed run',
    )
    # torchrun and torch.distributed.launch spell it in both ways.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    parser.add_argument('--no-pin-memory', action='store_true', help="do not pin the data loaders' memory")


def parse(parser: argparse.ArgumentParser, argv: Optional[Sequence[str]] = None):
    """Parse arguments; a malformed ``--cfg-options`` ends in the parser's usual error."""
    try:
        args = parser.parse_args(argv)
    except (ValueError, AssertionError) as error:
        parser.error(f'argument --cfg-options: expected KEY=VALUE ({_reason(error)})')
    if hasattr(args, 'local_rank'):
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


# -- config -----------------------------------------------------------------------------------


def load_config(path: str, options: Optional[dict] = None) -> Config:
    """Read a config file and apply ``--cfg-options`` to it.

    Args:
        path (str): Config file, relative to the current directory.
        options (dict, optional): Dotted keys and their new values.

    Returns:
        Config: The config.

    Raises:
        UserError: If the file is not there, cannot be read, or an option does not fit it.
    """
    if not osp.isfile(path):
        raise UserError(f'config not found: {path} (looked for {osp.abspath(path)})')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is a program: anything may go wrong in it
        raise UserError(f'cannot read config {path}: {type(error).__name__}: {_reason(error)}') from error
    if options:
        try:
            cfg.merge_from_dict(options)
        except (KeyError, TypeError, AssertionError, IndexError) as error:
            raise UserError(f'--cfg-options do not fit {path}: {_reason(error)}') from error
    return cfg


def set_work_dir(cfg: Config, args) -> None:
    """Work directory: the flag, else the config's, else ``./work_dirs/CONFIG_NAME``."""
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('./work_dirs', osp.splitext(osp.basename(args.config))[0])
    if osp.exists(cfg.work_dir) and not osp.isdir(cfg.work_dir):
        raise UserError(f'work directory {cfg.work_dir} is a file; name another with --work-dir')


def set_loader_defaults(cfg: Config, args) -> None:
    """Data loader settings that users expect each package's own tool to fill in."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if loader is None:
            continue
        if cfg.get('default_scope') == 'mmpretrain':
            loader.setdefault('pin_memory', has_accelerator())
            loader.setdefault('persistent_workers', True)
            loader.setdefault('collate_fn', dict(type='default_collate'))
        if args.no_pin_memory:
            loader.pin_memory = False
        if not loader.get('num_workers') or getattr(args, 'no_persistent_workers', False):
            loader.persistent_workers = False  # torch refuses it where there are no workers


def set_launcher(cfg: Config, launcher: str) -> None:
    """Set the launcher; on a machine without a GPU, make a torchrun job work on the CPU.

    mmengine selects a CUDA device and hands device ids to DDP whatever the backend is. Without a
    GPU the process group is therefore made here (gloo), and DDP is told not to expect devices.

    Raises:
        UserError: If there are more processes than GPUs, or the launcher cannot do without a GPU.
    """
    cfg.launcher = launcher
    if launcher == 'none':
        return
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count()
        if launcher == 'pytorch' and local >= gpus:
            raise UserError(f'more processes than GPUs: this machine has {gpus}; start {gpus} at most')
        return
    if _has_other_accelerator():
        return
    if launcher != 'pytorch':
        raise UserError(f'--launcher {launcher} needs a GPU; on CPUs use --launcher pytorch (tools/dist_train.sh)')
    if 'WORLD_SIZE' not in os.environ:
        raise UserError(
            '--launcher pytorch is for torchrun: use tools/dist_train.sh or tools/dist_test.sh, or leave it out'
        )
    warn('no GPU here: running distributed on the CPU with gloo')
    if cfg.get('sync_bn'):
        warn('SyncBN runs on GPUs only: every process takes batch statistics of its own')
        cfg.sync_bn = None
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    wrapper = cfg.get('model_wrapper_cfg') or dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    wrapper['device_ids'] = None
    cfg.model_wrapper_cfg = wrapper


def _has_other_accelerator() -> bool:
    from mmengine.device import get_device

    return get_device() not in ('cpu', 'cuda')


def has_accelerator() -> bool:
    """Whether mmengine will run on something that knows mixed precision, that is not on a CPU."""
    return torch.cuda.is_available() or _has_other_accelerator()


# -- checks -----------------------------------------------------------------------------------


def check_packages(cfg: Config) -> None:
    """The package of the config's task is installed, and mmcv has its operators.

    Raises:
        UserError: If not.
    """
    scope = cfg.get('default_scope')
    if scope not in PACKAGES:
        return
    package, requirement = PACKAGES[scope]
    if scope in ('mmdet', 'mmseg'):
        try:
            importlib.import_module('mmcv._ext')
        except ImportError as error:
            raise UserError(
                f'mmcv has no compiled operators ({_reason(error)}), which {scope} needs. '
                'Reinstall it against the torch in use: MMCV_WITH_OPS=1 pip install '
                '--no-cache-dir --force-reinstall --no-deps --no-build-isolation mmcv==2.1.0 '
                '(needs a C++ compiler and setuptools<81)'
            ) from error
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f'this config needs {package}, which cannot be imported ({_reason(error)}): pip install {requirement}'
        ) from error


def check_data(cfg: Config, loaders: Sequence[str]) -> None:
    """Every folder and annotation file that the loaders name is there.

    Args:
        cfg (Config): The config.
        loaders (Sequence[str]): Of 'train', 'val', 'test', those the run will use.

    Raises:
        UserError: With the first missing path and the layout that is expected.
    """
    for split in datacheck.from_config(cfg, loaders):
        missing = split.missing()
        if missing:
            layout = f' Expected layout: {split.layout}.' if split.layout else ''
            raise UserError(
                f'{split.name}: {missing[0]}.{layout} Put or link the data set there, or change '
                f'{split.name}.dataset.data_root; tools/data/check_dataset.py CONFIG says more'
            )


def check_checkpoint(path: str):
    """Read a checkpoint once before the run, so that a bad file stops it early.

    Args:
        path (str): File or http(s) address. Addresses are fetched by the first process of a
            machine only (into torch's cache, where the run finds them).

    Returns:
        dict | None: What is in it; None if it is not looked at here (another scheme, or another
        process does it).

    Raises:
        UserError: If the file is missing or cannot be read.
    """
    from mmengine.runner import CheckpointLoader

    path = str(path)
    remote = path.startswith(('http://', 'https://'))
    if remote and int(os.environ.get('LOCAL_RANK', 0)):
        return None
    if not remote:
        if datacheck.is_remote(path) or path.startswith('torchvision://'):
            return None
        file = osp.expanduser(path)
        if osp.isdir(file):
            raise UserError(f'checkpoint {path} is a folder; name a .pth file in it')
        if not osp.isfile(file):
            raise UserError(f'checkpoint not found: {path} (looked for {osp.abspath(file)})')
    try:
        return CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    except Exception as error:  # zip, pickle, network: each fails in its own way
        reason = _reason(error).removeprefix(f'{path}: ')
        if remote:
            raise UserError(
                f'cannot fetch {path}: {reason}. A file can be named in its place; a backbone starts from '
                'scratch with --cfg-options model.backbone.init_cfg=None'
            ) from error
        raise UserError(f'cannot read checkpoint {path}: {reason}; download or copy it again') from error


def overlock_of(model: Optional[dict]) -> Optional[dict]:
    """The config of the OverLoCK backbone in a model's config, or None."""
    backbone = (model or {}).get('backbone')
    if not isinstance(backbone, dict):
        return None
    kind = backbone.get('type')
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    return backbone if name.split('.')[-1] == 'OverLoCK' else None


def check_model(cfg: Config):
    """The config describes an OverLoCK that can be built. Costs no memory: it is built on 'meta'.

    Returns:
        OverLoCK | None: The backbone without storage; None if the config's is another one.

    Raises:
        UserError: If the constructor refuses its arguments.
    """
    backbone = overlock_of(cfg.get('model'))
    if backbone is None:
        return None
    from .models import OverLoCK

    arguments = {k: v for k, v in backbone.items() if k not in ('type', 'init_cfg', '_scope_')}
    try:
        with torch.device('meta'):
            return OverLoCK(**arguments)
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise UserError(f'model.backbone: {_reason(error)}') from error


def check_fit(backbone, content: Optional[dict], path: str, prefix: str = 'backbone.', strict: bool = False) -> None:
    """A checkpoint's backbone is the config's: a file of another variant or form is refused before the run.

    Args:
        backbone (OverLoCK | None): What :func:`check_model` built; None checks nothing.
        content (dict | None): What :func:`check_checkpoint` read; None checks nothing.
        path (str): The checkpoint's name, for the message.
        prefix (str): Where in the file the backbone is; '' finds it. Defaults to 'backbone.'.
        strict (bool): Demand every key, also of a file in this project's names. Defaults to False.

    Raises:
        UserError: If it does not fit.
    """
    if backbone is None or content is None:
        return
    from .checkpoints import CheckpointError, adapt_backbone_state_dict, unwrap

    try:
        state = unwrap(content)
        own = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        adapt_backbone_state_dict(backbone, own, '', strict=strict)
    except CheckpointError as error:
        raise UserError(f'{path} does not fit this config: {error}') from error


def check_whole(cfg: Config, checkpoint: str) -> Optional[dict]:
    """A checkpoint is of a config's model: another variant, or half a model, is refused.

    Args:
        cfg (Config): The config.
        checkpoint (str): File or http(s) address.

    Returns:
        dict | None: What :func:`check_checkpoint` read.

    Raises:
        UserError: If it cannot be read or is not.
    """
    content, backbone = check_checkpoint(checkpoint), check_model(cfg)
    if content is None or backbone is None:
        return content
    check_fit(backbone, content, checkpoint, strict=True)
    state = content.get('state_dict', content)
    absent = [part for part in HEADS if cfg.model.get(part) and not any(k.startswith(f'{part}.') for k in state)]
    if absent:
        raise UserError(
            f'{checkpoint} has no {" and no ".join(absent)}: it is a backbone, not the whole model that this needs'
        )
    return content


def check_batch_norm(cfg: Config) -> None:
    """No batch norm of a dense head sees a single value per channel in training.

    Pyramid pooling (UPerHead, PSPHead) reduces each picture to one value before a batch norm: with
    one picture per process there is no variance to normalise with. Whether SyncBN helps depends on
    the number of processes.

    Raises:
        UserError: If the batch is too small.
    """
    batch = (cfg.get('train_dataloader') or {}).get('batch_size')
    if batch != 1:
        return
    heads = (cfg.get('model') or {}).get('decode_head') or {}
    for head in heads if isinstance(heads, (list, tuple)) else [heads]:
        norm = (head.get('norm_cfg') or {}).get('type', '')
        synced = world_size() > 1 and norm in ('SyncBN', 'MMSyncBN', 'naiveSyncBN')
        if 'BN' in norm and not synced and 1 in (head.get('pool_scales') or ()):
            raise UserError(
                f"a batch of one picture gives the {norm} after {head.get('type')}'s 1x1 pooling "
                f'a single value per channel to normalise: set train_dataloader.batch_size to 2 '
                'or more (or train on several GPUs with SyncBN)'
            )


@contextlib.contextmanager
def explain_single_value():
    """Translate torch's complaint about a batch norm that saw a single value in training.

    Raises:
        UserError: In its place.
    """
    try:
        yield
    except ValueError as error:
        if 'a single value a channel' in str(error):  # OverLoCK says it itself, with the cure
            raise UserError(_reason(error)) from error
        if 'more than 1 value per channel' not in str(error):
            raise
        raise UserError(
            f'a batch norm saw a single value per channel in training ({_reason(error)}): {SINGLE_VALUE_CURE}'
        ) from error


@contextlib.contextmanager
def explain_non_finite():
    """Show the guard's error as one line: it names the parameter and the cure, a traceback adds nothing.

    Raises:
        UserError: In its place.
    """
    from .engine import NonFiniteError

    try:
        yield
    except NonFiniteError as error:
        raise UserError(_reason(error)) from error


@contextlib.contextmanager
def wait_for_the_cause(runner, seconds: float = 30):
    """Let the process that failed first be the one whose error the launcher reports.

    When one of several processes dies, the others find their connections broken and fail as well, at times before the
    launcher has seen the first one's exit: it then names the consequence as the cause. A process that lost a connection
    therefore waits to be stopped by its launcher, unless it has been told already, and fails by itself only after
    ``seconds`` (the cause was on another node).
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() > 1 and any(text in str(error) for text in LOST_CONNECTION):
            print(f'rank {rank()} lost the connection to another process ({_reason(error)})', file=sys.stderr)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save: stop at once when told to
            if not any(getattr(hook, 'told_to_stop', False) for hook in runner.hooks):
                time.sleep(seconds)
        raise


@contextlib.contextmanager
def explain_json(cfg: Config):
    """Name the annotation file that is damaged: the reader of COCO's says line and column alone.

    Raises:
        UserError: In place of the JSON error.
    """
    try:
        yield
    except json.JSONDecodeError as error:
        for split in datacheck.from_config(cfg, ('train', 'val', 'test')):
            path = getattr(split, 'annotations', None)
            if not path or not path.endswith('.json') or not osp.isfile(path):
                continue
            try:
                with open(path, encoding='utf-8') as file:
                    json.load(file)
            except ValueError as reason:
                raise UserError(f'annotation file {path} is damaged ({_reason(reason)}): copy it again') from error
        raise
