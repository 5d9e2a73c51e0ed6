"""The demo's steps: run once, side by side, stopped together, and never half-believed."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import steps
from steps import DemoError, Step, run_steps


@pytest.fixture
def script(tmp_path):
    """Function that makes a step of a few lines of Python."""

    def make(key, code, phase='Do', **kwargs):
        path = tmp_path / f'{key}.py'
        path.write_text(code)
        return Step(key, key.title(), phase, [str(path)], digest=kwargs.pop('digest', code), **kwargs)

    return make


def run(script_steps, work, limit=20):
    run_steps(script_steps, work, dict(DEMO_TEST='7'), limit)


def record(work, key):
    return json.loads((work / 'steps' / f'{key}.json').read_text())


def test_runs_and_remembers(script, tmp_path, capsys):
    log = tmp_path / 'log.txt'
    code = f"import os; open({str(log)!r}, 'a').write(os.environ['DEMO_TEST'])\nsum(range(3000000))"
    run([script('one', code)], tmp_path / 'work')
    state = record(tmp_path / 'work', 'one')
    assert state['done'] and state['wall'] > 0 and state['cpu'] > 0
    assert state['command'].endswith(f'python {tmp_path / "one.py"}') and 'DEMO_TEST=7' in state['command']
    run([script('one', code)], tmp_path / 'work')
    assert log.read_text() == '7'
    assert 'done before' in capsys.readouterr().out
    # Another digest: again, in an emptied folder.
    (tmp_path / 'work' / 'one').mkdir()
    run([script('one', code, digest='other')], tmp_path / 'work')
    assert log.read_text() == '77' and not (tmp_path / 'work' / 'one').exists()


def test_phases_follow_each_other_and_share_within(script, tmp_path):
    # Each of the two waits for the other one's file: only side by side do they end.
    wait = (
        'import pathlib, time\n'
        "here = pathlib.Path(__file__).parent; (here / '{0}.here').touch(); end = time.time() + 20\n"
        "while not (here / '{1}.here').exists():\n"
        '    assert time.time() < end\n'
        '    time.sleep(0.05)\n'
    )
    last = "import pathlib\nhere = pathlib.Path(__file__).parent\nassert (here / 'a.here').exists()"
    run(
        [script('a', wait.format('a', 'b')), script('b', wait.format('b', 'a')), script('c', last, 'Then')],
        tmp_path / 'work',
    )
    assert all(record(tmp_path / 'work', key)['done'] for key in 'abc')


def test_a_failure_is_told_and_stops_the_others(script, tmp_path):
    slow = script('slow', 'import time\ntime.sleep(60)')
    bad = script('bad', "import sys\nprint('the reason')\nsys.exit(3)")
    never = script('never', '', 'Later')
    begun = time.monotonic()
    with pytest.raises(DemoError, match=r'"Bad" failed with exit status 3(.|\n)*the reason(.|\n)*by hand') as error:
        run([slow, bad, never], tmp_path / 'work')
    assert time.monotonic() - begun < 20
    assert 'bad.log' in str(error.value)
    assert not record(tmp_path / 'work', 'slow')['done'] and not record(tmp_path / 'work', 'bad')['done']
    assert not (tmp_path / 'work' / 'steps' / 'never.json').exists()
    # Mended, it goes on, and the time of both attempts counts.
    before = record(tmp_path / 'work', 'bad')['wall']
    bad.command = script('good', '').command
    slow.command = bad.command
    run([slow, bad, never], tmp_path / 'work')
    assert record(tmp_path / 'work', 'never')['done'] and record(tmp_path / 'work', 'bad')['wall'] > before


def test_an_interrupt_ends_the_commands(script, tmp_path, monkeypatch):
    started = []
    start = steps.Job.start
    monkeypatch.setattr(steps.Job, 'start', lambda job, env: (start(job, env), started.append(job.process.pid)))

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps.Screen, 'progress', interrupt)
    with pytest.raises(KeyboardInterrupt):
        run([script('slow', 'import time\ntime.sleep(60)')], tmp_path / 'work')
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)
    assert not record(tmp_path / 'work', 'slow')['done']


def test_an_impatient_interrupt_leaves_nothing_running(script, tmp_path):
    # The command itself ignores the polite signal for a second, in which the second interrupt falls.
    child = script(
        'child',
        'import os, pathlib, signal, time\n'
        'signal.signal(signal.SIGTERM, lambda *args: (time.sleep(1), os._exit(1)))\n'
        "pathlib.Path(__file__).with_suffix('.pid').write_text(str(os.getpid()))\n"
        'time.sleep(60)\n',
    )
    code = (
        'import pathlib, signal, sys\n'
        f'sys.path.insert(0, {str(steps.ROOT / "tools/demo")!r})\n'
        'import run_demo, steps\n'
        'signal.signal(signal.SIGTERM, run_demo._interrupt)\n'
        f"step = steps.Step('child', 'Child', 'Do', {child.command!r}, digest='x')\n"
        f'steps.run_steps([step], pathlib.Path({str(tmp_path / "work")!r}), {{}}, 20)\n'
    )
    parent = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid_file, patience = tmp_path / 'child.pid', time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < patience:
        time.sleep(0.05)
    time.sleep(0.7)  # the parent is in its loop
    for _ in range(2):
        parent.terminate()
        time.sleep(0.3)
    parent.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_progress_follows_the_log(script, tmp_path):
    step = script('train', '', iterations=10, shown=(('acc', 'Accuracy', 100), ('no', 'None', 1)))
    job = steps.Job(step, tmp_path / 'work')
    assert job.progress() == (0.0, '')
    for stamp, lines in (('1', [(1, 9.0), (4, 3.0)]), ('2', [(4, 2.5), (5, 2.0)])):
        folder = tmp_path / 'work' / 'train' / stamp / 'vis_data'
        folder.mkdir(parents=True)
        text = [json.dumps(dict(loss=loss, step=i, lr=0.1)) for i, loss in lines]
        (folder / 'scalars.json').write_text('\n'.join([*text, '{"acc": 0.25, "step": 4}', '{"loss": 1']))
    assert job.progress() == (0.5, '5/10 loss 2.00 Accuracy 25.0')
    scalars = steps.read_scalars(tmp_path / 'work' / 'train')
    assert scalars['loss'] == [(1, 9.0), (4, 2.5), (5, 2.0)]  # the resumed run counts


def test_slower_than_planned_is_told_but_not_ended(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(steps, '_guess', lambda *args: 3600.0)
    monkeypatch.setattr(steps.Job, 'progress', lambda job: (0.5, ''))
    run([script('one', 'import time\ntime.sleep(1)')], tmp_path / 'work')
    assert 'more than the 20 minutes' in capsys.readouterr().out
    assert record(tmp_path / 'work', 'one')['done']


def test_guess():
    def step(phase, planned):
        return Step('k', 't', phase, [], planned=planned)

    plan = [step('a', 100), step('b', 200), step('b', 50), step('c', 100)]
    assert steps._guess(plan, 0, 0, 0.0, 1) == 401  # nothing known yet: the plan
    assert steps._guess(plan, 1, 200, 0.5, 200) == pytest.approx(800)  # half as fast as planned


def test_clock():
    assert [steps.clock(s) for s in (0, 59.6, 61, 3661)] == ['0:00', '1:00', '1:01', '1:01:01']


def test_screen_without_a_terminal_is_quiet(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', SimpleNamespace(isatty=lambda: False, write=sys.stdout.write, flush=lambda: 0))
    screen = steps.Screen(every=1000)
    screen.line('first')
    screen.progress('too soon')
    assert capsys.readouterr().out == 'first\n'
