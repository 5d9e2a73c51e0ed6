"""Three tiny data sets, the tools as modules, and one short training a task."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_configs import imagenet_folders, load_tool, picture, write_config


@pytest.fixture(scope='session')
def imagenet(tmp_path_factory):
    return imagenet_folders(tmp_path_factory.mktemp('imagenet'))


@pytest.fixture(scope='session')
def coco(tmp_path_factory):
    """Four pictures with a square instance each, in both splits."""
    root, rng = tmp_path_factory.mktemp('coco'), np.random.default_rng(0)
    for split in ('train', 'val'):
        for i in range(4):
            picture(root / f'{split}2017' / f'{i}.jpg', rng)
        box = [[8, 8, 40, 8, 40, 40, 8, 40]]
        (root / 'annotations').mkdir(exist_ok=True)
        (root / 'annotations' / f'instances_{split}2017.json').write_text(
            json.dumps(
                dict(
                    images=[dict(id=i, file_name=f'{i}.jpg', width=64, height=64) for i in range(4)],
                    annotations=[
                        dict(
                            id=i + 1,
                            image_id=i,
                            category_id=1,
                            bbox=[8, 8, 32, 32],
                            area=1024,
                            iscrowd=0,
                            segmentation=box,
                        )
                        for i in range(4)
                    ],
                    categories=[dict(id=1, name='box')],
                )
            )
        )
    return root


@pytest.fixture(scope='session')
def ade(tmp_path_factory):
    """Four pictures to train on, two to test; labels 0, 1 and 255."""
    root, rng = tmp_path_factory.mktemp('ade'), np.random.default_rng(0)
    for split, number in (('training', 4), ('validation', 2)):
        for i in range(number):
            picture(root / 'images' / split / f'{i}.jpg', rng)
            mask = np.zeros((64, 64), dtype=np.uint8)
            mask[:, 32:], mask[:4] = 1, 255
            path = root / 'annotations' / split / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    return root


@pytest.fixture(scope='session')
def roots(imagenet, coco, ade):
    """Data set folders by task."""
    return dict(cls=imagenet, det=coco, seg=ade)


@pytest.fixture(scope='session')
def train():
    """tools/train.py as a module."""
    return load_tool('train.py')


@pytest.fixture(scope='session')
def test_tool():
    """tools/test.py as a module."""
    return load_tool('test.py')


@pytest.fixture(scope='session')
def trained(roots, train, tmp_path_factory):
    """Gives (config, work directory) of a short training of a task by tools/train.py, once each."""
    runs = {}

    def run(task):
        if task not in runs:
            folder = tmp_path_factory.mktemp(task)
            config = write_config(folder / f'tiny_{task}.py', task, roots[task])
            train.main([config, '--work-dir', str(folder / 'work')])
            runs[task] = config, folder / 'work'
        return runs[task]

    return run
