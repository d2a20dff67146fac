"""PNG and CSV of estimates made by hand."""

import csv
import math
import random
import time
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from bstf_compiler import files
from bstf_compiler.aie import timeline, trace
from bstf_compiler.aie.estimate import Estimate, LayerEstimate
from bstf_compiler.aie.isa import KINDS
from tests.bstf_compiler.aie.estimates import estimate, many, span


def test_merge_joins_touching_spans_of_one_layer_and_lane():
    bars = timeline.merge(
        [
            span("a", "COMP", "core 0,1", 1.0, 2.0, busy=0.5),
            span("a", "COMP", "core 0,0", 0.0, 1.0),
            span("a", "COMP", "core 0,0", 3.0, 4.0),
            span("b", "COMP", "core 0,0", 2.0, 3.0),
            span("a", "LOAD", "memtile 0", 0.5, 1.5),
        ]
    )
    assert bars == (
        timeline.Bar("a", "LOAD", 1, 0.5, 1.5, 1.0, 640, 1280),
        timeline.Bar("a", "COMP", 2, 0.0, 2.0, 1.5, 1280, 2560),
        timeline.Bar("b", "COMP", 1, 2.0, 3.0, 1.0, 640, 1280),
        timeline.Bar("a", "COMP", 1, 3.0, 4.0, 1.0, 640, 1280),
    )


def test_merge_keeps_sums_and_leaves_no_overlap():
    dice = random.Random(7)
    spans = []
    for _ in range(500):
        start = dice.uniform(0, 10)
        name, kind, unit = dice.choice("ab"), dice.choice(KINDS), f"unit {dice.randrange(3)}"
        spans.append(span(name, kind, unit, start, start + dice.uniform(0, 0.2)))
    bars = timeline.merge(spans)
    for field in ("bytes", "macs", "busy"):
        assert math.isclose(sum(getattr(s, field) for s in spans), sum(getattr(b, field) for b in bars))
    groups = defaultdict(list)
    for bar in bars:
        groups[bar.kind, bar.layer].append(bar)
    for group in groups.values():
        assert all(left.end < right.start for left, right in pairwise(group))
    for s in spans:
        assert any(b.start <= s.start and s.end <= b.end for b in groups[s.kind, s.layer])


def test_csv_reads_back_equal(tmp_path):
    subject = estimate()
    timeline.layers_csv(subject, tmp_path / "layers.csv")
    with open(tmp_path / "layers.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["name", "op", "start", "seconds", *KINDS, "bound", "macs", "bytes"]
    read = [
        LayerEstimate(
            name=row["name"],
            op=row["op"],
            start=float(row["start"]),
            seconds=float(row["seconds"]),
            kinds={kind: float(row[kind]) for kind in KINDS},
            bound=row["bound"],
            macs=int(row["macs"]),
            bytes=int(row["bytes"]),
        )
        for row in rows
    ]
    assert tuple(read) == subject.layers


def test_png_shows_every_lane(tmp_path):
    timeline.timeline_png(estimate(), tmp_path / "one.png")
    timeline.timeline_png([estimate(), estimate(0.5)], tmp_path / "two.png", titles=["dense", "sparse"])
    one, two = imread(tmp_path / "one.png"), imread(tmp_path / "two.png")
    assert one.shape[1] == two.shape[1] >= 1200
    assert 300 < one.shape[0] < two.shape[0]
    for picture in (one, two):
        for kind in KINDS:
            near = abs(picture[..., :3] - to_rgb(timeline.COLORS[kind])).max(axis=-1) < 0.02
            assert near.sum() > 200, kind


def test_second_panel_shares_the_time_axis(tmp_path):
    """The last WRITE of a network twice as fast ends at half the way."""
    timeline.timeline_png([estimate(), estimate(0.5)], tmp_path / "both.png")
    picture = imread(tmp_path / "both.png")[..., :3]
    painted = abs(picture - to_rgb(timeline.COLORS["WRITE"])).max(axis=-1) < 0.02
    slow, fast = (half.any(axis=0).nonzero()[0].max() for half in np.array_split(painted, 2))
    left = 91  # pixels: about where the axis starts
    assert (fast - left) / (slow - left) == pytest.approx(0.5, abs=0.03)


def test_curves_stand_at_their_heights(tmp_path):
    """Of the memory tile: 450, 600 and 300 of 1,000 bytes under the dashed limit, in three thirds of the width."""
    timeline.timeline_png(replace(estimate(), spans=()), tmp_path / "one.png")
    picture = imread(tmp_path / "one.png")[..., :3]
    colourful = picture.max(axis=-1) - picture.min(axis=-1) > 0.15  # all else is grey
    left, right = 91, 1700  # pixels: about where the axis starts and ends
    heights = [colourful[:, left + int(part * (right - left))].sum() for part in (0.2, 0.5, 0.72)]
    assert heights[1] > 30
    assert heights[0] / heights[1] == pytest.approx(450 / 600, abs=0.05)
    assert heights[2] / heights[1] == pytest.approx(300 / 600, abs=0.05)


def test_empty_program_can_be_drawn(tmp_path):
    empty = Estimate("aie2_1x1", "exact", (), ())
    timeline.timeline_png(empty, tmp_path / "empty.png")
    assert imread(tmp_path / "empty.png").shape[1] >= 1200


def test_eighty_thousand_spans(tmp_path):
    """As many as ResNet50 has: files to send, made in a few seconds."""
    subject = many(80_000)
    timeline.timeline_png(estimate(), tmp_path / "first.png")  # imports matplotlib
    start = time.process_time()
    trace.write_chrome_trace(subject, tmp_path / "trace.json")
    timeline.timeline_png(subject, tmp_path / "timeline.png")
    assert time.process_time() - start < 5
    assert (tmp_path / "trace.json").stat().st_size < 20e6


WRITERS = [trace.write_chrome_trace, timeline.layers_csv, timeline.timeline_png]


@pytest.mark.parametrize("write", WRITERS)
def test_failed_write_leaves_the_old_file(tmp_path, write, monkeypatch):
    path = tmp_path / "out"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write(estimate(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write(estimate(), path)
    assert path.read_bytes() != b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", WRITERS)
def test_missing_folder_is_named(tmp_path, write):
    with pytest.raises(FileNotFoundError, match=r"Can't write out: create the folder .*nowhere first"):
        write(estimate(), tmp_path / "nowhere" / "out")


@pytest.mark.parametrize("write", [timeline.timeline_png, trace.write_chrome_trace])
def test_titles_must_match_estimates(tmp_path, write):
    with pytest.raises(ValueError, match="one title for each estimate: 1 for 2"):
        write([estimate(), estimate()], tmp_path / "out", titles=["dense"])
    with pytest.raises(ValueError, match="at least one estimate"):
        write([], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
