"""Where a layer keeps its kernel, which of its axes are channels, and what it is multiplied by.

Every layer with a block-sparse form computes one product: rows of input channels times planes (cin, cout), at one or
several kernel positions. Keras stores these planes in several orders and under several names; everything outside of
this room sees kernels as (..., cin, cout). `LAYOUTS` has the facts, the functions read them.
"""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops


class Layout(NamedTuple):
    """How the layers of a class hold and use the kernel that Γ can mask.

    Attributes:
        kernel: the attribute that gives the kernel the layer computes with, LoRA included.
        variable: the attribute that holds its variable.
        product: `(layer, inputs, kernel) -> outputs` before bias and activation.
        inputs: axes of the kernel that are input channels, counted from its end.
        outputs: axes that are output channels. The axes that are neither are kernel positions.
    """

    kernel: str
    variable: str
    product: Callable[[keras.Layer, Any, Any], Any]
    inputs: tuple[int, ...] = (-2,)
    outputs: tuple[int, ...] = (-1,)


def _convolution(layer: keras.Layer, inputs: Any, kernel: Any) -> Any:
    padding = layer.padding
    if padding == "causal":  # of Conv1D alone
        inputs, padding = ops.pad(inputs, layer._compute_causal_padding()), "valid"
    window = {"strides": list(layer.strides), "dilation_rate": layer.dilation_rate}
    return ops.conv(inputs, kernel, padding=padding, data_format=layer.data_format, **window)


def _transposed_convolution(layer: keras.Layer, inputs: Any, kernel: Any) -> Any:
    window = {"strides": list(layer.strides), "dilation_rate": layer.dilation_rate}
    padding = {"padding": layer.padding, "output_padding": layer.output_padding}
    return ops.conv_transpose(inputs, kernel, data_format=layer.data_format, **padding, **window)


def _separable_convolution(layer: keras.Layer, inputs: Any, kernel: Any) -> Any:
    window = {"strides": layer.strides, "padding": layer.padding, "dilation_rate": layer.dilation_rate}
    return ops.separable_conv(inputs, layer.depthwise_kernel, kernel, data_format=layer.data_format, **window)


LAYOUTS = {
    keras.layers.Conv1D: Layout("kernel", "_kernel", _convolution),
    keras.layers.Conv2D: Layout("kernel", "_kernel", _convolution),
    keras.layers.Conv3D: Layout("kernel", "_kernel", _convolution),
    keras.layers.Conv2DTranspose: Layout("kernel", "kernel", _transposed_convolution, inputs=(-1,), outputs=(-2,)),
    keras.layers.SeparableConv2D: Layout("pointwise_kernel", "pointwise_kernel", _separable_convolution),
    keras.layers.Dense: Layout("kernel", "_kernel", lambda _, inputs, kernel: ops.matmul(inputs, kernel)),
    # Its axes are in its equation.
    keras.layers.EinsumDense: Layout("kernel", "_kernel", lambda layer, *both: ops.einsum(layer.equation, *both)),
}


def layout(layer: keras.Layer) -> Layout | None:
    """How a layer holds its kernel; None if layers of its class have no kernel that Γ could mask."""
    return next((facts for kind, facts in LAYOUTS.items() if isinstance(layer, kind)), None)


def refusal(layer: keras.Layer) -> str | None:
    """Why the kernel of a layer that has a layout isn't one plane a position, in a few words; None if it is."""
    if getattr(layer, "groups", 1) != 1:
        return f"grouped (groups={layer.groups})"
    if not isinstance(layer, keras.layers.EinsumDense):
        return None
    inputs, kernel, outputs = (set(term) - set(".") for term in _terms(layer))
    if kernel & inputs & outputs:
        return f"grouped (a matrix for each {_axis(kernel & inputs & outputs)} of its equation {layer.equation})"
    if not kernel & inputs or not kernel & outputs:
        return f"no matrix of inputs and outputs (equation {layer.equation})"
    if inputs - kernel - outputs:
        return f"no product alone (equation {layer.equation} adds up over {_axis(inputs - kernel - outputs)})"
    return None


def variable(layer: keras.Layer) -> keras.Variable:
    """The variable of a built layer's kernel, as Keras stores it."""
    return getattr(layer, layout(layer).variable)


def kernel_axes(layer: keras.Layer) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axes of a built layer's stored kernel: positions, input channels, output channels."""
    rank = len(variable(layer).shape)
    if isinstance(layer, keras.layers.EinsumDense):
        x, kernel, _ = _terms(layer)
        ins = tuple(axis for axis, label in enumerate(kernel) if label in x)
        outs = tuple(axis for axis, label in enumerate(kernel) if label not in x)
    else:
        ins, outs = (tuple(axis % rank for axis in axes) for axes in layout(layer)[-2:])
    return tuple(axis for axis in range(rank) if axis not in ins + outs), ins, outs


def to_planes(layer: keras.Layer, kernel: Any, xp: ModuleType = np) -> Any:
    """Views a kernel as a layer stores it as (..., cin, cout).

    Several axes of input or output channels, those of an EinsumDense, become one in the order of the kernel: heads x
    channels of a head, for instance. A block may then hold channels of two heads, unless its size divides theirs.
    """
    positions, ins, outs = kernel_axes(layer)
    sizes = [math.prod(kernel.shape[axis] for axis in axes) for axes in (ins, outs)]
    return xp.reshape(
        xp.transpose(kernel, (*positions, *ins, *outs)), [kernel.shape[axis] for axis in positions] + sizes
    )


def plane_shape(layer: keras.Layer) -> tuple[int, ...]:
    """The shape (..., cin, cout) of a built layer's kernel."""
    return to_planes(layer, np.broadcast_to(0, variable(layer).shape)).shape


def from_planes(layer: keras.Layer, planes: Any, xp: ModuleType = np) -> Any:
    """Lays (..., cin, cout) out as a layer stores its kernel; a plane (cin, cout) so that it broadcasts against it."""
    positions, ins, outs = kernel_axes(layer)
    shape = variable(layer).shape
    if (*positions, *ins, *outs) == tuple(range(len(shape))) and len(ins) == len(outs) == 1:
        return planes  # which saves a training step two operations a layer
    lead = tuple(planes.shape[:-2]) or (1,) * len(positions)
    apart = xp.reshape(planes, (*lead, *(shape[axis] for axis in (*ins, *outs))))
    return xp.transpose(apart, [int(axis) for axis in np.argsort((*positions, *ins, *outs))])


def channels(layer: keras.Layer, input_shape: Sequence[int | None]) -> tuple[int, int]:
    """Input and output channels of the kernel that a layer will have when it is built for such inputs.

    Raises:
        ValueError: the number of input channels is open.
    """
    sizes = [input_shape[axis] for axis in input_axes(layer, len(input_shape))]
    if None in sizes:
        raise ValueError(
            f"Layer '{layer.name}' is built for an unknown number of input channels: give its input a shape "
            "whose channel axis isn't None."
        )
    output_shape = layer.compute_output_shape(tuple(input_shape))
    outs = [output_shape[axis] for axis in output_axes(layer, len(output_shape))]
    return math.prod(sizes) * getattr(layer, "depth_multiplier", 1), math.prod(outs)


def input_axes(layer: keras.Layer, rank: int) -> tuple[int, ...]:
    """The axes of a layer's inputs that its kernel's input channels multiply, in the kernel's order."""
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel, _ = _terms(layer)
        return tuple(_position(inputs, label, rank) for label in kernel if label in inputs)
    return _channel_axis(layer, rank)


def output_axes(layer: keras.Layer, rank: int) -> tuple[int, ...]:
    """The axes of a layer's outputs that are its kernel's output channels, in the kernel's order."""
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel, outputs = _terms(layer)
        return tuple(_position(outputs, label, rank) for label in kernel if label not in inputs)
    return _channel_axis(layer, rank)


def in_order_of_inputs(layer: keras.Layer, outputs: np.ndarray) -> np.ndarray:
    """Outputs with the axes that aren't channels in the order of the inputs: an EinsumDense may exchange them."""
    if not isinstance(layer, keras.layers.EinsumDense):
        return outputs
    term, _, wanted = _terms(layer)
    shared = [_position(wanted, label, outputs.ndim) for label in term if label != "." and label in wanted]
    order = np.arange(outputs.ndim)
    order[sorted(shared)] = shared
    return outputs.transpose(order)


def channels_last(array: Any, axes: Sequence[int], xp: ModuleType = np) -> Any:
    """Moves the channel axes of inputs or outputs to the end and makes them one: (..., channels)."""
    rest = [axis for axis in range(len(array.shape)) if axis not in axes]
    shape = [array.shape[axis] for axis in rest] + [math.prod(array.shape[axis] for axis in axes)]
    return xp.reshape(xp.transpose(array, (*rest, *axes)), shape)


def multiplied(layer: keras.Layer, inputs: Any) -> Any:
    """What the kernel of a layer multiplies: its inputs, or a separable convolution's after the depthwise one."""
    if not isinstance(layer, keras.layers.SeparableConv2D):
        return inputs
    window = {"strides": layer.strides, "padding": layer.padding, "dilation_rate": layer.dilation_rate}
    depthwise = ops.cast(layer.depthwise_kernel, inputs.dtype)
    return ops.depthwise_conv(inputs, depthwise, data_format=layer.data_format, **window)


def _terms(layer: keras.layers.EinsumDense) -> tuple[str, str, str]:
    """Inputs, kernel and outputs of an equation."""
    operands, outputs = layer.equation.split("->")
    inputs, kernel = operands.split(",")
    return inputs, kernel, outputs


def _position(term: str, label: str, rank: int) -> int:
    """The axis of a label in a tensor whose equation may leave some out: "...ab" or "ab..."."""
    before, _, after = term.partition("...")
    return before.index(label) if label in before else rank - len(after) + after.index(label)


def _channel_axis(layer: keras.Layer, rank: int) -> tuple[int, ...]:
    return (1,) if getattr(layer, "data_format", None) == "channels_first" else (rank - 1,)


def _axis(labels: set[str]) -> str:
    return "'" + "".join(sorted(labels)) + "'"
