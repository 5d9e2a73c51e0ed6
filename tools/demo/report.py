# Copyright (c) mmoverlock authors. Licensed under Apache-2.0.
"""Write the demo's report: one HTML file that needs nothing else, no network and no script.

Charts are SVG in the page and pictures are embedded, so that the file can be mailed or attached.
"""

import base64
import html
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from steps import clock

BLUE, ORANGE, GREEN, INK, GREY = '#2f5fd0', '#d9691e', '#1b8a5a', '#1d2433', '#8a93a6'


@dataclass
class Series:
    """One line of a chart.

    Args:
        name (str): Name in the legend.
        points (list[tuple]): (x, y) pairs in order of x; values that are not finite are skipped.
        colour (str): CSS colour.
        smooth (bool): Draw the points faintly and a running mean strongly. Defaults to False.
        dots (bool): Mark every point. Defaults to False.
    """

    name: str
    points: list
    colour: str
    smooth: bool = False
    dots: bool = False


@dataclass
class Chart:
    """A line chart over training iterations.

    Args:
        title (str): Heading of the chart.
        series (list[Series]): Its lines.
        target (float): Level drawn as a dashed line. Defaults to None, no line.
        low, high (float): Ends of the vertical axis. Default to the data's.
    """

    title: str
    series: list
    target: float = None
    low: float = None
    high: float = None


@dataclass
class Picture:
    """A picture with a caption.

    Args:
        path (Path): PNG or JPEG file.
        caption (str): Text below it. Defaults to ''.
        mark (str): 'good', 'bad' or '', the caption's colour. Defaults to ''.
    """

    path: Path
    caption: str = ''
    mark: str = ''


@dataclass
class Gallery:
    """Pictures under one heading.

    Args:
        title (str): Heading.
        note (str): Text below it.
        pictures (list[Picture]): The pictures.
        wide (bool): They hold truth and prediction side by side. Defaults to False.
        legend (list[tuple]): (name, CSS colour) pairs. Defaults to none.
    """

    title: str
    note: str
    pictures: list
    wide: bool = False
    legend: list = field(default_factory=list)


@dataclass
class Target:
    """A number that the demo must reach; ``value`` None means that it was not measured."""

    name: str
    value: float
    target: float
    unit: str = '%'
    at_most: bool = False

    @property
    def met(self):
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass
class Task:
    """One task's section.

    Args:
        title (str): Heading.
        text (str): A sentence or two below it.
        charts (list[Chart]): Curves.
        table (list[list]): Rows of a table, the first one its head.
        table_note (str): Text below the table. Defaults to ''.
        galleries (list[Gallery]): Pictures.
    """

    title: str
    text: str
    charts: list = field(default_factory=list)
    table: list = field(default_factory=list)
    table_note: str = ''
    galleries: list = field(default_factory=list)


@dataclass
class Command:
    """One command that was run; ``wall`` and ``cpu`` in seconds. Those of a phase ran together."""

    phase: str
    title: str
    command: str
    wall: float
    cpu: float


@dataclass
class Report:
    """All that the page shows.

    Args:
        title, lead (str): Heading, and a sentence or two below it.
        targets (list[Target]): Numbers to reach.
        tasks (list[Task]): Sections.
        commands (list[Command]): Commands that were run.
        wall (float): Seconds from start to end.
        facts (list[tuple]): (name, value) pairs about the machine.
        flow (tuple[str]): What leads to what, in a few words each. Defaults to none.
        data_text (str): What the data are. Defaults to ''.
        banner (str): A warning above everything, in place of a verdict. Defaults to ''.
    """

    title: str
    lead: str
    targets: list
    tasks: list
    commands: list
    wall: float
    facts: list
    flow: tuple = ()
    data_text: str = ''
    banner: str = ''


def _number(value, unit=''):
    if value is None or not math.isfinite(value):
        return '–'
    return f'{value:.1f}{" %" if unit == "%" else " " + unit if unit else ""}'


# ---------------------------------------------------------------- charts


def _ticks(low, high, count=5):
    """About ``count`` round numbers that span low to high."""
    span = high - low or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _running_mean(points):
    """Mean over a window that grows to a tenth of the points."""
    out = []
    for i in range(len(points)):
        reach = min(i, len(points) - 1 - i, max(1, len(points) // 20))
        window = points[i - reach : i + reach + 1]
        out.append((points[i][0], sum(y for _, y in window) / len(window)))
    return out


def draw_chart(chart, width=460, height=230):
    """Draw a chart as SVG.

    Args:
        chart (Chart): What to draw.
        width, height (int): Size in CSS pixels; the page scales it.

    Returns:
        str: An ``<svg>`` element, or a line of text if there is nothing to draw.
    """
    series = []
    for s in chart.series:
        points = [(x, y) for x, y in s.points if y is not None and math.isfinite(y)]
        if points:
            series.append((s, points))
    if not series:
        return '<p class="note">No values were logged.</p>'

    xs = [x for _, points in series for x, _ in points]
    ys = sorted(y for _, points in series for _, y in points)
    if chart.target is not None:
        ys = sorted([*ys, chart.target])
    # A first loss ten times the rest would press the curve flat: cut the top at the 98th centile.
    top = ys[min(len(ys) - 1, int(0.98 * len(ys)))] if len(ys) > 50 else ys[-1]
    low = chart.low if chart.low is not None else min(ys[0], 0)
    high = chart.high if chart.high is not None else top * 1.05
    if high <= low:
        high = low + 1
    first, last = min(0, min(xs)), max(max(xs), 1)
    left, right, above, below = 40, 12, 10, 26

    def px(x):
        return left + (x - first) / (last - first) * (width - left - right)

    def py(y):
        y = min(max(y, low), high)
        return height - below - (y - low) / (high - low) * (height - above - below)

    def path(points):
        return 'M' + 'L'.join(f'{px(x):.1f},{py(y):.1f}' for x, y in points)

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(chart.title)}">']
    for y in _ticks(low, high):
        out.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(y):.1f}" '
            f'y2="{py(y):.1f}"/><text x="{left - 7}" y="{py(y) + 3.5:.1f}" '
            f'text-anchor="end">{y:g}</text>'
        )
    for x in _ticks(first, last):
        out.append(f'<text x="{px(x):.1f}" y="{height - 8}" text-anchor="middle">{x:g}</text>')
    if chart.target is not None:
        y = py(chart.target)
        out.append(f'<line class="target" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for s, points in series:
        if s.smooth and len(points) > 10:
            out.append(f'<path d="{path(points)}" stroke="{s.colour}" opacity=".25"/>')
            points = _running_mean(points)
        out.append(f'<path d="{path(points)}" stroke="{s.colour}" stroke-width="2"/>')
        if s.dots:
            out += [
                f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.2" fill="{s.colour}">'
                f'<title>{html.escape(s.name)}: {y:.1f} at {x:g}</title></circle>'
                for x, y in points
            ]
    out.append('</svg>')
    legend = [f'<span><i style="background:{s.colour}"></i>{html.escape(s.name)}</span>' for s, _ in series]
    if chart.target is not None:
        legend.append(f'<span><i class="dash"></i>target {chart.target:g}</span>')
    return ''.join(out) + f'<div class="legend">{"".join(legend)}</div>'


# ---------------------------------------------------------------- the page

_STYLE = """
:root { color-scheme: light; --ink: #1d2433; --soft: #5b6478; --line: #e3e7ee; --paper: #fff;
  --wash: #f5f7fa; --blue: #2f5fd0; --good: #1b8a5a; --good-wash: #e7f5ee; --bad: #c0342b;
  --bad-wash: #fdecea; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; -webkit-font-smoothing: antialiased; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em;
  margin: 0 0 12px; text-wrap: balance; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 0 0 6px; }
h3 { font-size: .95rem; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 74ch; }
.lead { font-size: 1.08rem; color: var(--soft); }
.note { color: var(--soft); font-size: .875rem; }
section > :last-child { margin-bottom: 0; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 14px;
  padding: 28px; margin-top: 24px; }
.badge { display: inline-block; border-radius: 99px; padding: 3px 12px; font-size: .85rem;
  font-weight: 600; margin-bottom: 16px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.badge.good { background: var(--good-wash); } .badge.bad { background: var(--bad-wash); }
.banner { background: #fff6dd; border: 1px solid #f0dca0; border-radius: 10px;
  padding: 12px 16px; margin-bottom: 24px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 14px;
  margin-top: 28px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 14px;
  padding: 18px 20px; }
.card b { display: block; font-size: 1.9rem; line-height: 1.15; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.card small { color: var(--soft); display: block; font-size: .85rem; }
.bar { position: relative; height: 6px; border-radius: 3px; background: var(--line);
  margin: 12px 0 8px; }
.bar i { position: absolute; inset: 0 auto 0 0; border-radius: 3px; background: var(--good); }
.bad .bar i, .card.miss .bar i { background: var(--bad); }
.bar u { position: absolute; top: -3px; width: 2px; height: 12px; background: var(--ink); }
.card.miss b { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 28px; margin: 20px 0 8px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: #6b7488; font-variant-numeric: tabular-nums; }
svg path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.grid { stroke: #eceff4; } .target { stroke: #1d2433; stroke-dasharray: 4 4; opacity: .55; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .82rem; color: var(--soft);
  padding-left: 40px; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; }
.legend i.dash { height: 0; border-top: 2px dashed #1d2433; opacity: .55; border-radius: 0; }
.legend.swatches { padding: 0; margin-bottom: 4px; } .legend.swatches i { width: 11px; height: 11px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: 12px 0; min-width: 50%; }
th, td { padding: 7px 14px; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.gallery { display: grid; gap: 14px; margin: 12px 0 20px;
  grid-template-columns: repeat(auto-fill, minmax(106px, 1fr)); }
.gallery.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; }
figure img { width: 100%; display: block; border-radius: 8px; }
figcaption { font-size: .8rem; color: var(--soft); padding-top: 5px; line-height: 1.35; }
figcaption.good { color: var(--good); } figcaption.bad { color: var(--bad); }
.flow { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin-top: 20px;
  font-size: .9rem; }
.flow span { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 5px 12px; } .flow em { color: var(--soft); font-style: normal; }
ol.steps { list-style: none; margin: 16px 0 0; padding: 0; }
ol.steps li { padding: 14px 0; border-top: 1px solid var(--line); }
ol.steps div { display: flex; justify-content: space-between; gap: 16px; flex-wrap: wrap; }
ol.steps span { color: var(--soft); font-size: .85rem; font-variant-numeric: tabular-nums; }
pre { margin: 8px 0 0; background: #f2f4f8; border-radius: 8px; padding: 10px 14px;
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 24px; margin: 12px 0 0;
  font-size: .9rem; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 560px) { main { padding: 28px 14px 48px; } section { padding: 20px 16px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; } }
@media print { body { background: #fff; } section, .card { break-inside: avoid; } }
"""


def _embed(path):
    path = Path(path)
    kind = dict(jpg='jpeg').get(path.suffix[1:], path.suffix[1:])
    return f'data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}'


def _card(target):
    sign = '≤' if target.at_most else '≥'
    scale = max(target.target, target.value or 0) if target.at_most else 100
    share = 0 if target.value is None else min(max(target.value / scale, 0), 1)
    verdict = 'met' if target.met else 'missed' if target.value is not None else 'not measured'
    return (
        f'<div class="card{"" if target.met else " miss"}">'
        f'<small>{html.escape(target.name)}</small>'
        f'<b>{_number(target.value, target.unit)}</b>'
        f'<div class="bar"><i style="width:{share:.1%}"></i>'
        f'<u style="left:calc({min(target.target / scale, 1):.1%} - 1px)"></u></div>'
        f'<small>target {sign} {target.target:g} '
        f'{html.escape(target.unit)}: {verdict}</small></div>'
    )


def _gallery(gallery):
    figures = []
    for p in gallery.pictures:
        caption = f'<figcaption class="{p.mark}">{html.escape(p.caption)}</figcaption>' if p.caption else ''
        figures.append(
            f'<figure><img src="{_embed(p.path)}" loading="lazy" '
            f'alt="{html.escape(p.caption or gallery.title)}">{caption}</figure>'
        )
    legend = ''.join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>' for name, colour in gallery.legend
    )
    return (
        f'<h3>{html.escape(gallery.title)}</h3>'
        f'<p class="note">{html.escape(gallery.note)}</p>'
        + (f'<div class="legend swatches">{legend}</div>' if legend else '')
        + f'<div class="gallery{" wide" if gallery.wide else ""}">{"".join(figures)}</div>'
    )


def _table(rows):
    head, *body = rows

    def line(cells, tag):
        shown = (c if isinstance(c, str) else _number(c) for c in cells)
        return '<tr>' + ''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in shown) + '</tr>'

    return (
        '<div class="scroll"><table><thead>'
        + line(head, 'th')
        + '</thead><tbody>'
        + ''.join(line(r, 'td') for r in body)
        + '</tbody></table></div>'
    )


def _task(task):
    out = [f'<section><h2>{html.escape(task.title)}</h2><p>{html.escape(task.text)}</p>']
    if task.charts:
        out.append('<div class="charts">')
        out += [f'<div><h3>{html.escape(c.title)}</h3>{draw_chart(c)}</div>' for c in task.charts]
        out.append('</div>')
    if task.table:
        out.append(_table(task.table))
    if task.table_note:
        out.append(f'<p class="note">{html.escape(task.table_note)}</p>')
    out += [_gallery(g) for g in task.galleries]
    return ''.join(out) + '</section>'


def render(report):
    """Render the page.

    Args:
        report (Report): What it shows.

    Returns:
        str: A whole HTML document.
    """
    missed = [t.name for t in report.targets if not t.met]
    if report.banner:
        verdict = ''
    elif missed:
        verdict = f'<span class="badge bad">Missed: {html.escape(", ".join(missed))}</span>'
    else:
        verdict = '<span class="badge good">Every target met</span>'
    out = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>{html.escape(report.title)}</title><style>{_STYLE}</style></head><body><main>',
    ]
    if report.banner:
        out.append(f'<div class="banner">{html.escape(report.banner)}</div>')
    out.append(f'{verdict}<h1>{html.escape(report.title)}</h1><p class="lead">{html.escape(report.lead)}</p>')
    if report.flow:
        out.append(
            '<div class="flow">' + '<em>→</em>'.join(f'<span>{html.escape(f)}</span>' for f in report.flow) + '</div>'
        )
    out.append('<div class="cards">' + ''.join(map(_card, report.targets)) + '</div>')
    if report.data_text:
        out.append(f'<section><h2>The scenes</h2><p>{html.escape(report.data_text)}</p></section>')
    out += map(_task, report.tasks)
    commands = ''.join(
        f'<li><div><b>{html.escape(c.phase)}: {html.escape(c.title)}</b><span>{clock(c.wall)} wall · '
        f'{clock(c.cpu)} CPU</span></div><pre>{html.escape(c.command)}</pre></li>'
        for c in report.commands
    )
    out.append(
        '<section><h2>The commands</h2><p>Run from the root of the repository, in this order; those with the same '
        f'first word ran side by side. From start to end {clock(report.wall)}, CPU time '
        f'{clock(sum(c.cpu for c in report.commands))} (minutes and seconds).</p><ol class="steps">{commands}</ol>'
        '</section>'
    )
    facts = ''.join(f'<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>' for k, v in report.facts)
    out.append(f'<section><h2>Versions and machine</h2><dl>{facts}</dl></section>')
    return ''.join(out) + '</main></body></html>\n'


def write_report(path, report):
    """Render the page into a file, whole or not at all.

    Args:
        path (str | Path): File to write.
        report (Report): What it shows.

    Returns:
        Path: The file.
    """
    path = Path(path)
    draft = path.with_name(f'.{path.name}.tmp')
    draft.write_text(render(report), encoding='utf-8')
    os.replace(draft, path)
    return path
