from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bstf_compiler
from bstf_compiler.aie import memory
from bstf_compiler.aie.layer import layers_of
from bstf_compiler.graph import Window
from tests.bstf_compiler.aie.devices import small_device
from tests.bstf_compiler.networks import Builder, network_of_everything

SAME = Window((3, 3), padding=(1, 1, 1, 1))


def residual_network(size=16):
    build = Builder(np.random.default_rng(0))
    x = build.conv(build.input(size, size, 8), 16, SAME)
    for _ in range(3):
        x = build.add(x, build.conv(build.conv(x, 16, SAME), 16, SAME, activation="linear"), "relu")
    return build.finish(x)


def placed(memtile, columns=2):
    graph = residual_network()
    device = small_device(columns, columns, 65536, memtile)
    return memory.place(
        layers_of(graph), list(graph.inputs), graph.outputs, device, lambda layer, rows: (256, 1e-6)
    ), device


def test_what_is_held_together_does_not_overlap():
    for size in (2**20, 2**14, 9000):
        placement, device = placed(size)
        for one in placement.allocations:
            assert one.address + one.bytes <= device.memtile.memory_bytes
        for one, two in combinations(placement.allocations, 2):
            if one.first <= two.last and two.first <= one.last:
                assert one.address + one.bytes <= two.address or two.address + two.bytes <= one.address


def test_network_ends_live_in_ddr_and_the_rest_in_memory_tiles():
    placement, _ = placed(2**20)
    spilled = {name for name, place in placement.places.items() if place.memory == "ddr"}
    assert len(spilled) == 2 and "image" in spilled
    assert all(len(stage.bands) == 1 for stage in placement.stages)


def test_a_sum_takes_the_place_of_an_input():
    placement, _ = placed(2**20)
    stage = next(stage for stage in placement.stages if stage.layer.residual is not None)
    residual = placement.places[stage.layer.residual.tensor]
    assert placement.places[stage.layer.output].address == residual.address


def test_small_memories_spill_and_work_in_bands():
    roomy, _ = placed(2**20)
    tight, _ = placed(3500)
    assert sum(p.memory == "ddr" for p in tight.places.values()) > sum(p.memory == "ddr" for p in roomy.places.values())
    banded = [stage for stage in tight.stages if len(stage.bands) > 1]
    assert banded
    for stage in tight.stages:
        rows = [row for band in stage.bands for row in range(*band)]
        assert rows == list(range(stage.layer.output_shape[0]))


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"layer '\w+': one output row needs \d+ bytes of a memory tile"):
        placed(600)


def test_ddr_that_is_too_small_is_refused():
    graph = residual_network()
    device = small_device(1, 1, 65536, 2**20)
    tiny = type(device)(**{**vars(device), "ddr": type(device.ddr)(1000)})
    with pytest.raises(ValueError, match="bytes of DDR"):
        bstf_compiler.compile(graph, tiny)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(0, 6), st.integers(0, 3)), min_size=0, max_size=8
    )
)
def test_packing_is_what_a_look_at_every_byte_and_stage_finds(boxes):
    allocations = [memory.Allocation("any", at, size, first, first + more) for at, size, first, more in boxes]
    found = memory.packing(allocations, {}, set())
    used = np.zeros((20, 10), int)  # byte x stage
    for one in allocations:
        used[one.address : one.address + one.bytes, one.first : one.last + 1] += 1
    assert found.least == used.sum(axis=0).max()
    assert found.peak == (np.flatnonzero(used.any(axis=1)) + 1).max(initial=0)
    assert found.gap == (found.peak / found.least - 1 if allocations else 0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("network", [residual_network, network_of_everything])
def test_spilled_are_the_bytes_of_ddr_that_are_neither_ends_nor_weights(seed, network):
    graph = network(16 + 2 * seed if network is residual_network else seed)
    spilled = []
    for memtile in (2**20, 3500):
        try:
            program = bstf_compiler.compile(graph, small_device(2, 2, 65536, memtile))
        except ValueError:
            continue
        ends = {port.tensor for port in (*program.inputs, *program.affines, *program.outputs)}
        owner = np.zeros(program.data_address, int)  # of every byte before the weights: 1 a tensor, 2 an end
        for is_end in (False, True):
            for name, (place, _, _) in program.tensors.items():
                if place.memory == "ddr" and (name in ends) == is_end:
                    for pixel in range(place.shape[0] * place.shape[1]):
                        start = place.address + pixel * place.pixel
                        owner[start : start + place.length] = 1 + is_end
        assert program.packing.spilled == np.count_nonzero(owner == 1)
        assert program.packing.least <= program.packing.peak <= memtile
        spilled.append(program.packing.spilled)
    assert spilled[0] == 0  # all has room in the large memories
    assert network is not residual_network or spilled[1] > 0
