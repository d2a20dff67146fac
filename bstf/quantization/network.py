"""The flat network between a Keras model and its fixed-point model: typed operations in order of
computation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bstf.blocks import BlockShape


@dataclass(kw_only=True)
class Operation:
    """One operation and the tensor it yields, which goes by the operation's name.

    Attributes:
        name: unique in its network; the Keras layer's name where that is.
        inputs: names of the operations whose tensors it reads.
        shape: of its tensor, without the batch.
    """

    name: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]


class Input(Operation):
    """An input of the network."""


@dataclass(kw_only=True)
class Affine(Operation):
    """x * scale + offset, both float32, a number, one a channel or an image: what the host computes on an input, before
    it is put on a grid.
    """

    scale: np.ndarray
    offset: np.ndarray


@dataclass(kw_only=True)
class Weights(Operation):
    """A linear operation with a kernel (..., cin, cout) and a bias (cout,), both float32; Γ if the layer has one."""

    kernel: np.ndarray
    bias: np.ndarray
    block: BlockShape
    gamma: np.ndarray | None = None

    def keras_order(self, kernel: np.ndarray) -> np.ndarray:
        """A kernel with its axes in the order of the Keras layer's, and the other way round."""
        return kernel


@dataclass(kw_only=True)
class Convolution(Weights):
    """2D convolution; kernel (h, w, cin / groups, cout)."""

    strides: tuple[int, int]
    padding: str
    groups: int = 1
    dilation: tuple[int, int] = (1, 1)

    @property
    def depthwise_kernel(self) -> np.ndarray | None:
        """The kernel (h, w, cin, cout / cin) of a depthwise convolution of one channel a group and equal strides, which
        Keras computes without compiling a grouped one; None for others.
        """
        height, width, cin, cout = self.kernel.shape
        if self.groups == 1 or cin != 1 or len(set(self.strides)) > 1:
            return None
        return self.kernel.reshape(height, width, self.groups, cout // self.groups)


@dataclass(kw_only=True)
class TransposedConvolution(Weights):
    """2D transposed convolution; kernel (h, w, cin, cout)."""

    strides: tuple[int, int]
    padding: str

    def keras_order(self, kernel: np.ndarray) -> np.ndarray:
        """The last two axes swapped."""
        return np.swapaxes(kernel, 2, 3)


class Dense(Weights):
    """Product of vectors and a matrix; kernel (cin, cout)."""


@dataclass(kw_only=True)
class BatchNorm(Operation):
    """x * scale + offset, both float64 (channels,): batch normalisation and its like; gone after folding. Those of an
    input may be (height, width, channels).
    """

    scale: np.ndarray
    offset: np.ndarray


@dataclass(kw_only=True)
class Relu(Operation):
    """max(x, 0), and min(., 6) where `ceiling` is 6."""

    ceiling: float | None


@dataclass(kw_only=True)
class Unary(Operation):
    """A function of one value, which becomes a table; `function` maps arrays and tensors alike."""

    function: Callable[[Any], Any]


@dataclass(kw_only=True)
class Add(Operation):
    """Sum of two tensors, or the first minus the second. The second may be one pixel, for all."""

    subtract: bool = False


class Multiply(Operation):
    """Product of two tensors. The second may be one pixel, for all."""


class Concat(Operation):
    """The channels of several tensors, one after another."""


@dataclass(kw_only=True)
class Pool(Operation):
    """Pooling over windows."""

    size: tuple[int, int]
    strides: tuple[int, int]
    padding: str


class MaxPool(Pool):
    """Largest element of each window."""


class AveragePool(Pool):
    """Mean of the elements of each window that aren't padding."""


@dataclass(kw_only=True)
class GlobalPool(Operation):
    """Pooling over the whole image."""

    keepdims: bool


class GlobalAveragePool(GlobalPool):
    """Mean of each channel."""


class GlobalMaxPool(GlobalPool):
    """Largest element of each channel."""


@dataclass(kw_only=True)
class ZeroPad(Operation):
    """Zeros around the image: ((top, bottom), (left, right))."""

    padding: tuple[tuple[int, int], tuple[int, int]]


@dataclass(kw_only=True)
class Crop(Operation):
    """Rows and columns taken off the image: ((top, bottom), (left, right))."""

    cropping: tuple[tuple[int, int], tuple[int, int]]


@dataclass(kw_only=True)
class Resize(Operation):
    """An image `factors` (rows, columns) times as large: "nearest", or "bilinear" between the centres of pixels."""

    factors: tuple[int, int]
    method: str


@dataclass(kw_only=True)
class Select(Operation):
    """The channels `numbers` of a tensor; gone after folding."""

    numbers: tuple[int, ...]


@dataclass(kw_only=True)
class Permute(Operation):
    """Axis k of the result is axis `axes[k]`, not counting the batch; gone after folding."""

    axes: tuple[int, ...]


class Reshape(Operation):
    """The same elements in the same order in another shape."""


class Softmax(Operation):
    """Softmax over the last axis, in float; only at the end."""


# Their results are put on a grid, after a relu that follows. The results of all others lie on the grid of their input,
# but for those of functions, interpolations and concatenations, which are put on one of their own right away.
REQUANTISED = (Weights, Add, Multiply, AveragePool, GlobalAveragePool)


@dataclass
class Network:
    """Operations in order of computation.

    Attributes:
        operations: by name, every operation after its inputs. The first ones are the `Input`s, in the
            order of the Keras model's inputs.
        outputs: names of the tensors that the network yields, in the order of the Keras model's outputs.
        structure: the Keras model's outputs, which may be a list or a dictionary of tensors.
        entry: the Keras model's inputs, in the same way.
    """

    operations: dict[str, Operation]
    outputs: tuple[str, ...]
    structure: Any = None
    entry: Any = None

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs by name, in order."""
        return {name: op.shape for name, op in self.operations.items() if isinstance(op, Input)}

    @property
    def prepared(self) -> set[str]:
        """The inputs on which the host computes something before that is put on a grid."""
        return {operation.inputs[0] for operation in self.operations.values() if isinstance(operation, Affine)}

    def free_name(self, name: str) -> str:
        """The name, with a number if an operation has it."""
        number, free = 0, name
        while free in self.operations:
            number += 1
            free = f"{name}_{number}"
        return free

    def remove(self, operation: Operation) -> None:
        """Takes out an operation of one input; its consumers read the input."""
        (source,) = operation.inputs
        del self.operations[operation.name]
        for other in self.operations.values():
            other.inputs = tuple(source if name == operation.name else name for name in other.inputs)
        self.outputs = tuple(source if name == operation.name else name for name in self.outputs)

    def consumers(self) -> dict[str, list[Operation]]:
        """Operations that read each tensor."""
        readers: dict[str, list[Operation]] = {name: [] for name in self.operations}
        for operation in self.operations.values():
            for name in dict.fromkeys(operation.inputs):
                readers[name].append(operation)
        return readers

    def only_consumer(self, name: str, readers: dict[str, list[Operation]]) -> Operation | None:
        """The operation that alone reads a tensor, unless the tensor is an output of the network too."""
        if name in self.outputs or len(readers[name]) != 1:
            return None
        return readers[name][0]

    def fused(self) -> dict[str, str]:
        """Relus computed before their producer's result is put on its grid: producer -> relu."""
        readers = self.consumers()
        pairs = ((op.name, self.only_consumer(op.name, readers)) for op in self.operations.values())
        return {
            name: relu.name
            for name, relu in pairs
            if isinstance(relu, Relu) and isinstance(self.operations[name], REQUANTISED)
        }

    def grids(self) -> dict[str, str]:
        """Tensors that lie on a grid -> the operation that owns their position.

        The inputs (or what the host makes of them), layers with weights, sums, products, functions and concatenations
        own one; all other operations pass on the grid of their input.
        """
        fused, owners = self.fused(), {}
        prepared = self.prepared
        for name, operation in self.operations.items():
            if isinstance(operation, (Input, Affine, Weights, Unary, Add, Multiply, Concat)):
                owner = name
            elif isinstance(operation, Softmax):
                continue
            else:
                owner = owners.get(operation.inputs[0], operation.inputs[0])
            owners[name] = owner
        return {name: owner for name, owner in owners.items() if name not in fused and name not in prepared}
