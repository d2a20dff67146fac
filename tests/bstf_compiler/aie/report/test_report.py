"""The report page as a file: its numbers, words and markup."""

import base64
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler import files
from bstf_compiler.aie.isa import KINDS
from bstf_compiler.aie.report import Panel, Section, data, gammas_of, words, write_report
from bstf_compiler.aie.timeline import Bar, merge
from bstf_compiler.aie.usage import curves
from tests.bstf_compiler.aie.estimates import ODD_NAME, many
from tests.bstf_compiler.aie.report import pages


class Page(HTMLParser):
    """Collects tags, the ids in use, and the cells of every table; checks that tags nest."""

    VOID = frozenset({"meta", "br", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tables, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "script" not in self.open and "style" not in self.open:
            self.text += text
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return pages.write(tmp_path_factory.mktemp("report") / "report.html")


def unpacked(packed, panel, end):
    """The spans as (layer, kind, unit, start, end, busy, bytes, macs)."""
    content, n = zlib.decompress(base64.b64decode(packed["deflated"])), packed["count"]
    columns, at = [], 0
    for kind in ("<f8", "<f8", "<u4", "<u4", "<u4", "<u2", "<u2", "<u1"):
        columns.append(np.frombuffer(content, kind, n, at))
        at += columns[-1].nbytes
    assert at == len(content)
    moved, macs, *times, layers, units, kinds = columns
    times = [one * (end / (2**32 - 1)) for one in times]
    for row in zip(layers, kinds, units, *times, moved, macs):
        yield panel["names"][row[0]], KINDS[row[1]], panel["units"][row[1]][row[2]], *row[3:]


def test_every_span_bar_and_curve_is_there(made):
    shown, (_, panels) = pages.data_of(made), pages.compiled()
    assert shown["kinds"] == list(KINDS)
    assert shown["horizon"] == max(one.estimate.total_seconds for one in panels)
    for one, panel in zip(panels, shown["panels"], strict=True):
        estimate = one.estimate
        assert panel["title"] == one.title
        spans = sorted(unpacked(panel["spans"], panel, shown["horizon"]))
        expected = sorted((s.layer, s.kind, s.unit, s.start, s.end, s.busy, s.bytes, s.macs) for s in estimate.spans)
        assert [span[:3] for span in spans] == [span[:3] for span in expected]
        np.testing.assert_allclose(
            [span[3:6] for span in spans], [span[3:6] for span in expected], atol=shown["horizon"] * 2**-32
        )
        assert sorted(span[6:] for span in spans) == sorted(span[6:] for span in expected)
        bars = (Bar(panel["names"][n], KINDS[kind], *numbers) for n, kind, *numbers in panel["bars"])
        assert tuple(bars) == merge(estimate.spans)
        layers = [[e.name, e.start, e.seconds, e.bound] for e in estimate.layers]
        assert [[panel["names"][n], *rest] for n, *rest in panel["layers"]] == layers
        ddr = curves(estimate)[1]
        assert (panel["ddr"]["limit"], panel["ddr"]["times"]) == (ddr.limit, ddr.times.tolist())
        assert dict(panel["ddr"]["parts"]) == {name: amounts.tolist() for name, amounts in ddr.parts.items()}


def test_memory_map_holds_what_the_memory_tiles_hold(made):
    """At every time the boxes add up to the curve that usage.py makes of the same allocations, and none overlap."""
    for one, panel in zip(pages.compiled()[1], pages.data_of(made)["panels"]):
        tile, held = curves(one.estimate)[0], panel["memory"]["held"]
        assert panel["memory"]["limit"] == one.code.device.memtile.memory_bytes
        for index, (start, end) in enumerate(zip(tile.times, tile.times[1:])):
            now = sorted(box[2:4] for box in held if box[4] <= (start + end) / 2 < box[5])
            assert sum(size for _, size in now) == tile.total[index]
            assert all(a + size <= b for (a, size), (b, _) in pairwise(now))
        kinds = {name: kind for name, kind, *_ in held}
        assert kinds["weight chunks"] == 2 and kinds["staging image"] == 1


def test_roofline_counts_what_the_instructions_do(made):
    shown = pages.data_of(made)
    for one, panel in zip(pages.compiled()[1], shown["panels"]):
        steps = [one.code.layer_step(number) for number in range(len(one.code.steps))]
        assert panel["roofline"]
        for number, seconds, operations, ddr, array in panel["roofline"]:
            own = [i for step in steps if step.layer == panel["names"][number] for i in step.instructions]
            macs = sum(i.macs * i.iterations for i in own if i.kind == "COMP")
            assert operations == 2 * macs > 0

            def moved(*kinds, own=own):
                return sum(i.bytes * i.iterations for i in own if i.kind in kinds)

            assert ddr == moved("LOAD", "LOADW", "WRITE") and array == moved("LOADFM", "LOADWM", "WRITEFM") > 0
            assert operations / seconds <= shown["roofs"]["peak"]
            assert array / seconds <= shown["roofs"]["memory tiles"]
    device = pages.compiled()[1][0].code.device
    assert shown["roofs"]["peak"] == 2 * 4 * device.core.macs_per_cycle * device.clock_hz
    links = device.links
    assert shown["roofs"]["memory tiles"] == pytest.approx(2 * (links.loadfm + links.loadwm + links.writefm))


def test_gammas_are_those_of_the_weights(made):
    graph = pages.compiled()[0][1]
    layers = [layer.name for layer in pages.compiled()[1][1].estimate.layers]
    kernels = [node.inputs[1] for node in graph if node.op.kind == "conv"]
    shown = pages.data_of(made)["gammas"]
    assert {name for name, *_ in shown} <= set(layers)  # that of the convolution before the sum has the sum's name
    for (_, rows, columns, bits), name in zip(shown, kernels, strict=True):
        kernel = graph.tensors[name].data
        kept = np.unpackbits(np.frombuffer(base64.b64decode(bits), np.uint8))[: rows * columns].reshape(rows, columns)
        for (row, column), one in np.ndenumerate(kept):
            block = kernel[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert bool(one) == block.any()
        assert kernel.shape[2:] == (8 * rows, 8 * columns)


def test_table_has_the_numbers_of_every_layer(made):
    page, (dense, sparse) = Page(made.read_text("utf-8")), pages.compiled()[1]
    why = sparse.code.explain(dense.code)
    (table,) = [table for table in page.tables if table[0][0] == "#"]
    head, *rows, total = table
    others = {layer.name: layer for layer in dense.estimate.layers}
    for layer, reason, row in zip(sparse.estimate.layers, why.layers, rows, strict=True):
        cells = dict(zip(head, row))
        assert (cells["layer"], cells["op"], cells["bound"]) == (layer.name, layer.op, layer.bound)
        assert cells["time, µs"] == f"{layer.seconds * 1e6:,.2f}"
        assert cells["dense, µs"] == f"{others[layer.name].seconds * 1e6:,.2f}"
        assert cells["gain"] == f"{reason.gain:.2f}" and cells["why not less"] == reason.reason
        assert cells["multiply-adds"] == f"{layer.macs:,}" and cells["bytes"] == f"{layer.bytes:,}"
        for kind in KINDS:
            assert cells[f"{kind}, µs"] == f"{layer.kinds[kind] * 1e6:,.2f}"
    assert dict(zip(head, total))["time, µs"] == f"{sparse.estimate.total_seconds * 1e6:,.2f}"
    assert words.seconds(sparse.estimate.total_seconds) in page.text
    assert words.size(sparse.code.weight_bytes) in page.text and words.size(dense.code.weight_bytes) in page.text
    zero = sum(rows * columns for _, rows, columns, _ in pages.data_of(made)["gammas"])
    assert f"of {zero:,} weight blocks of 8x8" in page.text
    for name, seconds in why.doubled.items():
        assert f"{name}{why.seconds / seconds:.2f}x" in page.text
    assert "estimates for a model of the array" in page.text and "not measurements" in page.text


def test_page_stands_alone(made):
    text = made.read_text("utf-8")
    page = Page(text)
    assert "http:" not in text.replace("http://www.w3.org/2000/svg", "") and "https:" not in text  # a name, no address
    assert "@import" not in text and "url(" not in text
    assert not [attrs for tag, attrs in page.tags if "src" in attrs]
    assert [attrs["href"] for tag, attrs in page.tags if tag == "link"] == ["data:,"]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert targets and all(target[1:] in ids for target in targets)
    referred = [attrs[key] for _, attrs in page.tags for key in ("aria-labelledby", "aria-describedby") if key in attrs]
    assert set(referred) <= set(ids)


def test_one_program_without_pictures(tmp_path):
    panel = pages.compiled()[1][1]
    write_report(tmp_path / "one.html", [replace(panel, title="")])
    text = (tmp_path / "one.html").read_text("utf-8")
    page = Page(text)
    (table,) = [table for table in page.tables if table[0][0] == "#"]
    assert not {"dense, µs", "gain", "kept"} & set(table[0])
    assert 'id="gammas"' not in text and "Zero blocks<" not in text


def test_other_cost_models_are_named_and_not_explained(tmp_path):
    program = pages.compiled()[1][1].code
    write_report(tmp_path / "one.html", [Panel("", program, program.estimate("published"))])
    page = Page((tmp_path / "one.html").read_text("utf-8"))
    assert "published cost model" in page.text and "What would help" not in page.text


def test_odd_names_are_only_names(tmp_path):
    panel = pages.compiled()[1][1]
    names = dict(zip((layer.name for layer in panel.estimate.layers), (ODD_NAME, "$data", "</script>", '"&amp;')))
    layers = tuple(replace(layer, name=names.get(layer.name, layer.name)) for layer in panel.estimate.layers)
    spans = tuple(replace(span, layer=names.get(span.layer, span.layer)) for span in panel.estimate.spans)
    section = Section("more", "More", "More & more", "<em>A</em>", "<p>text</p>")
    options = {"first": [section], "files": {"a b.txt": "what <it> is"}, "title": "<title>"}
    write_report(
        tmp_path / "odd.html", [replace(panel, estimate=replace(panel.estimate, layers=layers, spans=spans))], **options
    )
    page = Page((tmp_path / "odd.html").read_text("utf-8"))
    (table,) = [table for table in page.tables if table[0][0] == "#"]
    assert [row[1] for row in table[1:-1]] == [layer.name for layer in layers]
    assert set(pages.data_of(tmp_path / "odd.html")["panels"][0]["names"]) == {layer.name for layer in layers}
    assert "<title> on aie2_2x2" in page.text and "what <it> is" in page.text and "More & more" in page.text


def test_large_programs_make_pages_of_bounded_size(tmp_path, monkeypatch):
    """More spans than ResNet50 has; of more than are allowed the bars alone."""
    program = pages.compiled()[1][1].code
    code = SimpleNamespace(**{name: getattr(program, name) for name in ("name", "device", "packing", "weight_bytes")})
    estimate = replace(many(80_000), cost_model="calibrated")  # which isn't explained, and so needs no steps
    sizes = []
    for most in (data.MOST_SPANS, len(estimate.spans) - 1):
        monkeypatch.setattr(data, "MOST_SPANS", most)
        write_report(tmp_path / "large.html", [Panel("", code, estimate)])
        sizes.append((tmp_path / "large.html").stat().st_size)
        (panel,) = pages.data_of(tmp_path / "large.html")["panels"]
        assert (panel["spans"] is not None) == (len(sizes) == 1) and len(panel["bars"]) == 70 * len(KINDS)
    assert sizes[1] < sizes[0] < 2e6 and sizes[1] < 4e5


def test_refusals_leave_nothing(tmp_path, monkeypatch):
    panel = pages.compiled()[1][0]
    other = bstf_compiler.compile(pages.compiled()[0][0], "aie2_1x1")
    path = tmp_path / "report.html"
    for wrong, sentence in (
        ([], "it was given 0"),
        ([panel] * 3, "it was given 3"),
        ([Panel("dense", other, other.estimate()), panel], "the dense program is for aie2_1x1, this one for aie2_2x2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            write_report(path, wrong)
    with pytest.raises(FileNotFoundError, match=r"create the folder .*nowhere first"):
        write_report(tmp_path / "nowhere" / "report.html", [panel])
    path.write_text("old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path, [panel])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_convolution_that_ends_in_a_sum_has_the_name_of_the_sum():
    graph, panel = pages.compiled()[0][1], pages.compiled()[1][1]
    names = [layer.name for layer in panel.estimate.layers]
    convolutions = [node.name for node in graph if node.op.kind == "conv"]
    found = list(gammas_of(graph, names))
    assert len(found) == len(convolutions) and set(found) <= set(names)
    assert found != convolutions  # one of them ends in the sum


@pytest.mark.parametrize(
    "value, written",
    [(1.5, "1.500 s"), (2.4e-3, "2.400 ms"), (123.45e-6, "123.5 µs"), (5e-9, "0.005 µs"), (0.0, "0.000 µs")],
)
def test_seconds_have_units(value, written):
    assert words.seconds(value) == written


def test_sizes_and_counts_have_units():
    assert [words.size(n) for n in (0, 100, 1024, 5 * 2**20, 3 * 2**30)] == [
        "0 bytes", "100 bytes", "1.000 KiB", "5.000 MiB", "3.000 GiB",
    ]  # fmt: skip
    assert [words.count(n) for n in (7, 1234, 3.856e9)] == ["7", "1.234 k", "3.856 G"]
