import pytest
import torch
from tiny_configs import ARCH, load_tool, write_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmoverlock import OverLoCK
from mmoverlock.models import blocks
from mmoverlock.ops import contmix

PUBLISHED_GMACS = dict(xt=2.6, t=5.5, s=9.7, b=16.7)
# Counted on the official code.
PARAMS = dict(
    cls=dict(xt=17307272, t=34990472, s=58309772, b=98012968),
    merged=dict(xt=16791384, t=33981064, s=56670476, b=95520680),
    det=dict(xt=15657380, t=33127096, s=56446524, b=96091496),
    seg=dict(xt=15514328, t=32796472, s=56115900, b=95673464),
)


@pytest.fixture(scope='module')
def tool():
    return load_tool('analysis/get_flops.py')


@pytest.mark.parametrize('arch', PUBLISHED_GMACS)
def test_published_figures(tool, arch):
    result = tool.main([arch])
    assert result['params']['train'] == PARAMS['cls'][arch]
    assert result['params']['merged'] == PARAMS['merged'][arch]
    assert round(result['published'] / 1e9, 1) == PUBLISHED_GMACS[arch]
    assert result['complete'] > result['published']


@pytest.mark.parametrize('task', ['det', 'seg'])
@pytest.mark.parametrize('arch', PUBLISHED_GMACS)
def test_dense_backbones(tool, arch, task):
    assert tool.parameters(tool.build_variant(arch, task)) == PARAMS[task][arch]


def test_contmix_counts_what_its_definition_multiplies(tool):
    groups, dim, height, width, small, large = 4, 3, 9, 11, 3, 5
    shapes = [
        (1, groups, dim, height, width),
        (1, groups, dim, 49),
        (small**2 + large**2, 49),
        (small**2 + large**2,),
        (groups, 2 * small - 1, 2 * small - 1),
        (groups, 2 * large - 1, 2 * large - 1),
        (1, 16, height, width),
    ]
    with tool.counting() as tally:
        blocks.contmix(*(torch.rand(s) for s in shapes))
    with FlopCounterMode(display=False) as counter:
        contmix(*(torch.rand(s) for s in shapes), backend='reference')
    places = height * width
    assert tally['ContMix affinity'] == places * groups * dim * 49
    assert tally['ContMix projection'] == places * groups * 49 * (small**2 + large**2)
    assert tally['ContMix window sums'] == places * 16 // 2 * (small**2 + large**2)
    # The definition multiplies the zeros outside the windows too.
    assert sum(tally[k] for k in tool.COMPLETE[2:]) <= counter.get_total_flops() // 2


def test_convolutions_are_counted_by_hand(tool):
    conv = nn.Conv2d(3, 8, 3, padding=1, device='meta')
    with tool.counting() as tally:
        conv(torch.empty(1, 3, 10, 10, device='meta'))
    assert tool.total(tally, tool.COMPLETE) == 10 * 10 * 8 * 27
    assert tool.total(tally, tool.PUBLISHED) == 10 * 10 * 8 * (27 + 1)


@pytest.mark.parametrize(
    'task, part', [('cls', 'whole model'), ('det', '1000 boxes and 100 masks'), ('seg', 'whole segmentor')]
)
def test_config(tool, task, part, roots, tmp_path):
    config = write_config(tmp_path / 'tiny.py', task, roots[task])
    result = tool.main([config, '--shape', '64'])
    assert part in result['part']
    assert result['params']['train'] > result['params']['merged'] > result['params']['deploy']
    assert result['shape'] == (64, 64)


@pytest.mark.parametrize('form', ['train', 'merged', 'deploy'])
def test_a_larger_picture_costs_more(tool, form):
    def build():
        with torch.device('meta'):
            return OverLoCK(ARCH)

    small, large = (tool.report(build, 'tiny', form, s)['complete'] for s in ((256, 256), (256, 512)))
    assert large == pytest.approx(2 * small, rel=0.02)


def test_neither_variant_nor_config(tool, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(['huge'])
    assert stop.value.code == 2
    assert 'huge is neither a variant' in capsys.readouterr().err
