"""bstf-compile end to end on a tiny network, its refusals, and what the compiler imports."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from absl import flags

import bstf
import bstf_compiler
from bstf_compiler import integer, main
from bstf_compiler.graph import Window
from tests.bstf_compiler.networks import Builder

WRITTEN = {"program.asm", "data.bin", "layers.csv", "trace.json", "report.html", "timeline.png"}


def tiny(ratio=0.5, body="body", size=3):
    """A residual network of 8x8 images with a softmax at its end."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((8, 8, 3), name="image")
    stem = layers.Conv2D(16, 3, padding="same", activation="relu", name="stem")(inputs)
    x = layers.Conv2D(16, size, padding="same", name=body)(stem)
    x = layers.Add(name="sum")([x, stem])
    outputs = layers.Dense(10, activation="softmax", name="head")(layers.GlobalAveragePooling2D(name="pool")(x))
    return bstf.sparsify(keras.Model(inputs, outputs, name="tiny"), ratio=ratio)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with the SavedModels "int8", "float" and "dense" (int8) of one network, and of others."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny()
    bstf.export(model, folder / "float")
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")
    bstf.export(bstf.quantize(model, images), folder / "int8")
    others = {"dense": {"ratio": 0}, "renamed": {"ratio": 0, "body": "trunk"}, "wider": {"ratio": 0, "size": 5}}
    for name, options in others.items():
        bstf.export(bstf.quantize(tiny(**options), images), folder / name)
    return folder


@pytest.fixture
def compile_program(monkeypatch, capfd):
    """Runs the program on flags of its own; returns exit code, standard output and standard error."""

    def call(*words):
        values = flags.FlagValues()
        main.define_flags(values)
        monkeypatch.setattr(main, "FLAGS", values)
        return main.main(values(["bstf-compile", *map(str, words)])), *capfd.readouterr()

    return call


def python(*words):
    """A Python of its own, without the settings of this one."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, check=False)


def test_explains(models, tmp_path, compile_program):
    code, out, err = compile_program(f"--model={models / 'int8'}", f"--output={tmp_path / 'out'}", "--explain")
    assert (code, err) == (0, "")
    assert "why not less" in out and "whole network with twice the" in " ".join(out.split())


def test_dense_network_stands_beside(models, tmp_path, compile_program):
    arguments = f"--model={models / 'int8'}", f"--dense={models / 'dense'}", f"--output={tmp_path / 'out'}"
    code, out, err = compile_program(*arguments, "--explain")
    assert (code, err) == (0, "")
    sparse, dense = (bstf_compiler.compile(bstf_compiler.load(models / name)) for name in ("int8", "dense"))
    times = [one.estimate() for one in (dense, sparse)]
    gain = times[0].total_seconds / times[1].total_seconds
    assert f"dense: {times[0].total_seconds * 1e3:.3f} ms an image, {gain:.2f} times as long" in out
    rows = [re.split(r"\s*│\s*", line.strip("│ \n")) for line in out.splitlines() if line.startswith("│")]
    gains = {row[0]: row[4] for row in rows if len(row) == 7}  # rows of the explanation
    for one, other in zip(*(estimate.layers for estimate in times)):
        assert gains[one.name] == f"{one.seconds / other.seconds:.2f}"
    trace = json.loads((tmp_path / "out" / "trace.json").read_text(encoding="utf-8"))
    shown = [(one["title"], one["seconds"]) for one in trace["otherData"]["estimates"]]
    assert shown == [("dense", times[0].total_seconds), ("sparse", times[1].total_seconds)]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.index("<h3>dense: ") < page.index("<h3>sparse: ")
    with open(tmp_path / "out" / "layers.csv", newline="", encoding="utf-8") as stream:
        assert [float(row["seconds"]) for row in csv.DictReader(stream)] == [e.seconds for e in times[1].layers]
    assert bstf_compiler.Program.load(tmp_path / "out") == sparse


@pytest.mark.parametrize(
    ("model", "dense", "sentence"),
    [
        ("int8", "renamed", "the dense network has no layer 'body', the other one has; give the same network before"),
        (
            "int8",
            "wider",
            r"layer 'body' has a kernel of \(5, 5, 16, 16\) in the dense network and \(3, 3, 16, 16\) in",
        ),
        ("dense", "int8", "the dense network has [34] zero blocks, '.*' 0; exchange them"),
        ("int8", "float", "the dense network: .* has no fixed-point grid; quantise the network"),
        ("int8", "nowhere", "nowhere' holds no saved_model.pb"),
    ],
)
def test_another_network_is_no_dense_one(model, dense, sentence, models, tmp_path, compile_program):
    arguments = f"--model={models / model}", f"--dense={models / dense}", f"--output={tmp_path / 'out'}"
    code, out, err = compile_program(*arguments)
    assert (code, out) == (1, "") and not (tmp_path / "out").exists()
    assert re.fullmatch(f"bstf-compile: .*{sentence}.*\n", err)


def test_networks_of_other_images_or_more_layers_are_not_the_same():
    graphs = []
    for size, layers in ((8, 1), (8, 2), (6, 1)):
        build = Builder(np.random.default_rng(0))
        x = build.input(size, size, 8)
        for _ in range(layers):
            x = build.conv(x, 8, Window((1, 1)), ratio=0.0)
        graphs.append(build.finish(x))
    main.check_same_network(graphs[0], graphs[0])
    with pytest.raises(ValueError, match="the sparse network has no layer 'conv[^']*', the other one has"):
        main.check_same_network(graphs[0], graphs[1])
    with pytest.raises(
        ValueError, match=r"the dense network takes images of \(6, 6, 8\), '.*' of \(8, 8, 8\); give the"
    ):
        main.check_same_network(graphs[0], graphs[2])


def test_compiles_and_simulates(models, tmp_path, compile_program):
    output = tmp_path / "deep" / "out"
    code, out, err = compile_program(f"--model={models / 'int8'}", f"--output={output}", "--simulate=3")
    assert (code, err) == (0, "")
    assert out.endswith("simulation equals integer reference on 3 of 3 images\n")
    assert {path.name for path in output.iterdir()} == WRITTEN and os.listdir(output.parent) == ["out"]

    program = bstf_compiler.Program.load(output)
    estimate = program.estimate()
    rows = [re.split(r"\s*│\s*", line.strip("│ \n")) for line in out.splitlines() if line.startswith("│")]
    assert rows[:-1] == [
        [e.name, e.op, f"{e.seconds * 1e6:,.1f}", f"{e.lower_bound_seconds * 1e6:,.1f}", e.bound, f"{e.macs:,}"]
        for e in estimate.layers
    ]
    assert [row[0] for row in rows] == ["stem", "body", "sum", "pool", "head", "total"]
    assert rows[-1][-1] == f"{sum(layer.macs for layer in estimate.layers):,}"
    assert f"time: {estimate.total_seconds * 1e3:.3f} ms an image (exact cost model)" in out
    assert f"lower bound: {estimate.lower_bound_seconds * 1e3:.3f} ms" in out
    assert f"weights: {program.weight_bytes:,} bytes" in out
    packing = program.packing
    assert (
        f"memory tiles: {packing.peak:,} of 524,288 bytes of each, {packing.least:,} at least "
        f"(optimality gap {packing.gap:.1%}); 0 bytes of tensors spilled to DDR\n"
    ) in out
    assert "on the host, in none of these times: softmax of 'head'" in out
    assert "device: aie2_4x4, 4 x 4 cores at 1 GHz" in out and f"written to: {output}" in out
    with open(output / "layers.csv", newline="", encoding="utf-8") as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == [layer.name for layer in estimate.layers]


def test_writes_an_mlir_aie_design(models, tmp_path, compile_program):
    arguments = f"--model={models / 'int8'}", f"--output={tmp_path / 'out'}", f"--emit_mlir={tmp_path / 'design'}"
    code, out, err = compile_program(*arguments, "--device=npu1_2x2", "--mlir_version=2025")
    assert (code, err) == (0, "")
    assert f"mlir-aie design: {tmp_path / 'design'}; it was read back and executed" in out
    assert (tmp_path / "design" / "step0.mlir").read_text().startswith("// For mlir-aie of late 2024 to 2025;")
    assert bstf_compiler.Program.load(tmp_path / "out").device.name == "npu1_2x2"


def test_a_model_of_an_array_has_no_mlir_aie_design(models, tmp_path, compile_program):
    arguments = f"--model={models / 'int8'}", f"--output={tmp_path / 'out'}", f"--emit_mlir={tmp_path / 'design'}"
    code, out, err = compile_program(*arguments)
    assert (code, out) == (1, "")
    assert re.fullmatch("bstf-compile: mlir-aie knows no device 'aie2_4x4'; compile for npu1, .*\n", err)
    assert not list(tmp_path.iterdir())


def test_json_is_all_that_is_printed(models, tmp_path, compile_program):
    """With the same numbers as the files have."""
    arguments = f"--model={models / 'int8'}", f"--dense={models / 'dense'}", f"--output={tmp_path / 'out'}"
    code, out, err = compile_program(*arguments, "--json", "--explain", "--simulate=1")
    assert (code, err) == (0, "")
    found = json.loads(out)
    program = bstf_compiler.Program.load(tmp_path / "out")
    estimate = program.estimate()
    assert found["seconds"] == estimate.total_seconds < found["dense_seconds"]
    assert found["lower_bound_seconds"] == estimate.lower_bound_seconds
    assert found["weight_bytes"] == program.weight_bytes and found["output"] == str(tmp_path / "out")
    assert [layer["seconds"] for layer in found["layers"]] == [layer.seconds for layer in estimate.layers]
    assert found["simulation"] == {"images": 1, "equal": 1} and found["host"] == ["softmax of 'head'"]
    dense = bstf_compiler.compile(bstf_compiler.load(models / "dense"))
    assert found["explanation"] == json.loads(json.dumps(program.explain(dense).to_dict()))
    assert found["memory_tile"]["peak"] == program.packing.peak and 0 < found["blocks"]["zero"] < found["blocks"]["all"]
    assert compile_program(*arguments, "--quiet", "--simulate=1") == (0, "", "")


def test_replaces_an_earlier_program(models, tmp_path, compile_program):
    model = f"--model={models / 'int8'}"
    assert compile_program(model, f"--output={tmp_path}", "--device=aie2_1x1")[0] == 0
    code, out, _ = compile_program(model, f"--output={tmp_path}", "--device=aie2_2x2", "--cost_model=published")
    assert code == 0 and "device: aie2_2x2, 2 x 2 cores" in out and "(published cost model)" in out
    assert "simulation" not in out
    assert bstf_compiler.Program.load(tmp_path).device.name == "aie2_2x2"
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN


def test_difference_is_reported(models, tmp_path, compile_program, monkeypatch):
    right = integer.evaluate

    def wrong(graph, node, values):
        result = right(graph, node, values)
        return result ^ 1 if node.name == "sum" else result

    monkeypatch.setattr(integer, "evaluate", wrong)
    code, out, err = compile_program(f"--model={models / 'int8'}", f"--output={tmp_path}", "--simulate=2")
    assert code == 1 and out.endswith("simulation equals integer reference on 0 of 2 images\n")
    assert "bstf-compile: image 2: layer 'sum' has 1,024 of 1,024 values that differ" in err


def test_random_images_fill_the_grid_and_are_the_same_again(models):
    program = bstf_compiler.compile(bstf_compiler.load(models / "int8"))
    (port,) = program.inputs
    images = np.concatenate([one[port.tensor] for one in main.random_images(program, 8)])
    assert images.shape == (8, 8, 8, 3) and images.dtype == np.float32
    integers = integer.quantize(images, port.position)
    assert integers.min() < -120 and integers.max() > 120
    again = np.concatenate([one[port.tensor] for one in main.random_images(program, 8)])
    np.testing.assert_array_equal(images, again)


def damaged(folder, models):
    shutil.copytree(models / "int8", folder / "damaged")
    file = folder / "damaged" / "saved_model.pb"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return folder / "damaged"


BAD_MODELS = {
    "missing": (lambda folder, models: folder / "nowhere", "nowhere' holds no saved_model.pb"),
    "float": (lambda folder, models: models / "float", "has no fixed-point grid; quantise the network"),
    "truncated": (damaged, r"damaged' is damaged or incomplete \(.*\); export it again"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model_is_one_sentence_and_leaves_nothing(case, models, tmp_path, compile_program):
    make, sentence = BAD_MODELS[case]
    code, out, err = compile_program(f"--model={make(tmp_path, models)}", f"--output={tmp_path / 'a' / 'out'}")
    assert (code, out) == (1, "")
    assert re.fullmatch(f"bstf-compile: .*{sentence}.*\n", err)
    assert not (tmp_path / "a").exists()


def test_unknown_device_is_refused_at_once(models, tmp_path, compile_program):
    arguments = f"--model={models / 'int8'}", f"--output={tmp_path / 'out'}"
    code, out, err = compile_program(*arguments, "--device=aie3_4x4")
    assert (code, out) == (1, "") and not (tmp_path / "out").exists()
    assert re.fullmatch(r"bstf-compile: unknown device 'aie3_4x4' \(did you mean 'aie2_4x4'\?\).*\n", err)


@pytest.mark.parametrize(
    "place, sentence",
    [
        (".", "holds 'mine.txt', no part of a program; give an empty or new folder"),
        ("mine.txt", "is a file; give a folder"),
        ("mine.txt/deep/out", "can't be made: '.*mine.txt' is a file; give another folder"),
    ],
)
def test_output_that_holds_something_else_is_kept(place, sentence, models, tmp_path, compile_program):
    (tmp_path / "mine.txt").write_text("mine")
    code, out, err = compile_program(f"--model={models / 'int8'}", f"--output={tmp_path / place}")
    assert (code, out) == (1, "")
    assert re.fullmatch(f"bstf-compile: '.*' {sentence}\n", err)
    assert os.listdir(tmp_path) == ["mine.txt"] and (tmp_path / "mine.txt").read_text() == "mine"


def test_failed_write_is_one_sentence_and_leaves_the_old_program(models, tmp_path, compile_program, monkeypatch):
    arguments = f"--model={models / 'int8'}", f"--output={tmp_path / 'out'}"
    assert compile_program(*arguments)[0] == 0

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bstf_compiler.aie.report.write_report", full)
    code, _, err = compile_program(*arguments, "--device=aie2_1x1")
    assert code == 1 and re.fullmatch(r"bstf-compile: Can't write .*out: no space left on device; make room .*\n", err)
    assert os.listdir(tmp_path) == ["out"]
    assert bstf_compiler.Program.load(tmp_path / "out").device.name == "aie2_4x4"


def test_interrupt_ends_quietly(tmp_path, compile_program, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bstf_compiler, "load", interrupted)
    code, _, err = compile_program("--model=any", f"--output={tmp_path / 'out'}")
    assert code == 130 and "interrupted" in err and not (tmp_path / "out").exists()


def test_messages_are_dropped_unless_something_breaks(capfd):
    with main._without_stderr():
        os.write(2, b"chatter")
    with pytest.raises(ValueError), main._without_stderr():
        os.write(2, b"chatter")
        raise ValueError("about the input")
    assert capfd.readouterr().err == ""
    with pytest.raises(RuntimeError), main._without_stderr():
        os.write(2, b"why it broke\n")
        raise RuntimeError
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "why it broke\nafter\n"


@pytest.mark.parametrize(
    "words",
    [[], ["--model=m"], ["--output=o"]]
    + [["--model=m", "--output=o", word] for word in ("--simulate=-1", "--cost_model=other", "--nonono")],
)
def test_bad_flags_are_refused(words):
    values = flags.FlagValues()
    main.define_flags(values)
    with pytest.raises(flags.Error):
        values(["bstf-compile", *words])


def test_console_program(models, tmp_path):
    helped = python("-m", "bstf_compiler.main", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "bstf-compile: compiles a SavedModel" in helped.stdout
    assert "bstf-compile --model=build/digits/int8 --output=build/program" in helped.stdout
    assert all(
        f"--{name}" in helped.stdout for name in ("model", "dense", "device", "output", "simulate", "cost_model")
    )
    script = Path(sys.executable).with_name("bstf-compile")
    if script.exists():
        assert "--cost_model" in python(script, "--help").stdout
    done = python("-m", "bstf_compiler.main", f"--model={models / 'int8'}", f"--output={tmp_path / 'out'}")
    assert (done.returncode, done.stderr) == (0, "")  # nothing from TensorFlow, no progress in a pipe
    assert (tmp_path / "out" / "program.asm").is_file()


RUN_A_PROGRAM = """
import sys
import numpy as np
import bstf_compiler
heavy = {"tensorflow", "keras", "bstf", "matplotlib"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
program = bstf_compiler.Program.load(sys.argv[1])
program.simulate([np.zeros((1, *port.user_shape), np.float32) for port in program.inputs][0])
program.estimate()
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
program.write(sys.argv[2])
heavy -= {"matplotlib"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


def test_only_reading_a_model_imports_tensorflow(models, tmp_path):
    bstf_compiler.compile(bstf_compiler.load(models / "int8")).write(tmp_path / "program")
    done = python("-c", RUN_A_PROGRAM, tmp_path / "program", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    for name in WRITTEN - {"timeline.png"}:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "program" / name).read_bytes(), name
