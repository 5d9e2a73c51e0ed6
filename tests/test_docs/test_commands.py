"""Every command in the documentation runs.

They run in their order in one folder, as a reader types them; ``sandbox.py`` says what is made smaller.
"""

import re
import shlex
import subprocess

import pytest
import sandbox
from pages import PAGES, ROOT, commands

#: Flags added to a tool's own, where a command is of a size that needs a GPU. The last of two equal flags counts.
SMALLER = {
    'tools/analysis/benchmark.py': '--device cpu --dtype fp32 --batch 1 --shape 64 --iters 1 --warmup 1'.split(),
    'tools/analysis/profile.py': '--device cpu --dtype fp32 --batch 2 --shape 64 --steps 1'.split(),
    'tools/analysis/train_speed.py': '--iters 1 --warmup 1 --batch-size 2'.split(),
    'tools/analysis/scaling.py': '--batch-size 2 --size 64 --iters 1 --warmup 0'.split(),
    'tools/deploy/export.py': '--exporter torchscript --dynamic batch --shape 64 64'.split(),
    'tools/deploy/quantize.py': '--samples 4'.split(),
    'tools/analysis/feeding.py': '--number 4 --rounds 1'.split(),
}

#: Commands that do not run here: a regular expression, and why.
NOT_HERE = {
    r'benchmark\.py --suite': 'a hundred rows; tests/test_tools/test_benchmark.py builds the suites',
    r'^trtexec': 'TensorRT runs on GPUs alone; no file of ours has been through it, as the page says',
    r'web_demo\.py': 'serves until it is stopped; tests/test_web starts it and drives the page',
}

#: Pages that a test of their own follows.
FOLLOWED = {'your-own-data': 'tests/test_guide.py', 'real-data': 'tests/test_docs/test_commands_real_data.py'}


def not_here(command):
    return next((why for pattern, why in NOT_HERE.items() if re.search(pattern, command)), None)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return sandbox.make(tmp_path_factory.mktemp('reader'))


@pytest.fixture(scope='module')
def done():
    """Commands that ran: one that stands on two pages runs once."""
    return set()


@pytest.mark.parametrize('page', [p for p in PAGES if commands(p) and p.stem not in FOLLOWED], ids=lambda p: p.stem)
def test_commands(page, folder, done):
    follow(page, folder, done)


def follow(page, folder, done):
    """Runs the commands of a page that have not run yet."""
    for command in commands(page):
        if not_here(command) or command in done:
            continue
        for program, *argv in sandbox.call(folder, command):
            if program == 'python':
                script = next(a for a in argv if a.endswith('.py'))
                sandbox.run(folder, argv, SMALLER.get(script, ()))
            else:
                CHECKS[program](argv)
        done.add(command)


def check_make(argv):
    """The targets exist: a dry run."""
    done = subprocess.run(['make', '-n', *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_pip(argv):
    """Versions are those that are tested, extras those that exist; tests/test_setup.py installs."""
    pins = dict(
        line.split(';')[0].strip().split('==')
        for line in (ROOT / 'requirements/openmmlab.txt').read_text().splitlines()
        if '==' in line
    )
    extras = re.findall(r'^ +[\'"]?(\w+)[\'"]?[:=]', (ROOT / 'setup.py').read_text(), re.MULTILINE)
    assert argv[0] == 'install'
    for argument in argv[1:]:
        if match := re.fullmatch(r'\.(?:\[(.*)\])?', argument):
            for extra in filter(None, (match[1] or '').split(',')):
                assert extra in extras, f'setup.py has no extra {extra}'
        elif match := re.fullmatch(r'([\w-]+)==([\w.]+)', argument):
            name, version = match.groups()
            text = (ROOT / 'tools/dev/setup_env.py').read_text()
            assert pins.get(name) == version or f'{name}=={version}' in text, f'{argument} is not what is tested'


def check_git(argv):
    assert argv[0] in ('clone', 'status')


CHECKS = dict(make=check_make, pip=check_pip, git=check_git)


@pytest.mark.parametrize('pattern', NOT_HERE)
def test_exceptions_are_needed(pattern):
    assert any(re.search(pattern, command) for page in PAGES for command in commands(page))


def test_pages_that_are_followed_elsewhere():
    for page, test in FOLLOWED.items():
        assert f'docs/{page}.md' in (ROOT / test).read_text()


def test_no_placeholders():
    """What stands in a block can be typed as it is."""
    for page in PAGES:
        for command in commands(page):
            words = [w for w in shlex.split(command, comments=True) if re.fullmatch(r'[A-Z]{4,}(\.\w+)?|<.*>', w)]
            assert not words, f'{page.name}: {command}'
