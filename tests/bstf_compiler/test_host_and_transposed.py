"""Passes for what the host computes at the input, for tables and for transposed convolutions."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from bstf_compiler import integer, passes
from bstf_compiler.graph import (
    Affine,
    BiasAdd,
    Conv,
    ConvTranspose,
    DepthToSpace,
    FakeQuant,
    Gather,
    Graph,
    Lookup,
    Multiply,
    Node,
    Relu,
    Tensor,
)
from bstf_compiler.passes.host import FormAffine
from bstf_compiler.passes.transposed import SinkDepthToSpace, SubpixelConv


def graph_of(shape, *links):
    """A row of nodes over an image: (operation, shape of its output, constants...)."""
    graph = Graph("test", inputs={"image": shape[1:]})
    graph.tensors["image"] = Tensor("image", shape)
    last = "image"
    for place, (op, out, *constants) in enumerate(links):
        name = f"{op.kind}{place}"
        inputs = [last, *(graph.add_constant(f"{name} c", np.float32(data)) for data in constants)]
        graph.nodes.append(Node(name, op, inputs))
        graph.tensors[name] = Tensor(name, out)
        last = name
    graph.outputs, graph.output_shapes = [last], [graph.tensors[last].shape[1:]]
    return graph


@pytest.mark.parametrize("links", [(Multiply, BiasAdd), (Multiply,), (BiasAdd,)])
def test_a_scaled_and_shifted_input_is_the_hosts(links):
    shape, values = (1, 4, 4, 3), {Multiply: [0.1, 0.2, 0.3], BiasAdd: [-1.0]}
    graph = graph_of(shape, *((kind(), shape, values[kind]) for kind in links), (FakeQuant(4), shape))
    assert passes.apply(FormAffine(), graph) == 1
    (node,) = graph.nodes
    scale, offset = (graph.tensors[name].data for name in node.inputs[1:])
    assert node.op == Affine() and graph.is_fixed_point and graph.tensors[node.output].position == 4
    assert np.array_equal(scale, np.float32(values[Multiply] if Multiply in links else [1]))
    assert np.array_equal(offset, np.float32(values[BiasAdd] if BiasAdd in links else [0]))


def test_a_constant_a_row_is_the_hosts_and_one_an_image_isnt():
    shape = (1, 3, 6, 3)
    rows = np.reshape([1.0, 2.0, 0.5], (3, 1, 1))
    graph = graph_of(shape, (Multiply(), shape, rows), (FakeQuant(4), shape))
    assert passes.apply(FormAffine(), graph) == 1
    assert np.array_equal(graph.constants(graph.nodes[0])[0].data, np.broadcast_to(rows, shape[1:]))
    graph = graph_of(shape, (Multiply(), shape, np.ones((2, 1, 1, 1))), (FakeQuant(4), shape))
    assert passes.apply(FormAffine(), graph) == 0


@pytest.mark.parametrize("links", [(BiasAdd, Multiply), ()])
def test_other_orders_and_plain_inputs_are_not_the_hosts(links):
    shape = (1, 4, 4, 3)
    graph = graph_of(shape, *((kind(), shape, [2.0]) for kind in links), (FakeQuant(4), shape))
    assert passes.apply(FormAffine(), graph) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(["SAME", "VALID"]),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_transposed_convolution_is_that_of_tensorflow(kernel, strides, padding, size, cout, seed):
    rng = np.random.default_rng(seed)
    cin = 3
    weights = rng.integers(-9, 9, (*kernel, cout, cin)).astype(np.float32)
    bias = rng.integers(-9, 9, cout).astype(np.float32)
    x = rng.integers(-9, 9, (2, *size, cin)).astype(np.float32)
    more = [max(k - s, 0) if padding == "VALID" else 0 for k, s in zip(kernel, strides)]
    out = [n * s + extra for n, s, extra in zip(size, strides, more)]
    expected = tf.nn.relu(tf.nn.conv2d_transpose(x, weights, (2, *out, cout), strides, padding) + bias)
    totals = [max((n - 1) * s + k - o, 0) for n, s, k, o in zip(size, strides, kernel, out)]
    before = tuple(total // 2 if padding == "SAME" else 0 for total in totals)
    shape = (1, *out, cout)
    links = (ConvTranspose(strides, before), shape, weights), (BiasAdd(), shape, bias), (Relu("relu"), shape)
    graph = graph_of((1, *size, cin), *links)
    assert passes.apply(SubpixelConv(), graph) == 1
    passes.apply(SinkDepthToSpace(), graph)
    values = x.astype(np.float64)
    for node in graph:
        if isinstance(node.op, Conv):
            window, kernel_data = node.op.window, graph.tensors[node.inputs[1]].data
            values = integer.conv(values.astype(np.int8), kernel_data.astype(np.int8), window).astype(np.float64)
        elif isinstance(node.op, DepthToSpace):
            values = integer.depth_to_space(values, node.op)
            assert node is graph.nodes[-1]  # all that is done to channels comes before it
        else:
            values = np.maximum(values, 0) if isinstance(node.op, Relu) else values + graph.constants(node)[0].data
        assert values.shape[1:] == graph.tensors[node.output].shape[1:], node.name
    assert np.array_equal(values, expected)


def test_zero_blocks_of_a_transposed_kernel_stay_whole():
    kernel = np.ones((4, 4, 16, 8), np.float32)
    kernel[:, :, 8:] = 0
    graph = graph_of((1, 4, 4, 8), (ConvTranspose((2, 2), (1, 1)), (1, 8, 8, 16), kernel))
    passes.apply(SubpixelConv(), graph)
    made = graph.tensors[graph.nodes[0].inputs[1]].data
    assert made.shape == (2, 2, 8, 64)
    blocks = made.reshape(2, 2, 8, 4, 2, 8)
    assert (blocks[..., 1, :] == 0).all() and (blocks[..., 0, :] == 1).all()


def table_graph(scale):
    table = np.clip(np.arange(-128, 128) // 2, -64, 63) / 16
    shape = (1, 2, 2, 3)
    links = (FakeQuant(4), shape), (Gather(scale), shape, table), (FakeQuant(4), shape)
    return graph_of(shape, *links)


def test_a_table_of_a_grid_becomes_one_of_integers():
    graph = passes.lower(table_graph(4))
    (node,) = graph.nodes
    assert node.op == Lookup() and graph.tensors[node.output].position == 4
    x = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3) / 16 - 0.3
    wanted = np.floor(np.floor(x * 16 + 0.5) / 2) / 16
    assert np.array_equal(integer.run(graph, x), wanted)


def test_a_table_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="gather1.*table is for position 5, its input has 4"):
        passes.lower(table_graph(5))
