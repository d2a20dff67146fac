"""Estimates as Chrome/Perfetto traces."""

import json
from collections import defaultdict
from itertools import pairwise

import pytest

from bstf_compiler.aie import trace
from bstf_compiler.aie.estimate import Estimate
from bstf_compiler.aie.isa import KINDS
from bstf_compiler.aie.usage import curves
from tests.bstf_compiler.aie.estimates import estimate, layer, span


def test_trace_has_one_track_per_lane_and_unit(tmp_path):
    subject = estimate()
    trace.write_chrome_trace(subject, tmp_path / "trace.json")
    made = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    assert made == trace.chrome_trace(subject)
    (other,) = made["otherData"]["estimates"]
    assert other == {
        "title": "",
        "device": "aie2_4x4",
        "cost_model": "exact",
        "seconds": subject.total_seconds,
        "limits": {"MemTile bytes": 1000, "DDR bytes/s": 2e8},
        "host": [],
    }
    events = made["traceEvents"]
    assert {event["ph"] for event in events} == {"X", "M", "C"}
    events = [event for event in events if event["ph"] != "C"]
    for event in events:
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and event["pid"] > 0
        if event["ph"] == "M":
            assert event["name"] in {"process_name", "process_sort_index", "thread_name", "thread_sort_index"}
            assert list(event["args"]) in (["name"], ["sort_index"])
        else:
            assert event["ts"] >= 0 and event["dur"] >= 0 and isinstance(event["name"], str)

    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(processes.values()) == ["layers", *KINDS]
    expected = [("layers", "layers")] + [(k, u) for k in KINDS for u in ("core 2,0", "core 10,0")]
    assert [(processes[pid], unit) for (pid, _), unit in threads.items()] == expected


def test_trace_holds_every_span_to_the_nanosecond():
    subject = estimate()
    events = [e for e in trace.chrome_trace(subject)["traceEvents"] if e["ph"] == "X"]
    found = {
        (e["args"]["layer"], e["cat"], e["args"]["unit"], e["ts"], e["args"]["bytes"], e["args"]["macs"]): e
        for e in events
        if e["cat"] != "layers"
    }
    assert len(found) == len(subject.spans)
    for s in subject.spans:
        event = found[s.layer, s.kind, s.unit, round(s.start * 1e9) / 1e3, s.bytes, s.macs]
        assert event["ts"] + event["dur"] == pytest.approx(s.end * 1e6, abs=1e-3)
        assert event["args"]["busy_us"] == pytest.approx(s.busy * 1e6)
    layers = [e for e in events if e["cat"] == "layers"]
    assert [e["name"] for e in layers] == [layer.name for layer in subject.layers]
    assert layers[0]["args"] == {"op": "conv2d", "bound": "WRITE", "bytes": 4096, "macs": 123456789012}


def test_trace_never_overlaps_on_a_track():
    spans = tuple(span("a", "LOADFM", "column 0", start, start + 2e-6) for start in (0.0, 1e-6, 2e-6, 9e-6))
    subject = Estimate("aie2_4x4", "exact", (layer("a", 0.0, 2e-5),), spans)
    events = trace.chrome_trace(subject)["traceEvents"]
    tracks = defaultdict(list)
    for event in (e for e in events if e["ph"] == "X"):
        tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert sorted(len(track) for track in tracks.values()) == [1, 1, 3]
    for track in tracks.values():
        assert all(left[1] <= right[0] for left, right in pairwise(track))
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert names == ["layers", "column 0", "column 0 (2)"]


def test_counters_hold_until_the_next_one():
    """The last counter event at or before a time says how much there is then, as Perfetto draws it."""
    subject = estimate()
    events = [e for e in trace.chrome_trace(subject)["traceEvents"] if e["ph"] == "C"]
    assert {e["pid"] for e in events} == {1}
    for curve in curves(subject):
        own = [(e["ts"], e["args"]["value"]) for e in events if e["name"] == f"{curve.name} {curve.unit}"]
        assert own == sorted(own) and own[-1] == (pytest.approx(curve.times[-1] * 1e6), 0)
        for start, end, total in zip(curve.times, curve.times[1:], curve.total):
            middle = (start + end) / 2 * 1e6
            assert [value for time, value in own if time <= middle][-1] == total
    tile = [e["args"]["value"] for e in events if e["name"] == "MemTile bytes"]
    assert tile == [450, 600, 300, 0]
    assert {e["args"]["value"] for e in events if e["name"] == "DDR bytes/s"} == {0, 1.28e8}


def test_several_estimates_are_groups_of_processes():
    one, two = estimate(), estimate(0.5)
    both = trace.chrome_trace([one, two], ["dense", "sparse"])
    assert [e["title"] for e in both["otherData"]["estimates"]] == ["dense", "sparse"]
    events = both["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    order = {e["pid"]: e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"}
    expected = [f"{title}: {process}" for title in ("dense", "sparse") for process in ("layers", *KINDS)]
    assert [names[pid] for pid in sorted(names, key=order.get)] == expected
    # Each group holds the events that its estimate has alone.
    for subject, first in ((one, 0), (two, 1 + len(KINDS))):
        alone = [e for e in trace.chrome_trace(subject)["traceEvents"] if e["ph"] != "M"]
        group = [e | {"pid": e["pid"] - first} for e in events if e["ph"] != "M"]
        assert [e for e in group if 1 <= e["pid"] <= 1 + len(KINDS)] == alone
