import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bstf_compiler
from bstf_compiler.aie import program as program_module
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.estimate import layer_seconds
from bstf_compiler.aie.isa import KINDS, Compute
from bstf_compiler.graph import Window
from tests.bstf_compiler.aie.devices import entries, small_device
from tests.bstf_compiler.networks import Builder, network_of_everything, random_network

SAME = Window((3, 3), padding=(1, 1, 1, 1))


def residual_network(ratio, channels=64, size=14):
    """Two networks of one seed differ in their zero blocks only."""
    build = Builder(np.random.default_rng(0))
    x = build.conv(build.input(size, size, channels), channels, SAME, ratio=0.0)
    for _ in range(2):
        y = build.conv(build.conv(x, channels, Window((1, 1)), ratio), channels, SAME, ratio, "linear")
        x = build.add(x, y, "relu")
    return build.finish(x)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.sampled_from([random_network, network_of_everything]))
def test_times_add_up_and_units_never_work_longer_than_they_are_there(seed, mesh, network):
    program = bstf_compiler.compile(network(seed), f"aie2_{mesh}x{mesh}")
    times = program.estimate()
    assert times.host == program.host_parts
    assert times.total_seconds == pytest.approx(max(span.end for span in times.spans))
    clock = 0.0
    for layer in times.layers:
        assert layer.start == pytest.approx(clock)
        clock += layer.seconds
        assert set(layer.kinds) == set(KINDS) and layer.bound in KINDS
        here = {kind: busy for kind, busy in layer.kinds.items() if kind not in ("LOADW", "LOADWM")}  # may come before
        assert max(here.values()) <= layer.seconds * (1 + 1e-9)
    for span in times.spans:
        assert span.busy <= (span.end - span.start) * (1 + 1e-9) + 1e-15
    assert [layer.name for layer in times.layers] == list(dict.fromkeys(step.layer for step in program.steps))


def test_multiply_adds_are_those_of_kept_blocks():
    graph = residual_network(0.5)
    times = bstf_compiler.compile(graph, "aie2_4x4").estimate()
    convolutions = [node for node in graph.nodes if node.op.kind == "conv"]
    assert len(times.layers) == len(convolutions)  # each sum is the end of a convolution
    for node, layer in zip(convolutions, times.layers):
        kernel = graph.tensors[node.inputs[1]].data
        kept = sum(kernel[:, :, i : i + 8, o : o + 8].any() for i in range(0, 64, 8) for o in range(0, 64, 8))
        assert layer.macs == 14 * 14 * kernel.shape[0] * kernel.shape[1] * 64 * kept


def test_a_lone_core_computes_for_multiply_adds_over_its_rate():
    """COMP of every layer is ceil(multiply-adds / 256) cycles a tile; the slowest core counts."""
    program = bstf_compiler.compile(residual_network(0.3), "aie2_1x1")
    for layer in program.estimate().layers:
        cycles = sum(
            i.iterations * math.ceil(i.work / 256 + i.added / 64)
            for step in program.steps
            for i in step.instructions
            if step.layer == layer.name and isinstance(i, Compute)
        )
        assert layer.kinds["COMP"] == pytest.approx(cycles * 1e-9)


@pytest.mark.parametrize("device", ["aie2_1x1", "aie2_2x2", "aie2_4x4", "aie2_8x8"])
def test_sparse_is_never_slower(device):
    dense, sparse = (bstf_compiler.compile(residual_network(ratio), device) for ratio in (0.0, 0.5))
    assert sparse.weight_bytes < dense.weight_bytes
    assert sparse.estimate().total_seconds < dense.estimate().total_seconds


def test_the_slowest_core_counts():
    """All kept blocks in one output block: one core does all the work."""
    times = {}
    for spread in (False, True):
        build = Builder(np.random.default_rng(0))
        x = build.conv(build.input(16, 16, 64), 64, SAME, ratio=0.0, activation="linear")
        kernel = build.graph.tensors[f"{x} kernel"].data
        keep = np.eye(8, dtype=np.int8) if spread else np.zeros((8, 8), np.int8)
        if not spread:
            keep[:, 0] = 1
        kernel *= np.kron(keep, np.ones((8, 8), np.int8))
        kernel[0, 0, ::8, ::8] += np.kron(keep, np.ones((1, 1), np.int8)) * (kernel[0, 0, ::8, ::8] == 0)
        times[spread] = bstf_compiler.compile(build.finish(x), "aie2_4x4").estimate().layers[0]
    assert times[True].macs == times[False].macs
    assert times[False].kinds["COMP"] >= 3.5 * times[True].kinds["COMP"]


@pytest.mark.parametrize("seed", range(8))
def test_published_model_runs_on_any_program(seed):
    program = bstf_compiler.compile(network_of_everything(seed), "aie2_4x4")
    times = program.estimate("published")
    assert times.cost_model == "published" and times.total_seconds > 0
    idle = {step.layer for step in program.steps if not step.instructions}
    assert all((layer.seconds > 0) != (layer.name in idle) for layer in times.layers)


def test_published_model_refuses_links_of_different_rates():
    spec = entries()
    spec["links"]["writefm"] //= 2
    program = bstf_compiler.compile(random_network(7), DeviceSpec.from_dict(spec, "test"))
    with pytest.raises(ValueError, match="one link rate"):
        program.estimate("published")


def test_unknown_cost_model():
    with pytest.raises(ValueError, match="unknown cost model 'guess'; use one of: exact, calibrated, published"):
        bstf_compiler.compile(random_network(0), "aie2_1x1").estimate("guess")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("memtile", [8192, 524288])
def test_layer_seconds_are_those_of_an_estimate_for_another_device(seed, memtile):
    program = bstf_compiler.compile(random_network(seed), small_device(3, 2, 65536, memtile))
    spec = entries(3, 2, 65536, memtile) | {"clock_hz": 3 * 10**9}
    spec["links"]["loadfm"] *= 2
    other = DeviceSpec.from_dict(spec, "test device")
    for device in (program.device, other):
        expected = [layer.seconds for layer in dataclasses.replace(program, device=device).estimate().layers]
        assert layer_seconds(program, device) == expected
    assert layer_seconds(program, other) != layer_seconds(program, program.device)


def test_lower_bounds_are_counted_once_for_all_cost_models_and_explanations(monkeypatch):
    counted = []
    count = program_module.layer_bounds
    monkeypatch.setattr(program_module, "layer_bounds", lambda code: counted.append(code) or count(code))
    program = bstf_compiler.compile(random_network(1), "aie2_2x2")
    times = [program.estimate(model) for model in ("exact", "calibrated", "published")]
    program.explain(program)
    assert len(counted) == 1
    for one in times:
        assert [layer.unavoidable for layer in one.layers] == list(count(program).values())
