"""Pictures of Estimates as PNG, the lanes of each; and its table of layers as CSV.

A lane is an instruction kind. Where a lane has a single row, the spans of all its units are merged by layer:
pale while any unit is inside an instruction, solid up to the fraction of the lane's units at work. Below the lanes
stand the curves of usage.py under their limits, in the colours of the lanes that bring and take the bytes.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bstf_compiler.aie.estimate import Estimate, LayerEstimate, Span
from bstf_compiler.aie.isa import KINDS
from bstf_compiler.aie.usage import HELD, Curve, curves
from bstf_compiler.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = dict(zip(KINDS, ("#0072B2", "#CC79A7", "#56B4E9", "#9467BD", "#D55E00", "#009E73", "#C99A00")))
"""Colour of each lane: after Okabe and Ito, so that colour-blind readers tell them apart."""

_PART_COLORS = COLORS | dict(zip(HELD, (COLORS["LOADFM"], COLORS["LOAD"], COLORS["LOADWM"])))
_UNITS = {"bytes": (2**10, "KiB"), "bytes/s": (1e9, "GB/s")}  # to print
_COLUMNS = 1200  # in which the PNG shows the mean of a curve
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


def units_of(estimate: Estimate) -> dict[str, list[str]]:
    """The units of each lane that have spans, in order: "core 2,0" before "core 10,0"."""
    units: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for span in estimate.spans:
        units[span.kind].add(span.unit)
    return {kind: sorted(names, key=_natural) for kind, names in units.items()}


def panels_of(estimates: Estimate | Sequence[Estimate], titles: Sequence[str] | None) -> list[tuple[str, Estimate]]:
    """Pairs of title ("" by default) and estimate.

    Raises:
        ValueError: no estimate, or not as many titles as estimates.
    """
    if isinstance(estimates, Estimate):
        estimates = [estimates]
    if not estimates:
        raise ValueError("A timeline needs at least one estimate.")
    titles = [""] * len(estimates) if titles is None else titles
    if len(titles) != len(estimates):
        raise ValueError(f"A timeline needs one title for each estimate: {len(titles)} for {len(estimates)}.")
    return list(zip(titles, estimates))


def horizon(estimates: Iterable[Estimate]) -> float:
    """Right end of a time axis that all estimates share, in seconds; never 0."""
    times = [time for one in estimates for time in (one.total_seconds, *(span.end for span in one.spans))]
    return max(times) or 1e-6


def layers_csv(estimate: Estimate, path: str | Path) -> None:
    """Writes one row a layer: name, op, start, seconds, seconds of each kind, bound, macs, bytes.

    Seconds are written so that they read back equal. Replaces `path` only when complete.
    """
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["name", "op", "start", "seconds", *KINDS, "bound", "macs", "bytes"])
        for layer in estimate.layers:
            kinds = [layer.kinds.get(kind, 0.0) for kind in KINDS]
            times = [layer.start, layer.seconds, *kinds]
            writer.writerow([layer.name, layer.op, *times, layer.bound, layer.macs, layer.bytes])


def timeline_png(
    estimates: Estimate | Sequence[Estimate], path: str | Path, titles: Sequence[str] | None = None
) -> None:
    """Draws the seven lanes and both curves over milliseconds. Every bar is at least a pixel wide.

    Args:
        estimates: one, or several to draw one above the other on one time axis.
        path: file to write. Replaced only when complete.
        titles: one for each estimate.

    Raises:
        ValueError: no estimate, or not as many titles as estimates.
        FileNotFoundError: the folder of `path` does not exist.
    """
    from matplotlib.figure import Figure  # takes long to import, and only pictures need it

    panels = panels_of(estimates, titles)
    figure = Figure(figsize=(15, 0.7 + 4.6 * len(panels)), dpi=120, layout="constrained")
    rows = figure.subplots(3 * len(panels), sharex=True, height_ratios=[3.3, 0.65, 0.65] * len(panels))
    end = horizon(estimate for _, estimate in panels)
    for number, (title, estimate) in enumerate(panels):
        lanes, *graphs = rows[3 * number : 3 * number + 3]
        _draw_lanes(lanes, estimate, end)
        lanes.set_title(_headline(title, estimate), loc="left", fontsize=11, parse_math=False)
        for axes, curve in zip(graphs, curves(estimate)):
            _draw_curve(axes, curve, end)
        graphs[-1].tick_params(axis="x", labelbottom=True)
    rows[-1].set_xlabel(
        "time in ms   (pale: inside an instruction; solid: fraction of the lane's units at work; "
        "right: ms of work of the busiest unit; peak and limit of a memory tile and of DDR)"
    )
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a layer may have a name in any script
        figure.savefig(temporary, format="png")


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


def _natural(unit: str) -> list[tuple[int, int, str]]:
    """Sort key that puts "core 2,0" before "core 10,0"."""
    words = "".join(c if c.isdigit() else f" {c} " for c in unit).split()
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in words]


def _headline(title: str, estimate: Estimate) -> str:
    text = f"{estimate.total_seconds * 1e3:.3f} ms on {estimate.device}, cost model {estimate.cost_model}"
    if estimate.host:
        text += f"; on the host, not counted: {'; '.join(estimate.host)}"
    return f"{title}: {text}" if title else text


def _draw_lanes(axes: Axes, estimate: Estimate, horizon: float) -> None:
    rows = {kind: index + 1 for index, kind in enumerate(KINDS)}
    units = units_of(estimate)
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
        _draw_boxes(axes, pale, COLORS[kind], 0.25)
        _draw_boxes(axes, solid, COLORS[kind], 1.0)
        text = f" {busiest[kind] * 1e3:.3f}"
        axes.text(1.0, rows[kind], text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    _draw_layers(axes, estimate.layers, horizon)
    axes.set_yticks(range(len(KINDS) + 1), ["layers", *KINDS])
    for label, color in zip(axes.get_yticklabels()[1:], COLORS.values()):
        label.set_color(color)
    axes.set_ylim(len(KINDS) + 0.55, -0.6)
    _frame(axes, horizon)


def _draw_curve(axes: Axes, curve: Curve, horizon: float) -> None:
    """The parts of a curve, one upon the other, each column of pixels at its mean; the limit is dashed."""
    edges = np.linspace(0.0, horizon, _COLUMNS + 1)
    below = np.zeros(_COLUMNS)
    for name, means in curve.mean(edges).items():
        label = name if name in HELD and means.any() else None  # lanes have names already
        bottom, top = (np.append(values, values[-1]) for values in (below, below + means))
        # Not `stairs`: for a patch matplotlib computes the extent of every one of its thousands of edges.
        axes.fill_between(edges * 1e3, bottom, top, step="post", color=_PART_COLORS[name], linewidth=0, label=label)
        below = below + means
    if axes.get_legend_handles_labels()[1]:
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.9), "borderpad": 0.0, "frameon": False}
        axes.legend(ncols=len(HELD), fontsize=8, handlelength=1.0, **place)
    axes.axhline(curve.limit, color="0.4", linewidth=0.8, linestyle="--")
    top = max(curve.limit, curve.peak) * 1.05 or 1.0
    axes.set_ylim(0, top)
    axes.set_yticks([top / 2], [curve.name])
    scale, unit = _UNITS[curve.unit]
    text = f" {curve.peak / scale:.1f} of\n {curve.limit / scale:.1f} {unit}"
    axes.text(1.0, 0.5, text, transform=axes.transAxes, va="center", fontsize=8)
    _frame(axes, horizon)


def _frame(axes: Axes, horizon: float) -> None:
    axes.tick_params(axis="both", length=0, labelbottom=False)
    axes.grid(axis="x", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlim(0, horizon * 1.002e3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_layers(axes: Axes, layers: Sequence[LayerEstimate], horizon: float) -> None:
    """A row of alternating greys, with the names that have room."""
    for index, layer in enumerate(layers):
        _draw_boxes(axes, [_box(layer.start, layer.start + layer.seconds, 0.38, -0.38)], ("0.62", "0.82")[index % 2])
        letters = int(layer.seconds / horizon * 190)  # about 190 letters of this size fit the width
        if letters >= 7 or letters >= len(layer.name):
            text = layer.name if len(layer.name) <= letters else layer.name[: letters - 1] + "…"
            middle = (layer.start + layer.seconds / 2) * 1e3
            options = {"ha": "center", "va": "center", "fontsize": 7, "clip_on": True, "parse_math": False}
            axes.text(middle, 0, text, **options)


def _draw_boxes(axes: Axes, boxes: list[list[tuple[float, float]]], color: str, alpha: float = 1.0) -> None:
    from matplotlib.collections import PolyCollection  # like Figure: only pictures need it

    axes.add_collection(PolyCollection(boxes, facecolor=color, alpha=alpha, linewidth=0))


def _box(start: float, end: float, bottom: float, top: float) -> list[tuple[float, float]]:
    left, right = start * 1e3, end * 1e3
    return [(left, bottom), (left, top), (right, top), (right, bottom)]


def _fraction(bar: Bar, units: int) -> float:
    """Fraction of the lane's units that work, on average over the bar."""
    return min(1.0, bar.busy / ((bar.end - bar.start) * units)) if bar.end > bar.start else 0.0
