"""One focused test a pass: graph in, graph out."""

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler import integer, passes
from bstf_compiler.graph import (
    Add,
    Affine,
    AveragePool,
    BatchToSpace,
    BiasAdd,
    Concat,
    Conv,
    FakeQuant,
    Graph,
    MatMul,
    MaxPool,
    Multiply,
    Node,
    Pad,
    Relu,
    Requantize,
    Reshape,
    SpaceToBatch,
    SumPool,
    Tensor,
    Transpose,
    Window,
)
from bstf_compiler.passes.activations import FoldActivation, MergeRelu6
from bstf_compiler.passes.affine import FoldBias, FoldScale, MergeAffine
from bstf_compiler.passes.averages import FormAveragePool, SumToConv
from bstf_compiler.passes.concat import FlattenConcat
from bstf_compiler.passes.dead import remove_dead
from bstf_compiler.passes.dense import DenseToConv
from bstf_compiler.passes.dilation import FormDilation
from bstf_compiler.passes.duplicates import MergeDuplicates
from bstf_compiler.passes.grids import AbsorbGrid, IntegerConstants, KeepGrid
from bstf_compiler.passes.host import FormMeanImage
from bstf_compiler.passes.padding import FoldPadding, PadToPool
from bstf_compiler.passes.reshapes import FoldTranspose, RemoveReshape
from bstf_compiler.passes.strides import FoldDownsampling
from tests.bstf_compiler.networks import Builder, random_images

RNG = np.random.default_rng(0)


class Chain:
    """A graph of nodes in a row."""

    def __init__(self, *shape):
        self.graph = Graph("test", inputs={"image": shape[1:]})
        self.graph.tensors["image"] = Tensor("image", shape)
        self.last = "image"

    def then(self, name, op, shape, *constants, positions=()):
        inputs = [self.last]
        for index, data in enumerate(constants):
            position = positions[index] if positions else None
            inputs.append(self.graph.add_constant(f"{name} constant{index}", np.asarray(data, np.float32), position))
        self.graph.nodes.append(Node(name, op, inputs))
        self.graph.tensors[name] = Tensor(name, shape)
        self.last = name
        return self

    def done(self):
        self.graph.outputs = [self.last]
        self.graph.output_shapes = [self.graph.tensors[self.last].shape[1:]]
        return self.graph


def names(graph):
    return [node.name for node in graph]


def test_fold_scale_and_bias():
    kernel, scale, shift = RNG.normal(size=(1, 1, 3, 4)), RNG.normal(size=4), RNG.normal(size=4)
    bias = RNG.normal(size=4)
    graph = (
        Chain(1, 5, 5, 3)
        .then("conv", Conv(Window((1, 1))), (1, 5, 5, 4), kernel)
        .then("bias", BiasAdd(), (1, 5, 5, 4), bias)
        .then("scale", Multiply(), (1, 5, 5, 4), scale)
        .then("shift", BiasAdd(), (1, 5, 5, 4), shift)
        .done()
    )
    assert passes.apply(FoldScale(), graph) == 1
    assert passes.apply(FoldBias(), graph) == 2
    (conv,) = graph.nodes
    folded_kernel, folded_bias = (graph.tensors[name].data for name in conv.inputs[1:])
    np.testing.assert_allclose(folded_kernel, kernel * scale, rtol=1e-6)
    np.testing.assert_allclose(folded_bias, bias * scale + shift, rtol=1e-5, atol=1e-6)
    assert graph.outputs == ["conv"]


def test_fold_scale_leaves_gridded_constants_alone():
    graph = (
        Chain(1, 5, 5, 3)
        .then("conv", Conv(Window((1, 1))), (1, 5, 5, 4), RNG.normal(size=(1, 1, 3, 4)), positions=[7])
        .then("scale", Multiply(), (1, 5, 5, 4), RNG.normal(size=4))
        .done()
    )
    assert passes.apply(FoldScale(), graph) == 0


def test_fold_bias_leaves_a_layer_with_another_reader_alone():
    graph = (
        Chain(1, 5, 5, 3)
        .then("conv", Conv(Window((1, 1))), (1, 5, 5, 4), RNG.normal(size=(1, 1, 3, 4)))
        .then("bias", BiasAdd(), (1, 5, 5, 4), RNG.normal(size=4))
        .done()
    )
    graph.nodes.append(Node("sum", Add(), ["conv", "bias"]))
    graph.tensors["sum"] = Tensor("sum", (1, 5, 5, 4))
    graph.outputs = ["sum"]
    assert passes.apply(FoldBias(), graph) == 0


def test_fold_scale_and_bias_into_a_grouped_convolution():
    kernel, scale, shift = RNG.normal(size=(3, 3, 1, 8)), RNG.normal(size=8), RNG.normal(size=8)
    graph = (
        Chain(1, 5, 5, 4)
        .then("conv", Conv(Window((3, 3)), groups=4), (1, 3, 3, 8), kernel)
        .then("scale", Multiply(), (1, 3, 3, 8), scale)
        .then("shift", BiasAdd(), (1, 3, 3, 8), shift)
        .done()
    )
    passes.lower(graph)
    (node,) = graph.nodes
    assert node.op == Conv(Window((3, 3)), groups=4)
    np.testing.assert_allclose(graph.tensors[node.inputs[1]].data, kernel * scale, rtol=1e-6)
    np.testing.assert_allclose(graph.tensors[node.inputs[2]].data, shift, rtol=1e-6)


def test_scales_and_shifts_in_a_row_become_one_of_each():
    chain, expected = Chain(1, 2, 2, 3), np.array([1.5, -2.0, 0.5])
    for index, op in enumerate([BiasAdd, BiasAdd, Multiply, BiasAdd, Multiply, Multiply]):
        constant = RNG.normal(size=() if index == 2 else 3)
        expected = expected * constant if op is Multiply else expected + constant
        chain.then(f"n{index}", op(), (1, 2, 2, 3), constant)
    graph = chain.done()
    passes.apply(MergeAffine(), graph)
    assert [node.op for node in graph] == [Multiply(), BiasAdd()]
    scale, shift = (graph.tensors[node.inputs[1]].data for node in graph)
    np.testing.assert_allclose(np.array([1.5, -2.0, 0.5]) * scale + shift, expected, rtol=1e-5)
    assert graph.nodes[1].inputs[0] == graph.nodes[0].output and graph.outputs == [graph.nodes[1].output]


def test_a_shift_that_another_layer_reads_keeps_its_place():
    graph = (
        Chain(1, 2, 2, 3)
        .then("shift", BiasAdd(), (1, 2, 2, 3), RNG.normal(size=3))
        .then("scale", Multiply(), (1, 2, 2, 3), RNG.normal(size=3))
        .done()
    )
    graph.outputs.append("shift")
    assert passes.apply(MergeAffine(), graph) == 0


def test_a_mean_image_and_the_constants_before_it_are_one_operation_of_the_host():
    images, rows, channels = RNG.normal(size=(1, 4, 5, 3)), RNG.normal(size=(4, 1, 1)), RNG.normal(size=3)
    x = np.float32(RNG.normal(size=(4, 5, 3)))
    graph = (
        Chain(1, 4, 5, 3)
        .then("half", Multiply(), (1, 4, 5, 3), 0.5)
        .then("mean", BiasAdd(), (1, 4, 5, 3), images)
        .then("rows", Multiply(), (1, 4, 5, 3), rows)
        .then("channels", Multiply(), (1, 4, 5, 3), channels)
        .done()
    )
    assert passes.apply(FormMeanImage(), graph) == 2
    host, left = graph.nodes
    assert (host.name, host.op, host.inputs[0], left.op) == ("rows", Affine(), "image", Multiply())
    scale, offset = (constant.data for constant in graph.constants(host))
    assert scale.shape == offset.shape == (4, 5, 3)
    np.testing.assert_allclose(x * scale + offset, (x * 0.5 + images[0]) * rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outputs", [["image"], ["before"]])
def test_an_image_that_another_layer_reads_keeps_its_constants(outputs):
    chain = Chain(1, 4, 5, 3).then("before", BiasAdd(), (1, 4, 5, 3), 1.0)
    graph = chain.then("mean", BiasAdd(), (1, 4, 5, 3), RNG.normal(size=(4, 5, 3))).done()
    graph.outputs += outputs
    assert passes.apply(FormMeanImage(), graph) == 0


def test_dense_to_conv():
    matrix = RNG.normal(size=(6, 4))
    graph = Chain(1, 1, 1, 6).then("dense", MatMul(), (1, 1, 1, 4), matrix).done()
    passes.apply(DenseToConv(), graph)
    (node,) = graph.nodes
    assert node.op == Conv(Window((1, 1)))
    np.testing.assert_array_equal(graph.tensors[node.inputs[1]].data[0, 0], matrix.astype(np.float32))


def test_flatten_before_dense_becomes_a_convolution_of_the_image():
    matrix = RNG.normal(size=(2 * 3 * 4, 5))
    graph = Chain(1, 2, 3, 4).then("flatten", Reshape(), (1, 24)).then("dense", MatMul(), (1, 5), matrix).done()
    passes.apply(RemoveReshape(), graph)
    (node,) = graph.nodes
    assert node.op == Conv(Window((2, 3)))
    x = RNG.normal(size=(2, 3, 4))
    kernel = graph.tensors[node.inputs[1]].data
    np.testing.assert_allclose(np.einsum("hwc,hwco->o", x, kernel), x.ravel() @ matrix, rtol=1e-5)
    assert graph.tensors["dense"].shape == (1, 1, 1, 5)
    assert graph.output_shapes == [(5,)]


def test_flatten_sinks_below_elementwise_nodes():
    graph = (
        Chain(1, 2, 3, 4)
        .then("flatten", Reshape(), (1, 24))
        .then("relu", Relu("relu"), (1, 24))
        .then("grid", FakeQuant(3), (1, 24))
        .then("dense", MatMul(), (1, 5), RNG.normal(size=(24, 5)))
        .done()
    )
    passes.apply(RemoveReshape(), graph)
    assert names(graph) == ["relu", "grid", "dense"]
    assert [graph.tensors[name].shape for name in names(graph)] == [(1, 2, 3, 4), (1, 2, 3, 4), (1, 1, 1, 5)]
    assert graph.nodes[2].inputs[0] == "grid" and graph.nodes[2].op == Conv(Window((2, 3)))


def test_a_transposition_before_an_inner_product_moves_the_rows_of_its_matrix():
    matrix = RNG.normal(size=(24, 5))
    chain = Chain(1, 2, 3, 4).then("turn", Transpose((0, 3, 1, 2)), (1, 4, 2, 3)).then("flatten", Reshape(), (1, 24))
    graph = chain.then("dense", MatMul(), (1, 5), matrix, positions=[3]).done()
    assert passes.apply(FoldTranspose(), graph) == 1
    assert names(graph) == ["flatten", "dense"] and graph.nodes[0].inputs == ["image"]
    x, moved = RNG.normal(size=(2, 3, 4)), graph.constants(graph.nodes[1])[0]
    np.testing.assert_allclose(x.ravel() @ moved.data, x.transpose(2, 0, 1).ravel() @ matrix, rtol=1e-5)
    assert moved.position == 3


def test_a_transposition_that_something_else_reads_stays():
    chain = Chain(1, 2, 3, 4).then("turn", Transpose((0, 2, 1, 3)), (1, 3, 2, 4))
    assert passes.apply(FoldTranspose(), chain.then("relu", Relu("relu"), (1, 3, 2, 4)).done()) == 0
    with pytest.raises(ValueError, match="layer 'turn': the CPU engine has no transpose"):
        bstf_compiler.Engine(passes.lower(chain.graph))


@pytest.mark.parametrize("size", [(9, 12), (10, 11)])
@pytest.mark.parametrize(
    "window", [Window((1, 1)), Window((3, 2), (2, 1), (1, 2, 0, 1)), Window((2, 3), dilation=(2, 1))]
)
def test_down_sampling_then_a_convolution_is_one_with_strides(size, window):
    build = Builder(np.random.default_rng(1))
    pixels = build.max_pool(build.input(*size, 8), Window((1, 1), (2, 3)))
    graph = build.finish(build.conv(pixels, 16, window, groups=2), build.conv(pixels, 8, Window((1, 1))))
    images = random_images(0, graph, 2)
    before = integer.run(graph, images)
    assert passes.apply(FoldDownsampling(), graph) == 1
    assert [node.op.kind for node in graph] == ["conv", "conv"]
    assert graph.nodes[0].op.window.strides == (2 * window.strides[0], 3 * window.strides[1])
    for one, other in zip(before, integer.run(graph, images), strict=True):
        assert np.array_equal(one, other)
    assert not bstf_compiler.compile(graph, "aie2_2x2").verify()
    for one, other in zip(before, bstf_compiler.compile(graph, "aie2_2x2").simulate(images), strict=True):
        assert np.array_equal(one, other)


def test_reshape_in_the_middle_is_refused():
    graph = Chain(1, 4, 4, 8).then("fold", Reshape(), (1, 2, 8, 8)).then("pad", Pad((1, 1, 1, 1)), (1, 4, 10, 8)).done()
    with pytest.raises(ValueError, match="layer 'fold'"):
        passes.apply(RemoveReshape(), graph)


def test_padding_joins_the_window():
    graph = (
        Chain(1, 8, 8, 3)
        .then("pad", Pad((1, 2, 3, 4)), (1, 11, 15, 3))
        .then("conv", Conv(Window((3, 3), padding=(1, 1, 1, 1))), (1, 11, 15, 4), RNG.normal(size=(3, 3, 3, 4)))
        .done()
    )
    passes.apply(FoldPadding(), graph)
    assert names(graph) == ["conv"]
    assert graph.nodes[0].op.window.padding == (2, 3, 4, 5)


def test_padding_before_a_maximum_counts_as_zeros():
    graph = (
        Chain(1, 8, 8, 3)
        .then("pad", Pad((1, 1, 1, 1)), (1, 10, 10, 3))
        .then("max", MaxPool(Window((3, 3), (2, 2))), (1, 4, 4, 3))
        .done()
    )
    passes.apply(FoldPadding(), graph)
    assert graph.nodes[0].op == MaxPool(Window((3, 3), (2, 2), (1, 1, 1, 1)), zero_padding=True)


@pytest.mark.parametrize("op", [MaxPool, SumPool])
def test_padding_before_a_window_that_does_not_count_its_own_stays(op):
    graph = (
        Chain(1, 8, 8, 3)
        .then("pad", Pad((1, 1, 1, 1)), (1, 10, 10, 3))
        .then("pool", op(Window((3, 3), (1, 1), (1, 1, 1, 1))), (1, 10, 10, 3))
        .done()
    )
    assert passes.apply(FoldPadding(), graph) == 0


def test_padding_that_nothing_takes_is_a_maximum_over_one_pixel():
    graph = Chain(1, 8, 8, 3).then("pad", Pad((1, 0, 0, 2)), (1, 9, 10, 3)).done()
    assert passes.apply(FoldPadding(), graph) == 0
    passes.apply(PadToPool(), graph)
    assert graph.nodes[0].op == MaxPool(Window((1, 1), padding=(1, 0, 0, 2)), zero_padding=True)


def test_relu6_from_relu_and_minimum():
    graph = Chain(1, 2, 2, 3).then("relu", Relu("relu"), (1, 2, 2, 3)).then("min", Relu("min6"), (1, 2, 2, 3)).done()
    passes.apply(MergeRelu6(), graph)
    assert [node.op for node in graph] == [Relu("relu6")]


def test_activation_joins_the_layer():
    graph = (
        Chain(1, 2, 2, 3)
        .then("conv", Conv(Window((1, 1))), (1, 2, 2, 3), RNG.normal(size=(1, 1, 3, 3)))
        .then("relu", Relu("relu6"), (1, 2, 2, 3))
        .done()
    )
    passes.apply(FoldActivation(), graph)
    assert [node.op.activation for node in graph] == ["relu6"]


def concatenation(graph, name, channels, *inputs):
    graph.nodes.append(Node(name, Concat(), list(inputs)))
    graph.tensors[name] = Tensor(name, (1, 2, 2, channels))
    graph.outputs = [name]


@pytest.mark.parametrize(
    ("outputs", "inner", "outer", "expected"),
    [
        ([], None, None, ["a", "a", "image", "b", "a", "image"]),
        ([], 3, 3, ["a", "a", "image", "b", "a", "image"]),
        ([], 3, None, ["a", "in", "b", "in"]),  # its own grid rounds
        (["in"], None, None, ["a", "in", "b", "in"]),
    ],
)
def test_a_concatenation_joins_the_one_after_it(outputs, inner, outer, expected):
    graph = Chain(1, 2, 2, 3).then("a", Relu("relu"), (1, 2, 2, 3)).then("b", Relu("relu"), (1, 2, 2, 3)).done()
    concatenation(graph, "in", 6, "a", "image")
    concatenation(graph, "out", 18, "a", "in", "b", "in")
    graph.outputs += outputs
    graph.tensors["in"].position, graph.tensors["out"].position = inner, outer
    passes.apply(FlattenConcat(), graph)
    assert graph.producer("out").inputs == expected
    assert ("in" in graph.tensors) == ("in" in expected)


def test_a_concatenation_has_the_grid_after_it_or_that_of_its_inputs():
    for after in (2, None):
        graph = Chain(1, 2, 2, 3).then("grid", FakeQuant(5), (1, 2, 2, 3)).then("a", Relu("relu"), (1, 2, 2, 3)).done()
        concatenation(graph, "whole", 6, "a", "grid")
        if after is not None:
            graph.nodes.append(Node("after", FakeQuant(after), ["whole"]))
            graph.tensors["after"], graph.outputs = Tensor("after", (1, 2, 2, 6)), ["after"]
        passes.lower(graph)
        assert graph.producer("whole").inputs == ["a", "image"]
        assert graph.tensors["whole"].position == (5 if after is None else after)


def test_concatenations_of_one_grid_become_one_and_stay_so():
    graph = Chain(1, 2, 2, 3).then("grid", FakeQuant(5), (1, 2, 2, 3)).done()
    for name, channels, inputs in (("in", 6, ["grid", "grid"]), ("out", 9, ["in grid", "grid"])):
        concatenation(graph, name, channels, *inputs)
        graph.nodes.append(Node(f"{name} grid", FakeQuant(4), [name]))
        graph.tensors[f"{name} grid"] = Tensor(f"{name} grid", (1, 2, 2, channels))
    graph.outputs = ["out grid"]
    text = str(passes.lower(graph))
    assert names(graph) == ["out"] and graph.nodes[0].inputs == ["image"] * 3
    assert str(passes.lower(graph)) == text


def dilated(block=(2, 3), pads=(2, 4, 4, 4), crop=(0, 2, 0, 1), strides=(1, 1)):
    return (
        Chain(1, 12, 10, 4)
        .then("to", SpaceToBatch(block, pads), (1, 9, 6, 4))
        .then("conv", Conv(Window((3, 2), strides), groups=2), (1, 7, 5, 8), RNG.normal(size=(3, 2, 2, 8)))
        .then("from", BatchToSpace((2, 3), crop), (1, 12, 14, 8))
        .then("bias", BiasAdd(), (1, 12, 14, 8), RNG.normal(size=8))
        .done()
    )


def test_a_convolution_of_images_in_the_batch_is_dilated():
    graph = dilated()
    assert passes.apply(FormDilation(), graph) == 1
    assert names(graph) == ["conv", "bias"]
    node = graph.nodes[0]
    assert node.op == Conv(Window((3, 2), padding=(2, 2, 4, 3), dilation=(2, 3)), groups=2)
    assert graph.tensors["conv"].shape[1:3] == node.op.window.output_size(12, 10) == (12, 14)


@pytest.mark.parametrize(
    "change", [{"block": (2, 2)}, {"crop": (3, 0, 0, 0)}, {"strides": (2, 1)}, {"pads": (0, 0, 0, 0)}]
)
def test_other_moves_into_the_batch_are_refused(change):
    with pytest.raises(ValueError, match="layer 'from'"):
        passes.apply(FormDilation(), dilated(**change))


def test_a_window_sum_in_a_float_graph_is_a_depthwise_convolution():
    graph = (
        Chain(1, 5, 5, 3)
        .then("pad", Pad((1, 0, 1, 0)), (1, 6, 6, 3))
        .then("sum", SumPool(Window((2, 3), (2, 1), (0, 1, 1, 1))), (1, 3, 6, 3))
        .then("scale", Multiply(), (1, 3, 6, 3), [1.0, 2.0, 4.0])
        .done()
    )
    assert passes.apply(SumToConv(), graph) == 1
    passes.lower(graph)
    (node,) = graph.nodes
    assert node.op == Conv(Window((2, 3), (2, 1), (1, 1, 2, 1)), groups=3)
    kernel = graph.tensors[node.inputs[1]].data
    assert kernel.shape == (2, 3, 1, 3) and (kernel == [1, 2, 4]).all()


def test_a_window_sum_between_grids_stays():
    graph = (
        Chain(1, 5, 5, 3)
        .then("grid", FakeQuant(5), (1, 5, 5, 3))
        .then("sum", SumPool(Window((5, 5))), (1, 1, 1, 3))
        .done()
    )
    assert passes.apply(SumToConv(), graph) == 0


def test_average_from_sum_and_factors():
    factors = np.full((1, 2, 2, 1), 7 / 64)
    factors[0, 1, 1, 0] = 1 / 4
    graph = (
        Chain(1, 5, 5, 3)
        .then("sum", SumPool(Window((3, 3), (2, 2))), (1, 2, 2, 3))
        .then("factor", Multiply(), (1, 2, 2, 3), factors)
        .done()
    )
    passes.apply(FormAveragePool(), graph)
    (node,) = graph.nodes
    assert node.op == AveragePool(Window((3, 3), (2, 2)), 6)
    assert graph.tensors[node.inputs[1]].data.tolist() == [[7, 7], [7, 16]]


def test_average_of_factors_that_are_no_fractions_of_two_is_refused():
    graph = (
        Chain(1, 3, 3, 3)
        .then("sum", SumPool(Window((3, 3))), (1, 1, 1, 3))
        .then("factor", Multiply(), (1, 1, 1, 3), 1 / 3)
        .done()
    )
    with pytest.raises(ValueError, match="layer 'sum'"):
        passes.apply(FormAveragePool(), graph)


def gridded_chain():
    return (
        Chain(1, 4, 4, 3)
        .then("image_grid", FakeQuant(5), (1, 4, 4, 3))
        .then("conv", Conv(Window((1, 1))), (1, 4, 4, 8), np.full((1, 1, 3, 8), 0.5), positions=[7])
        .then("conv_grid", FakeQuant(4), (1, 4, 4, 8))
        .then("max", MaxPool(Window((2, 2), (2, 2))), (1, 2, 2, 8))
        .then("relu", Relu("relu"), (1, 2, 2, 8))
        .then("relu_grid", FakeQuant(4), (1, 2, 2, 8))
    )


def test_grids_become_positions():
    graph = gridded_chain().done()
    for rule in (AbsorbGrid(), KeepGrid(), IntegerConstants()):
        passes.apply(rule, graph)
    assert names(graph) == ["conv", "max", "relu"]
    assert [graph.tensors[name].position for name in ("image", *names(graph))] == [5, 4, 4, 4]
    assert graph.nodes[2].op == Requantize("relu")
    kernel, bias = (graph.tensors[name] for name in graph.nodes[0].inputs[1:])
    assert kernel.data.dtype == bias.data.dtype == np.int8
    assert (kernel.data == 64).all() and not bias.data.any()
    assert bias.position == 12
    assert graph.ungridded is None


def test_a_constant_off_its_grid_is_refused():
    graph = (
        Chain(1, 4, 4, 3)
        .then("image_grid", FakeQuant(5), (1, 4, 4, 3))
        .then("conv", Conv(Window((1, 1))), (1, 4, 4, 8), np.full((1, 1, 3, 8), 0.3), positions=[7])
        .then("conv_grid", FakeQuant(4), (1, 4, 4, 8))
        .done()
    )
    with pytest.raises(ValueError, match="not on its grid"):
        passes.lower(graph)


def test_dead_nodes_go():
    graph = Chain(1, 2, 2, 3).then("a", Relu("relu"), (1, 2, 2, 3)).then("b", Relu("relu"), (1, 2, 2, 3)).done()
    graph.outputs = ["a"]
    remove_dead(graph)
    assert names(graph) == ["a"] and set(graph.tensors) == {"image", "a"}


@pytest.mark.parametrize("strides", [(2, 2), (3, 1), (1, 2)])
@pytest.mark.parametrize("between", ["conv", "add", "grid"])
def test_strides_of_one_pixel_move_to_the_layers_before(strides, between):
    build = Builder(np.random.default_rng(1))
    x = build.input(11, 8, 16)
    layer = build.conv(x, 16, Window((3, 3), padding=(1, 1, 1, 1)))
    if between == "add":
        layer = build.add(build.conv(x, 16, Window((1, 1))), layer, "relu")
    elif between == "grid":
        layer = build.requantize(layer)
    graph = build.finish(*(build.conv(layer, 8, Window((1, 1), strides)) for _ in range(2)))
    before, moved = str(graph), passes.without_unread_pixels(graph)
    assert str(graph) == before
    images = RNG.normal(size=(2, 11, 8, 16)) * 4
    for one, other in zip(integer.run(graph, images), integer.run(moved, images), strict=True):
        assert np.array_equal(one, other)
    convolutions = {node.name: node.op.window.strides for node in moved if isinstance(node.op, Conv)}
    assert convolutions.pop("conv0") == strides
    assert all(convolutions.pop(name) == (1, 1) for name in graph.outputs)
    assert all(one == strides for one in convolutions.values())
    assert len(moved.nodes) == len(graph.nodes)


def test_strides_stay_where_another_layer_reads_all_pixels():
    build = Builder(np.random.default_rng(1))
    layer = build.conv(build.input(9, 9, 8), 8, Window((3, 3)))
    ends = [build.conv(layer, 8, Window((1, 1), (2, 2))), build.conv(layer, 8, Window((3, 3), (2, 2)))]
    graph = build.finish(*ends)
    assert str(passes.without_unread_pixels(graph)) == str(graph)
    graph = build.finish(layer, ends[0])
    remove_dead(graph)
    assert str(passes.without_unread_pixels(graph)) == str(graph)
    for softmax in (False, True):  # the network returns what the window picks, by its name
        build = Builder(np.random.default_rng(1))
        layer = build.conv(build.input(9, 9, 8), 8, Window((3, 3)))
        graph = build.finish(build.max_pool(layer, Window((1, 1), (2, 2))), softmax=softmax)
        assert str(passes.without_unread_pixels(graph)) == str(graph)


def test_sums_of_one_tensor_may_be_picked_from_with_different_strides():
    build = Builder(np.random.default_rng(1))
    x = build.conv(build.input(9, 9, 8), 8, Window((1, 1)))
    ends = []
    for strides in ((2, 2), (3, 3)):
        total = build.add(x, build.conv(x, 8, Window((1, 1))))
        ends.append(build.conv(total, 8, Window((1, 1), strides)))
    graph = build.finish(*ends)
    images = RNG.normal(size=(2, 9, 9, 8)) * 4
    moved = passes.without_unread_pixels(graph)
    for one, other in zip(integer.run(graph, images), integer.run(moved, images), strict=True):
        assert np.array_equal(one, other)
    assert [node.op.window.strides for node in moved if isinstance(node.op, MaxPool)] == [(3, 3), (2, 2)]


def test_factors_of_either_sign_are_bounded():
    build = Builder(np.random.default_rng(1))
    graph = build.finish(build.average_pool(build.input(4, 4, 8), Window((4, 4))))
    graph.constants(graph.nodes[0])[0].data[:] = -(2**22)
    with pytest.raises(ValueError, match="its sums can reach"):
        passes.sums.check_sums(graph)


def test_lowering_is_idempotent_and_prints():
    graph = passes.lower(gridded_chain().done())
    text = str(graph)
    assert str(passes.lower(graph)) == text
    assert "conv: 4x4x8 @4" in text


def test_equal_nodes_become_one():
    build = Builder(np.random.default_rng(1))
    x = build.input(6, 6, 8)
    twins = [build.max_pool(x, Window((2, 2), (2, 2))) for _ in range(3)]
    tables = [build.lookup(name) for name in twins]
    graph = build.finish(build.add(build.add(*tables[:2]), tables[2]), twins[2])
    first, second, third = (graph.producer(name) for name in tables)
    data = [graph.tensors[node.inputs[1]] for node in (first, second, third)]
    data[1].data, data[1].position = data[0].data.copy(), data[0].position
    graph.tensors[second.output].position = graph.tensors[first.output].position
    images = random_images(0, graph, 2)
    before = integer.run(graph, images)
    assert passes.apply(MergeDuplicates(), graph) == 2  # a pool and a table; the third table is another one
    assert [node.op.kind for node in graph] == ["maxpool", "maxpool", "lookup", "lookup", "add", "add"]
    for one, other in zip(before, integer.run(graph, images)):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("name", ["graph.svg", "graph.png"])
def test_graphs_are_drawn(name, tmp_path):
    build = Builder(np.random.default_rng(1))
    x = build.conv(build.affine(build.input(6, 6, 8)), 8, Window((1, 1)))
    bstf_compiler.draw(build.finish(build.add(x, build.lookup(x))), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG") or all(word in content for word in (b"<svg", b"</svg>"))
    with pytest.raises(ValueError, match=r"'.*graph\.doc' can't be drawn.*\.svg"):
        bstf_compiler.draw(build.graph, tmp_path / "graph.doc")
