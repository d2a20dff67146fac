import numpy as np

from bstf_compiler import integer
from bstf_compiler.aie import weights
from bstf_compiler.aie.layer import layers_of
from bstf_compiler.graph import Window
from tests.bstf_compiler.networks import Builder


def decode(chunk, taps, inputs):
    """A chunk by its documented layout, independently of the packer and the kernels."""
    shift, low, high, blocks = np.frombuffer(chunk, "<i4", 4)
    bias = np.frombuffer(chunk, "<i4", 8 * blocks, 16)
    at = 16 + 32 * blocks
    counts = np.frombuffer(chunk, "<u2", blocks, at)
    rows = np.frombuffer(chunk, "<u2", counts.sum(), at + 2 * blocks)
    at += -(-2 * (blocks + len(rows)) // 16) * 16
    values = np.frombuffer(chunk, "i1", -1, at).reshape(len(rows), taps, 8, 8)
    kernel = np.zeros((taps, 8 * inputs, 8 * blocks), np.int8)
    for entry, (row, column) in enumerate(zip(rows, np.repeat(np.arange(blocks), counts))):
        kernel[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = values[entry]
    return (shift, low, high), bias, kernel, len(rows)


def test_chunks_hold_the_kernel_and_nothing_of_its_zero_blocks():
    build = Builder(np.random.default_rng(0))
    name = build.conv(build.input(6, 6, 20), 36, Window((3, 2)), ratio=0.6, activation="relu6")
    graph = build.finish(name)
    (layer,) = layers_of(graph)
    node = graph.nodes[0]
    kernel, bias = (graph.tensors[tensor].data for tensor in node.inputs[1:])
    full = np.zeros((6, 24, 40), np.int8)
    full[:, :20, :36] = kernel.reshape(6, 20, 36)
    packer = weights.Packer(graph, layer)
    for outputs, inputs in ((range(5), (0, 3)), (range(1, 3), (0, 3)), ((4,), (1, 2)), ((0, 2, 4), (0, 2))):
        chunk = packer.chunk(outputs, inputs)
        header, biases, values, kept = decode(chunk, 6, inputs[1] - inputs[0])
        assert header == (
            integer.shift_cut(graph, node),
            *integer.activation_bounds("relu6", graph.tensors[name].position),
        )
        channels = [8 * block + i for block in outputs for i in range(8)]
        assert np.array_equal(values, full[:, 8 * inputs[0] : 8 * inputs[1], channels])
        shifted = np.zeros(40, np.int64)
        shifted[:36] = bias.astype(np.int64) << integer.shift_bias(graph, node)
        assert np.array_equal(biases, shifted[channels])
        assert kept == layer.kept[slice(*inputs), outputs].sum()
        assert len(chunk) == weights.chunk_bytes(layer, len(outputs), kept)


def test_groups_are_packed_as_blocks_along_the_diagonal():
    build = Builder(np.random.default_rng(1))
    graph = build.finish(build.conv(build.input(6, 6, 48), 36, Window((3, 1)), ratio=0.0, groups=12))
    (layer,) = layers_of(graph)
    kernel = graph.tensors[graph.nodes[0].inputs[1]].data.reshape(3, 4, 36)
    full = np.zeros((3, 48, 40), np.int8)
    for channel in range(36):  # three of each group, four inputs each
        full[:, channel // 3 * 4 : channel // 3 * 4 + 4, channel] = kernel[:, :, channel]
    _, _, values, kept = decode(weights.Packer(graph, layer).chunk(range(5), (0, 6)), 3, 6)
    assert np.array_equal(values, full)
    assert (
        kept
        == layer.kept.sum()
        == sum(full[:, i : i + 8, o : o + 8].any() for i in range(0, 48, 8) for o in range(0, 40, 8))
    )
    assert layer.macs(10, (0, 6), range(5)) == 10 * 3 * 4 * 36


def test_depthwise_chunks_hold_a_value_a_channel_and_kernel_position():
    build = Builder(np.random.default_rng(2))
    graph = build.finish(build.conv(build.input(6, 6, 10), 20, Window((3, 2)), ratio=0.0, groups=10))
    (layer,) = layers_of(graph)
    kernel = graph.tensors[graph.nodes[0].inputs[1]].data
    assert layer.op == "depthwise" and layer.macs(5, (0, 2), range(3)) == 5 * 6 * 20
    chunk = weights.Packer(graph, layer).chunk((1, 2), (0, 2))
    assert len(chunk) == weights.chunk_bytes(layer, 2, 2) == 16 + 64 + 6 * 16
    assert np.frombuffer(chunk, "<i4", 4)[3] == 2
    values = np.frombuffer(chunk, "i1", -1, 80).reshape(6, 16)
    assert np.array_equal(values[:, :12], kernel.reshape(6, 20)[:, 8:]) and not values[:, 12:].any()


def test_parameters_of_layers_without_weights():
    build = Builder(np.random.default_rng(0))
    x = build.input(7, 7, 8, position=4)
    pool = build.average_pool(x, Window((3, 3), (2, 2), (1, 1, 1, 1)))
    graph = build.finish(pool)
    words = np.frombuffer(weights.parameters(graph, graph.nodes[0], layers_of(graph)[0]), "<i4")
    assert words[:5].tolist() == [12, -128, 127, 3, 3]
    table = words[5:14].reshape(3, 3)
    assert table[2, 2] == round(4096 / 9) and table[1, 1] == 1024 and table[1, 2] == round(4096 / 6)
