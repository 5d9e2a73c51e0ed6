"""The demo's report: one file without anything from outside, and honest about what was missed."""

import math
import re

import pytest
import report
from report import Chart, Command, Gallery, Picture, Report, Series, Target, Task

PIXEL = bytes.fromhex(
    '89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360000002'
    '000001e221bc330000000049454e44ae426082'
)


def make(targets=(), **kwargs):
    defaults = dict(title='T', lead='L', targets=list(targets), tasks=[], commands=[], wall=61, facts=[])
    return Report(**{**defaults, **kwargs})


@pytest.mark.parametrize(
    'value, target, at_most, met',
    [(90, 90, False, True), (89.9, 90, False, False), (12, 20, True, True), (21, 20, True, False),
     (None, 90, False, False), (math.nan, 90, False, False), (math.nan, 20, True, False)],
)  # fmt: skip
def test_targets(value, target, at_most, met):
    assert Target('x', value, target, at_most=at_most).met is met


def test_verdict():
    good, bad = Target('top-1', 99, 90), Target('mIoU', 12, 60)
    assert 'Every target met' in report.render(make([good]))
    page = report.render(make([good, bad]))
    assert 'Every target met' not in page
    assert 'Missed: mIoU' in page
    page = report.render(make([good, bad], banner='only a trial'))
    assert 'only a trial' in page and 'Missed' not in page and 'Every target met' not in page


def test_nothing_from_outside(tmp_path):
    picture = tmp_path / 'p.png'
    picture.write_bytes(PIXEL)
    gallery = Gallery('G', 'note', [Picture(picture, 'caption', 'bad')], legend=[('ring', 'rgb(1,2,3)')])
    chart = Chart('C', [Series('loss', [(1, 2.0), (2, 1.0)], '#123456', dots=True)], target=1.5)
    task = Task('Task', 'text', [chart], [['', 'a'], ['row', 1.25]], 'below', [gallery])
    page = report.render(
        make([Target('x', 1, 0)], tasks=[task], commands=[Command('Draw', 'it', 'python x.py', 61, 122)])
    )
    assert 'data:image/png;base64,' in page and '<svg' in page and 'python x.py' in page and '1:01 wall' in page
    assert '1.2' in page or '1.3' in page
    assert not re.search(r'<script|<link|<iframe|@import|url\(|(src|href)="(?!data:)', page)
    assert 'http://' not in page and 'https://' not in page


def test_text_is_escaped():
    page = report.render(make(title='<b>&', commands=[Command('a', 'b', 'x > y && z', 1, 1)]))
    assert '<b>&<' not in page and '&lt;b&gt;&amp;' in page and 'x &gt; y &amp;&amp; z' in page


def test_chart_draws_all_points_and_skips_what_is_no_number():
    chart = Chart('C', [Series('s', [(1, 1.0), (2, math.nan), (3, None), (4, 2.0)], 'red', dots=True)])
    svg = report.draw_chart(chart)
    assert svg.count('<circle') == 2 and 'nan' not in svg
    assert 'No values' in report.draw_chart(Chart('C', [Series('s', [], 'red')]))
    # A constant, a single point, and a huge first value.
    for points in ([(5, 0.0)], [(1, 3.0), (2, 3.0)], [(i, 1e6 if i == 0 else 1.0) for i in range(100)]):
        numbers = re.findall(
            r' (?:x|y|cx|cy)\d?="([^"]*)"', report.draw_chart(Chart('C', [Series('s', points, 'red')]))
        )
        assert all(math.isfinite(float(n)) for n in numbers)


def test_a_higher_value_is_drawn_higher():
    svg = report.draw_chart(Chart('C', [Series('s', [(1, 10.0), (2, 90.0)], 'red', dots=True)], low=0, high=100))
    low, high = (float(y) for y in re.findall(r'cy="([\d.]+)"', svg))
    assert high < low


def test_written_whole(tmp_path):
    path = report.write_report(tmp_path / 'r.html', make())
    assert path.read_text().endswith('</html>\n')
    (tmp_path / 'gone.png').unlink(missing_ok=True)
    broken = make(tasks=[Task('t', 'x', galleries=[Gallery('g', '', [Picture(tmp_path / 'gone.png')])])])
    with pytest.raises(FileNotFoundError):
        report.write_report(tmp_path / 'r.html', broken)
    assert [p.name for p in tmp_path.iterdir()] == ['r.html']
    assert path.read_text().endswith('</html>\n')
