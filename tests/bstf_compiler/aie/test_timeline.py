"""PNG, HTML and CSV of estimates made by hand."""

import csv
import json
import math
import random
import shutil
import subprocess
import time
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from bstf_compiler import files
from bstf_compiler.aie import timeline, trace
from bstf_compiler.aie.estimate import Estimate, LayerEstimate, Span
from bstf_compiler.aie.isa import KINDS
from bstf_compiler.aie.usage import curves
from tests.bstf_compiler.aie.estimates import ODD_NAME, estimate, layer, many, span


class Page(HTMLParser):
    """Collects the scripts, the tags and the text of buttons; checks that tags nest."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.scripts, self.tags, self.buttons = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "button":
            self.buttons.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += text
        if self.open and self.open[-1] == "button":
            self.buttons[-1] += text


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
    timeline.timeline_html(empty, tmp_path / "empty.html")
    assert imread(tmp_path / "empty.png").shape[1] >= 1200
    Page((tmp_path / "empty.html").read_text(encoding="utf-8"))


def html_of(folder, *args, **kwargs):
    timeline.timeline_html(*args, folder / "timeline.html", **kwargs)
    return (folder / "timeline.html").read_text(encoding="utf-8")


def test_html_embeds_every_span(tmp_path):
    both = [estimate(), estimate(0.5)]
    page = Page(html_of(tmp_path, both, titles=["dense", "sparse < dense"]))
    data = json.loads(page.scripts[0])
    assert data["kinds"] == list(KINDS) and data["horizon"] == pytest.approx(3e-4)
    for subject, panel in zip(both, data["panels"]):
        spans = {
            Span(panel["names"][name], KINDS[kind], panel["units"][kind][unit], *numbers)
            for name, kind, unit, *numbers in panel["spans"]
        }
        assert spans == set(subject.spans) and len(panel["spans"]) == len(subject.spans)
        bars = (timeline.Bar(panel["names"][n], KINDS[kind], *numbers) for n, kind, *numbers in panel["bars"])
        assert tuple(bars) == timeline.merge(subject.spans)
        assert panel["layers"] == [[e.name, e.start, e.seconds, e.bound] for e in subject.layers]
        assert panel["units"][0] == ["core 2,0", "core 10,0"]
        for shown, curve in zip(panel["curves"], curves(subject), strict=True):
            assert (shown["name"], shown["unit"], shown["limit"]) == (curve.name, curve.unit, curve.limit)
            assert shown["times"] == curve.times.tolist()
            assert {name: amounts for name, _, amounts in shown["parts"]} == {
                name: amounts.tolist() for name, amounts in curve.parts.items()
            }


def test_html_is_self_contained_and_accessible(tmp_path):
    text = html_of(tmp_path, estimate(), titles=["dense"])
    page = Page(text)
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert not [tag for tag, attrs in page.tags if "src" in attrs or tag == "link"]
    canvases = [attrs for tag, attrs in page.tags if tag == "canvas"]
    assert len(canvases) == 1
    assert canvases[0]["tabindex"] == "0"
    assert canvases[0]["aria-label"].startswith("dense: 0.300 ms on aie2_4x4")
    assert any(attrs.get("aria-live") == "polite" for _, attrs in page.tags)
    assert page.buttons[2:] == ["conv1", ODD_NAME, "fc"]


def test_layer_named_like_a_placeholder_of_the_page(tmp_path):
    names = ("@DATA@", "@SECTIONS@")
    subject = Estimate("aie2_1x1", "exact", tuple(layer(name, 0.0, 1e-6) for name in names), ())
    page = Page(html_of(tmp_path, subject))
    assert page.buttons[2:] == json.loads(page.scripts[0])["panels"][0]["names"] == list(names)


def test_eighty_thousand_spans(tmp_path):
    """As many as ResNet50 has: files to send, made in a few seconds."""
    subject = many(80_000)
    timeline.timeline_png(estimate(), tmp_path / "first.png")  # imports matplotlib
    start = time.process_time()
    trace.write_chrome_trace(subject, tmp_path / "trace.json")
    timeline.timeline_png(subject, tmp_path / "timeline.png")
    text = html_of(tmp_path, subject)
    assert time.process_time() - start < 5
    assert (tmp_path / "trace.json").stat().st_size < 20e6 and len(text) < 10e6
    panel = json.loads(Page(text).scripts[0])["panels"][0]
    assert len(panel["spans"]) == len(subject.spans) > 79_000
    assert len(panel["bars"]) == 70 * len(KINDS)  # the first view draws these


# Runs the page's script on a stand-in for the browser and reports what it draws and says.
STUB = r"""
const page = require("fs").readFileSync(process.argv[1], "utf8");
const json = page.match(/id="data">([\s\S]*?)<\/script>/)[1];
const code = page.match(/<script>\n([\s\S]*?)<\/script>/)[1];
const element = extra => ({
  style: {}, textContent: "", dataset: {}, on: {}, setAttribute() {}, setPointerCapture() {},
  addEventListener(name, act) { this.on[name] = act; }, ...extra});
const rects = [], ink = {
  save() {}, restore() {}, scale() {}, beginPath() {}, rect() {}, clip() {}, fillText() {}, strokeRect() {},
  fillRect(...box) { if (!box.every(Number.isFinite)) throw Error(box); rects.push(box); }};
const ids = {data: element({textContent: json})};
for (const id of ["fit", "units", "range", "tip", "status"]) ids[id] = element();
const canvas = element({clientWidth: 1280, getContext: () => ink});
const button = element({dataset: {panel: "0", layer: "1"}});
let frames = [];
globalThis.document = {
  getElementById: id => ids[id], querySelectorAll: what => what === "canvas" ? [canvas] : [button]};
globalThis.window = {innerWidth: 1280, innerHeight: 720, addEventListener() {}};
globalThis.getComputedStyle = () => ({getPropertyValue: () => ""});
globalThis.requestAnimationFrame = act => frames.push(act);
const drawn = () => {
  const now = frames;
  rects.length = 0; frames = []; now.forEach(act => act());
  return rects.length;
};
const range = () => { drawn(); return ids.range.textContent; };
const key = name => canvas.on.keydown({key: name, preventDefault() {}});
const drag = (from, to, shiftKey) => {
  canvas.on.pointerdown({pointerId: 1, offsetX: from, shiftKey}); canvas.on.pointermove({offsetX: to});
  canvas.on.pointerup({});
};
(0, eval)(code);
const seen = {start: drawn()};
key("u"); seen.units = drawn(); key("u");
button.on.click(); seen.chosen = range(); seen.status = ids.status.textContent;
key("n"); key("+"); key("ArrowLeft"); key("Home"); seen.home = range();
canvas.on.wheel({preventDefault() {}, deltaX: 0, deltaY: -400, offsetX: 80}); seen.wheel = range();
drag(680, 80, false); seen.drag = range(); key("0");
drag(680, 80, true); seen.select = range(); key("0");
canvas.on.pointermove({offsetX: 81, offsetY: 30, clientX: 0, clientY: 0}); seen.tip = ids.tip.textContent;
canvas.on.pointermove({offsetX: 80 + 600, offsetY: 222, clientX: 0, clientY: 0}); seen.tile = ids.tip.textContent;
canvas.on.pointermove({offsetX: 81, offsetY: 270, clientX: 0, clientY: 0}); seen.ddr = ids.tip.textContent;
console.log(JSON.stringify(seen));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_html_script_zooms_pans_and_explains(tmp_path):
    html_of(tmp_path, estimate())
    command = ["node", "-e", STUB, str(tmp_path / "timeline.html")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert seen["units"] - seen["start"] == 3 * len(KINDS) * 2  # a pale and a solid box more per bar
    assert seen["chosen"] == "0.095000 ms to 0.2050 ms"
    assert seen["status"].startswith(f"{ODD_NAME}: from 0.1000 ms, takes 0.1000 ms, bound by WRITE")
    assert seen["home"] == "0.000000 ms to 0.3000 ms"
    assert seen["wheel"] == "0.000000 ms to 0.1104 ms"  # exp(-1) of the whole
    assert seen["drag"] == "0.055182 ms to 0.1655 ms"  # half a window further
    assert seen["select"] == "0.000000 ms to 0.1500 ms"
    assert seen["tip"].split("\n") == [
        "LOAD conv1",
        "2 of 2 units",
        "0.000000 ms to 0.010000 ms",
        "0.010000 ms, 50.0 % at work",
        "1,280 bytes, 2,560 multiply-adds",
    ]
    assert seen["tile"].split("\n") == [
        "MemTile at 0.1500 ms", "tensors: 500", "staging: 0", "weight chunks: 100", "600 of 1,000 bytes",
    ]  # fmt: skip
    assert seen["ddr"].split("\n")[1:] == [
        "LOAD: 128,000,000", "LOADW: 0", "WRITE: 0", "128,000,000 of 200,000,000 bytes/s",
    ]  # fmt: skip


WRITERS = [trace.write_chrome_trace, timeline.layers_csv, timeline.timeline_png, timeline.timeline_html]


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


@pytest.mark.parametrize("write", [timeline.timeline_png, timeline.timeline_html, trace.write_chrome_trace])
def test_titles_must_match_estimates(tmp_path, write):
    with pytest.raises(ValueError, match="one title for each estimate: 1 for 2"):
        write([estimate(), estimate()], tmp_path / "out", titles=["dense"])
    with pytest.raises(ValueError, match="at least one estimate"):
        write([], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
