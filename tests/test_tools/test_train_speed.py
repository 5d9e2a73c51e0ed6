import pytest
from tiny_configs import load_tool, write_config


@pytest.fixture(scope='module')
def tool():
    return load_tool('analysis/train_speed.py')


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_a_step_of_every_task_is_timed(tool, task, roots, tmp_path, capsys):
    config = write_config(tmp_path / f'tiny_{task}.py', task, roots[task])
    tool.main([config, '--iters', '2', '--warmup', '1', '--batch-size', '2'])
    cells = [c.strip() for c in capsys.readouterr().out.splitlines()[-1].strip('|').split('|')]
    name, params, batch, rate, ms, memory = cells
    assert name == f'tiny_{task}'
    backbone, model = map(float, params.split(' / '))
    assert 0 <= backbone <= model
    assert batch.startswith('2 x 64x64')
    assert float(ms) > 0
    # img/s and ms/step are one measurement: they agree up to their rounding.
    assert float(rate) == pytest.approx(2e3 / float(ms), abs=0.51)


def test_settings_of_the_config_can_be_changed(tool, roots, tmp_path, capsys):
    config = write_config(tmp_path / 'tiny.py', 'cls', roots['cls'])
    tool.main([config, '--iters', '1', '--warmup', '0', '--cfg-options', 'train_dataloader.batch_size=3'])
    assert '| 3 x ' in capsys.readouterr().out


def test_configs_whose_visualizers_share_a_name(tool, roots, tmp_path, capsys):
    config = write_config(tmp_path / 'tiny.py', 'cls', roots['cls'])
    with open(config, 'a') as file:
        file.write("\nvisualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')], name='same')\n")
    tool.main([config, config, '--iters', '1', '--warmup', '0', '--batch-size', '2'])
    assert capsys.readouterr().out.count('| tiny |') == 2


def test_clear_errors(tool, roots, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main([str(tmp_path / 'absent.py')])
    assert stop.value.code == 2 and 'config not found' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(['x.py', '--iters', '0'])
