import json

import pytest
from tiny_configs import load_tool


@pytest.fixture(scope='module')
def tool():
    return load_tool('analysis/collect_results.py')


def write_run(folder, stamp, records):
    run = folder / stamp
    (run / 'vis_data').mkdir(parents=True)
    (run / 'vis_data' / 'scalars.json').write_text('\n'.join(json.dumps(r) for r in records))
    (run / f'{stamp}.log').write_text(
        '2026/01/02 23:59:30 - mmengine - INFO - start\n\nno stamp\n2026/01/03 00:01:00 - mmengine - INFO - end\n'
    )


def train(step, loss, time):
    return dict(step=step, loss=loss, time=time, lr=1e-3)


def test_table_of_a_detector(tool, tmp_path, capsys):
    write_run(
        tmp_path / 'detector',
        '20260102_235930',
        [
            train(50, 2.0, 0.3),
            {'step': 50, 'coco/bbox_mAP': 0.25, 'coco/bbox_mAP_50': 0.5, 'time': 9},
            train(100, 1.0, 0.1),
            {'step': 100, 'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_50': 0.875, 'time': 9},
        ],
    )
    tool.main([str(tmp_path / 'detector')])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == '| detector | **50.0 (87.5)** | 50: 25.0 (50.0) | 100 | 1.000 | 200 | 90 |'


def test_the_latest_run_counts(tool, tmp_path):
    for stamp, accuracy in (('20260102_000000', 10.0), ('20260103_000000', 20.0)):
        write_run(
            tmp_path / 'work',
            stamp,
            [train(5, 1.0, 0.1), {'step': 5, 'accuracy/top1': accuracy}],
        )
    assert '**20.0**' in tool.row(tool.read_run(str(tmp_path / 'work')))


def test_a_run_that_stopped_is_not_given_a_result(tool, tmp_path):
    records = [train(5, 1.0, 0.1), {'step': 5, 'mIoU': 30.0}, train(8, 0.9, 0.1)]
    write_run(tmp_path / 'work', '20260102_000000', records)
    line = tool.row(tool.read_run(str(tmp_path / 'work')))
    assert 'not finished' in line and '5: 30.0' in line


@pytest.mark.parametrize('records', [None, [{'step': 5, 'mIoU': 30.0}]])
def test_nothing_to_read(tool, tmp_path, capsys, records):
    if records:
        write_run(tmp_path / 'work', '20260102_000000', records)
    with pytest.raises(SystemExit) as stop:
        tool.main([str(tmp_path / 'work')])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith('error: ') and len(error.splitlines()) == 1
