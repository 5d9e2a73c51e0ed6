#!/usr/bin/env python3
"""Make the virtual environment that the Makefile works in.

    python3 tools/dev/setup_env.py [--line openmmlab|onedl] [--venv DIR]

Needs Python 3.10-3.12 with its headers, a C++ compiler and a package index; nothing else. Installs the versions pinned
in ``requirements/<line>.txt``, compiles mmcv with its operators against the torch just installed, and installs this
package in editable form. A finished environment is recognised by its stamp, and then nothing is done. Anything else
(changed pins, an interrupted set-up) is made again from the start, which takes seconds: uv keeps what it downloaded,
and the compiled mmcv is kept in ``~/.cache/mmoverlock``, a folder for each torch and Python that it was made with.

Standard library only, and no syntax newer than Python 3.7: it must be able to say that the Python is too old.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

UV = '0.13.9'
PYTHONS = ((3, 10), (3, 11), (3, 12))
# The package that provides mmcv, compiled here. mmdet 3.3.0 and mmsegmentation 1.2.2 refuse mmcv 2.2.0.
MMCV = {'openmmlab': 'mmcv==2.1.0', 'onedl': 'onedl-mmcv==2.3.6'}
VENV = {'openmmlab': '.venv', 'onedl': '.venv-onedl'}
STAMP = 'mmoverlock-setup.json'
DISK_GIB = 8
HEARTBEAT_S = 30

# Run in the new environment. Fails where mmcv lacks its operators or was compiled against another torch.
PROBE_MMCV = """
import torch
from mmcv.ops import get_compiling_cuda_version, nms
from torch.utils.cpp_extension import CUDA_HOME
if torch.cuda.is_available() and CUDA_HOME and get_compiling_cuda_version() == 'not available':
    raise SystemExit('it was compiled without CUDA, but there are a GPU and a CUDA toolkit')
boxes = torch.tensor([[0., 0., 2., 2.], [0., 0., 2., 2.]])
if len(nms(boxes, torch.tensor([1., .5]), .5)[1]) != 1:
    raise SystemExit('mmcv.ops.nms gives a wrong result')
"""
# What mmcv would be compiled against, and for.
PROBE_TORCH = """
import os, sys, torch
from torch.utils.cpp_extension import CUDA_HOME
gpu = torch.cuda.is_available()
forced = os.getenv('FORCE_CUDA') == '1'
target = 'cuda' if forced or gpu and CUDA_HOME else 'no-toolkit' if gpu else 'cpu'
print(f'torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}', target)
"""


class SetupError(Exception):
    """What went wrong and what to do about it, for a person to read."""


def say(text):
    print(f'[set-up] {text}', flush=True)


def minutes(seconds):
    return f'{int(seconds) // 60} min {int(seconds) % 60:02d} s'


# --- what the machine must have ---------------------------------------------------------------


def choose_python(version=tuple(sys.version_info[:2])):
    """Return a supported interpreter: the one that runs this, or else one on the PATH.

    Raises:
        SetupError: If there is none.
    """
    if version in PYTHONS:
        return sys.executable
    for name in ('python3.11', 'python3.12', 'python3.10'):
        path = shutil.which(name)
        # Asked to run, not only found: version managers leave shims of versions they do not have.
        if path and subprocess.run([path, '-c', ''], stderr=subprocess.DEVNULL).returncode == 0:
            return path
    raise SetupError(
        f'Python {version[0]}.{version[1]} is not supported, 3.10, 3.11 or 3.12 is needed. Install one of them, for '
        'example `apt-get install python3.11 python3.11-dev python3.11-venv`, and name it if it is not on the PATH: '
        '`make setup PYTHON=/where/it/is/python3.11`.'
    )


def check_headers(include=None):
    """Raise SetupError when Python.h is missing, without which mmcv does not compile."""
    include = Path(include or sysconfig.get_paths()['include'])
    if not (include / 'Python.h').is_file():
        python = 'python{}.{}'.format(*sys.version_info)
        raise SetupError(
            f'the headers of {python} are missing (no Python.h in {include}), so mmcv cannot be compiled. Install '
            f'them: `apt-get install {python}-dev` (Debian, Ubuntu), `dnf install {python}-devel` (Fedora).'
        )


def check_compiler():
    """Raise SetupError when there is no compiler for C++17, which torch's headers need."""
    cure = 'Install one: `apt-get install g++` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora).'
    name = os.environ.get('CXX') or 'c++'  # what torch calls
    if not shutil.which(name.split()[0]):
        raise SetupError(f'no C++ compiler (`{name}` is not on the PATH), so mmcv cannot be compiled. {cure}')
    probe = b'#include <optional>\nint main() { return std::optional<int>(0).value(); }\n'
    command = name.split() + ['-std=c++17', '-x', 'c++', '-fsyntax-only', '-']
    result = subprocess.run(command, input=probe, capture_output=True)
    if result.returncode != 0:
        message = result.stderr.decode(errors='replace').strip().split('\n')[0]
        raise SetupError(
            f'the C++ compiler `{name}` does not compile C++17 ({message}), so mmcv cannot be compiled. {cure}'
        )


def check_disk(folder):
    """Raise SetupError when there is no room for the environment."""
    free = shutil.disk_usage(str(folder)).free / 2**30
    if free < DISK_GIB:
        raise SetupError(
            f'only {free:.1f} GiB are free in {folder}, the environment needs about {DISK_GIB} GiB. Make room, or '
            'put it elsewhere: `make setup VENV=/other/disk/venv`.'
        )


# --- running things in the environment --------------------------------------------------------


def environment(venv):
    """The variables installers run with: this virtual environment, and no other Python's paths."""
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME')}
    return dict(env, VIRTUAL_ENV=str(venv), PATH=f'{venv}/bin{os.pathsep}{env.get("PATH", "")}')


def run(venv, command, doing):
    """Run one of the environment's programs and show what it prints.

    Raises:
        SetupError: If it fails; ``doing`` says in words what failed.
    """
    command = [f'{venv}/bin/{command[0]}', *command[1:]]
    result = subprocess.run(command, env=environment(venv), stdin=subprocess.DEVNULL, cwd=ROOT)
    if result.returncode != 0:
        raise SetupError(f'{doing} failed, its messages are above. The command: {" ".join(command)}')


def run_with_heartbeat(command, env, log, doing, every=HEARTBEAT_S):
    """Run a long, silent command, saying every so many seconds that it still runs.

    Returns:
        int: Its exit status. What it printed is appended to the file ``log``.
    """
    start = last = time.time()
    with open(log, 'ab') as out:
        child = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=ROOT,
            start_new_session=True,  # a process group, to end the compilers with it
        )
        try:
            while child.poll() is None:
                time.sleep(0.2)
                if time.time() - last >= every:
                    last = time.time()
                    say(f'{doing}: {compiled_files(log)}{minutes(last - start)} so far')
        finally:
            if child.poll() is None:  # we are being interrupted
                os.killpg(child.pid, signal.SIGTERM)
                child.wait()
    return child.returncode


def compiled_files(log):
    """How far the compilation is, from the ``[n/m]`` that ninja prints, or an empty string."""
    steps = re.findall(rb'^ *\[(\d+)/(\d+)\]', log.read_bytes(), re.MULTILINE)
    return '{} of {} files, '.format(*(int(n) for n in steps[-1])) if steps else ''


def ask_python(venv, code):
    """Run code in the environment's Python; return its exit status and the last line it printed."""
    # -I: neither this folder nor PYTHONPATH may provide another mmcv.
    command = [f'{venv}/bin/python', '-I', '-c', code]
    result = subprocess.run(
        command,
        env=environment(venv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines = result.stdout.decode(errors='replace').strip().split('\n')
    return result.returncode, lines[-1]


# --- the steps --------------------------------------------------------------------------------


def fingerprint(line):
    """What a finished environment is recognised by: everything that decides what is in it."""
    pins = (ROOT / 'requirements' / f'{line}.txt').read_bytes()
    return {
        'line': line,
        'pins': hashlib.sha256(pins).hexdigest(),
        'mmcv': MMCV[line],
        'uv': UV,
        'python': '{}.{}.{}'.format(*sys.version_info),
        'root': str(ROOT),
    }


def is_finished(venv, wanted):
    """Whether ``venv`` holds a finished environment with the fingerprint ``wanted``."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return stamp == wanted and os.access(str(venv / 'bin' / 'python'), os.X_OK)


def write_stamp(venv, wanted):
    new = venv / f'{STAMP}.new'
    new.write_text(json.dumps(wanted, indent=2))
    new.replace(venv / STAMP)


def make_venv(venv):
    """Make a virtual environment with only uv in it, in place of what an earlier set-up left."""
    venv.mkdir(exist_ok=True)
    marker = venv / 'pyvenv.cfg'
    leftovers = [path for path in venv.iterdir() if path != marker]
    if leftovers and not marker.exists():
        raise SetupError(
            f'{venv} is there already and is no virtual environment: remove it, or choose another place with VENV=.'
        )
    # Interrupted at any point from here on, the folder is still known as ours.
    marker.touch()
    if leftovers:
        say(f'emptying {venv}, which is unfinished or has other versions in it')
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(str(path))
        else:
            path.unlink()
    check_disk(venv.parent)
    say(f'making {venv} with Python {sys.version.split()[0]}')
    command = [sys.executable, '-m', 'venv', str(venv)]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        python = 'python{}.{}'.format(*sys.version_info)
        raise SetupError(
            'Python could not make a virtual environment. On Debian and Ubuntu that is a package of its own: '
            f'`apt-get install {python}-venv`.'
        )
    pip = ['python', '-m', 'pip', '--disable-pip-version-check', 'install', '--quiet', f'uv=={UV}']
    run(venv, pip, 'installing uv with pip (can the package index be reached?)')


def install_pins(venv, line):
    """Install what ``requirements/<line>.txt`` pins, and nothing else."""
    pins = f'requirements/{line}.txt'
    say(f"installing what {pins} pins (5 GB; from uv's cache when it is there)")
    # --no-deps: the file is complete. --build-constraints: what comes as source is built with the pinned setuptools.
    # --compile-bytecode: a minute now instead of seconds at every import where PYTHONDONTWRITEBYTECODE is set.
    command = ['uv', 'pip', 'install', '--no-deps', '--compile-bytecode', '--build-constraints', pins, '-r', pins]
    run(venv, command, 'installing the pinned packages')


def probe_mmcv(venv):
    """Use mmcv's operators in the environment. Returns what is wrong, or an empty string."""
    status, answer = ask_python(venv, PROBE_MMCV)
    return '' if status == 0 else answer or f'exit status {status}'


def wheel_folder(requirement, built_with):
    """Where the compiled mmcv is kept: what fits one torch and Python is of no use to another."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return Path(cache) / 'mmoverlock' / f'{requirement.replace("==", "-")}-{built_with}'


def build_environment(venv, for_cpu):
    """The variables that the build of mmcv reads."""
    env = environment(venv)
    env['MMCV_WITH_OPS'] = '1'
    # One compiler takes up to 1.5 GiB; left alone, mmcv starts four even on a small machine.
    memory_gib = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    jobs = min(len(os.sched_getaffinity(0)), int(memory_gib / 2))
    env.setdefault('MAX_JOBS', str(max(1, jobs)))
    if for_cpu:
        env['CUDA_VISIBLE_DEVICES'] = ''  # seeing a GPU, mmcv would compile for CUDA
    return env


def compile_mmcv(venv, requirement, env, into):
    """Compile mmcv's wheel.

    Args:
        venv (Path): The environment whose torch it is compiled against.
        requirement (str): Name and version of the package.
        env (dict): The variables of :func:`build_environment`.
        into (Path): An empty folder for the wheel.

    Returns:
        Path: The wheel.

    Raises:
        SetupError: If it does not compile.
    """
    log = venv / 'mmcv-build.log'
    jobs = env['MAX_JOBS']
    say(f'compiling {requirement} with its operators, {jobs} files at a time; log: {log}')
    say('this is done once, and takes 9-13 minutes on 2 cores')
    # Without isolation the build sees the environment's torch. In isolation it would see none, leave the operators
    # out and say nothing. No cache: pip's does not ask which torch a wheel was compiled against.
    command = [f'{venv}/bin/python', '-m', 'pip', 'wheel', '--verbose', '--no-deps', '--use-pep517']
    command += ['--no-build-isolation', '--no-cache-dir', '--no-binary', ':all:']
    command += ['--wheel-dir', str(into), requirement]
    status = run_with_heartbeat(command, env, log, f'compiling {requirement}')
    wheels = list(into.glob('*.whl'))
    if status != 0 or len(wheels) != 1:
        # What a compiler says stands far above the traceback of the build that called it, and
        # its command lines are thousands of characters long.
        lines = [line[:200] for line in log.read_text(errors='replace').splitlines()]
        errors = [line for line in lines if re.search(r'\berror:|Killed', line)]
        shown = '\n'.join([*errors[:10], '...', *lines[-10:]])
        ended = f'was ended by signal {-status}' if status < 0 else f'failed with status {status}'
        raise SetupError(
            f'compiling {requirement} {ended}. From {log}:\n{shown}\n'
            'If it or a compiler was killed, memory ran out: `make setup MAX_JOBS=1` takes less.'
        )
    return wheels[0]


def install_mmcv(venv, line):
    """Install mmcv, compiled with its operators against the torch of the environment."""
    requirement = MMCV[line]
    status, answer = ask_python(venv, PROBE_TORCH)
    if status != 0:
        raise SetupError(f'torch does not work in {venv}: {answer}')
    built_with, target = answer.split()
    if target == 'no-toolkit':
        say(
            "there is a GPU but no CUDA toolkit (nvcc), so mmcv's operators are compiled for the CPU only. Detectors "
            "need them on the GPU: install the toolkit of torch's CUDA version, set CUDA_HOME, and run "
            '`make clean-env setup`'
        )
        target = 'cpu'

    def install(wheel):
        options = ['--quiet', '--no-deps', '--compile-bytecode', '--reinstall', str(wheel)]
        run(venv, ['uv', 'pip', 'install', *options], f'installing {wheel}')
        return probe_mmcv(venv)

    kept = wheel_folder(requirement, f'{built_with}-{target}')
    for wheel in kept.glob('*.whl'):
        say(f'installing {requirement}, compiled earlier: {wheel}')
        problem = install(wheel)
        if not problem:
            return
        say(f'that one does not work ({problem})')
    building = venv / 'mmcv-wheel'
    building.mkdir()
    wheel = compile_mmcv(venv, requirement, build_environment(venv, target == 'cpu'), building)
    problem = install(wheel)
    if problem:
        raise SetupError(
            f'{requirement} was compiled, but its operators (mmcv._ext) do not work: {problem}. '
            f'{venv}/mmcv-build.log may say why; try `make clean-env setup` with CXX, CXXFLAGS and LD_LIBRARY_PATH '
            'unset.'
        )
    # Kept only now that it is known to work, and under its name only when it is whole.
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(str(wheel), f'{kept / wheel.name}.new')
    os.replace(f'{kept / wheel.name}.new', str(kept / wheel.name))
    shutil.rmtree(str(building))


def install_package(venv):
    """Install this package in editable form and see that it imports."""
    say('installing mmoverlock in editable form')
    command = ['uv', 'pip', 'install', '--quiet', '--no-deps', '--no-build-isolation', '-e', '.']
    run(venv, command, 'installing mmoverlock')
    run(venv, ['python', '-I', '-c', 'import mmoverlock'], 'importing mmoverlock')


def set_up(line, venv):
    """Make the environment ``venv`` for ``line``, unless it is there already."""
    wanted = fingerprint(line)
    if is_finished(venv, wanted):
        return
    venv.parent.mkdir(parents=True, exist_ok=True)
    # Two at a time would pull the environment from under each other.
    with open(f'{venv}.lock', 'w') as lock:
        say('waiting until no other set-up works here' if is_locked(lock) else 'setting up')
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_finished(venv, wanted):
            return
        start = time.time()
        check_headers()
        check_compiler()
        make_venv(venv)
        install_pins(venv, line)
        install_mmcv(venv, line)
        install_package(venv)
        write_stamp(venv, wanted)
        say(f'{venv} is ready after {minutes(time.time() - start)}')


def is_locked(file):
    """Whether another process holds the lock on ``file``."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--line',
        default='openmmlab',
        choices=sorted(MMCV, reverse=True),
        help='openmmlab: the original packages (default); onedl: the maintained onedl-* forks',
    )
    parser.add_argument('--venv', help='where to make it (default: .venv, or .venv-onedl)')
    return parser.parse_args(argv)


def main():
    args = parse_args()
    venv = Path(os.path.abspath(str(ROOT / (args.venv or VENV[args.line]))))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    try:
        python = choose_python()
        if python != sys.executable:
            say(f'using {python}: Python {sys.version.split()[0]} is not supported')
            os.execv(python, [python, *sys.argv])
        set_up(args.line, venv)
    except SetupError as error:
        sys.exit(f'[set-up] ERROR: {error}')
    except KeyboardInterrupt:
        sys.exit('[set-up] interrupted. The same command starts again and keeps what was downloaded')


if __name__ == '__main__':
    main()
