"""The demo at a tiny size: its last line, exit code, files and numbers, and what it does when things go wrong."""

import html.parser
import json
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf
from absl import flags

import bstf_compiler
from benchmarks import demo, demo_page
from bstf import datasets

TINY = demo.Recipe(widths=(8, 16), depth=1, epochs=1, retrain_epochs=1, calibration=8, images=3)


@pytest.fixture(scope="module")
def digits():
    data = datasets.load("mnist5k", batch_size=50)
    every_tenth = data.test.unbatch().shard(10, 0).batch(50)  # the test images stand in order of their classes
    return replace(data, train=data.train.take(4), test=every_tenth.apply(tf.data.experimental.assert_cardinality(2)))


@pytest.fixture(scope="module")
def made(digits, tmp_path_factory):
    """A folder that the demo wrote."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert demo.demonstrate(folder, TINY, digits)
    return folder


@pytest.fixture(scope="module")
def results(made):
    return json.loads((made / "results.json").read_text(encoding="utf-8"))


class Page(html.parser.HTMLParser):
    """The links, open elements and words of a page."""

    VOID = ("meta", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.links, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "a":
            self.links.append(dict(attrs)["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def damaged(program):
    """The program with one wrong byte among its weights, as a faulty compiler would write it."""
    data = bytearray(program.data)
    middle = next(i for i in range(len(data) // 2, len(data)) if data[i])
    data[middle] ^= 0x40
    return replace(program, data=bytes(data))


def do_nothing(*arguments, **options):
    """In place of a training that a test doesn't need."""


def test_page_is_whole_and_its_links_lead_somewhere(made, results):
    page = Page((made / "index.html").read_text(encoding="utf-8"))
    assert page.open == []
    files = {link for link in page.links if not link.startswith("#")}
    assert all((made / link).exists() for link in files)
    assert {"results.json", "dense/program/report.html", "sparse/program/program.asm"} <= files
    for row in results["networks"]:
        assert all(cell in page.text for cell in demo_page.cells(row))
    for layer in results["layers"]:
        assert f"{layer['dense']['seconds'] * 1e6:,.2f}" in page.text and layer["name"] in page.text
    assert "A block-sparse ResNet for mnist5k on aie2_4x4" in page.text
    assert "on 3 of 3 test images" in page.text and "Γ" in page.text


def test_results_are_consistent(made, results):
    rows = {row["name"]: row for row in results["networks"]}
    assert list(rows) == ["dense", "sparse", "dense INT8", "sparse INT8", "simulated"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values())
    assert rows["sparse"]["images"] == 100 and rows["simulated"]["images"] == 3
    for small, large in (("sparse", "dense"), ("sparse INT8", "dense INT8"), ("sparse INT8", "sparse")):
        assert rows[small]["weight_bytes"] < rows[large]["weight_bytes"]
    assert rows["dense"]["macs"] == rows["dense INT8"]["macs"] > rows["sparse"]["macs"] == rows["sparse INT8"]["macs"]
    assert rows["dense"]["seconds"] is None and rows["simulated"]["seconds"] == rows["sparse INT8"]["seconds"]
    for name in ("dense", "sparse"):
        program = bstf_compiler.Program.load(made / name / "program")
        assert rows[f"{name} INT8"]["weight_bytes"] == program.weight_bytes
        total = sum(layer[name]["seconds"] for layer in results["layers"])
        assert total == pytest.approx(program.estimate().total_seconds)
        assert total == pytest.approx(rows[f"{name} INT8"]["seconds"])
    assert results["recipe"]["images"] == results["simulation"]["images"] == results["simulation"]["equal"] == 3
    assert results["simulation"]["differing"] == {}
    layers = {layer["name"] for layer in results["layers"]}
    assert set(results["simulation"]["compared"]) == {*layers, "returned"}
    assert sum(layer["sparse"]["macs"] for layer in results["layers"]) == rows["simulated"]["macs"]


def test_written_network_is_the_one_that_was_measured(made, digits, results):
    """The folder's SavedModel and program, read back, give the classes that the results count."""
    images, labels = demo._spread(digits, 3)
    graph = bstf_compiler.load(made / "sparse" / "model")
    program = bstf_compiler.Program.load(made / "sparse" / "program")
    answers = program.simulate(images)
    np.testing.assert_array_equal(answers, bstf_compiler.integer.run(graph, images))
    assert results["networks"][-1]["accuracy"] == np.mean(np.argmax(answers, axis=-1) == labels)


@pytest.fixture
def run_main(digits, monkeypatch, capsys):
    """Calls the program: exit code, lines of standard output, standard error."""
    values = flags.FlagValues()
    demo.define_flags(values)
    values(["demo"])
    monkeypatch.setattr(demo, "FLAGS", values)
    monkeypatch.setattr(demo, "Recipe", lambda seed: replace(TINY, seed=seed))
    monkeypatch.setattr(datasets, "load", lambda seed: digits)

    def run(output):
        values.output = str(output)
        code = demo.main(["demo"])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def test_program_replaces_an_earlier_demo_and_ends_with_the_computed_line(run_main, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    for name in ("index.html", "results.json", "left from an earlier demo"):
        (output / name).touch()
    code, lines, _ = run_main(output)
    assert code == 0
    assert lines[-1] == "demo: simulation equals integer reference on 3 of 3 images"
    assert not (output / "left from an earlier demo").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_wrong_weight_in_the_program_makes_it_fail(run_main, tmp_path, monkeypatch):
    compile = bstf_compiler.compile
    monkeypatch.setattr(demo, "train", do_nothing)
    monkeypatch.setattr(bstf_compiler, "compile", lambda graph, device: damaged(compile(graph, device)))
    code, lines, _ = run_main(tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    simulation = results["simulation"]
    assert code == 1
    assert simulation["equal"] < 3 and simulation["equal"] + len(simulation["differing"]) == 3
    assert lines[-1] == f"demo: simulation equals integer reference on {simulation['equal']} of 3 images"
    assert all(set(names) <= set(simulation["compared"]) for names in simulation["differing"].values())
    assert 'class="verdict different"' in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_failure_on_the_way_leaves_nothing(run_main, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(demo, "train", do_nothing)
    monkeypatch.setattr(demo, "write_report", refuse)
    code, _, err = run_main(tmp_path / "out")
    assert code == 1 and "demo: No space left on device" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "results.json"])
def test_folder_with_other_things_is_refused_at_once(run_main, tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("mine")
    monkeypatch.setattr(demo, "train", None)
    code, _, err = run_main(tmp_path)
    assert code == 1 and "exists and isn't an earlier demo" in err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_more_images_than_there_are(digits, tmp_path):
    with pytest.raises(ValueError, match="has 100 test images; 101 of them can't be simulated"):
        demo.demonstrate(tmp_path / "out", replace(TINY, images=101), digits)
    assert list(tmp_path.iterdir()) == []
