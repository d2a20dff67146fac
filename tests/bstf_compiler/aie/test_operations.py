"""Each operation on the array: bit for bit the reference, and what its program moves and computes."""

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler import integer
from bstf_compiler.aie.isa import Compute
from bstf_compiler.graph import Window
from bstf_compiler.main import random_images as random_grid_images
from tests.bstf_compiler.aie.devices import small_device
from tests.bstf_compiler.aie.test_simulate import assert_equal_to_reference
from tests.bstf_compiler.networks import Builder, random_images

DEVICES = ["aie2_1x1", "aie2_3x3", small_device(3, 2, 4096, 3000), small_device(1, 4, 8192, 65536)]
PIXEL, SAME = Window((1, 1)), Window((3, 3), padding=(1, 1, 1, 1))
SEPARATE = Window((3, 3), (2, 1), (2, 2, 1, 3), (2, 3))


def builder(channels, size=(9, 7), seed=0):
    build = Builder(np.random.default_rng(seed))
    return build, build.input(*size, channels)


def computations(program, layer):
    steps = [step for step in program.steps if step.layer == layer]
    return [i for step in steps for i in step.instructions if isinstance(i, Compute)]


def grouped(channels, outputs, groups, window=SAME):
    def make():
        build, x = builder(channels)
        return build.finish(build.conv(x, outputs, window, 0.3 if groups == 1 else 0.0, groups=groups))

    return make


def resized(factors, method, channels=13):
    def make():
        build, x = builder(channels)
        return build.finish(build.max_pool(build.resize(x, factors, method), Window((2, 1))))

    return make


def apart(channels, block, crop=(0, 0, 0, 0)):
    def make():
        build, x = builder(channels)
        return build.finish(build.requantize(build.depth_to_space(x, block, crop)))

    return make


def paired(kind, broadcast, channels=21):
    def make():
        build, x = builder(channels)
        y = build.conv(x, channels, SAME, activation="linear")
        y = build.average_pool(y, Window((9, 7))) if broadcast else y
        return build.finish(build.product(x, y) if kind == "product" else build.add(x, y, "relu", kind == "subtract"))

    return make


def pooled(kind, window=SEPARATE, zero_padding=False):
    def make():
        build, x = builder(11)
        return build.finish(build.max_pool(x, window, zero_padding) if kind == "max" else build.average_pool(x, window))

    return make


CASES = {
    "dilated": grouped(17, 12, 1, SEPARATE),
    "groups of whole blocks": grouped(32, 48, 2),
    "groups across blocks": grouped(30, 20, 5),
    "a group a block and a half": grouped(24, 36, 2, SEPARATE),
    "depthwise": grouped(20, 20, 20),
    "depthwise, three outputs each": grouped(11, 33, 11, SEPARATE),
    "depthwise, nine outputs each": grouped(3, 27, 3),
    "lookup": lambda: (lambda build, x: build.finish(build.lookup(x)))(*builder(9)),
    "nearest": resized((2, 3), "nearest"),
    "bilinear": resized((4, 2), "bilinear"),
    "bilinear along one axis": resized((1, 2), "bilinear"),
    "pixels of whole blocks": apart(64, (2, 2)),
    "pixels across blocks": apart(30, (3, 2), (1, 2, 0, 3)),
    "a crop": apart(19, (1, 1), (2, 1, 0, 3)),
    "product": paired("product", False),
    "product with a value a channel": paired("product", True),
    "difference": paired("subtract", False),
    "difference with a value a channel": paired("subtract", True),
    "sum with a value a channel": paired("add", True),
    "dilated maximum": pooled("max"),
    "dilated maximum over zeros": pooled("max", zero_padding=True),
    "dilated average": pooled("average"),
    "average over the image": pooled("average", Window((9, 7))),
}


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case, device):
    graph = CASES[case]()
    assert_equal_to_reference(graph, device, random_images(1, graph, 2))


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_multiply_adds_of_groups_are_their_own(groups):
    """Those of the padding of blocks cost time; they are no effective operations."""
    graph = grouped(32, 32, groups)()
    (layer,) = bstf_compiler.compile(graph, "aie2_2x2").estimate().layers
    assert layer.macs == 9 * 7 * 9 * 32 * (32 // groups)


def test_cores_load_the_channels_of_their_groups_only():
    """Eight groups of one block each: every input byte reaches one core, without groups all four."""
    loads = {}
    for groups in (1, 8):
        build, x = builder(64, size=(8, 6))
        graph = build.finish(build.conv(x, 64, PIXEL, ratio=0.0, groups=groups))
        program = bstf_compiler.compile(graph, small_device(1, 4, 2048, 524288))
        moves = [i for step in program.steps for i in step.instructions if i.kind == "LOADFM"]
        loads[groups] = sum(m.source.bytes * len(m.target.tiles) * i.iterations for i in moves for m in i.moves)
    assert loads[8] == 8 * 6 * 64 and loads[1] >= 4 * loads[8]


def test_depthwise_moves_a_byte_a_weight_and_takes_element_operations():
    graph = grouped(64, 64, 64)()
    program = bstf_compiler.compile(graph, "aie2_1x1")
    assert 0 < program.weight_bytes - 64 * (9 + 4) <= 8 * (16 + 8)  # a head and some padding a block at most
    (layer,) = program.estimate().layers
    assert layer.op == "depthwise" and layer.macs == 9 * 7 * 9 * 64
    cycles = sum(-(-i.work // 64) * i.iterations for i in computations(program, layer.name))
    assert layer.kinds["COMP"] == pytest.approx(cycles * 1e-9) and cycles >= layer.macs / 64


@pytest.mark.parametrize("device", ["aie2_1x1", "aie2_3x3"])
def test_a_value_a_channel_is_loaded_once_for_each_core(device):
    """A product of 40 channels in many tiles: the small operand comes once, however many tiles a core computes."""
    build, image = builder(8, size=(64, 60))
    x = build.conv(image, 40, PIXEL)
    y = build.product(x, build.average_pool(x, Window((64, 60))))
    program = assert_equal_to_reference(build.finish(build.conv(y, 8, PIXEL)), device, random_images(0, build.graph))
    (step,) = [step for step in program.steps if step.layer == y]
    loads = [i for i in step.instructions if i.kind == "LOADFM"]
    columns = program.device.columns
    assert sum(i.bytes * i.iterations for i in loads) == 64 * 60 * 40 + columns * 40
    assert all(i.inputs[1].advance == 0 for i in computations(program, y))


def joined(channels, positions=(4, 4, 4)):
    build, x = builder(16)
    parts = [build.conv(x, count, SAME) for count in channels]
    for part, position in zip(parts, positions):
        build.graph.tensors[part].position = position
    name = build.concat(*parts, position=4)
    return build.finish(build.conv(name, 8, PIXEL)), name, parts


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(
    ("channels", "positions", "copied"),
    [
        ((16, 8, 24), (4, 4, 4), 0),
        ((16, 8, 5), (4, 4, 4), 0),  # the last part may be ragged
        ((16, 8, 24), (4, 5, 4), 1),
        ((8, 3, 10), (4, 4, 4), 2),
        ((3, 8, 16), (4, 4, 4), 3),  # no part begins with a whole block but the first, which is ragged
        ((8, 16, 8), (3, 4, 6), 2),
    ],
)
def test_only_parts_that_are_not_in_their_places_are_copied(channels, positions, copied, device):
    graph, name, _ = joined(channels, positions)
    program = assert_equal_to_reference(graph, device, random_images(3, graph))
    made = computations(program, name)
    assert {len(i.inputs) for i in made} == ({copied} if copied else set())
    layer = next(layer for layer in program.estimate().layers if layer.name == name)
    assert (layer.seconds > 0) == bool(copied)
    total = sum(count for count, position in zip(channels, positions)) if copied == 3 else None
    if total:
        assert sum(i.output.bytes * i.iterations for i in made) == 9 * 7 * 8 * -(-total // 8)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_parts_of_parts_lie_in_one_tensor(device):
    """Each layer's output joins what came before, which later layers read too, as in DenseNet."""
    build, x = builder(16)
    x = build.max_pool(x, SAME)
    position = build.graph.tensors[x].position
    for _ in range(3):
        y = build.conv(x, 8, SAME)
        build.graph.tensors[y].position = position
        x = build.concat(x, y, position=position)
    graph = build.finish(build.requantize(x))
    program = assert_equal_to_reference(graph, device, random_images(5, graph))
    places = [place for name, (place, _, _) in program.tensors.items() if name.startswith(("concat", "conv", "max"))]
    assert len({place.pixel for place in places}) == 1 and places[0].pixel == 40
    assert not any(computations(program, node.name) for node in graph if node.op.kind == "concat")


def test_a_part_twice_an_input_and_an_output_are_copied():
    build, x = builder(8)
    y = build.conv(x, 8, SAME)
    for part in (x, y):
        build.graph.tensors[part].position = 4
    z = build.concat(y, y, x, position=4)
    build.finish(z, y)
    program = bstf_compiler.compile(build.graph, "aie2_2x2")
    images = random_images(0, build.graph, 2)
    for one, two in zip(program.simulate(images), integer.run(build.graph, images), strict=True):
        assert np.array_equal(one, two)
    assert {len(i.inputs) for i in computations(program, z)} == {3}


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_the_host_scales_and_shifts_images_before_the_array(device):
    build, x = builder(3)
    a = build.affine(x, 5)
    graph = build.finish(build.conv(a, 9, SAME))
    assert_equal_to_reference(graph, device, random_images(7, graph, 3))


def test_random_images_for_the_host_reach_both_ends_of_what_it_makes():
    build, x = builder(3)
    a = build.affine(x, 3)
    build.graph.tensors["image scale"].data[:] = [-2.0, 0.5, 0.0]
    graph = build.finish(build.conv(a, 9, SAME))
    program = bstf_compiler.compile(graph, "aie2_1x1")
    ((images,),) = (one.values() for one in random_grid_images(program, 1))
    made = integer.trace(graph, np.repeat(images, 2, axis=0))[a]
    assert np.ptp(made[..., 0].astype(int)) > 200 and np.ptp(made[..., 1].astype(int)) > 200
    assert np.ptp(made[..., 2]) == 0


def test_an_output_that_no_layer_reads_is_refused():
    build, x = builder(8)
    graph = build.finish(build.conv(x, 8, SAME), build.input(4, 4, 3, name="other"))
    with pytest.raises(ValueError, match="output 'other' is an input that no layer reads"):
        bstf_compiler.compile(graph, "aie2_1x1")


def test_equal_tiles_of_a_resize_are_one_instruction():
    build, image = builder(8, size=(40, 8))
    resized = build.resize(build.conv(image, 32, PIXEL), (2, 2))
    program = bstf_compiler.compile(build.finish(build.conv(resized, 8, PIXEL)), small_device(1, 1, 4096, 524288))
    counts = [i.iterations for i in computations(program, resized)]
    assert sum(counts) > 2 * len(counts)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(("swapped", "subtract"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("ratio", [0.4, 1.0])
def test_a_sum_ends_the_convolution_before_it(device, swapped, subtract, ratio):
    for seed, channels in enumerate((3, 21, 40)):
        build, image = builder(channels, seed=seed)
        x = build.conv(image, 29, PIXEL)
        y = build.conv(build.conv(x, 37, SAME), 29, SAME, ratio, "linear")
        sum_ = build.add(*((x, y) if swapped else (y, x)), "relu", subtract)
        graph = build.finish(build.conv(sum_, 11, PIXEL))
        program = assert_equal_to_reference(graph, device, random_images(seed, graph, 2))
        layers = {step.layer: step.op for step in program.steps}
        assert (y in layers) == (layers[sum_] == "add")
        if device in DEVICES[:2]:  # the others may have no room for all three images
            assert layers[sum_] == ("add" if swapped and subtract else "conv")


def test_sums_stay_layers_of_their_own_where_a_convolution_can_not_end_in_them():
    """Read twice, returned, added to its own input, of one pixel for all, or alone among its channels."""
    build, image = builder(16)
    x = build.conv(image, 16, SAME)
    read_twice = build.conv(x, 16, SAME)
    own_input = build.conv(read_twice, 16, SAME)
    channelwise = build.conv(x, 16, SAME, 0.0, groups=16)
    returned = build.conv(x, 16, SAME)
    sums = [
        build.add(x, read_twice), build.add(read_twice, own_input), build.add(x, channelwise), build.add(x, returned),
    ]  # fmt: skip
    build.finish(*sums, returned)
    program = bstf_compiler.compile(build.graph, "aie2_2x2")
    assert {step.op for step in program.steps if step.layer in sums} == {"add"}
    images = random_images(0, build.graph, 2)
    for one, two in zip(program.simulate(images), integer.run(build.graph, images), strict=True):
        assert np.array_equal(one, two)
