"""Random fixed-point graphs, built without TensorFlow, for tests of the compiler."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

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
    Op,
    Product,
    Requantize,
    Resize,
    Softmax,
    Tensor,
    Window,
)

ACTIVATIONS = ("linear", "relu", "relu6")


@dataclass
class Builder:
    """Adds layers to a graph; every layer's output has a random position."""

    rng: np.random.Generator
    graph: Graph = field(default_factory=lambda: Graph("random"))

    def input(self, height: int, width: int, channels: int, position: int = 4, name: str = "image") -> str:
        self.graph.tensors[name] = Tensor(name, (1, height, width, channels), position=position)
        self.graph.inputs[name] = (height, width, channels)
        return name

    def conv(
        self, x: str, channels: int, window: Window, ratio: float = 0.5, activation: str = "relu", groups: int = 1
    ) -> str:
        source = self.graph.tensors[x]
        cin = source.shape[-1] // groups
        kernel = self.rng.integers(-128, 128, (*window.kernel, cin, channels)).astype(np.int8)
        keep = self.rng.random((-(-cin // 8), -(-channels // 8))) >= ratio
        kernel *= np.kron(keep, np.ones((8, 8), np.int8))[:cin, :channels]
        bias = self.rng.integers(-128, 128, channels).astype(np.int8)
        kernel_position, shift_bias = int(self.rng.integers(4, 10)), int(self.rng.integers(0, 9))
        products = kernel_position + source.position
        spread = np.log2(max(1.0, 60.0 * 60.0 * np.sqrt(kernel[..., 0].size)) / 60.0)
        name = f"conv{len(self.graph.nodes)}"
        self.graph.add_constant(f"{name} kernel", kernel, kernel_position)
        self.graph.add_constant(f"{name} bias", bias, products - shift_bias)
        inputs = [x, f"{name} kernel", f"{name} bias"]
        shape = (*window.output_size(*source.shape[1:3]), channels)
        return self._add(name, Conv(window, activation, groups), inputs, shape, products - int(np.clip(spread, 0, 16)))

    def affine(self, x: str, position: int = 4, image: bool = False) -> str:
        """The input's host part, with constants a channel or (`image`) a value; the input loses its grid."""
        source = self.graph.tensors[x]
        source.position = None
        shape = source.shape[1:] if image else source.shape[-1:]
        constants = [
            self.graph.add_constant(f"{x} {what}", self.rng.normal(size=shape).astype(np.float32))
            for what in ("scale", "offset")
        ]
        return self._add("affine", Affine(), [x, *constants], source.shape[1:], position)

    def add(self, a: str, b: str, activation: str = "linear", subtract: bool = False) -> str:
        """Of two tensors of one shape, or `b` of one row and column."""
        positions = [self.graph.tensors[name].position for name in (a, b)]
        position = min(positions) - int(self.rng.integers(-1, 3))
        return self._add("add", Add(activation, subtract), [a, b], self.graph.tensors[a].shape[1:], position)

    def product(self, a: str, b: str, activation: str = "linear") -> str:
        """Of two tensors of one shape, or `b` of one row and column."""
        position = sum(self.graph.tensors[name].position for name in (a, b)) - int(self.rng.integers(4, 9))
        return self._add("product", Product(activation), [a, b], self.graph.tensors[a].shape[1:], position)

    def lookup(self, x: str) -> str:
        table = self.rng.integers(-128, 128, 256).astype(np.int8)
        position = int(self.rng.integers(2, 8))
        name = self.graph.add_constant(f"table{len(self.graph.nodes)}", table, position)
        return self._add("lookup", Lookup(), [x, name], self.graph.tensors[x].shape[1:], position)

    def resize(self, x: str, factors: tuple[int, int], method: str = "nearest") -> str:
        source = self.graph.tensors[x]
        shape = (source.shape[1] * factors[0], source.shape[2] * factors[1], source.shape[3])
        position = source.position + (0 if method == "nearest" else int(self.rng.integers(-1, 2)))
        return self._add("resize", Resize(factors, method), [x], shape, position)

    def depth_to_space(self, x: str, block: tuple[int, int], crop: tuple[int, int, int, int] = (0, 0, 0, 0)) -> str:
        """Channels must be a multiple of the block's pixels; a block of (1, 1) only crops."""
        source, (rows, columns), (top, bottom, left, right) = self.graph.tensors[x], block, crop
        _, height, width, channels = source.shape
        shape = (height * rows - top - bottom, width * columns - left - right, channels // (rows * columns))
        return self._add("pixels", DepthToSpace(block, crop), [x], shape, source.position)

    def concat(self, *parts: str, position: int) -> str:
        first = self.graph.tensors[parts[0]]
        shape = (*first.shape[1:3], sum(self.graph.tensors[part].shape[-1] for part in parts))
        return self._add("concat", Concat(), list(parts), shape, position)

    def requantize(self, x: str, activation: str = "relu") -> str:
        source = self.graph.tensors[x]
        shift = int(self.rng.integers(-2, 4))
        return self._add("grid", Requantize(activation), [x], source.shape[1:], source.position - shift)

    def max_pool(self, x: str, window: Window, zero_padding: bool = False) -> str:
        source = self.graph.tensors[x]
        shape = (*window.output_size(*source.shape[1:3]), source.shape[-1])
        return self._add("max", MaxPool(window, zero_padding), [x], shape, source.position)

    def average_pool(self, x: str, window: Window) -> str:
        """Averages by valid pixels, factors n / 2**12."""
        source = self.graph.tensors[x]
        height, width = window.output_size(*source.shape[1:3])
        counts = np.ones((height, width))
        for axis, (size, out) in enumerate(zip(source.shape[1:3], (height, width))):
            starts = np.arange(out) * window.strides[axis] - window.padding[2 * axis]
            taps = starts[:, None] + np.arange(window.kernel[axis]) * window.dilation[axis]
            valid = np.maximum(((taps >= 0) & (taps < size)).sum(axis=1), 1)
            counts *= valid[:, None] if axis == 0 else valid[None, :]
        name = f"avg{len(self.graph.nodes)}"
        self.graph.add_constant(f"{name} numerators", np.rint(4096 / counts).astype(np.int32))
        inputs, shape = [x, f"{name} numerators"], (height, width, source.shape[-1])
        return self._add(name, AveragePool(window, 12), inputs, shape, source.position)

    def finish(self, *outputs: str, softmax: bool = False) -> Graph:
        if softmax:
            shape = self.graph.tensors[outputs[0]].shape[1:]
            self.graph.nodes.append(Node("softmax", Softmax(), [outputs[0]]))
            self.graph.tensors["softmax"] = Tensor("softmax", (1, *shape))
            outputs = ("softmax",)
        self.graph.outputs = list(outputs)
        self.graph.output_shapes = [self.graph.tensors[name].shape[1:] for name in outputs]
        return self.graph

    def _add(self, name: str, op: Op, inputs: list[str], shape: tuple[int, ...], position: int) -> str:
        if not name.startswith(("conv", "avg")) or name == "concat":
            name = f"{name}{len(self.graph.nodes)}"
        self.graph.nodes.append(Node(name, op, inputs))
        self.graph.tensors[name] = Tensor(name, (1, *shape), position=position)
        return name


def random_window(rng: np.random.Generator, height: int, width: int, most: int = 7) -> Window:
    """A window that fits an image, padded by less than its size."""
    kernel = tuple(int(rng.integers(1, min(most, size) + 1)) for size in (height, width))
    strides = tuple(int(rng.integers(1, 4)) for _ in range(2))
    pads = [int(rng.integers(0, kernel[axis])) for axis in (0, 0, 1, 1)]
    return Window(kernel, strides, tuple(pads))


def random_network(seed: int, layers: int = 5, most_channels: int = 40, most_size: int = 14) -> Graph:
    """A random network of every operation, residual sums among them."""
    rng = np.random.default_rng(seed)
    build = Builder(rng)
    height, width = (int(rng.integers(1, most_size + 1)) for _ in range(2))
    x = build.input(height, width, int(rng.integers(1, most_channels + 1)))
    for _ in range(layers):
        _, height, width, channels = build.graph.tensors[x].shape
        activation = ACTIVATIONS[rng.integers(3)]
        kind = rng.choice(["conv", "residual", "max", "average", "grid"], p=[0.4, 0.3, 0.1, 0.1, 0.1])
        window = random_window(rng, height, width)
        if kind == "conv":
            x = build.conv(x, int(rng.integers(1, most_channels + 1)), window, rng.random() * 0.9, activation)
        elif kind == "residual":
            kh, kw = (min(3, size) for size in (height, width))
            same = Window((kh, kw), padding=((kh - 1) // 2, kh // 2, (kw - 1) // 2, kw // 2))
            y = build.conv(x, channels, same, rng.random() * 0.9, "linear")
            x = build.add(*((x, y) if rng.random() < 0.5 else (y, x)), activation)
        elif kind == "max":
            x = build.max_pool(x, window, bool(rng.integers(2)))
        elif kind == "average":
            x = build.average_pool(x, window)
        else:
            x = build.requantize(x, activation)
    return build.finish(x)


def network_of_everything(seed: int, layers: int = 7, most_channels: int = 28, most_size: int = 10) -> Graph:
    """A random network of every operation of a lowered graph; layers read any earlier ones."""
    rng = np.random.default_rng(seed)
    build = Builder(rng)
    size = [int(rng.integers(1, most_size + 1)) for _ in range(2)]
    x = build.input(*size, int(rng.integers(1, most_channels + 1)))
    made = [build.affine(x, int(rng.integers(2, 6))) if rng.random() < 0.3 else x]
    if rng.random() < 0.5:
        sizes = size if rng.random() < 0.5 else [int(n) for n in rng.integers(1, most_size + 1, 2)]
        x = build.input(*sizes, build.graph.tensors[x].shape[3] if rng.random() < 0.5 else 3, 5, name="second")
        made.append(build.affine(x, int(rng.integers(2, 6))) if rng.random() < 0.3 else x)
    for _ in range(layers):
        x = made[-1] if rng.random() < 0.7 else made[int(rng.integers(len(made)))]
        made.append(_GROW[rng.integers(len(_GROW))](build, x, made, most_size))
    outputs = {made[-1], *(rng.choice(made[2:], 1) if rng.random() < 0.2 else ())}
    graph = build.finish(*sorted(map(str, outputs)), softmax=len(outputs) == 1 and rng.random() < 0.2)
    graph.nodes = [node for node in graph if not isinstance(node.op, Affine) or graph.consumers(node.output)]
    return graph


def _dilated(rng: np.random.Generator, height: int, width: int) -> Window:
    """A window that fits an image, its kernel positions up to three pixels apart."""
    window = random_window(rng, height, width, most=4)
    most = [min(3, (size - 1) // max(1, kernel - 1)) for kernel, size in zip(window.kernel, (height, width))]
    steps = tuple(int(rng.integers(1, 1 + max(1, n))) for n in most)
    return Window(window.kernel, window.strides, window.padding, steps)


def _activation(build: Builder) -> str:
    return ACTIVATIONS[build.rng.integers(3)]


def _grow_conv(build: Builder, x: str, made: list[str], most_size: int) -> str:
    _, height, width, channels = build.graph.tensors[x].shape
    rng, window = build.rng, _dilated(build.rng, height, width)
    groups = int(rng.choice([n for n in range(1, channels + 1) if channels % n == 0]))
    each = int(rng.integers(1, max(2, 28 // groups + 1)))
    ratio = rng.random() * 0.9 if groups == 1 else 0.0
    return build.conv(x, groups * each, window, ratio, _activation(build), groups)


def _grow_pair(build: Builder, x: str, made: list[str], most_size: int) -> str:
    """A sum, a difference or a product, of another tensor of the same shape or one of a single pixel."""
    rng, shape = build.rng, build.graph.tensors[x].shape
    others = [name for name in made if build.graph.tensors[name].shape == shape]
    other = str(rng.choice(others))
    if rng.random() < 0.5:
        other = build.average_pool(other, Window(shape[1:3]))
        if rng.random() < 0.5:
            other = build.conv(other, shape[3], Window((1, 1)))
    if rng.random() < 0.5:
        return build.product(x, other, _activation(build))
    return build.add(x, other, _activation(build), subtract=bool(rng.integers(2)))


def _grow_concat(build: Builder, x: str, made: list[str], most_size: int) -> str:
    rng, shape = build.rng, build.graph.tensors[x].shape
    others = [name for name in made if build.graph.tensors[name].shape[:3] == shape[:3]]
    parts = [x, *map(str, rng.choice(others, int(rng.integers(1, 3))))]
    if rng.random() < 0.5:
        parts[-1] = build.conv(x, int(rng.choice([8, 16, 5])), Window((1, 1)))
    if sum(build.graph.tensors[part].shape[3] for part in parts) > 90:
        return build.requantize(x)
    position = build.graph.tensors[parts[-1]].position - int(rng.integers(-1, 2) if rng.random() < 0.5 else 0)
    return build.concat(*parts, position=position)


def _grow_size(build: Builder, x: str, made: list[str], most_size: int) -> str:
    """A larger image, by resizing or from channels, perhaps cropped."""
    rng, (_, height, width, channels) = build.rng, build.graph.tensors[x].shape
    if max(height, width) > 2 * most_size:
        return build.max_pool(x, Window((2, 2), (2, 2), (0, 1, 0, 1)))
    if rng.random() < 0.5:
        method = str(rng.choice(["nearest", "bilinear"]))
        return build.resize(
            x, tuple(int(n) for n in rng.choice([1, 2, 3] if method == "nearest" else [1, 2, 4], 2)), method
        )
    blocks = [(i, j) for i in (1, 2, 3) for j in (1, 2, 3) if channels % (i * j) == 0]
    block = blocks[rng.integers(len(blocks))]
    crop = [
        int(rng.integers(0, (size * factor + 1) // 2)) for size, factor in zip((height, width), block) for _ in "ab"
    ]
    return build.depth_to_space(x, block, tuple(crop))


def _grow_value(build: Builder, x: str, made: list[str], most_size: int) -> str:
    return build.lookup(x) if build.rng.random() < 0.5 else build.requantize(x, _activation(build))


def _grow_pool(build: Builder, x: str, made: list[str], most_size: int) -> str:
    _, height, width, _ = build.graph.tensors[x].shape
    window = _dilated(build.rng, height, width)
    if build.rng.random() < 0.5:
        return build.max_pool(x, window, bool(build.rng.integers(2)))
    return build.average_pool(x, window)


_GROW = (_grow_conv, _grow_conv, _grow_pair, _grow_concat, _grow_size, _grow_value, _grow_pool)


def random_images(seed: int, graph: Graph, count: int = 1) -> np.ndarray | list[np.ndarray]:
    """Images that reach both ends of the inputs' grids."""
    rng, images = np.random.default_rng(seed), []
    for name, shape in graph.inputs.items():
        reach = 2.0 ** (8 - (graph.tensors[name].position or 0))
        images.append(rng.uniform(-reach, reach, (count, *shape)).astype(np.float32))
    return images if len(images) > 1 else images[0]
