"""Which channels of a network may be exchanged without changing what it computes.

The output channels of a convolution can stand in any order, if everything that reads them knows it: the kernels after
it, biases, batch normalisations. Channels that must keep the same order form a group: a convolution opens one, an
addition makes one of two. What isn't known here, and what enters and leaves the model, keeps its order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from bstf.places import is_graph, nodes


@dataclass(frozen=True)
class Channels:
    """What stands on the last axis of a tensor, element by element.

    Attributes:
        group: (elements,), the group of each.
        index: (elements,), which channel of its group.
        copy: (elements,), which occurrence of that channel on this axis: after a flattening there are many.
    """

    group: np.ndarray
    index: np.ndarray
    copy: np.ndarray

    @classmethod
    def of(cls, group: int, size: int) -> "Channels":
        """A whole group, once."""
        return cls(np.full(size, group), np.arange(size), np.zeros(size, int))

    def __len__(self) -> int:
        return len(self.group)

    def tiled(self, times: int) -> "Channels":
        """All of it several times, as a flattening of pixels makes it."""
        copy = np.concatenate([self.copy * times + time for time in range(times)])
        return Channels(np.tile(self.group, times), np.tile(self.index, times), copy)

    def repeated(self, times: int) -> "Channels":
        """Each channel several times, as a depthwise convolution makes it."""
        copy = np.repeat(self.copy * times, times) + np.tile(np.arange(times), len(self))
        return Channels(np.repeat(self.group, times), np.repeat(self.index, times), copy)

    @classmethod
    def joined(cls, parts: "Sequence[Channels]") -> "Channels":
        """One behind the other."""
        copy = np.concatenate([part.copy * len(parts) + number for number, part in enumerate(parts)])
        return cls(np.concatenate([part.group for part in parts]), np.concatenate([part.index for part in parts]), copy)


@dataclass(frozen=True)
class Part:
    """An axis of a layer's variable along which channels stand."""

    layer: keras.Layer
    variable: str
    axis: int
    channels: Channels


class ChannelGroups:
    """The groups of a model's channels and where they stand.

    Args:
        model: a built Sequential or functional model, nested ones included.

    Attributes:
        parts: every axis of a variable that channels stand on, kernels' and others'.
        sizes: channels of each group, by its number; of groups that were made one, the first counts.

    Example:
        >>> groups = ChannelGroups(model)
        >>> [groups.sizes[group] for group in groups.free()]
    """

    def __init__(self, model: keras.Model) -> None:
        self.parts: list[Part] = []
        self.sizes: list[int] = []
        self._parents: list[int] = []
        self._pinned: set[int] = set()
        self._outputs: dict[int, tuple[list[Channels | None], list[Channels | None]]] = {}
        for channels in self._trace(model, [self._opaque(tensor) for tensor in model.inputs]):
            self._pin(channels)

    def free(self) -> list[int]:
        """The groups of more than one channel whose order is free."""
        pinned = {self.root(group) for group in self._pinned}
        roots = dict.fromkeys(self.root(group) for group in range(len(self.sizes)))
        return [group for group in roots if group not in pinned and self.sizes[group] > 1]

    def root(self, group: int) -> int:
        """The group that a group has become part of."""
        while self._parents[group] != group:
            group = self._parents[group]
        return group

    def resolved(self, channels: Channels) -> Channels:
        """The same with the groups that there are in the end."""
        groups, where = np.unique(channels.group, return_inverse=True)
        return Channels(np.array([self.root(group) for group in groups])[where], channels.index, channels.copy)

    def _open(self, size: int) -> Channels:
        self._parents.append(len(self.sizes))
        self.sizes.append(size)
        return Channels.of(self._parents[-1], size)

    def _pin(self, channels: Channels | None) -> None:
        if channels is not None:
            self._pinned.update(np.unique(channels.group).tolist())

    def _opaque(self, tensor: Any) -> Channels | None:
        """Channels of a tensor that nothing is known of; None where even their number is open."""
        size = tensor.shape[-1] if len(tensor.shape) > 1 else None
        channels = None if size is None else self._open(size)
        self._pin(channels)
        return channels

    def _merge(self, many: Sequence[Channels | None]) -> Channels | None:
        """Channels that are computed with one by one: they must keep the same order from here on."""
        first, *others = sorted(many, key=lambda one: 0 if one is None else -len(one))
        for other in others:
            if first is None or other is None:
                fits = False
            elif len(other) == 1 < len(first):
                continue  # broadcast to all channels
            else:
                fits = all(np.array_equal(getattr(first, name), getattr(other, name)) for name in ("index", "copy"))
            if not fits:
                self._pin(first)
                self._pin(other)
                continue
            for one, two in set(zip(first.group.tolist(), other.group.tolist())):
                one, two = sorted((self.root(one), self.root(two)))
                self._parents[two] = one
        return first

    def _trace(self, model: keras.Model, inputs: list[Channels | None]) -> list[Channels | None]:
        known = {id(tensor): channels for tensor, channels in zip(model.inputs, inputs)}
        for node in nodes(model):
            found = self._call(node, [known[id(tensor)] for tensor in node.input_tensors])
            known |= {id(tensor): channels for tensor, channels in zip(node.outputs, found)}
        return [known[id(tensor)] for tensor in model.outputs]

    def _call(self, node: Any, inputs: list[Channels | None]) -> list[Channels | None]:
        layer = node.operation
        if is_graph(layer):
            return self._again(layer, inputs) or self._first(layer, inputs, self._trace(layer, inputs))
        handler = _HANDLERS.get(type(layer)) or _function(node)
        plain = handler is not None and None not in inputs and len(node.outputs) == 1
        plain = plain and (len(inputs) == 1 or handler in _OF_SEVERAL)  # a mask is an input too
        plain = plain and getattr(layer, "data_format", None) in (None, "channels_last")
        if not plain:
            return self._unknown(node, inputs)
        if not isinstance(layer, keras.Layer) or not layer.weights:
            found = handler(self, layer, inputs, node.outputs[0])
            return self._unknown(node, inputs) if found is None else [found]
        again = self._again(layer, inputs)
        if again is not None:
            return again
        found = handler(self, layer, inputs, node.outputs[0])
        return self._unknown(node, inputs) if found is None else self._first(layer, inputs, [found])

    def _first(self, layer: Any, inputs: list, outputs: list) -> list[Channels | None]:
        self._outputs[id(layer)] = inputs, outputs
        return outputs

    def _again(self, layer: Any, inputs: list[Channels | None]) -> list[Channels | None] | None:
        """A layer that is called once more has one kernel for all calls, so one order, too."""
        if id(layer) not in self._outputs:
            return None
        before, outputs = self._outputs[id(layer)]
        for pair in zip(before, inputs):
            self._merge(pair)
        return outputs

    def _unknown(self, node: Any, inputs: list[Channels | None]) -> list[Channels | None]:
        for channels in inputs:
            self._pin(channels)
        return [self._opaque(tensor) for tensor in node.outputs]


_Handler = Callable[[ChannelGroups, Any, list[Channels], Any], Channels | None]


def _kernel(variable: str, cin: int, cout: int) -> _Handler:
    """A layer that multiplies all its inputs by a kernel, with the channels on these axes of it."""

    def handle(groups: ChannelGroups, layer: Any, inputs: list[Channels], output: Any) -> Channels | None:
        grouped = getattr(layer, "groups", 1) != 1
        special = getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None)
        if grouped or special:
            return None
        found = groups._open(output.shape[-1])
        if not _is_elementwise(layer.activation):
            groups._pin(found)
        groups.parts += [Part(layer, variable, cin, inputs[0]), Part(layer, variable, cout, found)]
        if layer.use_bias:
            groups.parts.append(Part(layer, "bias", 0, found))
        return found

    return handle


def _depthwise(groups: ChannelGroups, layer: Any, inputs: list[Channels], output: Any) -> Channels | None:
    found = inputs[0].repeated(layer.depth_multiplier)
    if not _is_elementwise(layer.activation):
        return None
    groups.parts.append(Part(layer, "kernel", -2, inputs[0]))
    if layer.use_bias:
        groups.parts.append(Part(layer, "bias", 0, found))
    return found


def _separable(groups: ChannelGroups, layer: Any, inputs: list[Channels], output: Any) -> Channels | None:
    between = inputs[0].repeated(layer.depth_multiplier)
    groups.parts.append(Part(layer, "depthwise_kernel", -2, inputs[0]))
    return _kernel("pointwise_kernel", -2, -1)(groups, layer, [between], output)


def _normalization(*variables: str) -> _Handler:
    """A layer that has such variables of one number a channel."""

    def handle(groups: ChannelGroups, layer: Any, inputs: list[Channels], output: Any) -> Channels | None:
        axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
        if [axis % len(output.shape) for axis in axes] != [len(output.shape) - 1]:
            return None
        present = [name for name in variables if isinstance(getattr(layer, name, None), keras.Variable)]
        groups.parts += [Part(layer, name, 0, inputs[0]) for name in present]
        return inputs[0]

    return handle


def _each_channel(groups: ChannelGroups, layer: Any, inputs: list[Channels], output: Any) -> Channels | None:
    return inputs[0]


def _activation(groups: ChannelGroups, layer: Any, inputs: list[Channels], output: Any) -> Channels | None:
    return inputs[0] if _is_elementwise(layer.activation) else None


def _softmax(groups: ChannelGroups, layer: Any, inputs: list[Channels], output: Any) -> Channels | None:
    return inputs[0] if layer.axis in (-1, len(output.shape) - 1) else None


def _elementwise(groups: ChannelGroups, layer: Any, inputs: list[Channels], output: Any) -> Channels | None:
    return groups._merge(inputs)


def _concatenate(groups: ChannelGroups, layer: Any, inputs: list[Channels], output: Any) -> Channels | None:
    if layer.axis in (-1, len(output.shape) - 1):
        return Channels.joined(inputs)
    return groups._merge(inputs)


def _reshape(groups: ChannelGroups, layer: Any, inputs: list[Channels], output: Any) -> Channels | None:
    """The last axis holds whole rows of channels, one behind the other, if their number divides it."""
    size = output.shape[-1]
    if size is None or size % len(inputs[0]):
        return None
    return inputs[0].tiled(size // len(inputs[0]))


def _function(node: Any) -> _Handler | None:
    """The handler of an operation of `keras.ops` on tensors alone."""
    operation = node.operation
    if not type(operation).__module__.startswith("keras.src.ops."):
        return None
    arguments = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
    if any(hasattr(one, "shape") and not isinstance(one, keras.KerasTensor) for one in arguments):
        return None  # an array has an order of its own
    return _FUNCTIONS.get(type(operation).__name__)


def _is_elementwise(activation: Any) -> bool:
    """Whether an activation treats all channels alike."""
    if isinstance(activation, keras.Layer):
        return _HANDLERS.get(type(activation)) is _each_channel
    return activation is None or activation in _ACTIVATIONS


_OF_SEVERAL = (_elementwise, _concatenate)
_ACTIVATIONS = tuple(
    getattr(keras.activations, name)
    for name in (
        "linear", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "sigmoid", "hard_sigmoid", "silu",
        "hard_silu", "softplus", "softsign", "softmax", "tanh", "mish", "exponential",
    )
    if hasattr(keras.activations, name)
)  # fmt: skip
_L = keras.layers
_HANDLERS: dict[type, _Handler] = {
    **dict.fromkeys((_L.Conv1D, _L.Conv2D, _L.Conv3D, _L.Dense), _kernel("kernel", -2, -1)),
    **dict.fromkeys((_L.Conv1DTranspose, _L.Conv2DTranspose, _L.Conv3DTranspose), _kernel("kernel", -1, -2)),
    **dict.fromkeys((_L.DepthwiseConv1D, _L.DepthwiseConv2D), _depthwise),
    **dict.fromkeys((_L.SeparableConv1D, _L.SeparableConv2D), _separable),
    _L.BatchNormalization: _normalization("gamma", "beta", "moving_mean", "moving_variance"),
    _L.LayerNormalization: _normalization("gamma", "beta"),
    **dict.fromkeys((_L.Add, _L.Subtract, _L.Multiply, _L.Average, _L.Maximum, _L.Minimum), _elementwise),
    _L.Concatenate: _concatenate,
    **dict.fromkeys((_L.Flatten, _L.Reshape), _reshape),
    _L.Activation: _activation,
    _L.Softmax: _softmax,
    **dict.fromkeys(
        (
            _L.ReLU, _L.LeakyReLU, _L.ELU, _L.Identity, _L.Dropout, _L.SpatialDropout1D, _L.SpatialDropout2D,
            _L.GaussianDropout, _L.GaussianNoise, _L.AlphaDropout, _L.ActivityRegularization,
            _L.MaxPooling1D, _L.MaxPooling2D, _L.MaxPooling3D, _L.AveragePooling1D, _L.AveragePooling2D,
            _L.AveragePooling3D, _L.GlobalMaxPooling1D, _L.GlobalMaxPooling2D, _L.GlobalMaxPooling3D,
            _L.GlobalAveragePooling1D, _L.GlobalAveragePooling2D, _L.GlobalAveragePooling3D,
            _L.ZeroPadding1D, _L.ZeroPadding2D, _L.ZeroPadding3D, _L.Cropping1D, _L.Cropping2D, _L.Cropping3D,
            _L.UpSampling1D, _L.UpSampling2D, _L.UpSampling3D,
        ),
        _each_channel,
    ),
}  # fmt: skip
_FUNCTIONS: dict[str, _Handler] = {  # of keras.ops
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Maximum", "Minimum"), _elementwise),
    **dict.fromkeys(("Relu", "Relu6", "Sigmoid", "Silu", "Tanh"), _each_channel),
    "Concatenate": _concatenate,
}
