import json
import os
import pickle

import pytest
import torch
from tiny_configs import fails, last, write_config

KEY = dict(cls='accuracy/top1', det='coco/bbox_mAP', seg='mIoU')


@pytest.mark.parametrize('task', KEY)
def test_predictions_and_pictures_go_where_the_flags_say(trained, test_tool, task, tmp_path):
    config, work = trained(task)
    out = tmp_path / ('maps' if task == 'seg' else 'deep/pred.pkl')
    metrics = test_tool.main(
        [
            config,
            last(work),
            '--work-dir',
            str(tmp_path / 'work'),
            '--out',
            str(out),
            '--show-dir',
            str(tmp_path / 'shown'),
        ]
    )
    assert KEY[task] in metrics
    if task == 'seg':
        assert sorted(os.listdir(out)) == ['0.png', '1.png']
    else:
        with open(out, 'rb') as file:
            assert len(pickle.load(file)) == 4
    folder = tmp_path / 'shown' / ('vis_data/vis_image' if task == 'seg' else '')
    assert len(os.listdir(folder)) == (2 if task == 'seg' else 4)


@pytest.mark.parametrize('task', KEY)
def test_flipping_without_a_tta_config_and_metrics_in_a_file(trained, test_tool, task, tmp_path, capsys):
    config, work = trained(task)
    out = tmp_path / 'metrics.json'
    metrics = test_tool.main(
        [config, last(work), '--work-dir', str(tmp_path / 'work'), '--tta', '--out', str(out), '--out-item', 'metrics']
    )
    assert json.loads(out.read_text())[KEY[task]] == pytest.approx(metrics[KEY[task]])
    assert os.listdir(tmp_path / 'work') and len(os.listdir(tmp_path)) == 2  # no partial file
    if task == 'det':  # mmdet merges no masks
        assert 'boxes only' in capsys.readouterr().err
        assert 'coco/segm_mAP' not in metrics


def test_tta_of_the_config_wins(trained, test_tool, tmp_path):
    config, work = trained('cls')
    mine = tmp_path / 'tiny_tta.py'
    mine.write_text(f"""
_base_ = {config!r}
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=s) for s in (64, 96)], [dict(type='PackInputs')]])]
""")
    cfg = test_tool.prepare(test_tool.parse_args([str(mine), last(work), '--tta']))
    assert len(cfg.test_dataloader.dataset.pipeline[1].transforms[0]) == 2
    assert cfg.model.type == 'AverageClsScoreTTA'


def test_segmentation_loads_the_label_map_after_the_flip(test_tool):
    load, annotations, pack = (dict(type=t) for t in ('LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs'))
    steps = test_tool.default_tta_pipeline([load, annotations, pack], 'mmseg')
    assert [s['type'] for s in steps] == ['LoadImageFromFile', 'TestTimeAug']
    assert steps[1]['transforms'][1:] == [[annotations], [pack]]


@pytest.fixture
def config(tmp_path, imagenet):
    return write_config(tmp_path / 'tiny.py', 'cls', imagenet)


def test_missing_checkpoint(test_tool, config, tmp_path, capsys):
    work = tmp_path / 'work'
    fails(
        capsys,
        work,
        lambda: test_tool.main([config, str(tmp_path / 'no.pth'), '--work-dir', str(work)]),
        'checkpoint not found',
        tmp_path / 'no.pth',
    )


def test_folder_as_checkpoint(test_tool, config, tmp_path, capsys):
    work = tmp_path / 'work'
    fails(capsys, work, lambda: test_tool.main([config, str(tmp_path), '--work-dir', str(work)]), 'is a folder')


def test_checkpoint_of_another_variant(trained, test_tool, tmp_path, capsys):
    config, folder = trained('cls')
    work = tmp_path / 'work'
    fails(
        capsys,
        work,
        lambda: test_tool.main(
            [
                config,
                last(folder),
                '--work-dir',
                str(work),
                '--cfg-options',
                'model.backbone.arch.widths="[8,16,32,64]"',
            ]
        ),
        'does not fit',
        '64',
    )


@pytest.mark.parametrize('task', KEY)
def test_backbone_alone_is_not_the_model(trained, test_tool, task, tmp_path, capsys):
    config, folder = trained(task)
    full = torch.load(last(folder), weights_only=False)
    state = {k: v for k, v in full['state_dict'].items() if k.startswith('backbone.')}
    torch.save(state, tmp_path / 'backbone.pth')
    work = tmp_path / 'work'
    fails(
        capsys,
        work,
        lambda: test_tool.main([config, str(tmp_path / 'backbone.pth'), '--work-dir', str(work)]),
        'it is a backbone',
    )


@pytest.mark.parametrize(
    'task, out, word', [('cls', 'pred.json', '.pkl'), ('det', 'pred.txt', '.pkl'), ('seg', 'pred.pkl', 'folder')]
)
def test_out_that_does_not_fit_the_task(test_tool, roots, tmp_path, capsys, task, out, word):
    config = write_config(tmp_path / 'tiny.py', task, roots[task])
    work = tmp_path / 'work'
    fails(
        capsys,
        work,
        lambda: test_tool.main([config, 'any.pth', '--work-dir', str(work), '--out', str(tmp_path / out)]),
        word,
    )
    assert not (tmp_path / out).exists()


def test_out_item_needs_out(test_tool, config, tmp_path, capsys):
    fails(
        capsys,
        tmp_path / 'w',
        lambda: test_tool.main([config, 'any.pth', '--work-dir', str(tmp_path / 'w'), '--out-item', 'metrics']),
        '--out',
    )


def test_missing_data(test_tool, tmp_path, capsys):
    config = write_config(tmp_path / 'tiny.py', 'seg', tmp_path / 'nowhere')
    work = tmp_path / 'work'
    fails(
        capsys,
        work,
        lambda: test_tool.main([config, 'any.pth', '--work-dir', str(work)]),
        'test_dataloader',
        tmp_path / 'nowhere',
    )


def test_show_dir_needs_the_hook(test_tool, config, tmp_path, capsys):
    fails(
        capsys,
        tmp_path / 'w',
        lambda: test_tool.main(
            [
                config,
                'any.pth',
                '--work-dir',
                str(tmp_path / 'w'),
                '--show-dir',
                'x',
                '--cfg-options',
                'default_hooks.visualization=None',
            ]
        ),
        'visualization hook',
    )
