from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import bstf_compiler
from bstf_compiler.aie import bounds
from bstf_compiler.graph import Window
from tests.bstf_compiler.aie.devices import small_device
from tests.bstf_compiler.networks import Builder, network_of_everything, random_network

RATE = 2**32  # bytes/s of every link
CLOCK = 1e9


def program_of(channels, size, window, device, ratio=0.0):
    build = Builder(np.random.default_rng(0))
    return bstf_compiler.compile(
        build.finish(build.conv(build.input(size, size, channels), channels, window, ratio)), device
    )


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    columns=st.integers(1, 5),
    rows=st.integers(1, 5),
    core=st.sampled_from([4096, 8192, 65536]),
    memtile=st.sampled_from([2048, 8192, 524288]),
    network=st.sampled_from([random_network, network_of_everything]),
)
def test_no_program_is_faster_than_its_bound(seed, columns, rows, core, memtile, network):
    try:
        times = bstf_compiler.compile(network(seed), small_device(columns, rows, core, memtile)).estimate()
    except ValueError:
        return
    assert 0 < times.lower_bound_seconds <= times.total_seconds * (1 + 1e-9)
    for layer in times.layers:
        assert layer.lower_bound_seconds <= layer.seconds * (1 + 1e-9), layer.name
        for kind, least in layer.unavoidable.items():
            assert least <= layer.kinds[kind] * (1 + 1e-9) + 1e-15, (layer.name, kind)


def test_what_a_convolution_cannot_avoid():
    """By hand: 16 x 16 x 32 through a dense 3x3 convolution on 2 x 2 cores."""
    (layer,) = program_of(32, 16, Window((3, 3), padding=(1, 1, 1, 1)), "aie2_2x2").estimate().layers
    least, image = layer.unavoidable, 16 * 16 * 32
    assert least["COMP"] == pytest.approx(16 * 16 * 9 * 32 * 32 / 256 / 4 / CLOCK)
    for kind in ("LOAD", "LOADFM", "WRITEFM", "WRITE"):
        assert least[kind] == pytest.approx(image / 2 / RATE), kind
    packed = 9 * 32 * 32 + 4 * 32 + 2 * (16 + 4)  # weights, bias, indices and counts of blocks
    assert least["LOADWM"] == least["LOADW"] == pytest.approx(packed / 2 / RATE)
    kinds = ("COMP", "LOADFM", "WRITEFM")
    assert layer.lower_bound_seconds == max(least["LOADWM"] - layer.ahead, *(least[kind] for kind in kinds))
    assert layer.ahead == pytest.approx((65536 - 1408) / RATE)


def test_zero_blocks_lower_the_bound_of_computing():
    times = [program_of(64, 8, Window((3, 3)), "aie2_2x2", ratio).estimate().layers[0] for ratio in (0.0, 0.75)]
    dense, sparse = (layer.unavoidable["COMP"] for layer in times)
    assert sparse / dense == pytest.approx(times[1].macs / times[0].macs)


def test_pixels_that_strides_step_over_are_avoidable():
    (layer,) = program_of(16, 12, Window((1, 1), (3, 2)), "aie2_2x2").estimate().layers
    assert layer.unavoidable["LOADFM"] == pytest.approx(4 * 6 * 16 / 2 / RATE)


@pytest.mark.parametrize("memtile", [4096, 524288])
def test_halos_and_bands_do_not_raise_the_bound(memtile):
    """Rows that two bands or two columns of cores read count once."""
    window = Window((3, 3), padding=(1, 1, 1, 1))
    program = program_of(16, 24, window, small_device(2, 2, 16384, memtile))
    assert len(program.steps) > 1
    times = program.estimate()
    assert times.layers[0].unavoidable["LOADFM"] == pytest.approx(24 * 24 * 16 / 2 / RATE)
    assert times.layers[0].unavoidable["LOAD"] == pytest.approx(24 * 24 * 16 / 2 / RATE)


def test_a_network_lasts_as_long_as_its_layers_or_as_a_link_to_ddr():
    times = bstf_compiler.compile(random_network(3, most_channels=80), "aie2_2x2").estimate()
    links = [sum(layer.unavoidable[kind] for layer in times.layers) for kind in ("LOAD", "LOADW", "WRITE")]
    most_ahead = times.layers[0].ahead
    array = shortest([layer.unavoidable for layer in times.layers], most_ahead)
    assert times.lower_bound_seconds == pytest.approx(max(array, *links))


def shortest(layers, most_ahead):
    """By linear programming: layers last as long as their work, and any run of them as its weights, less what may be in
    the cores before it begins.
    """
    count, unit = len(layers), max(max(layer.values()) for layer in layers) or 1.0  # near 1, for the solver
    layers = [{kind: seconds / unit for kind, seconds in layer.items()} for layer in layers]
    most_ahead /= unit
    least = [max(layer.get(kind, 0.0) for kind in ("LOADFM", "COMP", "WRITEFM")) for layer in layers]
    runs, weights = [], []
    for first, last in combinations(range(count + 1), 2):
        runs.append([-1.0 if first <= n < last else 0.0 for n in range(count)])
        ahead = most_ahead if first else 0.0
        weights.append(ahead - sum(layer.get("LOADWM", 0.0) for layer in layers[first:last]))
    return linprog(np.ones(count), A_ub=runs, b_ub=weights, bounds=[(low, None) for low in least]).fun * unit


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=7), st.floats(0, 10))
def test_weights_may_come_as_early_as_cores_have_room(work, most_ahead):
    layers = [{"COMP": compute, "LOADWM": weights} for compute, weights in work]
    assert bounds.network_bound(layers, most_ahead) == pytest.approx(shortest(layers, most_ahead), abs=1e-5)


def test_an_input_that_two_layers_load_counts_once():
    build = Builder(np.random.default_rng(0))
    x = build.input(8, 8, 16)
    graph = build.finish(build.conv(x, 8, Window((1, 1))), build.conv(x, 16, Window((1, 1))))
    layers = bstf_compiler.compile(graph, "aie2_2x2").estimate().layers
    assert sum(layer.unavoidable["LOAD"] for layer in layers) == pytest.approx(8 * 8 * 16 / 2 / RATE)
    assert sum(layer.kinds["LOAD"] for layer in layers) > sum(layer.unavoidable["LOAD"] for layer in layers)
