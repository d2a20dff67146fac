"""The compiler's view of a network: nodes over tensors, in topological order.

Activations are BHWC with a batch of one (`B` is always 1 here: the batch belongs to the caller). Kernels are
`(kh, kw, cin / groups, cout)` as in Keras and TensorFlow. A tensor with a `position` holds int8 integers `q` that
stand for `q * 2**-position`; a tensor without one is float.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

FUNCTIONS = (
    "elu", "erf", "exp", "gelu", "gelu_tanh", "hard_sigmoid", "hard_swish", "leaky_relu", "selu", "sigmoid", "softplus",
    "swish", "tanh",
)  # fmt: skip
"""Names of functions of one value."""


@dataclass(frozen=True)
class Window:
    """A sliding window: `kernel` (kh, kw), `strides` (sh, sw), `padding` (top, bottom, left, right) in pixels,
    `dilation` (dh, dw): from one kernel position to the next in pixels.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns from the first to the last kernel position."""
        return tuple((size - 1) * step + 1 for size, step in zip(self.kernel, self.dilation))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that the window produces from an image of `height` x `width` pixels."""
        top, bottom, left, right = self.padding
        rows, columns = self.extent
        return (
            (height + top + bottom - rows) // self.strides[0] + 1,
            (width + left + right - columns) // self.strides[1] + 1,
        )

    def padded(self, more: tuple[int, int, int, int]) -> Window:
        """The same window on an image with `more` (top, bottom, left, right) pixels of padding."""
        return replace(self, padding=tuple(a + b for a, b in zip(self.padding, more)))


@dataclass(frozen=True)
class Op:
    """What a node computes. Subclasses carry its parameters."""

    @property
    def kind(self) -> str:
        """Lower-case name, for reports and dispatch."""
        return type(self).__name__.lower()


# --- operations of a lowered graph -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv(Op):
    """Convolution: inputs (x, kernel[, bias]); then the activation.

    Channels in and out are cut into `groups` equal runs, and a run of outputs reads the run of inputs of its number:
    as many groups as input channels make it a depthwise convolution.
    """

    window: Window
    activation: str = "linear"  # linear, relu, relu6
    groups: int = 1


@dataclass(frozen=True)
class Add(Op):
    """Element-wise sum of two tensors, or the first minus the second (`subtract`); then the activation.

    The second may have one row and column for all: a value a channel.
    """

    activation: str = "linear"
    subtract: bool = False


@dataclass(frozen=True)
class Product(Op):
    """Element-wise product of two tensors, then the activation. The second may have one row and column for all."""

    activation: str = "linear"


@dataclass(frozen=True)
class Lookup(Op):
    """Any function of one value: inputs (x, table), table int8 (256,) from that of -128 to that of 127."""


@dataclass(frozen=True)
class Resize(Op):
    """An image `factors` (rows, columns) times as large: each pixel repeated ("nearest"), or interpolated between the
    centres of the four around ("bilinear", factors that are powers of two; outside of the image its edge goes on).
    """

    factors: tuple[int, int]
    method: str = "nearest"


@dataclass(frozen=True)
class DepthToSpace(Op):
    """`block` (rows, columns) pixels from the channels of each one, then `crop` (top, bottom, left, right) pixels less.

    Channel (i * columns + j) * channels out + c is channel c of pixel (i, j) of the block.
    """

    block: tuple[int, int]
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True)
class Requantize(Op):
    """The same values on another grid, after the activation."""

    activation: str = "linear"


@dataclass(frozen=True)
class MaxPool(Op):
    """Maximum over a window. `zero_padding`: padded pixels count as zeros; else they don't count."""

    window: Window
    zero_padding: bool = False


@dataclass(frozen=True)
class AveragePool(Op):
    """Sum over a window times a factor: inputs (x, numerators), numerators int (oh, ow), factor n / 2**shift."""

    window: Window
    shift: int
    activation: str = "linear"


@dataclass(frozen=True)
class Concat(Op):
    """The channels of two or more images of one size, one after another."""


@dataclass(frozen=True)
class Softmax(Op):
    """Softmax over channels, in float on the host; only at the end of a network."""


@dataclass(frozen=True)
class Affine(Op):
    """x * scale + offset in float32 on the host, then the grid if it has one; only on the input: inputs (x, scale,
    offset), constants of shape (1,), (channels,) or (height, width, channels).
    """


# --- operations that the front end reads and the passes rewrite ----------------------------------------------------


@dataclass(frozen=True)
class FakeQuant(Op):
    """Puts a tensor on the grid of `position`."""

    position: int


@dataclass(frozen=True)
class BiasAdd(Op):
    """Adds a constant, one value a channel: inputs (x, constant)."""


@dataclass(frozen=True)
class Gather(Op):
    """A table's entry for each value: inputs (x, table), table (256,) of what the integers on the grid of `position`
    become, from -128 on.
    """

    position: int


@dataclass(frozen=True)
class ConvTranspose(Op):
    """Transposed convolution: inputs (x, kernel), kernel (kh, kw, cout, cin) as TensorFlow has it.

    Pixel i of the input adds its product with kernel row k to output row i * stride + k - `before`.
    """

    strides: tuple[int, int]
    before: tuple[int, int]


@dataclass(frozen=True)
class Multiply(Op):
    """Multiplies by a constant (a value, one a channel, or a map over pixels): inputs (x, constant)."""


@dataclass(frozen=True)
class Relu(Op):
    """max(0, x), or min(max(0, x), 6)."""

    activation: str  # relu, relu6, min6 (half of a relu6)


@dataclass(frozen=True)
class Function(Op):
    """A function of one value, in float: one of `FUNCTIONS`, as TensorFlow has them. `alpha` is the slope of
    "leaky_relu" below zero; "gelu_tanh" is the approximation of "gelu", "hard_sigmoid" is relu6(x + 3) / 6.
    """

    name: str
    alpha: float = 0.0


@dataclass(frozen=True)
class Pad(Op):
    """Zeros around the image: (top, bottom, left, right) pixels."""

    padding: tuple[int, int, int, int]


@dataclass(frozen=True)
class SpaceToBatch(Op):
    """Pads with zeros, then makes every dh-th row and dw-th column an image of its own: `block` (dh, dw), `padding`
    (top, bottom, left, right) in pixels.
    """

    block: tuple[int, int]
    padding: tuple[int, int, int, int]


@dataclass(frozen=True)
class BatchToSpace(Op):
    """Puts the rows and columns of SpaceToBatch back in their places, then crops `crop` (top, bottom, left, right)."""

    block: tuple[int, int]
    crop: tuple[int, int, int, int]


@dataclass(frozen=True)
class Average(Op):
    """Mean over a window in float, padded pixels not counted."""

    window: Window


@dataclass(frozen=True)
class SumPool(Op):
    """Sum over a window, padded pixels count as zeros."""

    window: Window


@dataclass(frozen=True)
class MatMul(Op):
    """A vector times a matrix (cin, cout): inputs (x, matrix)."""


@dataclass(frozen=True)
class Transpose(Op):
    """Axis k of the result is axis `axes[k]`."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Reshape(Op):
    """Another shape for the same values, channels fastest."""


@dataclass
class Tensor:
    """A value between nodes, or a constant (`data`). `shape` has a batch of 1 first for activations."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    position: int | None = None
    data: np.ndarray | None = None

    @property
    def is_constant(self) -> bool:
        """Whether the values are known at compile time."""
        return self.data is not None


@dataclass(eq=False)
class Node:
    """One operation: reads tensors by name and writes one tensor, named like the node."""

    name: str
    op: Op
    inputs: list[str]

    @property
    def output(self) -> str:
        """Name of the tensor that the node writes: the node's own name."""
        return self.name


@dataclass
class Graph:
    """A network: `nodes` in topological order over `tensors` by name.

    `inputs` are shapes by tensor, in order; `outputs` name tensors, and `output_shapes` are theirs: shapes as the
    SavedModel has them, without batch.
    """

    name: str
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    output_shapes: list[tuple[int, ...]] = field(default_factory=list)

    def producer(self, tensor: str) -> Node | None:
        """The node that writes `tensor`, or None for an input or a constant."""
        return next((node for node in self.nodes if node.output == tensor), None)

    def consumers(self, tensor: str) -> list[Node]:
        """The nodes that read `tensor`."""
        return [node for node in self.nodes if tensor in node.inputs]

    def only_consumer(self, tensor: str) -> Node | None:
        """The one node that reads `tensor`, if there is exactly one and the network does not return it."""
        readers = self.consumers(tensor)
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None

    def constants(self, node: Node) -> list[Tensor]:
        """The constant inputs of a node."""
        return [self.tensors[name] for name in node.inputs if self.tensors[name].is_constant]

    def activations(self, node: Node) -> list[Tensor]:
        """The inputs of a node that are computed."""
        return [self.tensors[name] for name in node.inputs if not self.tensors[name].is_constant]

    def add_constant(self, name: str, data: np.ndarray, position: int | None = None) -> str:
        """Adds a constant and returns its name, made unique."""
        while name in self.tensors:
            name += "'"
        self.tensors[name] = Tensor(name, data.shape, str(data.dtype), position, data)
        return name

    def bypass(self, node: Node) -> None:
        """Removes a node with one computed input: readers of its output read that input instead."""
        source = self.activations(node)[0].name
        self.nodes.remove(node)
        for reader in self.consumers(node.output):
            reader.inputs = [source if name == node.output else name for name in reader.inputs]
        self.outputs = [source if name == node.output else name for name in self.outputs]
        del self.tensors[node.output]

    @property
    def is_fixed_point(self) -> bool:
        """Whether the network computes on integers: its inputs, or what the host makes of them, have grids; inputs
        that nobody reads don't count.
        """
        first = [name for name in self.inputs if name in self.outputs]
        for node in self.nodes:
            read = [name for name in node.inputs if name in self.inputs]
            first += [node.output] if read and isinstance(node.op, Affine) else read
        return bool(first) and all(self.tensors[name].position is not None for name in first)

    @property
    def ungridded(self) -> str | None:
        """The first tensor that has no fixed-point grid (those that only the host reads aside), or None."""
        for node in self.nodes:
            if isinstance(node.op, Softmax):
                continue
            for name in [node.output] if isinstance(node.op, Affine) else [*node.inputs, node.output]:
                tensor = self.tensors[name]
                if tensor.position is None and not np.issubdtype(np.dtype(tensor.dtype), np.integer):
                    return name
        return None

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __str__(self) -> str:
        lines = [f"graph {self.name}: {', '.join(self.inputs)} -> {', '.join(self.outputs)}"]
        for node in self.nodes:
            out = self.tensors[node.output]
            grid = "" if out.position is None else f" @{out.position}"
            shape = "x".join(map(str, out.shape[1:]))
            lines.append(f"  {node.name}: {shape}{grid} = {node.op}({', '.join(node.inputs)})")
        return "\n".join(lines)
