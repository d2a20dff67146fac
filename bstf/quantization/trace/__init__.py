"""A Keras model as a flat list of typed operations.

Sequential, functional and nested models become one list in an order in which every operation follows its
inputs. Activations that layers carry as an argument become operations of their own, dropout and other
identities vanish, masked layers give their masked kernels. Whatever can't be expressed is refused with a
sentence that names the layer.
"""

from collections.abc import Sequence
from typing import Any

import keras

from bstf.places import nodes
from bstf.quantization.network import Input, Network
from bstf.quantization.trace import images, joins, selections, values, weights
from bstf.quantization.trace.tracer import Tracer, function_name, refuse

_LAYERS = weights.LAYERS | values.LAYERS | joins.LAYERS | images.LAYERS | selections.LAYERS
_FUNCTIONS = values.FUNCTIONS | joins.FUNCTIONS | images.FUNCTIONS | selections.FUNCTIONS
_OF_SEVERAL = {*joins.LAYERS.values(), *joins.FUNCTIONS.values()}


def trace(model: keras.Model) -> Network:
    """Turns a Keras model into a network, as it is.

    Args:
        model: a built Sequential or functional model (nested ones included) of inputs (h, w, c) or (c,). It is
            only read.

    Returns:
        The network, batch normalisation not folded.

    Raises:
        TypeError: not a Keras model.
        ValueError: what the model is or holds isn't supported; the sentence names the layer.
    """
    graph = _graph(model)
    walk = _Walk(Tracer(_LAYERS, _FUNCTIONS, _OF_SEVERAL))
    outputs = walk.model(model, [walk.input(tensor) for tensor in graph.inputs])
    if alone := [name for name in outputs if name in walk.tracer.singles]:
        raise ValueError(f"the model's output is {alone[0]} on its own; take a slice of channels.")
    return Network(walk.tracer.operations, tuple(outputs), graph._outputs_struct, graph._inputs_struct)


def _graph(model: Any) -> Any:
    """The functional graph of a Sequential or functional model."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"quantisation needs a Keras model; got {type(model).__name__}.")
    if isinstance(model, keras.Sequential):
        if not model.built or model._functional is None:
            raise ValueError(f"model {model.name!r} isn't built; give it a keras.Input as its first layer.")
        return model._functional
    if not hasattr(model, "_nodes_by_depth"):
        raise ValueError(
            f"model {model.name!r} is a subclassed {type(model).__name__}, whose layers can't be read; write "
            "it as a functional or Sequential model."
        )
    return model


class _Walk:
    """Walks the graph of a model and of the models in it."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer

    def input(self, tensor: Any) -> str:
        shape = tuple(tensor.shape[1:])
        name = tensor._keras_history.operation.name
        if None in shape or len(shape) not in (1, 3):
            raise ValueError(
                f"input {name!r} has the shape {shape}; quantisation needs images (height, width, channels) "
                "or vectors of fixed size: build the model with such a keras.Input."
            )
        return self.tracer.add(Input(name=name, inputs=(), shape=shape))

    def model(self, model: keras.Model, inputs: Sequence[str]) -> list[str]:
        graph = _graph(model)
        tensors = {id(tensor): name for tensor, name in zip(graph.inputs, inputs)}
        for node in nodes(graph):
            names = [tensors[id(tensor)] for tensor in node.input_tensors]
            for tensor, name in zip(node.outputs, self.call(node, names)):
                tensors[id(tensor)] = name
        return [tensors[id(tensor)] for tensor in graph.outputs]

    def call(self, node: Any, inputs: list[str]) -> list[str]:
        layer = node.operation
        if isinstance(layer, keras.Model):
            return self.model(layer, inputs)
        if node.arguments.kwargs.get("training"):
            refuse(layer, "it is called with training=True; call it without.")
        kind = function_name(layer)
        if kind == "Stack":
            return [selections.stack(self.tracer, layer, inputs)]
        if any(name in self.tracer.singles for name in inputs):
            refuse(layer, "it reads a channel on its own; only a stack of channels may.")
        if kind == "GetItem":
            return [selections.item(self.tracer, layer, inputs, node.arguments.args)]
        if kind == "Pad" and any((*node.arguments.args[1:], *node.arguments.kwargs.values())):
            refuse(layer, "it pads with another value than zero.")
        if kind in values.WITH_CONSTANT and len(inputs) == 1:
            return [values.with_constant(self.tracer, layer, inputs, node.arguments.args)]
        return [self.tracer.layer(layer, inputs)]
