"""tools/analysis/visualize_*.py and plot_curves.py: what they draw is what the functions find."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from tiny_configs import ARCH, fails, load_tool, picture, write_config

from mmoverlock import visualization as vis
from mmoverlock.checkpoints import to_official
from mmoverlock.models.overlock import ARCHS, resolve_arch

pytest.importorskip('matplotlib')
pytest.importorskip('mmpretrain')
command = pytest.importorskip('mmoverlock.visualization.command')
pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A tiny classifier of cats and dogs, and two pictures."""
    root = tmp_path_factory.mktemp('visual')
    for i in range(2):
        picture(root / 'pictures' / f'{i}.png', np.random.default_rng(i), 96)
    config, checkpoint = write_config(root / 'tiny.py', 'cls', root), root / 'a.pth'
    subject = command.build(arguments(config))
    meta = dict(dataset_meta=dict(classes=('cat', 'dog')))
    torch.save(dict(state_dict=subject.model.state_dict(), meta=meta), checkpoint)
    subject = command.build(arguments(config, str(checkpoint)))
    seen = [picture for _, picture in command.pictures(arguments(config, pictures=[str(root / 'pictures')]), subject)]
    return SimpleNamespace(
        root=root,
        subject=subject,
        model=subject.model,
        command=[config, str(checkpoint), str(root / 'pictures')],
        seen=seen,
        images=[vis.normalize(subject.model, picture) for picture in seen],
    )


def arguments(model, checkpoint='none', pictures=('a.png',)):
    return command.parser('').parse_args([model, checkpoint, *pictures, '--out', 'a.png', '--device', 'cpu'])


@pytest.fixture
def built(home, monkeypatch):
    """The commands find the model built: the other tests build it."""
    monkeypatch.setattr(command, 'build', lambda args, classifier=False: home.subject)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures, save = [], command.save
    monkeypatch.setattr(command, 'save', lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def run(name, *args):
    return load_tool(f'analysis/{name}.py').main([*map(str, args), '--device', 'cpu'])


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def image_of(axes):
    return np.asarray(axes.images[0].get_array())


def test_pictures_are_those_of_the_test_pipeline(home):
    stored = cv2.imread(str(home.root / 'pictures' / '1.png'))[:, :, ::-1]
    assert len(home.seen) == 2 and np.array_equal(home.seen[1], stored)
    np.testing.assert_allclose(home.images[1][0].numpy(), (stored.transpose(2, 0, 1) - 127.0) / 60, atol=1e-5)


def test_overview(home, drawn, tmp_path):
    (path,) = run('visualize_overview', *home.command, '--target', 'dog', '--out', tmp_path / 'deep' / 'a.png')
    (figure,) = drawn
    assert titles(figure) == ['0', 'overview', 'overview: dog', '1', 'overview', 'overview: dog']
    for i, (seen, image) in enumerate(zip(home.seen, home.images)):
        whole, norm, dog = map(image_of, figure.axes[3 * i : 3 * i + 3])
        assert np.array_equal(whole, seen)
        assert np.array_equal(norm, vis.overlay(seen, vis.overview_map(home.model, image)))
        assert np.array_equal(dog, vis.overlay(seen, vis.overview_map(home.model, image, 1)))
    assert cv2.imread(path).shape[1] > 2 * command.CELL * command.DPI


def test_grad_cam(home, built, drawn, tmp_path):
    files = run('visualize_grad_cam', *home.command, '--out', tmp_path)
    assert files == [str(tmp_path / f'{i}_grad_cam.png') for i in range(2)]
    for figure, seen, image in zip(drawn, home.seen, home.images):
        scores = vis.class_scores(home.model, image)
        best = int(scores.argmax())
        assert titles(figure)[0].endswith(f'{("cat", "dog")[best]}: {scores[best]:.2f}')
        assert titles(figure)[1:] == ['focus4', 'stage4']
        for axes, layer in zip(figure.axes[1:], ('focus4', 'stage4')):
            assert np.array_equal(image_of(axes), vis.overlay(seen, vis.grad_cam(home.model, image, best, layer)))


def test_contmix(home, drawn, tmp_path):
    place = ['--position', 90, 10, '--block', 'focus3.0']
    run('visualize_contmix', *home.command[:2], home.root / 'pictures' / '0.png', *place, '--out', tmp_path / 'a.png')
    kernels = vis.contmix_kernels(home.model, home.images[0], (90, 10), 'focus3.0')
    whole, small, large, *heads = drawn[0].axes
    for window, outline in zip(('small', 'large'), whole.patches):
        x1, y1, x2, y2 = kernels.box(window)
        box = outline.get_x() + 0.5, outline.get_y() + 0.5, outline.get_width(), outline.get_height()
        assert box == pytest.approx((x1, y1, x2 - x1, y2 - y1))
    assert np.array_equal(image_of(large), vis.overlay(home.seen[0], kernels.heatmap('large')))
    assert len(heads) == 2 * kernels.heads == 4
    for i, axes in enumerate(heads):
        assert np.array_equal(image_of(axes), (kernels.small, kernels.large)[i // 2][i % 2])


def test_features(home, built, drawn, tmp_path):
    run('visualize_features', *home.command[:2], home.root / 'pictures' / '0.png', '--channels', 2, '--out', tmp_path)
    maps = vis.feature_maps(home.model, home.images[0])
    rows = np.reshape(drawn[0].axes, (6, 3))
    for (stage, values), row in zip(maps.items(), rows):
        assert row[0].get_title() == f'{stage}, {" x ".join(map(str, values.shape))}'
        channel = int(row[1].get_title().split()[1])
        assert values[channel].std() == values.flatten(1).std(1).max()
        assert np.array_equal(image_of(row[1]), values[channel].numpy())
    assert [p.name for p in tmp_path.iterdir()] == ['0_features.png']


def test_receptive_field(home, built, drawn, tmp_path, capsys):
    sizes = ['--size', 64, '--layers', 'stage1', 'focus4']
    areas = run('visualize_erf', *home.command, *sizes, '--out', tmp_path / 'a.png')
    small = [vis.normalize(home.model, cv2.resize(p, (64, 64), interpolation=cv2.INTER_AREA)) for p in home.seen]
    field = vis.effective_receptive_field(home.model, small, 'focus4')
    assert areas['focus4'] == vis.contribution_area(field) and areas['stage1'][0.99] < areas['focus4'][0.99]
    shown = image_of(drawn[0].axes[1])
    np.testing.assert_allclose(10**shown, np.maximum(field / field.max(), 1e-4), rtol=1e-5)
    assert f'| focus4 | {areas["focus4"][0.2]:.1%} |' in capsys.readouterr().out


def test_receptive_field_of_another_network(home, tmp_path):
    config = tmp_path / 'resnet.py'
    head = "dict(type='LinearClsHead', num_classes=2, in_channels=512)"
    config.write_text(
        "default_scope = 'mmpretrain'\n"
        f"model = dict(type='ImageClassifier', backbone=dict(type='ResNet', depth=18), head={head})\n"
    )
    areas = run('visualize_erf', config, 'none', home.command[2], '--size', 64, '--out', tmp_path / 'a.png')
    assert list(areas) == ['last map'] and 0 < areas['last map'][0.5] < 1


def test_a_variant_and_an_official_checkpoint(home, drawn, tmp_path, monkeypatch):
    """The backbone alone, and with its head where a class is asked for; a small network stands for XT."""
    monkeypatch.setitem(ARCHS, 'xt', resolve_arch(ARCH))
    official = to_official(command.build(arguments('xt'), classifier=True).model.state_dict())
    assert 'patch_embed1.0.weight' in official
    torch.save(dict(model=official), tmp_path / 'xt.pth')
    one = ['xt', tmp_path / 'xt.pth', home.root / 'pictures' / '0.png', '--size', 64, '--out', tmp_path / 'a.png']
    run('visualize_overview', *one)
    assert titles(drawn[0]) == ['0', 'overview'] and image_of(drawn[0].axes[0]).shape == (64, 64, 3)
    run('visualize_overview', *one, '--target', 3)
    assert titles(drawn[1]) == ['0', 'overview', 'overview: class 3']
    assert np.array_equal(image_of(drawn[0].axes[1]), image_of(drawn[1].axes[1]))


@pytest.mark.parametrize('task, view, size', [('det', 'overview', 64), ('seg', 'contmix', 96)])
def test_dense_models(task, view, size, home, drawn, tmp_path, roots):
    pytest.importorskip(dict(det='mmdet', seg='mmseg')[task])
    config = write_config(tmp_path / 'tiny.py', task, roots[task])
    run(f'visualize_{view}', config, 'none', home.root / 'pictures' / '0.png', '--out', tmp_path / 'a.png')
    assert titles(drawn[0])[0] == ('0' if task == 'det' else '0, focus4.0, map 5 x 5')  # 3 x 3, enlarged to the window
    assert image_of(drawn[0].axes[0]).shape == (size, size, 3)  # the detector's test pipeline resizes


def test_mistakes_are_one_line_and_leave_no_file(home, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'out' / 'a.png'
    config, checkpoint, folder = home.command
    (tmp_path / 'b.png').write_text('no picture')

    def call(name, args, *words):
        fails(capsys, out, lambda: run(name, *args, '--out', out), *words)

    call('visualize_overview', [config, 'no.pth', folder], 'checkpoint not found')
    call('visualize_overview', ['huge', checkpoint, folder], 'huge')
    monkeypatch.setattr(command, 'build', lambda args, classifier=False: home.subject)
    call('visualize_overview', [config, checkpoint, 'no.png'], 'no.png')
    call('visualize_overview', [config, checkpoint, tmp_path / 'b.png'], 'b.png', 'cannot be read')
    call('visualize_overview', [config, checkpoint, folder, '--target', 'cow'], "no class 'cow'", 'cat, dog')
    call('visualize_grad_cam', [config, checkpoint, folder, '--layers', 'focus9'], "no layer 'focus9'")
    call('visualize_erf', [config, checkpoint, folder, '--size', '0'], '--size must be positive')


def log(folder, values, metric):
    path = folder / '20260101_000000' / 'vis_data'
    path.mkdir(parents=True)
    records = [dict(loss=v, lr=1e-3, step=10 * i + 10) for i, v in enumerate(values)]
    records.append({metric: 50.0, 'step': 10 * len(values)})
    (path / 'scalars.json').write_text(''.join(json.dumps(r) + '\n' for r in records))
    return folder


def test_curves(drawn, tmp_path):
    a = log(tmp_path / 'a' / 'run', [4.0, 2.0, 1.0], 'mIoU')
    b = log(tmp_path / 'b' / 'run', [3.0, 3.0], 'accuracy/top1')
    plot = load_tool('analysis/plot_curves.py').main
    plot([str(a), str(b), '--out', str(tmp_path / 'c.png')])
    assert titles(drawn[0]) == ['loss', 'lr', 'accuracy/top1', 'mIoU', '', '']
    panels = dict(zip(titles(drawn[0]), drawn[0].axes))
    loss = {line.get_label(): line.get_xydata().tolist() for line in panels['loss'].lines}
    assert loss == {'a/run': [[10, 4], [20, 2], [30, 1]], 'b/run': [[10, 3], [20, 3]]}
    assert [line.get_label() for line in panels['mIoU'].lines] == ['a/run']
    assert panels['mIoU'].lines[0].get_xydata().tolist() == [[30, 50]]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ['a/run', 'b/run']

    options = ['--smooth', '0.5', '--keys', 'loss', '--legend', 'one', '--out', str(tmp_path / 'c.png')]
    plot([str(a), *options])
    (loss,) = drawn[1].axes
    pale, bold = loss.lines
    assert pale.get_ydata().tolist() == [4, 2, 1] and bold.get_label() == 'one'
    np.testing.assert_allclose(bold.get_ydata(), vis.smooth(np.array([4.0, 2.0, 1.0]), 0.5))


def test_mistakes_with_curves(tmp_path, capsys):
    run = log(tmp_path / 'run', [1.0], 'mIoU')
    plot, out = load_tool('analysis/plot_curves.py').main, tmp_path / 'c.png'
    fails(
        capsys, out, lambda: plot([str(run), '--keys', 'AP', '--out', str(out)]), 'no run logged AP', 'loss, lr, mIoU'
    )
    fails(capsys, out, lambda: plot([str(tmp_path / 'no'), '--out', str(out)]), 'holds no run')
    fails(capsys, out, lambda: plot([str(run), '--smooth', '1', '--out', str(out)]), 'smoothing must be in')
    with pytest.raises(SystemExit):
        plot([str(run), '--legend', 'a', 'b', '--out', str(out)])
    assert '--legend names 2 of 1 runs' in capsys.readouterr().err
