import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def env():
    """The set-up script as a module, fresh for each test."""
    spec = importlib.util.spec_from_file_location('setup_env', ROOT / 'tools/dev/setup_env.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path, text):
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return path


# -- pins --------------------------------------------------------------------------------------


@pytest.mark.parametrize('line', ['openmmlab', 'onedl'])
def test_every_package_is_pinned(line):
    pins = (ROOT / f'requirements/{line}.txt').read_text().splitlines()
    pins = [pin for pin in pins if not pin.startswith('#')]
    assert all(re.match(r'[\w.-]+==[\w.]+( ; .+)?$', pin) for pin in pins), pins
    wanted = (ROOT / f'requirements/{line}.in').read_text()
    direct = re.findall(r'^[\w-]+==[\w.]+', wanted, re.MULTILINE)
    assert len(direct) == 6 and set(direct) <= set(pins)
    assert {'torch==2.11.0', 'torchvision==0.26.0'} <= set(pins)
    common = (ROOT / 'requirements/common.in').read_text()
    names = {re.match(r'[\w.-]+', pin)[0] for pin in pins}
    assert set(re.findall(r'^[\w-]+', common, re.MULTILINE)) <= names
    assert 'opencv-python' not in names, 'two packages would write the same module'
    setuptools = next(pin for pin in pins if pin.startswith('setuptools=='))
    assert int(re.search(r'==(\d+)', setuptools)[1]) < 81


def test_default_line_is_the_one_promised(env):
    pins = (ROOT / 'requirements/openmmlab.txt').read_text().splitlines()
    assert {'mmengine==0.10.7', 'mmdet==3.3.0', 'mmsegmentation==1.2.2'} <= set(pins)
    assert 'mmpretrain==1.2.0' in pins
    assert env.MMCV['openmmlab'] == 'mmcv==2.1.0'
    args = env.parse_args([])
    assert (args.line, env.VENV[args.line]) == ('openmmlab', '.venv')


# -- what the machine must have ----------------------------------------------------------------


def test_supported_python_is_kept(env):
    assert env.choose_python((3, 12)) == sys.executable


def test_unsupported_python_gives_way_to_one_on_the_path(env, monkeypatch, tmp_path):
    program(tmp_path / 'python3.11', 'exit 127')  # a shim of a version that is not there
    good = program(tmp_path / 'python3.10', 'exit 0')
    monkeypatch.setenv('PATH', str(tmp_path))
    assert env.choose_python((3, 13)) == str(good)


def test_unsupported_python_alone_names_the_cure(env, monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(env.SetupError, match=r'Python 3\.9 is not supported.*apt-get install'):
        env.choose_python((3, 9))


def test_missing_headers_name_the_cure(env, tmp_path):
    with pytest.raises(env.SetupError, match=r'Python\.h.*apt-get install python3\.\d+-dev'):
        env.check_headers(tmp_path)
    (tmp_path / 'Python.h').touch()
    env.check_headers(tmp_path)


def test_missing_compiler_names_the_cure(env, monkeypatch, tmp_path):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(env.SetupError, match=r'no C\+\+ compiler.*apt-get install g\+\+'):
        env.check_compiler()


def test_useless_compiler_names_the_cure(env, monkeypatch, tmp_path):
    compiler = program(tmp_path / 'c++', 'echo "unknown option -std=c++17" >&2; exit 1')
    monkeypatch.setenv('CXX', str(compiler))
    with pytest.raises(env.SetupError, match=r'unknown option.*apt-get install g\+\+'):
        env.check_compiler()


def test_full_disk_names_the_cure(env, monkeypatch, tmp_path):
    monkeypatch.setattr(env.shutil, 'disk_usage', lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(env.SetupError, match=r'only 1\.0 GiB.*VENV='):
        env.check_disk(tmp_path)


def test_missing_python_names_the_cure():
    command = ['make', '-s', 'setup', 'PYTHON=no-such-python']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "no 'no-such-python' on the PATH. Install Python 3.10-3.12" in result.stderr


# -- running things ----------------------------------------------------------------------------


def test_long_commands_say_that_they_run(env, capsys, tmp_path):
    command = ['sh', '-c', 'echo compiling; sleep 0.7; exit 3']
    log = tmp_path / 'log'
    status = env.run_with_heartbeat(command, dict(os.environ), log, 'making it', every=0.3)
    assert status == 3
    assert log.read_text() == 'compiling\n'
    assert '[set-up] making it: 0 min 00 s so far' in capsys.readouterr().out


def test_interrupting_ends_the_command(env, monkeypatch, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    pid = tmp_path / 'pid'
    # The shell's child is what must not outlive it.
    command = ['sh', '-c', f'sleep 60 & echo $! > {pid}; wait']
    real_sleep = env.time.sleep
    monkeypatch.setattr(env.time, 'sleep', lambda s: pid.exists() and interrupt(s))
    with pytest.raises(KeyboardInterrupt):
        env.run_with_heartbeat(command, dict(os.environ), tmp_path / 'log', 'making it')
    child = Path('/proc') / pid.read_text().strip()
    for _ in range(50):
        # A zombie waits for its parent, it no longer runs.
        if not child.exists() or 'State:\tZ' in (child / 'status').read_text():
            break
        real_sleep(0.1)
    else:
        pytest.fail('the child of the interrupted command still runs')


# -- mmcv --------------------------------------------------------------------------------------


@pytest.fixture
def fake_venv(tmp_path, monkeypatch):
    """An environment whose programs log how they were called.

    Its torch is 2.11 for Python 3.11 on ``target``. Compiling writes a wheel that says ``compiled``;
    of the wheels that get installed, those that say ``bad`` lack the operators.
    """
    venv = tmp_path / 'venv'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.delenv('MAX_JOBS', raising=False)
    program(venv / 'bin/uv', f'for wheel; do :; done; echo uv "$@" >> {venv}/calls; cp $wheel {venv}/it')
    program(
        venv / 'bin/python',
        f"""
        case "$*" in
        *'pip wheel'*)
            echo "ops=$MMCV_WITH_OPS gpus=$CUDA_VISIBLE_DEVICES python $*" >> {venv}/calls
            echo "[7/77] c++ -c nms.cpp"
            [ -e {venv}/broken ] && echo "x.h:1: error: no such thing" && seq 100 && exit 1
            while [ "$1" != --wheel-dir ]; do shift; done
            cat {venv}/compiles > $2/mmcv-2.1.0-cp311.whl;;
        *__version__*) echo "torch2.11.0-cp311 $(cat {venv}/target)";;
        *) [ "$(cat {venv}/it)" = bad ] && echo "No module named mmcv._ext" && exit 1;;
        esac
        exit 0""",
    )
    (venv / 'target').write_text('cpu')
    (venv / 'compiles').write_text('compiled')
    return venv


def kept(venv, target='cpu'):
    """Where the wheel that the fake environment compiles is kept."""
    return venv.parent / f'cache/mmoverlock/mmcv-2.1.0-torch2.11.0-cp311-{target}/mmcv-2.1.0-cp311.whl'


def compilations(venv):
    calls = (venv / 'calls').read_text().splitlines()
    return [call for call in calls if 'pip wheel' in call]


def test_mmcv_is_compiled_with_operators_against_the_torch_in_use(env, fake_venv):
    env.install_mmcv(fake_venv, 'openmmlab')
    (call,) = compilations(fake_venv)
    assert call.startswith('ops=1 ') and call.endswith(' mmcv==2.1.0')
    assert '--no-build-isolation' in call and '--no-cache-dir' in call
    assert kept(fake_venv).read_text() == 'compiled'


def test_mmcv_is_compiled_once(env, fake_venv, capsys):
    kept(fake_venv).parent.mkdir(parents=True)
    kept(fake_venv).write_text('good')
    env.install_mmcv(fake_venv, 'openmmlab')
    assert not compilations(fake_venv)
    assert (fake_venv / 'it').read_text() == 'good'
    assert 'compiled earlier' in capsys.readouterr().out


def test_kept_mmcv_without_operators_is_compiled_again(env, fake_venv, capsys):
    kept(fake_venv).parent.mkdir(parents=True)
    kept(fake_venv).write_text('bad')
    env.install_mmcv(fake_venv, 'openmmlab')
    assert len(compilations(fake_venv)) == 1
    assert kept(fake_venv).read_text() == 'compiled'
    assert 'does not work (No module named mmcv._ext)' in capsys.readouterr().out


def test_mmcv_for_another_torch_or_target_is_not_taken(env, fake_venv):
    env.install_mmcv(fake_venv, 'openmmlab')
    (fake_venv / 'target').write_text('cuda')
    env.install_mmcv(fake_venv, 'openmmlab')
    assert len(compilations(fake_venv)) == 2
    assert kept(fake_venv, 'cuda').exists()


def test_compiled_mmcv_without_operators_is_an_error_and_not_kept(env, fake_venv):
    (fake_venv / 'compiles').write_text('bad')
    with pytest.raises(env.SetupError, match=r'mmcv\._ext.*make clean-env setup'):
        env.install_mmcv(fake_venv, 'openmmlab')
    assert not kept(fake_venv).exists()


def test_failed_compilation_shows_what_the_compiler_said(env, fake_venv):
    (fake_venv / 'broken').touch()
    expected = r'(?s)failed with status 1.*x\.h:1: error: no such thing\n\.\.\.\n91.*100\n.*MAX_JOBS=1'
    with pytest.raises(env.SetupError, match=expected):
        env.install_mmcv(fake_venv, 'openmmlab')
    assert not kept(fake_venv).exists()


def test_gpu_without_toolkit_is_compiled_for_cpu(env, fake_venv, capsys):
    (fake_venv / 'target').write_text('no-toolkit')
    env.install_mmcv(fake_venv, 'openmmlab')
    assert 'gpus= ' in compilations(fake_venv)[0]
    assert 'set CUDA_HOME' in capsys.readouterr().out
    assert kept(fake_venv, 'cpu').exists()


def test_progress_is_what_ninja_says(env, tmp_path):
    log = tmp_path / 'log'
    log.write_text('building\n')
    assert env.compiled_files(log) == ''
    log.write_text('  [1/77] c++ a.cpp\n  [12/77] c++ b.cpp [3/4]\n')
    assert env.compiled_files(log) == '12 of 77 files, '


def test_operators_work_here(env):
    """The probes themselves, on the environment that runs the tests."""
    assert env.probe_mmcv(Path(sys.prefix)) == ''
    status, answer = env.ask_python(Path(sys.prefix), env.PROBE_TORCH)
    assert status == 0
    assert re.fullmatch(r'torch2\.\S+-cp3\d+ (cpu|cuda|no-toolkit)', answer)


# -- the whole ---------------------------------------------------------------------------------


@pytest.fixture
def steps(env, monkeypatch):
    """Replace the slow steps; returns the list of those that ran."""
    ran = []

    def make_venv(venv):
        ran.append('venv')
        shutil.rmtree(venv, ignore_errors=True)
        program(venv / 'bin/python', 'exit 0')

    monkeypatch.setattr(env, 'make_venv', make_venv)
    for name in ('install_pins', 'install_mmcv', 'install_package'):
        monkeypatch.setattr(env, name, lambda *_, name=name: ran.append(name))
    for name in ('check_headers', 'check_compiler'):
        monkeypatch.setattr(env, name, lambda: None)
    return ran


def test_second_set_up_does_nothing(env, steps, tmp_path):
    env.set_up('openmmlab', tmp_path / 'venv')
    assert steps == ['venv', 'install_pins', 'install_mmcv', 'install_package']
    env.set_up('openmmlab', tmp_path / 'venv')
    assert len(steps) == 4


@pytest.mark.parametrize('failing', ['install_pins', 'install_mmcv', 'install_package'])
def test_interrupted_set_up_starts_again(env, steps, monkeypatch, tmp_path, failing):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(env, failing, interrupt)
        with pytest.raises(KeyboardInterrupt):
            env.set_up('openmmlab', tmp_path / 'venv')
    steps.clear()
    env.set_up('openmmlab', tmp_path / 'venv')
    assert steps == ['venv', 'install_pins', 'install_mmcv', 'install_package']


@pytest.mark.parametrize('key', ['pins', 'mmcv', 'python', 'root', 'line'])
def test_other_versions_are_set_up_again(env, steps, tmp_path, key):
    env.set_up('openmmlab', tmp_path / 'venv')
    stamp = tmp_path / 'venv' / env.STAMP
    stamp.write_text(json.dumps(dict(json.loads(stamp.read_text()), **{key: 'other'})))
    env.set_up('openmmlab', tmp_path / 'venv')
    assert len(steps) == 8


@pytest.mark.parametrize('damage', ['no stamp', 'half a stamp', 'no python'])
def test_damaged_environment_is_not_finished(env, steps, tmp_path, damage):
    venv = tmp_path / 'venv'
    env.set_up('openmmlab', venv)
    if damage == 'no python':
        (venv / 'bin/python').unlink()
    elif damage == 'no stamp':
        (venv / env.STAMP).unlink()
    else:
        (venv / env.STAMP).write_text('{"line": "open')
    assert not env.is_finished(venv, env.fingerprint('openmmlab'))


def test_half_removed_environment_is_still_known_as_ours(env, monkeypatch, tmp_path):
    venv = tmp_path / 'venv'
    (venv / 'lib/python').mkdir(parents=True)
    (venv / 'lib64').symlink_to('lib')
    (venv / 'pyvenv.cfg').touch()

    def interrupt(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(env.shutil, 'rmtree', interrupt)
        with pytest.raises(KeyboardInterrupt):
            env.make_venv(venv)
    made = []
    monkeypatch.setattr(env.subprocess, 'run', lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr(env, 'run', lambda *_: made.append(True))
    env.make_venv(venv)
    assert made and [path.name for path in venv.iterdir()] == ['pyvenv.cfg']


def test_folder_of_someone_else_is_left_alone(env, tmp_path):
    (tmp_path / 'thesis.tex').touch()
    with pytest.raises(env.SetupError, match='is no virtual environment'):
        env.make_venv(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


# -- make and CI -------------------------------------------------------------------------------


def dry_run(*args):
    """The commands that make would run, without a make above it telling it otherwise."""
    variables = ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS', 'LINE', 'VENV', 'ARGS', 'PYTHON')
    clean = {k: v for k, v in os.environ.items() if k not in variables}
    command = ['make', '--dry-run', *args]
    return subprocess.run(command, cwd=ROOT, env=clean, check=True, capture_output=True, text=True)


def test_make_test_sets_up_and_runs_the_tests():
    out = dry_run('test', 'ARGS=-k some').stdout
    assert 'tools/dev/setup_env.py --line openmmlab --venv .venv\n' in out
    assert re.search(r'^OMP_NUM_THREADS=1 \.venv/bin/python -m pytest .*-k some$', out, re.MULTILINE)


def test_make_demo_sets_up_and_runs_the_demo():
    out = dry_run('demo').stdout
    assert out.index('setup_env.py') < out.index('.venv/bin/python tools/demo/run_demo.py')


def test_each_line_has_its_environment():
    out = dry_run('test', 'LINE=onedl').stdout
    assert '--line onedl --venv .venv-onedl\n' in out
    assert '.venv-onedl/bin/python -m pytest' in out


def test_ci_runs_make_test_and_nothing_else():
    script = ROOT / '.ci/run'
    assert os.access(script, os.X_OK)
    code = [line for line in script.read_text().splitlines() if not line.startswith('#')]
    assert code == ['cd "$(dirname "$0")/.." && exec make test']


# -- the package -------------------------------------------------------------------------------


def test_core_imports_without_any_mm_package_but_mmengine():
    code = """
        import sys
        from importlib.abc import MetaPathFinder
        class Refuse(MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split('.')[0] in {'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torchvision'}:
                    raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        sys.meta_path.insert(0, Refuse())
        from mmoverlock import OverLoCK
        from mmengine.registry import MODELS
        assert isinstance(MODELS.build(dict(type='mmoverlock.OverLoCK', arch='xt')), OverLoCK)
    """
    subprocess.run([sys.executable, '-c', textwrap.dedent(code)], check=True)


def test_wheel_ships_what_mim_looks_for(tmp_path):
    source = tmp_path / 'source'
    skip = shutil.ignore_patterns('.*', 'work_dirs', 'tests', '__pycache__', '*.egg-info', 'build')
    shutil.copytree(ROOT, source, ignore=skip)
    command = [sys.executable, '-c', 'import setuptools.build_meta as b; b.build_wheel("..")']
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob('mmoverlock-*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        'mmoverlock/__init__.py',
        'mmoverlock/ops/contmix/__init__.py',
        'mmoverlock/.mim/model-index.yml',
        'mmoverlock/.mim/tools/train.py',
        'mmoverlock/.mim/configs/classification/overlock-xt_8xb256_in1k.py',
    } <= names
    assert not [name for name in names if '__pycache__' in name]
