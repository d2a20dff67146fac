"""Networks for tests of the CPU engine, operation by operation."""

import numpy as np
import tensorflow as tf

from bstf_compiler import Engine
from bstf_compiler.graph import Conv, Graph, Node, Tensor, Window


class Network:
    """Builds a graph, and beside it the function of TensorFlow that computes the same."""

    def __init__(self, shape):
        self.graph = Graph("network", [], {"x": Tensor("x", (1, *shape))}, {"x": tuple(shape)})
        self.functions = {"x": lambda x: x}

    def add(self, op, inputs, function, constants=(), name=None):
        name = name or f"n{len(self.graph.nodes)}"
        names = [self.graph.add_constant(f"{name} {i}", value) for i, value in enumerate(constants)]
        before = [self.functions[one] for one in inputs]

        def compute(x):
            return function(*(one(x) for one in before))

        self.functions[name] = compute
        shape = compute(np.zeros((1, *self.graph.inputs["x"]), np.float32)).shape
        self.graph.tensors[name] = Tensor(name, (1, *shape[1:]))
        self.graph.nodes.append(Node(name, op, [*inputs, *names]))
        return name

    def conv(
        self, source, kernel, bias, strides=(1, 1), padding=(0, 0, 0, 0), activation="linear", groups=1, dilation=(1, 1)
    ):
        top, bottom, left, right = padding
        after = {"linear": tf.identity, "relu": tf.nn.relu, "relu6": tf.nn.relu6}[activation]

        def function(x):
            x = tf.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
            # TensorFlow's own strides give other sums at every call where they are larger than a small kernel.
            parts = zip(tf.split(x, groups, axis=3), tf.split(kernel, groups, axis=3))
            sums = [tf.nn.conv2d(*part, 1, "VALID", dilations=dilation) for part in parts]
            return after(tf.concat(sums, axis=3)[:, :: strides[0], :: strides[1]] + bias).numpy()

        op = Conv(Window(kernel.shape[:2], strides, padding, dilation), activation, groups)
        return self.add(op, [source], function, [kernel, bias])

    def check(self, x, *outputs, threads=None, tolerance=2e-5):
        self.graph.outputs = list(outputs)
        self.graph.output_shapes = [self.graph.tensors[name].shape[1:] for name in outputs]
        results = Engine(self.graph, threads=threads)(x)
        for name, found in zip(outputs, results if len(outputs) > 1 else [results]):
            expected = self.functions[name](x)
            assert found.shape == expected.shape
            assert found.dtype == np.float32
            scale = max(np.abs(values).max() for values in (x, expected))  # sums may cancel
            np.testing.assert_allclose(found, expected, atol=tolerance * scale, rtol=0)


def blocks(rng, shape, density):
    """A kernel of which some 8x8 blocks are zero."""
    grid = np.kron(rng.random([-(-side // 8) for side in shape[2:]]) < density, np.ones((8, 8)))
    return (rng.normal(size=shape) * grid[: shape[2], : shape[3]]).astype(np.float32)
