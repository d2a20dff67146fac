import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

import bstf_compiler
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import KINDS
from bstf_compiler.graph import Window
from tests.bstf_compiler.aie.devices import entries
from tests.bstf_compiler.networks import Builder, network_of_everything

LINKS = ("LOAD", "LOADW", "LOADFM", "LOADWM", "WRITEFM", "WRITE")
SAME = Window((3, 3), padding=(1, 1, 1, 1))


def convolution(device, ratio=0.0, window=SAME, channels=64):
    """One convolution; networks of one seed differ in their zero blocks only."""
    build = Builder(np.random.default_rng(0))
    x = build.conv(build.input(16, 16, channels), channels, window, ratio)
    return bstf_compiler.compile(build.finish(x), device)


def device(slow="", macs=256):
    """All links fast but one."""
    spec = entries()
    spec["links"] = {name: 10**9 if name == slow.lower() else 10**13 for name in spec["links"]}
    spec["core"]["macs_per_cycle"] = macs
    return DeviceSpec.from_dict(spec, "test device")


@pytest.mark.parametrize("kind", LINKS)
def test_the_slow_link_bounds_and_its_double_helps_most(kind):
    found = convolution(device(kind, macs=10**6)).explain()
    (layer,) = found.layers
    assert layer.bound == kind == layer.helps
    assert 0.5 * layer.seconds <= layer.with_help < 0.75 * layer.seconds
    assert found.doubled[kind] == pytest.approx(layer.with_help)
    assert layer.gain is None and layer.left is None and found.dense_seconds is None


def test_slow_cores_want_more_work_a_cycle_or_a_faster_clock():
    found = convolution(device()).explain()
    (layer,) = found.layers
    assert layer.bound == "COMP" and layer.helps in ("work a cycle", "clock")
    assert found.doubled["clock"] == pytest.approx(layer.seconds / 2, rel=0.02)
    assert "COMP works" in layer.reason
    assert all(found.doubled[link] > 0.9 * found.seconds for link in LINKS)


def test_a_unit_that_began_under_the_layer_before_works_longer_than_the_layer_takes():
    (layer,) = convolution(device("LOADW", macs=10**6)).explain().layers
    early = dataclasses.replace(layer, seconds=layer.busy / 6.5)
    assert early.reason == f"LOADW works {layer.busy * 1e6:,.1f} us for it, and began earlier"


def test_zero_blocks_gain_where_cores_are_slow():
    (layer,) = convolution(device(), 0.75).explain(convolution(device())).layers
    assert layer.gain > 2 and layer.left == ()


def test_zero_blocks_gain_nothing_where_a_link_for_images_is_slow():
    slow = device("WRITEFM", macs=10**6)
    found = convolution(slow, 0.5).explain(convolution(slow))
    (layer,) = found.layers
    assert layer.gain == pytest.approx(1, abs=0.05) and layer.left == ("WRITEFM",)
    assert layer.reason == "zero blocks leave WRITEFM as it was"
    assert found.dense_seconds / found.seconds == pytest.approx(layer.gain)


def test_a_device_whose_ddr_is_the_limit():
    spec = entries()
    spec["ddr"]["read_rate"] = 10**8
    (layer,) = convolution(DeviceSpec.from_dict(spec, "test device")).explain().layers
    assert layer.helps in ("LOAD", "LOADW")


def test_dict_and_table_say_everything():
    program = bstf_compiler.compile(network_of_everything(3), "aie2_2x2")
    found = program.explain(program)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["seconds"] == program.estimate().total_seconds and len(read["layers"]) == len(found.layers)
    assert all(layer["bound"] in KINDS and layer["gain"] in (1.0, None) for layer in read["layers"])
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert all(layer.name in text and layer.reason in text for layer in found.layers)
    assert "whole network with twice the" in text


def test_explaining_leaves_the_program_as_it_is():
    program = convolution(device())
    before = dataclasses.replace(program)
    program.explain()
    assert program == before


def test_refuses_a_dense_program_of_another_device_or_network():
    program = convolution("aie2_2x2")
    with pytest.raises(ValueError, match="is for aie2_1x1, this one for aie2_2x2"):
        program.explain(convolution("aie2_1x1"))
    build = Builder(np.random.default_rng(0))
    other = bstf_compiler.compile(build.finish(build.lookup(build.input(4, 4, 8))), "aie2_2x2")
    with pytest.raises(ValueError, match="has no layer of"):
        program.explain(other)
