"""The engine of a saved model: many callers at once, its own files, and what it refuses."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest

import bstf
import bstf_compiler
from bstf.applications import small_resnet
from bstf_compiler import Engine, graph_file
from bstf_compiler.graph import Conv, Node, Relu, Window

pytestmark = pytest.mark.usefixtures("known_machine")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("engine")
    model = bstf.sparsify(small_resnet((28, 28, 1)), block=8, ratio=0.5)
    bstf.export(model, folder / "model")
    return model, folder / "model"


@pytest.fixture(scope="module")
def loaded(saved):
    return bstf_compiler.load(saved[1])


@pytest.fixture(scope="module")
def engine(loaded):
    return Engine(loaded)


def test_a_saved_model(saved):
    model, folder = saved
    x = np.random.default_rng(0).random((9, *model.input_shape[1:])).astype(np.float32)
    expected = model.predict(x, verbose=0)
    found = Engine(folder)(x)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_two_thousand_calls_of_eight_callers_at_once(saved):
    model, folder = saved
    engine = Engine(folder, threads=2)
    rng = np.random.default_rng(0)
    inputs = [rng.random((size, *model.input_shape[1:])).astype(np.float32) for size in (1, 3, 2, 9)]
    expected = [engine(x) for x in inputs]
    wrong = []

    def work(start):
        for turn in range(250):
            place = (start + turn) % len(inputs)
            if not np.array_equal(engine(inputs[place]), expected[place]):
                wrong.append(place)

    for _ in range(3):
        work(0)
    before = resident_bytes()
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(work, range(8)))  # raises what a caller does
    assert not wrong
    # Each caller at work needs memory for its activations, and keeps it for the next one.
    assert resident_bytes() - before < 8 * sum(engine.memory_bytes(len(x))[0] for x in inputs) + 2**25


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("fixed", [False, True])
def test_a_saved_engine_computes_the_same(saved, tmp_path, fixed):
    model, folder = saved
    x = np.random.default_rng(0).random((9, *model.input_shape[1:])).astype(np.float32)
    if fixed:
        folder = tmp_path / "fixed"
        bstf.export(bstf.quantize(model, x), folder)
    engine = Engine(folder)
    engine.save(tmp_path / "engine.npz")
    assert os.listdir(tmp_path) == ["engine.npz"] or fixed
    again = Engine(tmp_path / "engine.npz")
    assert np.array_equal(again(x), engine(x))
    assert again.graph.name == engine.graph.name


def test_a_saved_engine_is_read_without_tensorflow(engine, tmp_path):
    engine.save(tmp_path / "engine.npz")
    program = f"import sys; from bstf_compiler import Engine; Engine({str(tmp_path / 'engine.npz')!r}); "
    program += "sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_damaged_files_are_refused(engine, tmp_path):
    path = tmp_path / "engine.npz"
    engine.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or no saved engine"):
            Engine(path)
    for place in rng.integers(0, len(whole), 30):
        broken = bytearray(whole)
        broken[place] ^= 0x55
        path.write_bytes(broken)
        try:  # a byte that nobody reads may change
            found = Engine(path)
        except ValueError:
            continue
        assert len(found.graph.nodes) == len(engine.graph.nodes)


def test_compressed_files_are_refused(engine, tmp_path):
    """A few bytes of them may be many when they are read."""
    path = tmp_path / "engine.npz"
    engine.save(path)
    with np.load(path) as arrays:
        np.savez_compressed(path, **arrays)
    with pytest.raises(ValueError, match="damaged or no saved engine .its arrays are compressed."):
        Engine(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda graph: graph.nodes.reverse(), "out of order"),
        (lambda graph: graph.nodes.append(Node("y", Relu("relu"), ["nothing"])), "out of order"),
        (lambda graph: setattr(graph.tensors[graph.nodes[0].name], "shape", (1, 99, 99, 8)), "doesn't make"),
        (lambda graph: setattr(graph.tensors[graph.nodes[0].inputs[1]], "shape", (1, 1, 1, 1)), "isn't float32"),
        (lambda graph: setattr(graph.nodes[0], "op", Conv(Window((1, 1), (0, 1)))), "window"),
        (lambda graph: setattr(graph.nodes[0], "op", Conv(graph.nodes[0].op.window, groups=7)), "doesn't make"),
        (lambda graph: setattr(graph.nodes[0], "op", Conv(graph.nodes[0].op.window, "sine")), "sine"),
        (lambda graph: graph.outputs.__setitem__(0, "nothing"), "output is missing"),
    ],
)
def test_files_that_contradict_themselves_are_refused(loaded, tmp_path, change, words):
    graph = copy.deepcopy(loaded)
    change(graph)
    graph_file.write(graph, tmp_path / "engine.npz")
    with pytest.raises(ValueError, match=words):
        Engine(tmp_path / "engine.npz")


def test_same_bits_for_any_number_of_threads(saved, loaded):
    x = np.random.default_rng(0).random((3, *saved[0].input_shape[1:])).astype(np.float32)
    one = Engine(loaded, threads=1)(x)
    for threads in (None, 2, 4):
        assert np.array_equal(Engine(loaded, threads=threads)(x), one)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda engine, x: engine(x[0]), r"\(n, 28, 28, 1\); got \(28, 28, 1\)"),
        (lambda engine, x: engine(x[..., [0, 0]]), "got"),
        (lambda engine, x: engine(x[:0]), "at least one"),
        (lambda engine, x: engine(x * np.nan), "NaN"),
        (lambda engine, x: engine(x.astype(complex)), "complex128"),
        (lambda engine, x: engine(x.astype(str)), "takes numbers; got <U"),
        (lambda engine, x: engine([x, x]), r"got \(2, 2, 28, 28, 1\)"),
        (lambda engine, x: engine({"y": x}), "inputs are 'image'.*images of 'y'"),
        (lambda engine, x: Engine(engine.graph, threads=0), "threads is 0"),
        (lambda engine, x: Engine(engine.graph, precision="int8"), "is float; quantise it with bstf.quantize"),
        (lambda engine, x: Engine(engine.graph, precision="bfloat16"), "'float32', 'int8' and None"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(engine, call, words):
    (shape,) = engine.graph.inputs.values()
    with pytest.raises(ValueError, match=words):
        call(engine, np.ones((2, *shape), np.float32))
