"""The C++ kernels, compiled with the emulated AIE API, on packed bytes of real layers: equal to integer.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bstf_compiler
from bstf_compiler import integer
from bstf_compiler.aie import pointwise
from bstf_compiler.aie.layer import layers_of
from bstf_compiler.aie.mlir import host
from bstf_compiler.aie.mlir.design import design
from bstf_compiler.aie.mlir.machine import Machine
from bstf_compiler.aie.weights import Packer, parameters
from bstf_compiler.graph import Graph, Node, Window
from tests.bstf_compiler.aie.mlir import native
from tests.bstf_compiler.aie.mlir.networks import small
from tests.bstf_compiler.aie.mlir.shapes import layer_shapes
from tests.bstf_compiler.networks import Builder


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return native.build(tmp_path_factory.mktemp("kernels"))


def padded(x: np.ndarray) -> np.ndarray:
    """(h, w, c) with channels up to whole blocks."""
    return np.ascontiguousarray(np.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % 8))))


def image(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def reference(graph: Graph, node: Node, *images: np.ndarray) -> np.ndarray:
    values = iter(images)
    tensors = [graph.tensors[name] for name in node.inputs]
    return integer.evaluate(graph, node, [t.data if t.is_constant else next(values)[None] for t in tensors])[0]


def assert_convolution(library, window: Window, cin: int, cout: int, seed: int = 0, ratio: float = 0.5, extra: int = 1):
    """On the smallest image with `extra` windows more down and across."""
    size = [
        max(1, length - before - after) + extra * stride
        for length, stride, before, after in zip(
            window.extent, window.strides, window.padding[::2], window.padding[1::2]
        )
    ]
    build = Builder(np.random.default_rng(seed))
    graph = build.finish(build.conv(build.input(*size, cin), cout, window, ratio, activation="relu6"))
    (layer,) = layers_of(graph)
    rows, columns, blocks = layer.output_shape
    chunk = np.frombuffer(Packer(graph, layer).chunk(range(blocks), (0, -(-cin // 8))), np.int8).copy()
    x, y = image((*size, cin)), np.zeros((rows, columns, 8 * blocks), np.int8)
    tile = padded(x)
    shapes = (*tile.shape, *y.shape, *window.kernel, *window.strides, *window.dilation, *window.padding[::2])
    native.call(library, "bstf_conv", [tile, chunk, y], *shapes, 1, 1)
    assert np.array_equal(y[..., :cout], reference(graph, graph.nodes[0], x)), (window, cin, cout)
    return graph, layer, tile, chunk, y, shapes


def assert_pool(library, kind: str, window: Window, channels: int, extra: int = 1):
    size = [
        max(length // 2 + 1, length - before - after) + extra * stride
        for length, stride, before, after in zip(
            window.extent, window.strides, window.padding[::2], window.padding[1::2]
        )
    ]
    build = Builder(np.random.default_rng(0))
    x = build.input(*size, channels)
    graph = build.finish(build.max_pool(x, window) if kind == "max" else build.average_pool(x, window))
    (layer,) = layers_of(graph)
    chunk = np.frombuffer(parameters(graph, graph.nodes[0], layer), np.int8).copy()
    values = image((*size, channels))
    rows, columns, blocks = layer.output_shape
    y, tile = np.zeros((rows, columns, 8 * blocks), np.int8), padded(values)
    shapes = (*tile.shape, *y.shape, *window.kernel, *window.strides, *window.dilation, *window.padding[::2])
    native.call(library, f"bstf_{kind}pool", [tile, chunk, y], *shapes)
    assert np.array_equal(y[..., :channels], reference(graph, graph.nodes[0], values)), (kind, window, channels)


@pytest.mark.parametrize("name", ["ResNet50", "VGG16", "InceptionV3"])
def test_every_layer_shape_of(name, library):
    convolutions, pools = layer_shapes(name)
    assert len(convolutions) >= 11 and pools
    for window, cin, cout in sorted(convolutions, key=str):
        large = cin * cout > 2**22  # dense layers of VGG16: output blocks are alike, 16 of them tell all
        assert_convolution(library, window, cin, 128 if large else cout)
    for kind, window, channels in sorted(pools, key=str):
        assert_pool(library, kind, window, channels)
    assert library.most_live() == 4


WINDOWS = st.builds(
    lambda kernel, strides, dilation, ends: Window(
        kernel, strides, tuple(int(end) for end in np.array(ends) % np.repeat(kernel, 2)), dilation
    ),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    ends=st.tuples(*[st.integers(0, 4)] * 4),
)


@settings(max_examples=60, deadline=None)
@given(
    window=WINDOWS, cin=st.integers(1, 40), cout=st.integers(1, 30), seed=st.integers(0, 9), extra=st.integers(0, 4),
    ratio=st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_any_convolution_and_pool(library, window, cin, cout, seed, extra, ratio):
    assert_convolution(library, window, cin, cout, seed, ratio, extra)
    for kind in ("max", "average"):
        assert_pool(library, kind, window, cin, extra)


def test_sums_in_parts_and_residuals(library):
    """Two chunks of input channels give what one gives; then a residual on another grid is added."""
    window = Window((3, 3), padding=(1, 1, 1, 1))
    graph, layer, tile, _, y, shapes = assert_convolution(library, window, 40, 24, extra=6)
    packer, sums = Packer(graph, layer), np.zeros(y.size, np.int32)
    made, residual = np.zeros_like(y), image(y.shape, 3)
    shift = np.array([2, 0, -1, 1, -100, 90], np.int32)
    for part, (start, stop) in enumerate(((0, 3), (3, 5))):
        chunk = np.frombuffer(packer.chunk(range(layer.output_shape[2]), (start, stop)), np.int8).copy()
        if part:  # the parts' biases are added once
            chunk = np.concatenate([chunk, shift.view(np.int8), np.zeros(8, np.int8)])
        x = np.ascontiguousarray(tile[..., 8 * start : 8 * stop])
        numbers = (*x.shape, *shapes[3:], int(part == 0), int(part == 1))
        arrays = [x, residual, chunk, made, sums] if part else [x, chunk, made, sums]
        native.call(library, "bstf_conv_part_add" if part else "bstf_conv_part", arrays, *numbers)
    memory = np.concatenate([y.ravel(), residual.ravel(), shift.view(np.int8), np.zeros(y.size, np.int8)])
    pointwise.add(memory, 0, y.size, 2 * y.size + 24, 2 * y.size, y.shape, y.shape[-1])
    assert np.array_equal(made.ravel(), memory[2 * y.size + 24 :])


@settings(max_examples=60, deadline=None)
@given(
    pixels=st.integers(1, 9), blocks=st.integers(1, 5), same=st.booleans(), sign=st.sampled_from([1, -1]),
    shifts=st.tuples(st.integers(0, 24), st.integers(0, 24)), cut=st.integers(-9, 33), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sum(library, pixels, blocks, same, sign, shifts, cut, seed):
    channels = 8 * blocks
    a, b = image((pixels, channels, 1), seed), image((pixels if same else 1, channels, 1), seed + 1)
    words, y = np.array([*shifts, sign, cut, -120, 100], np.int32), np.zeros(a.size, np.int8)
    native.call(library, "bstf_add", [a, b, words, y], pixels, channels, channels if same else 0)
    memory = np.concatenate([a.ravel(), b.ravel(), y])
    memory = np.concatenate([words.view(np.int8), memory])
    step = channels if same else 0
    pointwise.add(memory, 24, 24 + a.size, 24 + a.size + b.size, 0, (1, pixels, channels), step)
    assert np.array_equal(y, memory[-y.size :])


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 30), shift=st.integers(-12, 12), low=st.integers(-128, 0), seed=st.integers(0, 99))
def test_any_requantisation(library, size, shift, low, seed):
    x, y = image((8 * size, 1, 1), seed), np.zeros(8 * size, np.int8)
    native.call(library, "bstf_requantize", [x, np.array([shift, low, 100], np.int32), y], 8 * size)
    assert np.array_equal(y, integer.requantize(x.ravel(), shift, (low, 100)))


def test_a_design_runs_on_the_compiled_kernels(library):
    """Every kernel, on the memories of cores, called as the cores' programs say."""
    program = bstf_compiler.compile(small(), "npu1_2x2")
    made, images = design(program), host.random_images(program)
    called = {name for one in made.configurations for name in one.kernels}
    assert called >= {"bstf_conv", "bstf_conv_add", "bstf_maxpool", "bstf_averagepool", "bstf_add", "bstf_requantize"}
    buffer = host.host_image(program, images)
    Machine(made, buffer, kernels=native.machine_kernels(library)).run()
    for found, wanted in zip(host.outputs(program, buffer), host.expected(program, images), strict=True):
        assert np.array_equal(found, wanted)
