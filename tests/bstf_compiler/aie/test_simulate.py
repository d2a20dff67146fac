import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bstf_compiler
from bstf_compiler import integer
from bstf_compiler.aie.layer import layers_of
from bstf_compiler.graph import Window
from bstf_compiler.passes.sums import check_sums
from tests.bstf_compiler.aie.devices import small_device
from tests.bstf_compiler.networks import Builder, network_of_everything, random_images, random_network

COUNT = 60


def assert_equal_to_reference(graph, device, images):
    program = bstf_compiler.compile(graph, device)
    simulated, expected = program.trace(images), integer.trace(graph, images)
    made = {node.output for node in graph if node.op.kind != "softmax"}
    ends_in_a_sum = {layer.summed for layer in layers_of(graph)}
    assert made - ends_in_a_sum <= set(simulated) <= made
    for name, value in simulated.items():
        assert np.array_equal(value, expected[name]), name
    found, wanted = program.simulate(images), integer.run(graph, images)
    for one, two in zip(*(value if isinstance(value, list) else [value] for value in (found, wanted)), strict=True):
        assert np.array_equal(one, two)
    return program


@settings(max_examples=COUNT, deadline=None)
@given(seed=st.integers(0, 2**32), mesh=st.integers(1, 8))
def test_random_networks_on_every_mesh(seed, mesh):
    graph = random_network(seed)
    assert_equal_to_reference(graph, f"aie2_{mesh}x{mesh}", random_images(seed, graph))


@settings(max_examples=COUNT, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    columns=st.integers(1, 5),
    rows=st.integers(1, 5),
    core=st.sampled_from([4096, 8192, 16384]),
    memtile=st.sampled_from([2048, 4096, 16384]),
)
def test_random_networks_on_tiny_devices(seed, columns, rows, core, memtile):
    """Tiny memories: input channels summed in pieces, tensors spilled, layers in bands; or a refusal in a sentence."""
    graph = random_network(seed)
    device = small_device(columns, rows, core, memtile)
    try:
        assert_equal_to_reference(graph, device, random_images(seed, graph))
    except ValueError as refusal:
        assert "layer '" in str(refusal) and "use" in str(refusal)


@settings(max_examples=COUNT, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    columns=st.integers(1, 4),
    rows=st.integers(1, 4),
    core=st.sampled_from([4096, 8192, 65536]),
    memtile=st.sampled_from([2048, 8192, 524288]),
)
@example(seed=279059, columns=4, rows=1, core=4096, memtile=8192)  # cores without columns of an enlarged image
def test_random_networks_of_every_operation(seed, columns, rows, core, memtile):
    graph = network_of_everything(seed)
    check_sums(graph)
    try:
        assert_equal_to_reference(graph, small_device(columns, rows, core, memtile), random_images(seed, graph))
    except ValueError as refusal:
        assert "layer '" in str(refusal) and "use" in str(refusal)


def test_sums_over_pieces_of_input_channels():
    build = Builder(np.random.default_rng(0))
    x = build.conv(build.input(6, 5, 72), 40, Window((3, 3), padding=(1, 1, 1, 1)))
    graph = build.finish(x)
    program = assert_equal_to_reference(graph, small_device(2, 2, 4096, 65536), random_images(1, graph, 2))
    computed = [i for step in program.steps for i in step.instructions if i.kind == "COMP"]
    assert any(not i.begin for i in computed) and any(not i.finish for i in computed)


def test_spilled_tensors_and_bands():
    build = Builder(np.random.default_rng(0))
    x = build.input(24, 16, 16)
    a = build.conv(x, 32, Window((3, 3), padding=(1, 1, 1, 1)))
    b = build.conv(a, 32, Window((3, 3), padding=(1, 1, 1, 1)), activation="linear")
    graph = build.finish(build.add(a, b, "relu"))
    program = assert_equal_to_reference(graph, small_device(2, 2, 65536, 12288), random_images(2, graph, 1))
    assert any(place.memory == "ddr" for name, (place, _, _) in program.tensors.items() if name.startswith("conv"))
    assert len(program.steps) > len(graph.nodes)


def test_zero_layers_and_dense_layers():
    """A convolution without any kept block is its bias; a dense layer is a 1x1 convolution of one pixel."""
    build = Builder(np.random.default_rng(3))
    x = build.conv(build.input(5, 5, 12), 20, Window((3, 3)), ratio=1.0)
    x = build.average_pool(x, Window((3, 3), (3, 3)))
    graph = build.finish(build.conv(x, 10, Window((1, 1)), activation="linear"), softmax=True)
    assert_equal_to_reference(graph, "aie2_4x4", random_images(3, graph, 3))


def test_several_outputs_and_an_output_that_is_read_again():
    build = Builder(np.random.default_rng(4))
    first = build.conv(build.input(9, 9, 8), 16, Window((3, 3)))
    second = build.conv(first, 8, Window((3, 3)))
    graph = build.finish(first, second)
    program = bstf_compiler.compile(graph, "aie2_2x2")
    images = random_images(4, graph, 2)
    for simulated, expected in zip(program.simulate(images), integer.run(graph, images), strict=True):
        assert np.array_equal(simulated, expected)


def test_no_images_give_no_outputs():
    graph = random_network(0)
    program = bstf_compiler.compile(graph, "aie2_1x1")
    none = np.zeros((0, *graph.inputs["image"]), np.float32)
    assert np.array_equal(program.simulate(none), integer.run(graph, none))
    assert program.simulate(none).shape == (0, *graph.output_shapes[0])


def test_refuses_images_of_another_shape_or_with_nan():
    graph = random_network(0)
    program = bstf_compiler.compile(graph, "aie2_1x1")
    with pytest.raises(ValueError, match="takes images of shape"):
        program.simulate(np.zeros((1, 3, 3, 99), np.float32))
    images = random_images(0, graph)
    images.flat[0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        program.simulate(images)


DEVICES = [
    "aie2_4x2",
    "aie2_1x8",
    "aie2_8x2",
    "aie2_4x4_waaw",
    "aie2_2x3_aw",
    "npu1",
    "npu2_3x4",
    "ve2802_4x4",
    "ve2302",
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network", [random_network, network_of_everything])
def test_rectangular_meshes_dedicated_tiles_and_real_parts(device, network):
    for seed in range(3):
        graph = network(seed)
        assert_equal_to_reference(graph, device, random_images(seed, graph))
