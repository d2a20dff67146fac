from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bstf_compiler
from bstf_compiler import integer
from bstf_compiler.aie import layout, tiling
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.splitting import Split, splits
from bstf_compiler.graph import Window
from tests.bstf_compiler.aie.devices import small_device
from tests.bstf_compiler.aie.test_simulate import assert_equal_to_reference
from tests.bstf_compiler.networks import Builder, random_images


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))
def test_every_way_to_split_covers_every_pixel_once_and_the_first_column_has_most(rows, width, columns):
    for split in splits(rows, width, columns, channels=True):
        met = np.zeros((rows, width), int)
        regions = split.regions(rows, width, columns)
        for own in regions:
            for ((top, bottom), (left, right)), (high, wide) in zip(own, regions[0]):
                met[top:bottom, left:right] += 1
                assert bottom - top <= high[1] - high[0] and right - left <= wide[1] - wide[0]
        assert (met == columns // split.parts).all()
        parts = [split.channel_part(column, columns) for column in range(columns)]
        assert sorted(parts) == sorted(list(range(columns // split.parts)) * split.parts)


def network(seed):
    """A convolution that reads far to the side, one that reads up and down, a sum, pools and a joined tensor."""
    build = Builder(np.random.default_rng(seed))
    x = build.conv(build.input(*SIZES[seed], 16), 24, Window((1, 5), padding=(0, 0, 2, 2)))
    y = build.conv(x, 24, Window((5, 1), padding=(2, 2, 0, 0)))
    x = build.add(y, build.conv(x, 24, Window((3, 3), padding=(1, 1, 1, 1)), activation="linear"), "relu")
    pool = build.average_pool(x, Window((3, 3), padding=(1, 1, 1, 1)))
    joined = build.concat(pool, y, position=build.graph.tensors[pool].position)
    return build.finish(build.max_pool(joined, Window((2, 2), (2, 2))))


SIZES = [(9, 13), (17, 8), (5, 7)]
DEVICES = [small_device(4, 2, 16384, 65536), small_device(6, 1, 65536, 4096), DeviceSpec.load("aie2_4x4_waaw")]


@pytest.mark.parametrize("seed", range(len(SIZES)))
@pytest.mark.parametrize("split", [Split(4), Split(2, 2), Split(1, 4), Split(4, 1, True), Split(1, 4, True)])
def test_every_split_gives_the_same_in_any_order(seed, split, monkeypatch):
    graph, device = network(seed), DEVICES[0]
    monkeypatch.setattr(tiling, "_splits", lambda *_: [split])
    program, images = bstf_compiler.compile(graph, device), random_images(seed, graph, 1)
    assert np.array_equal(program.simulate(images, seed=1), integer.run(graph, images))


@pytest.mark.parametrize("seed", range(len(SIZES)))
@pytest.mark.parametrize("device", DEVICES, ids=["4x2", "6x1", "waaw"])
def test_every_layer_is_as_the_reference_has_it(seed, device):
    graph = network(seed)
    assert_equal_to_reference(graph, device, random_images(seed, graph, 1))


@pytest.mark.parametrize("seed", range(len(SIZES)))
@pytest.mark.parametrize("device", [*DEVICES, DeviceSpec.load("npu1")], ids=["4x2", "6x1", "waaw", "npu1"])
def test_memory_tiles_hold_even_parts_of_every_row(seed, device):
    """Every block of a row lies in one place, and no memory tile has a block more than another, of what has no DMAs
    with limits.
    """
    for blocks in (1, 3, 8):
        width, held = SIZES[seed][1], {}
        for part in layout.parts(width, blocks, device):
            for column in range(*part.columns):
                for block in range(*part.blocks):
                    at = part.start + ((column - part.columns[0]) * blocks + block - part.blocks[0]) * 8
                    held.setdefault(part.tile, {})[at] = column * blocks + block
                    assert 0 <= at < part.pitch <= layout.row_bytes(width, blocks, device)
        assert sorted(n for own in held.values() for n in own.values()) == list(range(width * blocks))
        assert all(sorted(own) == list(range(0, 8 * len(own), 8)) for own in held.values())
        grain = blocks if device.descriptors else 1
        if len(held) == device.columns:
            assert max(map(len, held.values())) - min(map(len, held.values())) <= grain


def test_times_count_what_all_columns_of_cores_ask_of_a_memory_tile():
    """Where every column of cores reads the whole image, each reads all of the memory tiles, as do they all of one."""
    program = bstf_compiler.compile(network(0), DEVICES[0])
    alone = program.estimate()
    for step in program.steps:
        for index, i in enumerate(step.instructions):
            if i.kind == "LOADFM":
                moves = tuple(replace(m, source=replace(m.source, tiles=("m0",))) for m in i.moves)
                step.instructions[index] = replace(i, moves=moves)
    crowded = program.estimate()
    for one, two in zip(alone.layers, crowded.layers):
        assert two.kinds["LOADFM"] >= one.kinds["LOADFM"]
    first, second = (sum(layer.kinds["LOADFM"] for layer in times.layers) for times in (alone, crowded))
    assert 3 * first < second <= 4.01 * first
