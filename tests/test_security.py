"""Files from strangers: what is in them is not executed, and cannot fill the memory."""

import io
import os
import pickle
import re
import threading
import zipfile
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import CheckpointLoader

from mmoverlock import checkpoints
from mmoverlock.checkpoints import CheckpointError, UnsafeCheckpointError, read_checkpoint

ROOT = Path(__file__).parents[1]


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def target(tmp_path):
    """What an attack would make; nothing may."""
    path = tmp_path / 'executed'
    yield str(path)
    assert not path.exists()


def attacks(target):
    code = f'open({target!r}, "w")'
    return {
        'os': Calls(os.mkdir, target),
        'exec': Calls(exec, code),
        'eval': Calls(eval, code),
        'getattr': Calls(getattr, OrderedDict, 'fromkeys'),
        'import': Calls(__import__, 'os'),
        'torch.load': Calls(torch.load, target),
        'numpy.load': Calls(np.load, target),
        'open': Calls(open, target, 'w'),
        'in a list': [1, (2, {'a': Calls(os.mkdir, target)})],
        'as a key': {Calls(hash, 1): 2},
    }


@pytest.mark.parametrize('kind', attacks(''))
@pytest.mark.parametrize('old_format', [False, True])
def test_malicious_pickles(tmp_path, target, kind, old_format):
    path = str(tmp_path / 'evil.pth')
    content = dict(state_dict=dict(a=torch.zeros(1)), meta=attacks(target)[kind])
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    for load in (read_checkpoint, lambda p: CheckpointLoader.load_checkpoint(p, map_location='cpu')):
        with pytest.raises(UnsafeCheckpointError, match='evil.pth: holds .*could run code'):
            load(path)


def test_bare_pickle(tmp_path, target):
    path = tmp_path / 'evil.pth'
    path.write_bytes(pickle.dumps(Calls(os.mkdir, target)))
    with pytest.raises(CheckpointError, match='evil.pth'):
        read_checkpoint(str(path))


def test_program_in_the_metadata_of_a_run(tmp_path, target):
    """mmengine's Runner.resume runs meta['config'] as a config, that is as Python."""
    path = str(tmp_path / 'evil.pth')
    torch.save(dict(state_dict={}, meta=dict(config=f'open({target!r}, "w")', epoch=1)), path)
    meta = CheckpointLoader.load_checkpoint(path, map_location='cpu')['meta']
    assert 'config' not in meta and meta['epoch'] == 1


def rezip(path, compression=zipfile.ZIP_STORED, **changed):
    """Writes a checkpoint's archive anew, some entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, changed.get(name.split('/', 1)[1].replace('.', '_').replace('/', '_'), content))


def test_zip_bomb(tmp_path):
    path = str(tmp_path / 'bomb.pth')
    torch.save(dict(a=torch.zeros(25_000_000)), path)  # 100 MB
    rezip(path, zipfile.ZIP_DEFLATED)
    assert os.path.getsize(path) < 200_000
    with pytest.raises(UnsafeCheckpointError, match='bomb.pth: is compressed'):
        read_checkpoint(path)


def test_overlapping_entries(tmp_path):
    """A bomb without compression: many names in the directory for one piece of the file."""
    path = tmp_path / 'bomb.pth'
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('a/data.pkl', b'x' * 10_000)
        info = archive.infolist()[0]
        for i in range(50):
            twin = zipfile.ZipInfo(f'a/data/{i}')
            twin.file_size = twin.compress_size = info.file_size
            twin.CRC, twin.header_offset = info.CRC, info.header_offset
            archive.filelist.append(twin)
        archive._didModify = True
    path.write_bytes(buffer.getvalue())
    with pytest.raises(UnsafeCheckpointError, match='could unpack to any size'):
        read_checkpoint(str(path))


@pytest.mark.parametrize('wrap', [lambda t: dict(a=t), lambda t: dict(state_dict=dict(b=[(t,)]))])
def test_oversize_tensor(tmp_path, wrap):
    """4 TB in one number: a view with a stride of 0, which loads at once and fills the memory when it is used."""
    path = str(tmp_path / 'huge.pth')
    torch.save(wrap(torch.zeros(1).expand(2**40)), path)
    with pytest.raises(UnsafeCheckpointError, match=r'claims a tensor of shape \(1099511627776,\), 4096.0 GiB'):
        read_checkpoint(path)


def test_storage_that_claims_more_than_its_entry_holds(tmp_path):
    path = str(tmp_path / 'huge.pth')
    torch.save(dict(a=torch.arange(1000.0)), path)
    with zipfile.ZipFile(path) as archive:
        program = archive.read('huge/data.pkl')
    claimed = program.replace(b'M\xe8\x03', b'J\x00\x00\x00\x70')
    assert claimed != program
    rezip(path, data_pkl=claimed)
    with pytest.raises(CheckpointError, match='huge.pth'):
        read_checkpoint(path)


def test_content_that_refers_to_itself(tmp_path):
    loop = dict(a=torch.zeros(1))
    loop['b'] = [loop]
    torch.save(loop, tmp_path / 'loop.pth')
    assert read_checkpoint(str(tmp_path / 'loop.pth'))['b'][0]['a'].numel() == 1


def test_no_archive_is_unpacked():
    """Path traversal needs someone to unpack: nothing here does, data archives are the user's to open."""
    unpack = re.compile(r'extractall|unpack_archive|\.extract\(|import tarfile|tar .*-?x')
    files = [p for folder in ('mmoverlock', 'tools') for p in (ROOT / folder).rglob('*') if p.suffix in ('.py', '.sh')]
    assert files and not [p for p in files if unpack.search(p.read_text(encoding='utf-8'))]


# --- downloads


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    return tmp_path / 'checkpoints'


@pytest.mark.parametrize('url', ['http://example.org/a.pth', 'https://example.org/', 'https://example.org/a/..'])
def test_addresses_that_are_refused(cache, url):
    for load in (checkpoints.load_state_dict_file, lambda u: CheckpointLoader.load_checkpoint(u, map_location='cpu')):
        with pytest.raises(CheckpointError, match='only https|names no file'):
            load(url)
    assert not cache.exists()


def test_any_address_is_read_safely(cache, target):
    cache.mkdir()
    torch.save(dict(a=Calls(os.mkdir, target)), cache / 'evil.pth')
    with pytest.raises(UnsafeCheckpointError, match='mkdir, which could run code'):
        CheckpointLoader.load_checkpoint('https://example.org/evil.pth', map_location='cpu')


def test_redirection_away_from_https():
    request = checkpoints.urllib.request.Request('https://example.org/a.pth')
    handler = checkpoints._OnlyHttps()
    with pytest.raises(OSError, match='which is not https'):
        handler.redirect_request(request, None, 302, 'Found', {}, 'http://example.org/a.pth')
    assert handler.redirect_request(request, None, 302, 'Found', {}, 'https://example.com/a.pth') is not None


@pytest.fixture
def server():
    """A server on this machine: /whole answers with a file, /short breaks off."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', '8')
            self.end_headers()
            self.wfile.write(b'12345678' if self.path == '/whole' else b'1234')

        def log_message(self, *args):
            pass

    server = HTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_fetched_whole_or_not_at_all(server, tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    digest = checkpoints.fetch(f'{server}/whole', str(tmp_path / 'a'))
    assert digest == 'ef797c8118f02dfb649607dd5d3f8c7623048c9c063d532cc95c5ed7a898a64f'
    assert (tmp_path / 'a').read_bytes() == b'12345678'
    with pytest.raises(OSError, match='broke off after 4 of 8 bytes'):
        checkpoints.fetch(f'{server}/short', str(tmp_path / 'b'))
    assert os.listdir(tmp_path) == ['a']


def test_recorded_sum(cache, monkeypatch):
    url = checkpoints.OFFICIAL_RELEASE + 'v1/overlock_xt_in1k_224.pth'
    monkeypatch.setattr(checkpoints, 'fetch', lambda url, path: (torch.save(dict(a=torch.ones(1)), path), 'abc')[1])
    said = []
    monkeypatch.setattr(checkpoints, 'print_log', lambda text, **kwargs: said.append(text))
    path = checkpoints._download(url)
    assert said == [f'{path}: SHA-256 abc; none is on record to compare with']
    found = checkpoints._sha256(path)
    monkeypatch.setitem(checkpoints.OFFICIAL_SHA256, os.path.basename(path), found)
    assert checkpoints._download(url) == path
    monkeypatch.setitem(checkpoints.OFFICIAL_SHA256, os.path.basename(path), 'def')
    with pytest.raises(CheckpointError, match=f'has SHA-256 {found}, the official file has def'):
        checkpoints._download(url)
    assert checkpoints._download('https://example.org/overlock_xt_in1k_224.pth') == path  # not the official address
