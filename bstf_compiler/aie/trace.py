"""Estimates in the Chrome trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bstf_compiler.aie.estimate import Estimate
from bstf_compiler.aie.timeline import panels_of, units_of
from bstf_compiler.aie.usage import Curve, curves
from bstf_compiler.files import replacing

_LAYERS = "layers"


class _Event(NamedTuple):
    start: float
    end: float
    name: str
    args: dict


def chrome_trace(estimates: Estimate | Sequence[Estimate], titles: Sequence[str] | None = None) -> dict:
    """Estimates as trace events.

    Of each estimate one process for the layers and one for each lane in use, with its title before their names, and one
    track (thread) for each unit of a lane. Times are microseconds on a grid of 1 ns. As a track can only nest events,
    spans of a unit that overlap each other are spread over tracks "core 0,1", "core 0,1 (2)", ...
    The process of the layers has two counters: bytes that each memory tile holds, and bytes/s of DDR (see usage.py).

    Args:
        estimates: one, or several that begin at the same time, in groups one below the other.
        titles: one for each estimate.

    Returns:
        A dictionary for `json.dump`. `traceEvents`: complete events ("X") with args layer, unit, busy_us,
        bytes and macs, counters ("C") and metadata ("M"). `otherData`: of each estimate its title, device, cost model,
        total seconds, limits of both counters, and what the host does.

    Raises:
        ValueError: no estimate, or not as many titles as estimates.
    """
    events: list[dict] = []
    others = []
    pids = 0
    for title, estimate in panels_of(estimates, titles):
        counters = curves(estimate)
        made = list(_events(title, estimate, counters, pids))
        pids = max(event["pid"] for event in made)
        events += made
        others.append(
            {
                "title": title,
                "device": estimate.device,
                "cost_model": estimate.cost_model,
                "seconds": estimate.total_seconds,
                "limits": {_named_with_unit(curve): curve.limit for curve in counters},
                "host": list(estimate.host),
            }
        )
    return {"displayTimeUnit": "ms", "otherData": {"estimates": others}, "traceEvents": events}


def write_chrome_trace(
    estimates: Estimate | Sequence[Estimate], path: str | Path, titles: Sequence[str] | None = None
) -> None:
    """Writes `chrome_trace` as JSON. Replaces `path` only when complete."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        # Not json.dump: it encodes piece by piece, several times slower.
        stream.write(json.dumps(chrome_trace(estimates, titles), allow_nan=False, separators=(",", ":")))


def _events(title: str, estimate: Estimate, counters: Sequence[Curve], pids: int) -> Iterator[dict]:
    """The events of one estimate; its processes are numbered from `pids` + 1 on."""
    processes: dict[str, int] = {}
    threads: dict[str, int] = {}
    for (process, unit), track in _tracks(estimate).items():
        if process not in processes:
            pid = processes[process] = pids + len(processes) + 1
            yield from _named("process", f"{title}: {process}" if title else process, pid, 0, pid)
        pid = processes[process]
        for copy, row in enumerate(_without_overlap(track)):
            tid = threads[process] = threads.get(process, 0) + 1
            yield from _named("thread", unit if copy == 0 else f"{unit} ({copy + 1})", pid, tid, tid)
            place = {"ph": "X", "cat": process, "pid": pid, "tid": tid}
            for start, end, name, args in row:
                yield {**place, "name": name, "ts": start / 1000, "dur": (end - start) / 1000, "args": args}
    for curve in counters:
        yield from _counter(curve, processes[_LAYERS])


def _counter(curve: Curve, pid: int) -> Iterator[dict]:
    """A curve's total wherever it changes, and a 0 at its end."""
    # Of amounts that change within a nanosecond the last one stays.
    amounts = {round(time * 1e9): amount for time, amount in zip(curve.times, [*curve.total.tolist(), 0])}
    place = {"ph": "C", "pid": pid, "name": _named_with_unit(curve)}
    for time, amount in amounts.items():
        yield {**place, "ts": time / 1000, "args": {"value": amount}}


def _named_with_unit(curve: Curve) -> str:
    return f"{curve.name} {curve.unit}"


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
    tracks = {(_LAYERS, _LAYERS): layers}
    for kind, units in units_of(estimate).items():
        tracks |= {(kind, unit): [] for unit in units}
    for span in estimate.spans:
        # Work to the picosecond: more digits only make the file longer.
        args = {"layer": span.layer, "unit": span.unit, "busy_us": round(span.busy * 1e6, 6)}
        args["bytes"], args["macs"] = span.bytes, span.macs
        event = _Event(span.start, span.end, f"{span.kind} {span.layer}", args)
        tracks[span.kind, span.unit].append(event)
    return tracks


def _named(what: str, name: str, pid: int, tid: int, order: int) -> Iterator[dict]:
    """Metadata that names a process or thread and puts it in its place."""
    place = {"ph": "M", "pid": pid, "tid": tid}
    yield place | {"name": f"{what}_name", "args": {"name": name}}
    yield place | {"name": f"{what}_sort_index", "args": {"sort_index": order}}


def _without_overlap(track: list[_Event]) -> list[list[_Event]]:
    """Spreads events over as few rows as needed so that none overlap; times become whole nanoseconds."""
    rows: list[list[_Event]] = []
    for start, end, *rest in sorted(track, key=lambda event: (event.start, event.end)):
        event = _Event(round(start * 1e9), round(end * 1e9), *rest)
        row = next((row for row in rows if row[-1].end <= event.start), None)
        if row is None:
            rows.append([event])
        else:
            row.append(event)
    return rows
