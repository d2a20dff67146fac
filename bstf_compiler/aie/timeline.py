"""Pictures of an Estimate: Chrome/Perfetto trace, PNG and one HTML page; and its table of layers as CSV.

A lane is an instruction kind. Where a lane has a single row, the spans of all its units are merged by layer:
pale while any unit is inside an instruction, solid up to the fraction of the lane's units at work.
"""

from __future__ import annotations

import csv
import html
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from bstf_compiler.aie.estimate import Estimate, LayerEstimate, Span
from bstf_compiler.aie.isa import KINDS

COLORS = dict(zip(KINDS, ("#0072B2", "#CC79A7", "#56B4E9", "#9467BD", "#D55E00", "#009E73", "#C99A00")))
"""Colour of each lane: after Okabe and Ito, so that colour-blind readers tell them apart."""

_TOUCH = 1e-12  # seconds; spans closer than this are one bar


@dataclass(frozen=True)
class Bar:
    """Spans of one layer and lane that touch or overlap, merged over all units.

    Args:
        layer: name of the layer.
        kind: the lane.
        units: number of units that take part.
        start: seconds since the start of the program.
        end: seconds since the start of the program.
        busy: seconds of work, summed over the units.
        bytes: of all spans together.
        macs: multiply-adds of all spans together.
    """

    layer: str
    kind: str
    units: int
    start: float
    end: float
    busy: float
    bytes: int
    macs: int


class _Event(NamedTuple):
    start: float
    end: float
    name: str
    args: dict


def merge(spans: Iterable[Span]) -> tuple[Bar, ...]:
    """Merges spans into bars: ordered by lane, then start. Bars of one lane and layer don't touch."""
    runs: dict[tuple[str, str], list[list[Span]]] = {}
    ends: dict[tuple[str, str], float] = {}
    for span in sorted(spans, key=lambda span: span.start):
        key = span.kind, span.layer
        if key in ends and span.start <= ends[key] + _TOUCH:
            runs[key][-1].append(span)
            ends[key] = max(ends[key], span.end)
        else:
            runs.setdefault(key, []).append([span])
            ends[key] = span.end
    bars = [_bar(run) for group in runs.values() for run in group]
    return tuple(sorted(bars, key=lambda bar: (KINDS.index(bar.kind), bar.start)))


def chrome_trace(estimate: Estimate) -> dict:
    """The estimate in the Chrome trace event format, which Perfetto and chrome://tracing open.

    One process for the layers and one for each lane in use, one track (thread) for each unit of a lane. Times
    are microseconds on a grid of 1 ns. As a track can only nest events, spans of a unit that overlap each
    other are spread over tracks "core 0,1", "core 0,1 (2)", ...

    Returns:
        A dictionary for `json.dump`. `traceEvents`: complete events ("X") with args layer, unit, busy_us,
        bytes and macs, and metadata ("M"). `otherData`: device, cost model and total seconds.
    """
    events: list[dict] = []
    processes: dict[str, int] = {}
    threads: dict[str, int] = {}
    for (process, unit), track in _tracks(estimate).items():
        if process not in processes:
            processes[process] = len(processes) + 1
            events += _named("process", process, processes[process], 0, processes[process])
        pid = processes[process]
        for copy, row in enumerate(_without_overlap(track)):
            tid = threads[process] = threads.get(process, 0) + 1
            events += _named("thread", unit if copy == 0 else f"{unit} ({copy + 1})", pid, tid, tid)
            events += [
                {"ph": "X", "cat": process, "name": name, "pid": pid, "tid": tid}
                | {"ts": start / 1000, "dur": (end - start) / 1000, "args": args}
                for start, end, name, args in row
            ]
    other = {"device": estimate.device, "cost_model": estimate.cost_model, "seconds": estimate.total_seconds}
    return {"displayTimeUnit": "ms", "otherData": other, "traceEvents": events}


def write_chrome_trace(estimate: Estimate, path: str | Path) -> None:
    """Writes `chrome_trace` as JSON. Replaces `path` only when complete."""
    with _replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        json.dump(chrome_trace(estimate), stream, allow_nan=False, separators=(",", ":"))


def layers_csv(estimate: Estimate, path: str | Path) -> None:
    """Writes one row a layer: name, op, start, seconds, seconds of each kind, bound, macs, bytes.

    Seconds are written so that they read back equal. Replaces `path` only when complete.
    """
    with _replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["name", "op", "start", "seconds", *KINDS, "bound", "macs", "bytes"])
        for layer in estimate.layers:
            kinds = [layer.kinds.get(kind, 0.0) for kind in KINDS]
            times = [layer.start, layer.seconds, *kinds]
            writer.writerow([layer.name, layer.op, *times, layer.bound, layer.macs, layer.bytes])


def timeline_png(
    estimates: Estimate | Sequence[Estimate], path: str | Path, titles: Sequence[str] | None = None
) -> None:
    """Draws the seven lanes over milliseconds. Every bar is at least a pixel wide.

    Args:
        estimates: one, or several to draw one above the other on one time axis.
        path: file to write. Replaced only when complete.
        titles: one for each estimate.

    Raises:
        ValueError: no estimate, or not as many titles as estimates.
        FileNotFoundError: the folder of `path` does not exist.
    """
    panels = _panels(estimates, titles)
    figure = Figure(figsize=(15, 0.7 + 3.3 * len(panels)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    horizon = _horizon(panels)
    for axes, (title, estimate) in zip(all_axes, panels):
        _draw_lanes(axes, estimate, horizon)
        axes.set_title(_headline(title, estimate), loc="left", fontsize=11, parse_math=False)
    all_axes[-1].set_xlabel(
        "time in ms   (pale: inside an instruction; solid: fraction of the lane's units at work; "
        "right: ms of work of the busiest unit)"
    )
    with _replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def timeline_html(
    estimates: Estimate | Sequence[Estimate], path: str | Path, titles: Sequence[str] | None = None
) -> None:
    """Writes one HTML page that needs only a browser: lanes to zoom and pan, details, tables of layers.

    Args:
        estimates: one, or several to show one above the other on one time axis.
        path: file to write. Replaced only when complete.
        titles: one for each estimate.

    Raises:
        ValueError: no estimate, or not as many titles as estimates.
        FileNotFoundError: the folder of `path` does not exist.
    """
    panels = _panels(estimates, titles)
    data = {
        "kinds": KINDS,
        "colors": list(COLORS.values()),
        "horizon": _horizon(panels),
        "panels": [_page_data(estimate) for _, estimate in panels],
    }
    # A "<" inside a string could end the script element; its JSON escape is the same string.
    embedded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    sections = "".join(_section(index, *panel) for index, panel in enumerate(panels))
    page = _PAGE.replace("@SECTIONS@", sections).replace("@SCRIPT@", _SCRIPT).replace("@DATA@", embedded)
    with _replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _bar(run: Sequence[Span]) -> Bar:
    return Bar(
        layer=run[0].layer,
        kind=run[0].kind,
        units=len({span.unit for span in run}),
        start=run[0].start,
        end=max(span.end for span in run),
        busy=sum(span.busy for span in run),
        bytes=sum(span.bytes for span in run),
        macs=sum(span.macs for span in run),
    )


def _tracks(estimate: Estimate) -> dict[tuple[str, str], list[_Event]]:
    """Events by process and track, in the order to show them."""
    layers = [
        _Event(
            layer.start,
            layer.start + layer.seconds,
            layer.name,
            {"op": layer.op, "bound": layer.bound, "bytes": layer.bytes, "macs": layer.macs},
        )
        for layer in estimate.layers
    ]
    tracks = {("layers", "layers"): layers}
    for span in sorted(estimate.spans, key=lambda span: (KINDS.index(span.kind), _natural(span.unit))):
        args = {"layer": span.layer, "unit": span.unit, "busy_us": span.busy * 1e6}
        args |= {"bytes": span.bytes, "macs": span.macs}
        event = _Event(span.start, span.end, f"{span.kind} {span.layer}", args)
        tracks.setdefault((span.kind, span.unit), []).append(event)
    return tracks


def _named(what: str, name: str, pid: int, tid: int, order: int) -> list[dict]:
    """Metadata that names a process or thread and puts it in its place."""
    place = {"ph": "M", "pid": pid, "tid": tid}
    return [
        place | {"name": f"{what}_name", "args": {"name": name}},
        place | {"name": f"{what}_sort_index", "args": {"sort_index": order}},
    ]


def _without_overlap(track: list[_Event]) -> list[list[_Event]]:
    """Spreads events over as few rows as needed so that none overlap; times become whole nanoseconds."""
    rows: list[list[_Event]] = []
    for event in sorted(track, key=lambda event: (event.start, event.end)):
        event = event._replace(start=round(event.start * 1e9), end=round(event.end * 1e9))
        row = next((row for row in rows if row[-1].end <= event.start), None)
        if row is None:
            rows.append([event])
        else:
            row.append(event)
    return rows


def _natural(unit: str) -> list[tuple[int, int, str]]:
    """Sort key that puts "core 2,0" before "core 10,0"."""
    words = "".join(c if c.isdigit() else f" {c} " for c in unit).split()
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in words]


def _units(estimate: Estimate) -> dict[str, list[str]]:
    """The units of each lane, in order."""
    units: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for span in estimate.spans:
        units[span.kind].add(span.unit)
    return {kind: sorted(names, key=_natural) for kind, names in units.items()}


def _panels(estimates: Estimate | Sequence[Estimate], titles: Sequence[str] | None) -> list[tuple[str, Estimate]]:
    if isinstance(estimates, Estimate):
        estimates = [estimates]
    if not estimates:
        raise ValueError("A timeline needs at least one estimate.")
    titles = [""] * len(estimates) if titles is None else titles
    if len(titles) != len(estimates):
        raise ValueError(f"A timeline needs one title for each estimate: {len(titles)} for {len(estimates)}.")
    return list(zip(titles, estimates))


def _horizon(panels: Sequence[tuple[str, Estimate]]) -> float:
    """Right end of the common time axis, in seconds."""
    times = [estimate.total_seconds for _, estimate in panels]
    times += [span.end for _, estimate in panels for span in estimate.spans]
    return max(times) or 1e-6


def _headline(title: str, estimate: Estimate) -> str:
    text = f"{estimate.total_seconds * 1e3:.3f} ms on {estimate.device}, cost model {estimate.cost_model}"
    return f"{title}: {text}" if title else text


@contextmanager
def _replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if the body succeeds, and vanishes if not."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Can't write {path.name}: create the folder {path.parent} first.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw_lanes(axes: Axes, estimate: Estimate, horizon: float) -> None:
    rows = {kind: index + 1 for index, kind in enumerate(KINDS)}
    units = _units(estimate)
    busiest = {kind: sum(layer.kinds.get(kind, 0.0) for layer in estimate.layers) for kind in KINDS}
    merged = merge(estimate.spans)
    for kind in KINDS:
        bars = [bar for bar in merged if bar.kind == kind]
        bottom = rows[kind] + 0.42  # the y axis points down
        # Thinner than a pixel a bar may vanish, so it gets a pixel.
        ends = [max(bar.end, bar.start + horizon / 1600) for bar in bars]
        heights = [0.84 * _fraction(bar, len(units[kind])) for bar in bars]
        pale = [_box(bar.start, end, bottom, bottom - 0.84) for bar, end in zip(bars, ends)]
        solid = [_box(b.start, end, bottom, bottom - height) for b, end, height in zip(bars, ends, heights)]
        for boxes, alpha in ((pale, 0.25), (solid, 1.0)):
            axes.add_collection(PolyCollection(boxes, facecolor=COLORS[kind], alpha=alpha, linewidth=0))
        text = f" {busiest[kind] * 1e3:.3f}"
        axes.text(1.0, rows[kind], text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    _draw_layers(axes, estimate.layers, horizon)
    axes.set_yticks(range(len(KINDS) + 1), ["layers", *KINDS])
    for label, color in zip(axes.get_yticklabels()[1:], COLORS.values()):
        label.set_color(color)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=True)
    axes.grid(axis="x", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlim(0, horizon * 1.002e3)
    axes.set_ylim(len(KINDS) + 0.55, -0.6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_layers(axes: Axes, layers: Sequence[LayerEstimate], horizon: float) -> None:
    """A row of alternating greys, with the names that have room."""
    for index, layer in enumerate(layers):
        box = _box(layer.start, layer.start + layer.seconds, 0.38, -0.38)
        color = ("0.62", "0.82")[index % 2]
        axes.add_collection(PolyCollection([box], facecolor=color, linewidth=0))
        letters = int(layer.seconds / horizon * 190)  # about 190 letters of this size fit the width
        if letters >= 7 or letters >= len(layer.name):
            text = layer.name if len(layer.name) <= letters else layer.name[: letters - 1] + "…"
            middle = (layer.start + layer.seconds / 2) * 1e3
            options = {"ha": "center", "va": "center", "fontsize": 7, "clip_on": True, "parse_math": False}
            axes.text(middle, 0, text, **options)


def _box(start: float, end: float, bottom: float, top: float) -> list[tuple[float, float]]:
    left, right = start * 1e3, end * 1e3
    return [(left, bottom), (left, top), (right, top), (right, bottom)]


def _fraction(bar: Bar, units: int) -> float:
    """Fraction of the lane's units that work, on average over the bar."""
    return min(1.0, bar.busy / ((bar.end - bar.start) * units)) if bar.end > bar.start else 0.0


def _page_data(estimate: Estimate) -> dict:
    """Numbers of one panel. Spans and bars have the same columns; for bars `unit` is the number of units."""
    units = _units(estimate)
    names = list(dict.fromkeys([layer.name for layer in estimate.layers] + [s.layer for s in estimate.spans]))
    layer_of = {name: index for index, name in enumerate(names)}
    unit_of = {(kind, unit): i for kind, group in units.items() for i, unit in enumerate(group)}
    spans = sorted(estimate.spans, key=lambda s: (KINDS.index(s.kind), unit_of[s.kind, s.unit], s.start))
    return {
        "units": list(units.values()),
        "names": names,
        "layers": [[layer.name, layer.start, layer.seconds, layer.bound] for layer in estimate.layers],
        "spans": [
            [layer_of[s.layer], KINDS.index(s.kind), unit_of[s.kind, s.unit], s.start, s.end, s.busy]
            + [s.bytes, s.macs]
            for s in spans
        ],
        "bars": [
            [layer_of[b.layer], KINDS.index(b.kind), b.units, b.start, b.end, b.busy, b.bytes, b.macs]
            for b in merge(estimate.spans)
        ],
    }


def _section(index: int, title: str, estimate: Estimate) -> str:
    headline = html.escape(_headline(title, estimate))
    rows = "".join(
        f'<tr><th scope="row"><button type="button" data-panel="{index}" data-layer="{number}">'
        f"{html.escape(layer.name)}</button></th><td>{html.escape(layer.op)}</td>"
        f"<td>{layer.seconds * 1e6:,.1f}</td>"
        + "".join(f"<td>{layer.kinds.get(kind, 0.0) * 1e6:,.1f}</td>" for kind in KINDS)
        + f"<td>{html.escape(layer.bound)}</td><td>{layer.macs:,}</td><td>{layer.bytes:,}</td></tr>\n"
        for number, layer in enumerate(estimate.layers)
    )
    kinds = "".join(f'<th scope="col">{kind} µs</th>' for kind in KINDS)
    return f"""<section><h2>{headline}</h2>
<canvas tabindex="0" role="application" aria-roledescription="timeline" aria-describedby="keys"
 aria-label="{headline}. The same numbers are in the table of layers below."></canvas>
<details><summary>Layers</summary><div class="scroll"><table><thead><tr><th scope="col">layer</th>
<th scope="col">op</th><th scope="col">total µs</th>{kinds}<th scope="col">bound</th>
<th scope="col">multiply-adds</th><th scope="col">bytes</th></tr></thead><tbody>
{rows}</tbody></table></div></details></section>
"""


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Timeline</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --ink: #1d1d1f; --faint: #8884; --paper: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --paper: #17181a } }
body { margin: 1rem; font: 14px system-ui, sans-serif; color: var(--ink); background: var(--paper) }
h2 { font-size: 1rem; margin: 1rem 0 .3rem }
canvas { width: 100%; display: block; cursor: grab; touch-action: none }
canvas:focus-visible, button:focus-visible { outline: 2px solid #0072b2; outline-offset: 1px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .1rem .5rem; text-align: right; white-space: nowrap } th { font-weight: 500 }
th:first-child, td:nth-child(2) { text-align: left } tbody tr:nth-child(odd) { background: var(--faint) }
tbody button { all: unset; cursor: pointer; text-decoration: underline dotted }
#tip { position: fixed; display: none; pointer-events: none; white-space: pre; padding: .4rem .6rem;
 background: var(--paper); border: 1px solid var(--ink); border-radius: 4px; font-size: 12px }
#keys { opacity: .75 }
</style></head><body>
<p><button type="button" id="fit">Whole program</button>
<button type="button" id="units" aria-pressed="false">One row per unit</button> <span id="range"></span></p>
<p id="keys">Wheel: zoom. Drag: move. Shift and drag: zoom into the selection. Keys: + and - zoom,
arrows move, N and P next and previous layer, U units, 0 whole program. Pale: inside an instruction.
Solid: fraction of the lane's units at work.</p>
<div id="status" role="status" aria-live="polite"></div>
@SECTIONS@<div id="tip"></div>
<script type="application/json" id="data">@DATA@</script>
<script>
@SCRIPT@</script></body></html>
"""

_SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [LAYER, KIND, UNIT, START, END, BUSY, BYTES, MACS] = [0, 1, 2, 3, 4, 5, 6, 7];
const LEFT = 80, BAND = 20, LANE = 26, ROW = 10, GAP = 5, AXIS = 24;
const by = id => document.getElementById(id);
const panels = [...document.querySelectorAll("canvas")].map(
  (canvas, i) => ({canvas, ...data.panels[i], chosen: -1}));
let view = [0, data.horizon], perUnit = false, queued = false, drag = null;

function layout(panel) {  // rows: {y, h, label, color, items, units}
  let y = BAND + GAP;
  panel.rows = [];
  data.kinds.forEach((kind, k) => {
    const units = panel.units[k], color = data.colors[k];
    const lanes = perUnit && units.length ? units.map((_, u) => u) : [-1];
    const list = (perUnit ? panel.spans : panel.bars).filter(s => s[KIND] === k);
    lanes.forEach(u => {
      const h = u < 0 ? LANE - GAP : ROW - 1, items = u < 0 ? list : list.filter(s => s[UNIT] === u);
      panel.rows.push({y, h, items, color, units: u < 0 ? units.length : 1, label: u > 0 ? "" : kind});
      y += u < 0 ? LANE : ROW;
    });
    if (lanes[0] >= 0) y += GAP;
  });
  panel.bottom = y;
  panel.canvas.style.height = y + AXIS + "px";
}
const ms = s => (s * 1e3).toFixed(s < 1e-4 ? 6 : 4) + " ms";
const x = (panel, t) => LEFT + (t - view[0]) / (view[1] - view[0]) * (panel.canvas.clientWidth - LEFT);
const time = (panel, px) => view[0] + (px - LEFT) / (panel.canvas.clientWidth - LEFT) * (view[1] - view[0]);

function draw(panel) {
  const {canvas} = panel, ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = panel.bottom + AXIS;
  if (width <= LEFT) return;
  canvas.width = width * ratio; canvas.height = height * ratio;
  const g = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim() || "#000";
  g.scale(ratio, ratio); g.font = "12px system-ui, sans-serif"; g.textBaseline = "middle";
  g.fillStyle = ink; g.fillText("layers", 4, BAND / 2);
  for (const row of panel.rows) { g.fillStyle = row.color; g.fillText(row.label, 4, row.y + row.h / 2); }
  g.save(); g.beginPath(); g.rect(LEFT, 0, width - LEFT, height); g.clip();
  drawAxis(panel, g, width, ink); drawBand(panel, g, width, ink);
  for (const row of panel.rows) drawRow(panel, g, width, row);
  if (drag && drag.select && drag.panel === panel) {
    g.globalAlpha = .2; g.fillStyle = ink; g.fillRect(drag.from, 0, drag.to - drag.from, panel.bottom);
  }
  g.restore();
}
function drawAxis(panel, g, width, ink) {
  const about = (view[1] - view[0]) * 90 / (width - LEFT), ten = 10 ** Math.floor(Math.log10(about));
  const step = ten * ([1, 2, 5].find(m => ten * m >= about) || 10);
  const digits = Math.max(0, -Math.floor(Math.log10(step * 1.01e3)));
  g.textAlign = "center";
  for (let i = Math.ceil(view[0] / step); i * step <= view[1]; i++) {
    const at = x(panel, i * step);
    g.fillStyle = ink; g.globalAlpha = .15; g.fillRect(at, 0, 1, panel.bottom);
    g.globalAlpha = 1; g.fillText((i * step * 1e3).toFixed(digits), at, panel.bottom + 10);
  }
  g.textAlign = "right"; g.fillText("ms", width - 2, panel.bottom + 10); g.textAlign = "left";
}
function drawBand(panel, g, width, ink) {
  panel.layers.forEach(([name, start, seconds], i) => {
    const a = Math.max(x(panel, start), LEFT), b = Math.min(x(panel, start + seconds), width);
    if (b < LEFT || a > width) return;
    g.fillStyle = i % 2 ? "#9996" : "#bbb6"; g.fillRect(a, 0, b - a, BAND);
    if (i === panel.chosen) { g.strokeStyle = ink; g.strokeRect(a + .5, .5, b - a - 1, panel.bottom - 1); }
    const letters = Math.floor((b - a - 6) / 6.5);
    if (letters < Math.min(7, name.length)) return;
    g.fillStyle = ink;
    g.fillText(name.length > letters ? name.slice(0, letters - 1) + "…" : name, a + 3, BAND / 2);
  });
}
const share = (row, s) => s[END] > s[START] ? Math.min(1, s[BUSY] / ((s[END] - s[START]) * row.units)) : 0;
function drawRow(panel, g, width, row) {
  g.fillStyle = row.color;
  let last = -1;  // pixel column of the last span thinner than a pixel: one is enough there
  for (const s of row.items) {
    if (s[END] < view[0] || s[START] > view[1]) continue;
    const a = Math.max(x(panel, s[START]), LEFT - 1), b = Math.min(x(panel, s[END]), width + 1);
    if (b - a < 1) { if (Math.floor(a) === last) continue; last = Math.floor(a); }
    const w = Math.max(b - a, .6), solid = row.h * share(row, s);
    g.globalAlpha = .25; g.fillRect(a, row.y, w, row.h);
    g.globalAlpha = 1; g.fillRect(a, row.y + row.h - solid, w, solid);
  }
}
function redraw() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    by("range").textContent = ms(view[0]) + " to " + ms(view[1]);
    panels.forEach(draw);
  });
}
function show(start, end) {
  const span = Math.min(Math.max(end - start, 1e-9), data.horizon);
  start = Math.min(Math.max(start, 0), data.horizon - span);
  view = [start, start + span]; hide(); redraw();
}
function zoom(factor, at) { show(at - (at - view[0]) * factor, at + (view[1] - at) * factor); }
function pan(part) { const d = part * (view[1] - view[0]); show(view[0] + d, view[1] + d); }
function choose(panel, i) {
  if (!panel.layers.length) return;
  panel.chosen = i = (i + panel.layers.length) % panel.layers.length;
  const [name, start, seconds, bound] = panel.layers[i];
  show(start - seconds * .05, start + seconds * 1.05);
  by("status").textContent =
    name + ": from " + ms(start) + ", takes " + ms(seconds) + ", bound by " + bound;
}
function setUnits(on) {
  perUnit = on; by("units").setAttribute("aria-pressed", on); panels.forEach(layout); hide(); redraw();
}
function hide() { by("tip").style.display = "none"; }
function hover(panel, e) {
  const t = time(panel, e.offsetX), slack = 2 * (view[1] - view[0]) / panel.canvas.clientWidth;
  const inside = s => s[START] - slack <= t && t <= s[END] + slack, length = s => s[END] - s[START];
  let lines = null;
  const row = panel.rows.find(r => e.offsetY >= r.y && e.offsetY < r.y + r.h);
  if (e.offsetX < LEFT) return hide();
  if (row) {
    const hit = row.items.filter(inside).reduce((a, s) => a && length(a) <= length(s) ? a : s, null);
    if (hit) lines = describe(panel, row, hit);
  } else if (e.offsetY < BAND) {
    const layer = panel.layers.find(([, start, seconds]) => start <= t && t < start + seconds);
    if (layer) lines = [layer[0], ms(layer[2]), "bound by " + layer[3]];
  }
  if (!lines) return hide();
  const tip = by("tip");
  tip.textContent = lines.join("\n"); tip.style.display = "block";
  tip.style.left = Math.min(e.clientX + 14, window.innerWidth - tip.offsetWidth - 6) + "px";
  tip.style.top = Math.min(e.clientY + 14, window.innerHeight - tip.offsetHeight - 6) + "px";
}
function describe(panel, row, s) {
  const all = panel.units[s[KIND]], units = perUnit ? all[s[UNIT]] : s[UNIT] + " of " + all.length + " units";
  return [data.kinds[s[KIND]] + " " + panel.names[s[LAYER]], units, ms(s[START]) + " to " + ms(s[END]),
    ms(s[END] - s[START]) + ", " + (100 * share(row, s)).toFixed(1) + " % at work",
    s[BYTES].toLocaleString() + " bytes, " + s[MACS].toLocaleString() + " multiply-adds"];
}
panels.forEach(panel => {
  const c = panel.canvas;
  c.addEventListener("wheel", e => {
    e.preventDefault();
    if (Math.abs(e.deltaX) > Math.abs(e.deltaY)) pan(e.deltaX / 1000);
    else zoom(Math.exp(Math.max(-1, Math.min(1, e.deltaY / 400))), time(panel, Math.max(e.offsetX, LEFT)));
  }, {passive: false});
  c.addEventListener("pointerdown", e => {
    c.setPointerCapture(e.pointerId);
    drag = {panel, select: e.shiftKey, from: e.offsetX, to: e.offsetX, view: [...view]};
  });
  c.addEventListener("pointermove", e => {
    if (!drag) return hover(panel, e);
    if (drag.panel !== panel) return;
    drag.to = e.offsetX;
    const moved = (drag.from - drag.to) / (c.clientWidth - LEFT) * (drag.view[1] - drag.view[0]);
    if (drag.select) redraw(); else show(drag.view[0] + moved, drag.view[1] + moved);
  });
  c.addEventListener("pointerup", () => {
    const d = drag;
    drag = null;
    if (!d || !d.select) return;
    const [a, b] = [d.from, d.to].sort((p, q) => p - q);
    if (b - a > 3) show(time(panel, a), time(panel, b)); else redraw();
  });
  c.addEventListener("pointercancel", () => { drag = null; });
  c.addEventListener("pointerleave", hide);
  c.addEventListener("keydown", e => {
    const middle = (view[0] + view[1]) / 2, {chosen} = panel, keys = {
      "+": () => zoom(.6, middle), "=": () => zoom(.6, middle), "-": () => zoom(1 / .6, middle),
      ArrowLeft: () => pan(-.2), ArrowRight: () => pan(.2),
      Home: () => show(0, data.horizon), 0: () => show(0, data.horizon),
      n: () => choose(panel, chosen + 1), p: () => choose(panel, Math.max(chosen, 0) - 1),
      u: () => setUnits(!perUnit),
    };
    const act = keys[e.key] || keys[e.key.toLowerCase()];
    if (act && !e.ctrlKey && !e.metaKey && !e.altKey) { e.preventDefault(); act(); }
  });
});
document.querySelectorAll("button[data-layer]").forEach(b => b.addEventListener("click", () =>
  choose(panels[+b.dataset.panel], +b.dataset.layer)));
by("fit").addEventListener("click", () => show(0, data.horizon));
by("units").addEventListener("click", () => setUnits(!perUnit));
window.addEventListener("resize", redraw);
setUnits(false);
"""
