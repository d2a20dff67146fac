from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bstf_compiler.aie import tiling
from bstf_compiler.aie.boxes import slot
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.layer import Layer, layers_of, share
from bstf_compiler.aie.pipeline import Idle, ahead
from bstf_compiler.aie.reach import Sliding, Source
from bstf_compiler.aie.splitting import Split
from bstf_compiler.aie.tiling import Ring, Tiling
from bstf_compiler.graph import Window
from tests.bstf_compiler.aie.devices import small_device
from tests.bstf_compiler.networks import Builder, network_of_everything


@given(st.integers(0, 300), st.integers(1, 64))
def test_shares_are_even_and_complete(total, parts):
    spans = share(total, parts)
    sizes = [stop - start for start, stop in spans]
    assert sum(sizes) == total and len(spans) == parts
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([4096, 16384, 65536]))
def test_buffers_fit_and_do_not_overlap(seed, core):
    device = small_device(2, 3, core, 524288)
    for layer in (layer for layer in layers_of(network_of_everything(seed)) if layer.sources):
        try:
            chosen = tiling.choose(layer, device, 64, layer.output_shape[0])
        except ValueError as refusal:
            assert layer.name in str(refusal)
            continue
        rings = sorted((chosen.weights, *chosen.inputs, chosen.output, chosen.sums), key=lambda ring: ring.address)
        assert all(one.stop <= two.address for one, two in pairwise(rings) if one.bytes and two.bytes)
        assert rings[-1].stop <= core - device.core.reserved_bytes
        covered = [block for row in chosen.pieces for piece in row for block in piece.numbers]
        assert sorted(covered) == list(range(layer.blocks))


def layer_of(kept, channels=None):
    rows, columns = kept.shape
    channels = channels or (8 * rows, 8 * columns)
    axis = Sliding(28, extent=3, before=1)
    source, window = Source("x", axis, axis, channels[0], every=True), Window((3, 3), padding=(1, 1, 1, 1))
    return Layer("conv", "conv", (source,), "y", (28, 28, columns), channels, window, kept)


def test_half_the_blocks_never_take_longer():
    device = DeviceSpec.load("aie2_4x4")
    rng = np.random.default_rng(0)
    for _ in range(20):
        shape = tuple(rng.integers(1, 40, 2))
        dense = tiling.choose(layer_of(np.ones(shape, bool)), device, 0, 28)
        sparse = tiling.choose(layer_of(rng.random(shape) < 0.5), device, 0, 28)
        assert sparse.seconds <= dense.seconds


def test_multiply_adds_are_those_of_true_channels_and_time_that_of_whole_blocks():
    kept = np.zeros((4, 6), bool)
    kept[0, :3] = True
    kept[3, 5] = True
    layer = layer_of(kept, channels=(27, 42))
    assert layer.work(100, int(kept.sum())) == 100 * 9 * 4 * 64
    assert layer.macs(100, (0, 4), range(6)) == 100 * 9 * (3 * 64 + 3 * 2)
    assert layer.macs(1, (1, 4), range(3, 6)) == 9 * 3 * 2


def test_what_fits_no_core_is_refused_with_its_numbers():
    build = Builder(np.random.default_rng(0))
    graph = build.finish(build.conv(build.input(60, 60, 8), 8, Window((60, 60))))
    with pytest.raises(ValueError, match=r"layer 'conv0': its smallest sub-volume takes \d+ bytes .* 65408"):
        tiling.choose(layers_of(graph)[0], small_device(1, 1, 65536, 524288), 0, 1)


@pytest.mark.parametrize(
    ("room", "loadw", "loadwm", "loaded", "sent", "late"),
    [
        (2, 10, 10, 4, 2, 0),  # two chunks in the core, two in the memory tile
        (1, 10, 10, 3, 1, 0),
        (0, 10, 10, 2, 0, 0),
        (2, 2.5, 10, 2, 1, 0),  # the third waits for the first one's slot
        (2, 10, 0.5, 2, 0, 0),
        (2, 0.25, 10, 1, 0, 0.75),  # better late than later
        (2, 0, 10, 0, 0, 0),
    ],
)
def test_chunks_come_ahead_as_links_and_slots_allow(room, loadw, loadwm, loaded, sent, late):
    device = DeviceSpec.load("aie2_2x2")
    one = 4096 / device.rate("LOADW")
    assert device.rate("LOADWM") == device.rate("LOADW")
    found = ahead(np.full(4, 4096), device, 2, room, Idle(loadw * one, loadwm * one))
    assert (found.loaded, found.sent, found.bytes) == (loaded, sent, 4096 * loaded)
    assert found.late == pytest.approx(late * one)


def test_the_first_slots_of_a_mirrored_ring_are_its_last():
    ring = Ring(0, 2, 100)
    tiling = Tiling((), 1, 1, 1, ring, (), Ring(200, 1, 50), Ring(250, 1, 0), Split(1))
    mirrored = tiling.mirrored(1000).weights
    boxes = [slot(("c0.0",), mirrored, 10, use, moves_on=False).address for use in range(3)]
    assert boxes == [900, 800, 900]
    assert mirrored.first_slots(1) == (900, 100)
    assert mirrored.first_slots(2) == (800, 200)
    assert ring.first_slots(1) == (0, 100)
    assert [ring.room(free) for free in (0, 99, 100, 199, 500)] == [0, 0, 1, 1, 2]
