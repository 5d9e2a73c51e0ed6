"""The web page in a real Chromium, with models of all three tasks."""

import io
import shutil
import socket
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from random_models import random_model, smooth_pictures  # noqa: E402
from tiny_configs import load_tool  # noqa: E402

from mmoverlock import apis, web  # noqa: E402
from mmoverlock.apis import Inferencer  # noqa: E402
from mmoverlock.cli import UserError  # noqa: E402

for package in ('mmcv._ext', 'mmpretrain', 'mmdet', 'mmseg'):
    pytest.importorskip(package)
TASKS = ('cls', 'det', 'seg')
FLAGS = ('no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-background-networking')
FLAGS += ('disable-component-update', 'disable-sync')
SECOND = 1000


@pytest.fixture(scope='module')
def viewer(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    return web.Viewer([Inferencer(*random_model(folder, t), device='cpu', score_thr=0.05) for t in TASKS])


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    for name, picture in zip('ab', smooth_pictures([(96, 128), (128, 96)])):
        cv2.imwrite(str(folder / f'{name}.png'), picture)
    (folder / 'broken.png').write_text('no picture')
    return folder


@pytest.fixture(scope='module')
def server(viewer):
    pytest.importorskip('gradio', reason='the web page needs gradio')
    page = web.launch(list(viewer.models.values()), wait=False)
    yield page.local_url
    page.close()


@pytest.fixture
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='driving a browser needs playwright')
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if chromium is None:
        pytest.skip('there is no Chromium here')
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=[f'--{flag}' for flag in FLAGS])
        yield browser
        browser.close()


class Page:
    """The page as a visitor uses it."""

    def __init__(self, browser, address):
        from playwright.sync_api import expect

        self.page = browser.new_page(viewport=dict(width=1300, height=1100))
        self.page.set_default_timeout(60 * SECOND)
        expect.set_options(timeout=60 * SECOND)
        self.expect, self.requests, self.errors = expect, [], []
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.on('pageerror', lambda error: self.errors.append(str(error)))
        self.page.goto(address)

    def drop(self, path):
        """Put a picture on the page, in place of the one that is there."""
        remove = (
            self.page.locator('#picture')
            .get_by_label('Clear')
            .or_(self.page.locator('#picture').get_by_label('Remove Image'))
        )
        if self.page.locator('#picture img').count():
            remove.first.click()
        self.page.locator('#picture input[type=file]').set_input_files(str(path))

    def source(self, name):
        return self.page.locator(f'#{name} img').get_attribute('src')

    def image(self, name):
        """What one of the pictures shows, (H, W, 3) uint8."""
        content = self.page.request.get(self.source(name)).body()
        return np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))

    def shows(self, rows):
        """The table holds these rows, and no others."""
        grid = self.page.locator('#findings').get_by_role('grid')
        self.expect(grid).to_have_attribute('aria-rowcount', str(len(rows) + 1))  # with the heading
        cells = self.page.locator('#findings').get_by_role('gridcell')
        self.expect(cells).to_have_text([cell for row in rows for cell in row])

    def changed(self, name, before):
        """Wait until a picture is another one."""
        self.expect(self.page.locator(f'#{name} img')).not_to_have_attribute('src', before)

    @property
    def toast(self):
        return self.page.get_by_test_id('toast-body')


def test_page_in_chromium(viewer, server, browser, pictures):
    page = Page(browser, server)
    names, path = list(viewer.models), str(pictures / 'a.png')
    expected = [viewer.find(name, path) for name in names]
    assert [len(rows) for _, rows in expected] == [2, 4, 2]  # classes, boxes, classes

    page.drop(path)
    page.shows(expected[0][1])
    assert (page.image('found') == expected[0][0]).all()
    assert (page.image('overview') == viewer.overview(names[0], path)).all()

    for name, (drawn, rows) in zip(names[1:], expected[1:]):  # boxes and masks, then a segmentation map
        before = page.source('found')
        page.page.get_by_label(name).check()
        page.shows(rows)
        page.changed('found', before)
        # mmdet varies the colours of masks at random, a little.
        difference = np.abs(page.image('found').astype(int) - drawn)
        assert difference.mean() < 1 if name == names[1] else not difference.any()

    # From the middle of the picture, until somebody clicks elsewhere.
    block = viewer.blocks(names[2])[-1]
    middle = viewer.kernels(names[2], path, (128, 96), block, 'mean')
    assert (page.image('small') == middle[0]).all() and (page.image('large') == middle[1]).all()
    before = page.source('small'), page.source('large')
    overview = page.page.locator('#overview img')
    box = overview.bounding_box()
    # 128 x 96 pixels twice as large, in the middle of its place.
    scale = min(box['width'] / 256, box['height'] / 192, 1)
    left, top = (box['width'] - 256 * scale) / 2, (box['height'] - 192 * scale) / 2
    overview.click(position=dict(x=left + 40.5 * scale, y=top + 60.5 * scale))
    page.changed('small', before[0])
    page.changed('large', before[1])
    clicked = viewer.kernels(names[2], path, (41, 61), block, 'mean')
    assert (page.image('small') == clicked[0]).all() and (page.image('large') == clicked[1]).all()
    before = page.source('small')
    page.page.get_by_label('Head').click()
    page.page.get_by_role('option', name='1', exact=True).click()
    page.changed('small', before)
    assert page.toast.count() == 0

    page.drop(pictures / 'broken.png')
    page.expect(page.toast).to_contain_text('This file cannot be read (it is not a picture, or damaged).')
    page.drop(pictures / 'b.png')  # and it goes on
    page.shows(viewer.find(names[2], str(pictures / 'b.png'))[1])
    assert not page.errors
    outside = [url for url in page.requests if not url.startswith((server, 'data:', 'blob:'))]
    assert len(page.requests) > 10 and not outside


def test_what_a_click_shows(viewer, pictures):
    """Without a browser: the windows lie around the place, and heads differ."""
    name, path = list(viewer.models)[0], str(pictures / 'a.png')
    seen = viewer.seen(name, path)
    assert seen.shape == (96, 128, 3)
    assert (seen == cv2.imread(path)[..., ::-1]).all()  # this pipeline does not resize
    block = viewer.blocks(name)[0]
    shown = viewer.overview(name, path)
    assert shown.shape == (192, 256, 3)
    left, right = (viewer.kernels(name, path, (x, 96), block, 'mean') for x in (6, 255))
    beyond = viewer.kernels(name, path, (256, 96), block, 'mean')  # where a browser rounds up
    assert (beyond[0] == right[0]).all()
    for a, b in zip(left, right):
        assert a.shape == b.shape == shown.shape and (a != b).any()
    heads = [viewer.kernels(name, path, (3, 48), block, str(head))[0] for head in range(viewer.heads(name))]
    assert len(heads) > 1 and (heads[0] != heads[1]).any()
    with pytest.raises(UserError, match='not a picture'):
        viewer.find(name, str(pictures / 'broken.png'))


def test_command(monkeypatch):
    """tools/web_demo.py hands on every model; where it listens is this machine, unless told otherwise."""
    built, launched = [], []
    monkeypatch.setattr(apis, 'Inferencer', lambda *args, **kwargs: built.append((*args, kwargs['device'])))
    monkeypatch.setattr(web, 'launch', lambda models, *where: launched.append((len(models), *where)))
    tool = load_tool('web_demo.py')
    tool.main(['a.py', 'official'])
    tool.main(['a.py', 'a.pth', '--model', 'b.py', 'b.pth', '--device', 'cpu', '--host', '0.0.0.0', '--port', '99'])
    assert built == [('a.py', None, None), ('a.py', 'a.pth', 'cpu'), ('b.py', 'b.pth', 'cpu')]
    assert launched == [(1, '127.0.0.1', None), (2, '0.0.0.0', 99)]


def test_port_in_use(viewer):
    pytest.importorskip('gradio')
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f'cannot listen at 127.0.0.1:{port}'):
            web.launch(list(viewer.models.values())[:1], port=port, wait=False)


def test_without_gradio(viewer, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(UserError, match='pip install gradio'):
        web.build([])
