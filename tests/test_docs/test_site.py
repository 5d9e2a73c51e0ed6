"""The site builds without a warning, and what it makes of the metafiles is what stands there."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from pages import ROOT


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    pytest.importorskip('sphinx')
    folder = tmp_path_factory.mktemp('site')
    done = subprocess.run(
        [sys.executable, '-m', 'sphinx', '-b', 'html', '-W', '--keep-going', '-q', 'docs', str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_menu(site):
    menu = (site / 'index.html').read_text()
    for page in (ROOT / 'docs').glob('*.md'):
        assert (site / f'{page.stem}.html').exists()
        assert page.stem == 'index' or f'href="{page.stem}.html"' in menu


@pytest.mark.parametrize('task', ['classification', 'detection', 'segmentation'])
def test_model_zoo_is_the_metafiles(site, task):
    text = re.sub(r'<[^>]+>', ' ', (site / 'model-zoo.html').read_text())
    for model in yaml.safe_load((ROOT / 'configs' / task / 'metafile.yml').read_text())['Models']:
        row = text[text.index(f' {model["Name"]} ') :][:400]
        for result in model.get('Results') or []:
            for value in result['Metrics'].values():
                assert f'{value}' in row


def test_public_names_are_documented(site):
    import mmoverlock

    text = (site / 'api.html').read_text()
    for name in mmoverlock.__all__:
        assert name.startswith('_') or f'mmoverlock.{name}' in text, f'docs/api.md does not show {name}'


def test_pages_load_nothing_of_this_machine(site):
    for page in site.glob('*.html'):
        assert str(ROOT) not in page.read_text()
