"""The engine on fixed-point networks is compared with the integer reference: every element is equal."""

import keras
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import bstf
from bstf.applications import small_resnet
from bstf_compiler import Engine, integer
from bstf_compiler.graph import (
    Add,
    Affine,
    AveragePool,
    Concat,
    Conv,
    DepthToSpace,
    Graph,
    Lookup,
    MaxPool,
    Node,
    Product,
    Requantize,
    Resize,
    Softmax,
    Tensor,
    Window,
)
from bstf_compiler.passes.sums import check_sums


class Network:
    """Builds a random fixed-point graph from hypothesis' choices."""

    def __init__(self, data):
        self.data = data
        self.rng = np.random.default_rng(self.draw(0, 9999))
        shape = self.draw(1, 9), self.draw(1, 40), self.pick(1, 3, self.draw(1, 20))
        self.graph = Graph("network", [], {"x": Tensor("x", (1, *shape), "int8", self.draw(2, 6))}, {"x": shape})

    def draw(self, low, high):
        return self.data.draw(st.integers(low, high))

    def pick(self, *choices):
        return self.data.draw(st.sampled_from(choices))

    def constant(self, name, shape, position, density=1.0):
        blocks = np.kron(self.rng.random([-(-side // 8) for side in shape[-2:]]) < density, np.ones((8, 8)))
        values = self.rng.integers(-128, 128, shape) * blocks[tuple(slice(side) for side in shape[-2:])]
        self.graph.tensors[name] = Tensor(name, shape, "int8", position, values.astype(np.int8))
        return name

    def add(self, op, inputs, shape, position):
        name = f"n{len(self.graph.nodes)}"
        self.graph.tensors[name] = Tensor(name, (1, *shape), "int8", position)
        self.graph.nodes.append(Node(name, op, inputs))
        return name

    def shape(self, name):
        return self.graph.tensors[name].shape[1:]

    def position(self, name):
        return self.graph.tensors[name].position

    def window(self, name, largest, dilation=(1, 1)):
        height, width, _ = self.shape(name)
        kernel, padding = (self.draw(1, largest), self.draw(1, largest)), [self.draw(0, 2) for _ in range(4)]
        extent = [(size - 1) * step + 1 for size, step in zip(kernel, dilation)]
        padding[1] += max(0, extent[0] - padding[0] - padding[1] - height)
        padding[3] += max(0, extent[1] - padding[2] - padding[3] - width)
        return Window(kernel, (self.draw(1, 3), self.draw(1, 3)), tuple(padding), dilation)

    def conv(self, name, window=None, cout=None):
        window = window or self.window(name, 5, (self.draw(1, 2), self.draw(1, 2)))
        cin = self.shape(name)[2]
        groups = self.pick(1, cin) if cout is None else 1
        cout = cout or (cin if groups > 1 else self.draw(1, 20))
        own, place = self.draw(-2, 12), len(self.graph.nodes)
        x, finer = self.position(name), self.draw(0, 6)
        kernel = self.constant(f"k{place}", (*window.kernel, cin // groups, cout), 7, self.pick(0.5, 1))
        bias = self.constant(f"b{place}", (1, cout), x + 7 - finer)
        self.graph.tensors[bias].data = self.graph.tensors[bias].data[0]
        shape = *window.output_size(*self.shape(name)[:2]), cout
        op = Conv(window, self.pick("linear", "relu", "relu6"), groups)
        return self.add(op, [name, kernel, bias], shape, x + 7 - own)

    def pixel(self, name):
        """A pixel with the channels of another tensor: a squeeze."""
        height, width, channels = self.shape(name)
        return self.conv(self.add(MaxPool(Window((height, width))), [name], (1, 1, channels), self.position(name)),
                         Window((1, 1)), channels)  # fmt: skip

    def pixels(self, name, block, channels):
        """Channels for some pixels, then these, without some at the edges."""
        name = self.conv(name, Window((1, 1)), block[0] * block[1] * channels)
        height, width, _ = self.shape(name)
        size = height * block[0], width * block[1]
        before = [self.draw(0, min(2, side - 1)) for side in size]
        after = [self.draw(0, min(2, side - 1 - cut)) for side, cut in zip(size, before)]
        op = DepthToSpace(block, (before[0], after[0], before[1], after[1]))
        size = [side - first - last for side, first, last in zip(size, before, after)]
        return self.add(op, [name], (*size, channels), self.position(name))

    def affine(self, channels):
        """The input's part on the host."""
        constants = [
            self.graph.add_constant(name, self.rng.normal(size=self.pick(1, channels)).astype(np.float32))
            for name in ("scale", "offset")
        ]
        position, self.graph.tensors["x"].position = self.position("x"), None
        return self.add(Affine(), ["x", *constants], self.shape("x"), position)

    def step(self, name, others):
        """One more operation on `name`."""
        kind, shape, position = self.draw(0, 10), self.shape(name), self.position(name)
        if kind <= 1:
            return self.conv(name)
        if kind == 2:  # a sum right after a convolution, or of anything of the same shape
            same = [one for one in others if self.shape(one) == shape]
            other = self.conv(name, Window((1, 1)), shape[2]) if self.draw(0, 1) else self.pick(*same)
            pair = [name, other] if self.draw(0, 1) else [other, name]
            op = Add(self.pick("linear", "relu", "relu6"), self.draw(0, 2) == 0)
            return self.add(op, pair, shape, position + self.draw(-3, 2))
        if kind == 3:
            window = self.window(name, 3)
            op = MaxPool(window, self.draw(0, 1) == 1)
            return self.add(op, [name], (*window.output_size(*shape[:2]), shape[2]), position)
        if kind == 4:
            window = self.window(name, 3)
            size, place = window.output_size(*shape[:2]), len(self.graph.nodes)
            factors = self.rng.integers(1, 17, size)
            self.graph.tensors[f"f{place}"] = Tensor(f"f{place}", size, "int32", None, factors)
            op = AveragePool(window, self.draw(0, 6), self.pick("linear", "relu"))
            return self.add(op, [name, f"f{place}"], (*size, shape[2]), position + self.draw(-2, 1))
        if kind == 5:
            return self.add(Requantize(self.pick("linear", "relu")), [name], shape, position + self.draw(-4, 3))
        if kind == 7:  # two of one shape, or a value a channel
            same = [one for one in others if self.shape(one) == shape]
            other = self.pick(*same) if self.draw(0, 1) else self.pixel(name)
            activation, both = self.pick("linear", "relu", "relu6"), position + self.position(other)
            if self.draw(0, 1):
                return self.add(
                    Add(activation, self.draw(0, 1) == 1), [name, other], shape, position - self.draw(-1, 3)
                )
            return self.add(Product(activation), [name, other], shape, both - self.draw(-2, 9))
        if kind == 8:
            table = self.rng.integers(-128, 128, 256).astype(np.int8)
            place = self.graph.add_constant(f"t{len(self.graph.nodes)}", table, self.draw(0, 7))
            return self.add(Lookup(), [name, place], shape, self.position(place))
        if kind == 9:
            method = self.pick("nearest", "bilinear")
            factors = tuple(self.pick(1, 2, 4) if method == "bilinear" else self.draw(1, 3) for _ in range(2))
            size = shape[0] * factors[0], shape[1] * factors[1]
            return self.add(Resize(factors, method), [name], (*size, shape[2]), position + self.draw(-2, 2))
        if kind == 10:
            return self.pixels(name, (self.draw(1, 3), self.draw(1, 3)), self.draw(1, 10))
        near = [one for one in others if self.shape(one)[:2] == shape[:2]]
        parts = [name, *(self.pick(*near) for _ in range(self.draw(1, 2)))]
        if self.draw(0, 1):
            parts = [self.conv(one, Window((1, 1)), self.pick(8, 16)) for one in parts]
        whole = self.position(parts[0]) - self.draw(0, 3)
        return self.add(Concat(), parts, (*shape[:2], sum(self.shape(one)[2] for one in parts)), whole)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_every_element_equals_the_integer_reference(data):
    network = Network(data)
    position = network.position("x")
    tensors = ["x"] if network.draw(0, 3) else [network.affine(network.shape("x")[2])]
    for _ in range(network.draw(1, 4)):
        tensors.append(network.step(tensors[-1], tensors))
    tensors.append(network.conv(tensors[-1], Window((3, 3), (1, 1), (1, 1, 1, 1)), 8))  # reads zeros around
    graph = network.graph
    graph.outputs = tensors[-2:]
    graph.output_shapes = [network.shape(name) for name in graph.outputs]
    try:
        check_sums(graph)
    except ValueError:  # positions too far from each other, refused when a graph is loaded
        reject()
    images = network.rng.normal(size=(network.draw(1, 3), *graph.inputs["x"])).astype(np.float32)
    images *= 2.0 ** (5 - position)
    for name, found, expected in zip(
        graph.outputs, Engine(graph, threads=network.draw(1, 2))(images), integer.run(graph, images)
    ):
        assert np.array_equal(found, expected), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("engine_int8") / "model"
    model = bstf.sparsify(small_resnet((28, 28, 1)), block=8, ratio=0.5)
    images = np.random.default_rng(0).random((20, 28, 28, 1)).astype(np.float32)
    model = bstf.quantize(model, images)
    bstf.export(model, folder)
    return model, folder, images


def test_a_saved_model(saved):
    model, folder, images = saved
    engine = Engine(folder)
    found = engine(images)
    assert np.array_equal(found, integer.run(engine.graph, images))
    assert np.allclose(found, model.predict(images, verbose=0), atol=1e-6)  # its softmax rounds otherwise
    assert np.array_equal(found[:1], engine(images[:1]))


def test_activations_take_a_quarter_of_the_bytes(saved, tmp_path):
    keras.utils.set_random_seed(0)
    bstf.export(small_resnet((28, 28, 1)), tmp_path / "float")
    assert Engine(saved[1]).memory_bytes()[0] <= 0.3 * Engine(tmp_path / "float").memory_bytes()[0]


def test_a_fixed_point_network_is_computed_in_int8_only(saved):
    assert Engine(saved[1], precision="int8").graph.is_fixed_point
    with pytest.raises(ValueError, match="'.*' is fixed-point and computed in int8.*export the float model"):
        Engine(saved[1], precision="float32")


def test_softmax_is_computed_in_float():
    graph = Graph("n", [], {"x": Tensor("x", (1, 1, 1, 9), "int8", 3)}, {"x": (9,)}, ["p"], [(9,)])
    graph.tensors["k"] = Tensor("k", (1, 1, 9, 9), "int8", 7, np.eye(9, dtype=np.int8).reshape(1, 1, 9, 9) * 64)
    graph.tensors["b"] = Tensor("b", (9,), "int8", 7, np.zeros(9, np.int8))
    graph.tensors["y"], graph.tensors["p"] = Tensor("y", (1, 1, 1, 9), "int8", 3), Tensor("p", (1, 1, 1, 9))
    graph.nodes = [Node("y", Conv(Window((1, 1))), ["x", "k", "b"]), Node("p", Softmax(), ["y"])]
    x = np.random.default_rng(0).normal(size=(3, 9)).astype(np.float32)
    assert np.array_equal(Engine(graph)(x), integer.run(graph, x))
