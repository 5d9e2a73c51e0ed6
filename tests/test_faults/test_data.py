"""Broken pictures, label maps and annotation files, and a worker that is killed."""

import json
import random

import faults
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mmoverlock.engine.hooks import BadSampleError, ReliableDataHook, data
from mmoverlock.engine.hooks.random_state import random_state, set_random_state


@pytest.mark.parametrize('damage', ['empty', 'cut'])
def test_broken_picture_stops_the_run_by_name(own_data, tmp_path, damage):
    path = own_data / 'train' / 'dog' / 'dog2.png'
    path.write_bytes(b'' if damage == 'empty' else path.read_bytes()[:20])
    code, said = faults.train(faults.config(tmp_path / 'c.py', own_data), tmp_path / 'work')
    assert code == 1
    assert f'BadSampleError: {path} cannot be read or prepared (' in said and "on_bad_sample='skip'" in said


def test_broken_picture_stops_validation_whatever_the_setting(own_data, tmp_path):
    path = own_data / 'val' / 'dog' / 'dog1.png'
    path.write_bytes(b'')
    extra = "custom_hooks.append(dict(type='mmoverlock.ReliableDataHook', on_bad_sample='skip'))\n"
    code, said = faults.train(faults.config(tmp_path / 'c.py', own_data, extra), tmp_path / 'work')
    assert code == 1 and f'BadSampleError: {path} cannot be read or prepared (' in said
    assert (tmp_path / 'work' / 'epoch_1.pth').is_file()  # written before


def test_broken_picture_is_replaced_where_that_is_asked_for(own_data, tmp_path):
    path = own_data / 'train' / 'dog' / 'dog2.png'
    path.write_bytes(b'')
    extra = "custom_hooks.append(dict(type='mmoverlock.ReliableDataHook', on_bad_sample='skip'))\n"
    extra += 'train_cfg.update(max_epochs=1)\n'
    code, said = faults.train(faults.config(tmp_path / 'c.py', own_data, extra), tmp_path / 'work')
    assert code == 0, said
    assert said.count(f'{path} cannot be read') == 1 and 'another sample takes its place' in said
    assert len(faults.losses(tmp_path / 'work')) == 4


def test_killed_worker(own_data, tmp_path):
    code, said = faults.train(
        faults.config(tmp_path / 'c.py', own_data), tmp_path / 'work', fault='kill_worker_after', arguments=(5,)
    )
    assert code == 1
    assert 'is killed by signal: Killed' in said


@pytest.mark.parametrize('content, words', [(b'', 'is empty'), (b'{"images": [{"id"', 'is cut off')])
def test_annotation_file_cut_off(tmp_path, content, words):
    from mmoverlock import datacheck

    (tmp_path / 'a.json').write_bytes(content)
    split = datacheck.CocoSplit('train', str(tmp_path), str(tmp_path), str(tmp_path / 'a.json'))
    assert split.missing() == [m for m in split.missing() if str(tmp_path / 'a.json') in m and words in m] != []
    (tmp_path / 'a.json').write_text('\n{"images": []}\n')
    assert split.missing() == []


def test_annotation_file_damaged_inside(tmp_path):
    from mmengine.config import Config

    from mmoverlock import cli

    path = tmp_path / 'a.json'
    path.write_text('{"images": [}')
    dataset = dict(type='CocoDataset', data_root=str(tmp_path), ann_file='a.json', data_prefix=dict(img=''))
    cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dataset)))
    with pytest.raises(cli.UserError, match=r'a.json is damaged \(Expecting value'), cli.explain_json(cfg):
        json.loads('{"images": [}')
    path.write_text('{}')
    with pytest.raises(json.JSONDecodeError), cli.explain_json(cfg):  # another file's error stays what it is
        json.loads('')


def test_broken_label_map_is_named(tmp_path):
    pytest.importorskip('mmseg')
    from mmengine.registry import DATASETS
    from PIL import Image

    for folder in ('img', 'seg'):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / folder / 'a.png')
    (tmp_path / 'seg' / 'a.png').write_bytes(b'no picture')
    import mmseg.datasets  # noqa: F401

    dataset = DATASETS.build(
        dict(
            type='mmseg.BaseSegDataset',
            data_root=str(tmp_path),
            data_prefix=dict(img_path='img', seg_map_path='seg'),
            img_suffix='.png',
            pipeline=[dict(type='mmseg.LoadImageFromFile'), dict(type='mmseg.LoadAnnotations')],
        )
    )
    with pytest.raises(BadSampleError, match=f'{tmp_path}/img/a.png with {tmp_path}/seg/a.png cannot be read'):
        data._Samples(dataset, 'raise', None)([0])


class Draws(Dataset):
    """Each sample is what the three generators give; sample 3 is broken."""

    broken = ()

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index in self.broken:
            raise ValueError('broken')
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def batches(workers, seed=1, epoch=0, skip=0, broken=(), on_bad_sample='raise'):
    dataset = Draws()
    dataset.broken = broken
    loader = DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=list)
    data._name_bad_samples(loader, on_bad_sample, (seed, 0))
    keyed = data._KeyedBatches(loader.batch_sampler)
    keyed.batches.sampler.epoch, keyed.skip = epoch, skip
    vars(loader)['batch_sampler'] = keyed
    return list(loader)


def test_random_numbers_follow_from_the_place_alone():
    one = batches(0)
    assert batches(2) == one == batches(1)
    assert batches(0, skip=2) == one[2:] == batches(1, skip=2)
    numbers = {x for batch in one for sample in batch for x in sample[1:]}
    assert len(numbers) == 36
    for other in (batches(0, seed=2), batches(0, epoch=1)):
        assert not numbers & {x for batch in other for sample in batch for x in sample[1:]}


def test_data_in_the_main_process_leave_the_models_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    state = random_state()
    data._Samples(Draws(), 'raise', (1, 0))([(0, (0, 0, 0))])
    assert torch.equal(torch.rand(1), expected)
    set_random_state(state)
    assert torch.equal(torch.rand(1), expected)


def test_replacing_ends_after_ten_in_a_row():
    replaced = batches(0, broken=(3,), on_bad_sample='skip')
    assert sum(map(len, replaced)) == 12 and all(sample[0] != 3 for batch in replaced for sample in batch)
    with pytest.raises(BadSampleError, match='sample .* 9 others before it'):
        batches(0, broken=range(12), on_bad_sample='skip')


def test_settings_are_checked():
    with pytest.raises(ValueError, match="'raise' or 'skip', got 'ignore'"):
        ReliableDataHook('ignore')


def test_a_configs_own_hooks_are_kept():
    from mmengine.config import Config

    from mmoverlock.engine.hooks import make_reliable

    cfg = Config(dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=7))))
    make_reliable(cfg)
    make_reliable(cfg)
    assert cfg.default_hooks.checkpoint == dict(type='mmoverlock.ReliableCheckpointHook', interval=7)
    assert cfg.custom_hooks == [dict(type='mmoverlock.ReliableDataHook')]
    own = dict(type='mmoverlock.ReliableDataHook', on_bad_sample='skip')
    cfg = Config(dict(default_hooks=dict(checkpoint=dict(type='MyHook')), custom_hooks=[own]))
    make_reliable(cfg)
    assert cfg.default_hooks.checkpoint.type == 'MyHook' and cfg.custom_hooks == [own]
