"""Curves of memory tiles and DDR against what programs say themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

import bstf_compiler
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.memory import CHUNKS, STAGING
from bstf_compiler.aie.usage import LINKS, Curve, curves
from tests.bstf_compiler.aie.devices import small_device
from tests.bstf_compiler.aie.estimates import estimate
from tests.bstf_compiler.networks import network_of_everything, random_network


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    columns=st.integers(1, 4),
    rows=st.integers(1, 4),
    memtile=st.sampled_from([8192, 524288]),
    network=st.sampled_from([random_network, network_of_everything]),
)
def test_curves_are_what_the_program_holds_and_moves(seed, columns, rows, memtile, network):
    try:
        program = bstf_compiler.compile(network(seed), small_device(columns, rows, 65536, memtile))
    except ValueError:
        return
    times = program.estimate()
    tile, ddr = curves(times)
    assert tile.limit == program.device.memtile.memory_bytes and tile.peak == program.packing.least <= tile.limit
    for stage, layer in enumerate(times.layers):
        held = [one for one in program.allocations if one.first <= stage <= one.last]
        chunks = sum(one.bytes for one in held if one.name == CHUNKS)
        staging = sum(one.bytes for one in held if one.name.startswith(STAGING))
        assert [part[stage] for part in tile.parts.values()] == [
            sum(one.bytes for one in held) - chunks - staging, staging, chunks,
        ]  # fmt: skip
        assert tile.times[stage] == layer.start
    assert tile.times[-1] == pytest.approx(times.total_seconds)
    assert ddr.peak <= ddr.limit * (1 + 1e-9)
    for kind in LINKS:
        moved = sum(i.bytes * i.iterations for step in program.steps for i in step.instructions if i.kind == kind)
        assert (ddr.parts[kind] * np.diff(ddr.times)).sum() == pytest.approx(moved, rel=1e-6)
    for start, end, total in zip(ddr.times, ddr.times[1:], ddr.total):
        middle = (start + end) / 2
        active = [s for s in times.spans if s.kind in LINKS and s.start <= middle < s.end]
        assert total == pytest.approx(sum(s.bytes / (s.end - s.start) for s in active), abs=len(LINKS))


def test_mean_is_the_integral_over_each_interval():
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(1, 3, 12))
    curve = Curve("any", "bytes", 1.0, times, {"a": rng.uniform(0, 5, 11), "b": rng.uniform(0, 5, 11)})
    edges = np.linspace(0, 4, 24)

    def amount(part, t):
        inside = times[0] <= t < times[-1]
        return curve.parts[part][np.searchsorted(times, t, "right") - 1] if inside else 0.0

    for part, means in curve.mean(edges).items():
        for start, end, mean in zip(edges, edges[1:], means):
            breaks = [t for t in times if start < t < end] or None
            whole = quad(lambda t, part=part: amount(part, t), start, end, points=breaks)[0]
            assert mean == pytest.approx(whole / (end - start), abs=1e-6)


def test_a_program_without_layers_holds_and_moves_nothing():
    for curve in curves(estimate().__class__("aie2_1x1", "exact", (), ())):
        assert curve.peak == 0 and all(not means.any() for means in curve.mean([0.0, 1.0, 2.0]).values())


def test_a_tensor_may_be_named_like_what_is_no_tensor():
    tile, _ = curves(estimate())
    assert tile.parts["tensors"].tolist() == [300, 500, 200] and tile.parts["staging"].tolist() == [50, 0, 0]


@pytest.mark.parametrize(
    ("device", "rate"),
    [("aie2_4x4", 12 * 2**32), ("aie2_2x4", 2 * 2**32 + 4 * 2**32 + 2 * 2**32), ("npu1", 2 * 27_000_000_000)],
)
def test_rate_of_ddr(device, rate):
    """LOAD, LOADW and WRITE of every memory tile that they reach at once; of npu1, what its DDR was measured to do."""
    assert DeviceSpec.load(device).ddr_rate == pytest.approx(rate)
