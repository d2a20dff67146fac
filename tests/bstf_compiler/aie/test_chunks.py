"""Programs whose weights somebody changed on purpose: they load, and simulating them ends in a sentence or a result."""

from inspect import signature

import numba
import numpy as np
import pytest

import bstf_compiler
from bstf_compiler.aie import kernels, pointwise
from bstf_compiler.graph import Window
from tests.bstf_compiler.networks import Builder, network_of_everything, random_images

CONV, COUNT = Window((3, 3), padding=(1, 1, 1, 1)), 16 + 4 * 8  # and where the counts of one output block begin


def one_layer(op):
    build = Builder(np.random.default_rng(0))
    x = build.input(6, 6, 16)
    made = {
        "conv": lambda: build.conv(x, 24, CONV, ratio=0),
        "residual": lambda: build.add(build.conv(x, 16, CONV, ratio=0), x),
        "depthwise": lambda: build.conv(x, 16, CONV, groups=16),
        "averagepool": lambda: build.average_pool(x, CONV),
        "nearest": lambda: build.resize(x, (2, 2)),
        "bilinear": lambda: build.resize(x, (2, 2), "bilinear"),
        "depthtospace": lambda: build.depth_to_space(x, (2, 2)),
        "concat": lambda: build.concat(x, x, position=4),
    }[op]()
    return build.finish(made)


def changed(program, data):
    """The program with other data and the right checksums, loaded as one from anybody is."""
    other = type(program)(**(vars(program) | {"data": bytes(data)}))
    return bstf_compiler.Program.parse(other.assembly.encode(), other.data)


@pytest.mark.parametrize(
    ("op", "at", "kind", "value", "sentence"),
    [
        ("conv", 12, "<i4", 4, "is for 4 output blocks, its instruction makes 1"),
        ("conv", 12, "<i4", -1, "is for -1 output blocks, its instruction makes 1"),
        ("conv", COUNT, "<u2", 65535, r"needs [\d,]+ bytes, it has [\d,]+"),
        ("conv", COUNT, "<u2", 3, r"needs [\d,]+ bytes, it has [\d,]+"),
        ("conv", COUNT + 2, "<u2", 700, "names input block 700, the tile has 2"),
        ("conv", COUNT + 2, "<u2", 1, "names input block 1 at or after the next one, 1; they ascend"),
        ("residual", COUNT, "<u2", 3, r"needs [\d,]+ bytes, it has [\d,]+"),
        ("depthwise", 12, "<i4", 0, "has 0 output channels from each input channel, 1 is the least"),
        ("averagepool", 12, "<i4", 2**30, "has factors for 1073741824 rows or columns of a window of 3"),
        ("averagepool", 16, "<i4", -3, "has factors for -3 rows or columns of a window of 3"),
        ("nearest", 4, "<i4", 0, "scales by 0, 1 is the least"),
        ("nearest", 8, "<i4", 1, r"reads row or column \d+ of a tile of \d+"),
        ("bilinear", 8, "<i4", -2, "scales by -2, 1 is the least"),
        ("depthtospace", 0, "<i4", 2**30, r"reads channel \d+ of a tile of 16"),
        ("depthtospace", 0, "<i4", 5, r"reads channel \d+ of a tile of 16"),
        ("depthtospace", 4, "<i4", 1, r"reads row or column \d+ of a tile of \d+"),
        ("concat", 8, "<i4", 32, r"reads channel \d+ of a tile of 16"),
    ],
)
def test_a_chunk_that_leads_out_of_its_tile_is_refused(op, at, kind, value, sentence):
    graph = one_layer(op)
    program = bstf_compiler.compile(graph, "aie2_1x1")
    images, data = random_images(0, graph), bytearray(program.data)
    assert np.array_equal(changed(program, data).simulate(images), program.simulate(images))
    data[at : at + np.dtype(kind).itemsize] = np.array(value, kind).tobytes()
    broken = changed(program, data)
    for run in (broken.simulate, broken.trace):
        with pytest.raises(
            ValueError, match=rf"^layer '\w+': the chunk of core\.0\.0 {sentence}; the program is damag"
        ):
            run(images)


class Guarded(np.ndarray):
    """A memory that refuses the negative indices that NumPy takes from its end."""

    def __getitem__(self, place):
        assert not isinstance(place, int | np.integer) or place >= 0
        return super().__getitem__(place)

    def __setitem__(self, place, value):
        assert not isinstance(place, int | np.integer) or place >= 0
        super().__setitem__(place, np.array(value).astype(self.dtype))  # cut to a byte, as Numba does


def test_no_chunk_leads_out_of_a_memory(monkeypatch):
    """The kernels as Python, where an index out of range is an error, on chunks with random words."""
    for module in (kernels, pointwise):
        for name, value in vars(module).items():
            if isinstance(value, numba.core.registry.CPUDispatcher) and "memory" in signature(value.py_func).parameters:
                monkeypatch.setattr(module, name, guarded(value.py_func))
    ends = {True: 0, False: 0}
    for seed in range(6):
        rng, graph = np.random.default_rng(seed), network_of_everything(seed, most_size=6)
        program, images = bstf_compiler.compile(graph, "aie2_2x2"), random_images(seed, graph)
        for _ in range(10):
            data = bytearray(program.data)
            for at in 4 * rng.integers(0, len(data) // 4, 6):
                data[at : at + 4] = rng.bytes(4) if rng.integers(2) else np.array(rng.integers(-4, 40), "<i4").tobytes()
            broken = changed(program, data)
            try:
                broken.simulate(images)
            except ValueError as error:
                assert "the program is damaged: compile again" in str(error)
                ends[False] += 1
            else:
                ends[True] += 1
    assert min(ends.values()) > 5


def guarded(kernel):
    """A kernel whose memory, its first argument, is guarded."""

    def run(memory, *others):
        with np.errstate(over="ignore"):
            return kernel(memory.view(Guarded), *others)

    return run
