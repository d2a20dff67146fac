import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bstf_compiler
from bstf_compiler.aie import calibrated
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.graph import Window
from tests.bstf_compiler.networks import Builder, network_of_everything


@pytest.mark.parametrize(
    ("name", "load", "loadfm"),
    [("npu1", 7.0e9, 7.2e9), ("ve2802", 3.9 * 1.25e9, 5e9), ("aie2_4x4", 3.9e9, 4e9)],
)
def test_rates_are_the_measured_ones_or_the_devices_own_if_slower(name, load, loadfm):
    device = calibrated.measured(DeviceSpec.load(name))
    assert (device.links.load, device.links.loadfm) == pytest.approx((load, loadfm))
    assert device.core.macs_per_cycle / 256 == pytest.approx(0.448, abs=0.002)


def test_large_convolutions_run_at_the_measured_part_of_the_peak():
    """Between the open matrix product's whole call and its inner loop: 107 and 228 multiply-adds a cycle."""
    build = Builder(np.random.default_rng(0))
    same = Window((3, 3), padding=(1, 1, 1, 1))
    graph = build.finish(build.conv(build.input(32, 32, 64), 64, same, 0.0))
    program = bstf_compiler.compile(graph, "npu1")
    macs = 32 * 32 * 9 * 64 * 64
    (layer,) = program.estimate("calibrated").layers
    assert 107 < macs / (layer.kinds["COMP"] * 1.8e9 * 16) < 116
    assert program.estimate("calibrated").cost_model == "calibrated"


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["npu1", "aie2_2x3", "ve2802_4x4"]))
def test_hardware_is_never_faster_than_exact_times(seed, device):
    program = bstf_compiler.compile(network_of_everything(seed), device)
    exact, slower = program.estimate(), program.estimate("calibrated")
    assert exact.lower_bound_seconds == slower.lower_bound_seconds
    assert slower.total_seconds >= exact.total_seconds * (1 - 1e-9)
    assert [layer.macs for layer in slower.layers] == [layer.macs for layer in exact.layers]
