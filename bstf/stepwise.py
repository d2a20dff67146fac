"""A model computed call by call, each for many batches of images: what it takes to change layers on the way."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from bstf.places import calls, is_graph


class Step(NamedTuple):
    """A call that a model makes.

    Attributes:
        operation: the layer, or another operation of Keras.
        arguments: what it is called with, for each batch: (positional, by name).
    """

    operation: Any
    arguments: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]

    def compute(self, batch: int) -> Any:
        """What the call gives for a batch, in inference mode."""
        positional, named = self.arguments[batch]
        if getattr(self.operation, "_call_has_training_arg", False):
            named = {**named, "training": False}
        return self.operation(*positional, **named)

    def layers(self) -> list[keras.Layer]:
        """The layer that is called and those inside it."""
        is_layer = isinstance(self.operation, keras.Layer)
        return list(self.operation._flatten_layers()) if is_layer else []


def steps(model: keras.Model, batches: Sequence[Any]) -> Iterator[Step]:
    """Every call of a model, and of the models in it, in the order of computation.

    A call is computed when the next one is asked for, with the weights that it has then. The tensors that later calls
    still read are held for all batches.

    Args:
        model: Sequential or functional, with one input.
        batches: of images.

    Example:
        >>> for step in steps(model, [images[:32], images[32:64]]):
        ...     print(step.operation.name)
    """
    (entry,) = model.inputs
    yield from _steps(model, [[ops.convert_to_tensor(images, entry.dtype)] for images in batches])


def _steps(graph: keras.Model, inputs: Sequence[list[Any]]) -> Iterator[Step]:
    """The steps of a graph from its inputs on, for each batch; returns its outputs."""
    graph = graph._functional if isinstance(graph, keras.Sequential) else graph
    nodes = calls(graph)
    last_use = {id(tensor): number for number, node in enumerate(nodes) for tensor in node.input_tensors}
    last_use |= {id(tensor): len(nodes) for tensor in graph.outputs}
    held = [dict(zip(map(id, graph.inputs), tensors)) for tensors in inputs]
    for number, node in enumerate(nodes):
        if is_graph(node.operation):
            taken = [[tensors[id(source)] for source in node.input_tensors] for tensors in held]
            found = yield from _steps(node.operation, taken)
        else:
            step = Step(node.operation, [node.arguments.fill_in(tensors) for tensors in held])
            yield step
            # Without what PyTorch would keep of the calls before to derive them.
            found = [[ops.stop_gradient(x) for x in keras.tree.flatten(step.compute(i))] for i in range(len(held))]
        finished = {id(tensor) for tensor in (*node.outputs, *node.input_tensors)}
        finished = [tensor for tensor in finished if last_use.get(tensor, number) == number]
        for tensors, outputs in zip(held, found):
            tensors.update(zip(map(id, node.outputs), outputs))
            for tensor in finished:
                del tensors[tensor]
    return [[tensors[id(tensor)] for tensor in graph.outputs] for tensors in held]


class Walk:
    """A model's way through its calls, which goes on as far as it is asked to.

    Args:
        model: with one input. Of a subclassed one no steps are known.
        batches: of images.

    Example:
        >>> walk = Walk(model, batches)
        >>> for layer in walk.order(model.layers):
        ...     outputs = walk.around(layer).compute(0)
    """

    def __init__(self, model: keras.Model, batches: Sequence[Any]) -> None:
        self._whole = Step(model, [((images,), {}) for images in batches])
        self._steps = steps(model, batches) if is_graph(model) else iter(())
        self._step = next(self._steps, None)
        known = steps(model, []) if is_graph(model) else ()
        self._times = Counter(id(layer) for step in known for layer in step.layers())

    def order(self, layers: Iterable[keras.Layer]) -> list[keras.Layer]:
        """Layers in the order of their first calls, without those that are never called."""
        first = {layer: place for place, layer in enumerate(self._times)}  # by id
        return sorted((one for one in layers if id(one) in first), key=lambda one: first[id(one)])

    def around(self, layer: keras.Layer) -> Step:
        """The step in which a layer is called; the whole model's where it is in several, or in one gone by.

        Steps before are computed now, so that layers must be asked for in their order to be found in time.
        """
        if self._times[id(layer)] == 1:
            while self._step is not None and all(one is not layer for one in self._step.layers()):
                self._step = next(self._steps, None)
            if self._step is not None:
                return self._step
        return self._whole
