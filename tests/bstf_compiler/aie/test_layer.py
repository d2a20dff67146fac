import math
import re
from itertools import combinations

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler.aie.layer import layers_of
from bstf_compiler.aie.reach import Scaled, Sliding, Source
from bstf_compiler.graph import Affine, Node, Pad, Softmax, Tensor, Window
from tests.bstf_compiler.networks import Builder


@pytest.mark.parametrize("op", [Affine(), Softmax(), Pad((1, 1, 1, 1))])
def test_what_the_array_lacks_is_refused_by_name(op):
    """A host part in the middle of a network, and what no lowered graph holds."""
    build = Builder(np.random.default_rng(0))
    before = build.conv(build.input(4, 4, 8), 8, Window((1, 1)))
    graph = build.graph
    graph.nodes.append(Node("odd", op, [before]))
    graph.tensors["odd"] = Tensor("odd", (1, 4, 4, 8), position=3)
    build.finish(build.requantize("odd"))
    words = f"layer 'odd': operation '{op.kind}' can't run on the array; end the network before it"
    with pytest.raises(ValueError, match=re.escape(words)):
        bstf_compiler.compile(graph, "aie2_2x2")


def read_by(axis, out):
    """The input pixels that an output pixel reads, by the definition of each operation."""
    if isinstance(axis, Sliding):
        first = out * axis.stride - axis.before
        return [pixel for pixel in range(first, first + axis.extent) if 0 <= pixel < axis.size]
    centre = (out + axis.crop + 0.5) / axis.factor - (0.5 if axis.blends else 0)
    pixels = (math.floor(centre), math.floor(centre) + axis.blends)
    return [min(max(pixel, 0), axis.size - 1) for pixel in pixels]


@pytest.mark.parametrize("seed", range(20))
def test_reach_is_what_the_outputs_read(seed):
    rng = np.random.default_rng(seed)
    size, factor, crop = (int(n) for n in rng.integers((1, 1, 0), (12, 5, 3)))
    stride, extent, before = (int(n) for n in rng.integers((1, 1, 0), (4, 6, 4)))
    windows = (size + 2 * before - extent) // stride + 1
    cases = [
        (Sliding(size, stride, extent, before), windows),
        (Scaled(size, factor, crop), size * factor - 2 * crop),
        (Scaled(size, factor, blends=True), size * factor),
    ]
    for axis, outputs in cases:
        for first, last in combinations(range(max(0, outputs) + 1), 2):
            start, stop, _ = axis.reach(first, last)
            read = sorted({pixel for out in range(first, last) for pixel in read_by(axis, out)})
            assert stop - start <= axis.most(last - first)
            assert 0 <= start <= stop <= axis.size
            if (windows > 0 and extent >= stride and before < extent) or isinstance(axis, Scaled):
                assert (start, stop) == (read[0], read[-1] + 1) if read else start == stop
            elif read:  # windows with gaps, or in the padding alone
                assert start <= read[0] and read[-1] < stop


def test_channel_blocks_of_parts_and_multipliers():
    part = Source("x", Sliding(4), Sliding(4), channels=12, offset=13)
    assert [part.blocks(block, block + 1) for block in range(4)] == [(0, 0), (0, 1), (0, 2), (1, 2)]
    tripled = Source("x", Sliding(4), Sliding(4), channels=10, spread=3)
    assert [tripled.blocks(block, block + 1) for block in range(4)] == [(0, 1), (0, 1), (0, 1), (1, 2)]


def test_a_group_of_one_channel_is_depthwise_unless_it_is_the_only_one():
    build = Builder(np.random.default_rng(0))
    x = build.conv(build.input(4, 4, 1), 6, Window((1, 1)), groups=1)
    graph = build.finish(build.conv(build.conv(x, 12, Window((1, 1)), groups=6), 4, Window((1, 1)), groups=2))
    assert [layer.op for layer in layers_of(graph)] == ["conv", "depthwise", "conv"]
