"""Kernels side by side while a CUDA graph is recorded: who waits for whom, with streams that only take notes."""

import contextlib

import pytest
import torch

from mmoverlock.ops import triton_common
from mmoverlock.ops.triton_common import Lanes


class Stream:
    """Notes what it waits for."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def wait_stream(self, other):
        self.notes.append(f'{self.name} waits for {other.name}')


@pytest.fixture
def notes(monkeypatch):
    """What streams do while a graph is recorded, on a machine without a GPU."""
    notes = []
    main, *lanes = (Stream(name, notes) for name in ('main', 'lane0', 'lane1', 'lane2', 'lane3'))
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device=None: main)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: contextlib.nullcontext(notes.append(f'in {stream.name}')))
    monkeypatch.setattr(triton_common, '_side_streams', lambda index: lanes)
    return notes


def test_lanes_begin_after_and_end_before_the_current_stream(notes):
    with Lanes(torch.device('cuda', 0), 2) as lanes:
        for n in range(3):
            with lanes.lane(n):
                pass
        lanes.wait_for(1)
        lanes.hold(2)
    assert notes == [
        *('lane0 waits for main', 'lane1 waits for main'),
        *('in lane0', 'in lane1', 'in lane0'),
        'main waits for lane1',
        'lane0 waits for main',  # 2 is 0, counted round
        *('main waits for lane0', 'main waits for lane1'),
    ]


def test_what_lanes_keep_lives_as_long_as_they_run(notes):
    with Lanes(torch.device('cuda', 0), 1) as lanes:
        tensor = torch.zeros(1)
        lanes.keep(tensor)
        assert lanes._kept[0] is tensor
    assert not lanes._kept


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_without_a_recording_all_is_in_one_stream(notes, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: device == 'cpu')
    with Lanes(torch.device(device, 0)) as lanes:
        with lanes.lane(1):
            lanes.wait_for(1)
            lanes.hold(1)
            lanes.keep(torch.zeros(1))
        assert not lanes._kept
    assert notes == []
