"""A model computed call by call, all batches of images in lockstep: what it takes to change layers on the way."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops
from keras.src.models.functional import Functional  # Keras exports no name for it

from bstf.places import is_graph, nodes


class Call(NamedTuple):
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
        if isinstance(self.operation, keras.Layer):  # those inside get it, too
            named = {**named, "training": False}
        return self.operation(*positional, **named)

    def layers(self) -> list[keras.Layer]:
        """The layer that is called and those inside it."""
        return list(self.operation._flatten_layers()) if isinstance(self.operation, keras.Layer) else []


def calls(model: keras.Model, batches: Sequence[Any]) -> Iterator[Call]:
    """Every call of a model in the order of computation, those of the models in it in their place.

    A call is computed when the next one is asked for, with the weights that it has then. The tensors that later calls
    still read are held for all batches.

    Args:
        model: Sequential or functional, with one input.
        batches: of images.

    Example:
        >>> for call in calls(model, [images[:32], images[32:64]]):
        ...     print(call.operation.name)
    """
    yield from _calls(model, [[images] for images in batches])


def _calls(graph: keras.Model, inputs: list[list[Any]]) -> Iterator[Call]:
    """The calls of a graph from its inputs on, one a batch, which it takes out of the list; returns its outputs."""
    (entry,), numbered = graph.inputs, list(enumerate(nodes(graph)))
    last_use = {id(tensor): number for number, node in numbered for tensor in node.input_tensors}
    last_use |= {id(tensor): len(numbered) for tensor in graph.outputs}
    held = [{id(entry): ops.convert_to_tensor(one.pop(), entry.dtype)} for one in inputs]
    for number, node in numbered:
        if _is_transparent(node):
            source = id(node.input_tensors[0])
            take = dict.pop if last_use[source] == number else dict.get
            found = yield from _calls(node.operation, [[take(tensors, source)] for tensors in held])
        else:
            call = Call(node.operation, [node.arguments.fill_in(tensors) for tensors in held])
            yield call
            # Without what PyTorch would keep of the calls before to derive them.
            found = [[ops.stop_gradient(x) for x in keras.tree.flatten(call.compute(i))] for i in range(len(held))]
        finished = [id(tensor) for tensor in node.input_tensors if last_use[id(tensor)] == number]
        for tensors, outputs in zip(held, found):
            tensors.update(
                (id(tensor), output) for tensor, output in zip(node.outputs, outputs) if id(tensor) in last_use
            )
            for tensor in finished:
                tensors.pop(tensor, None)
    return [[tensors[id(tensor)] for tensor in graph.outputs] for tensors in held]


def _is_transparent(node: Any) -> bool:
    """Whether a call is that of a model whose graph may stand in its place: of one tensor, and no mask beside it."""
    return _has_graph(node.operation) and len(node.input_tensors) == 1


def _has_graph(model: Any) -> bool:
    """Whether a model computes what its graph says, from one input."""
    plain = is_graph(model) and type(model).call in (Functional.call, keras.Sequential.call)
    return plain and bool(nodes(model)) and len(model.inputs) == 1


class Lockstep:
    """A model's way through its calls, which goes on as far as it is asked to.

    Args:
        model: with one input. Of one with a `call` of its own only the whole is known.
        batches: of images.

    Example:
        >>> lockstep = Lockstep(model, batches)
        >>> for layer in lockstep.order(model.layers):
        ...     outputs = lockstep.around(layer).compute(0)
    """

    def __init__(self, model: keras.Model, batches: Sequence[Any]) -> None:
        self._whole = Call(model, [((images,), {}) for images in batches])
        self._calls = calls(model, batches)
        self._place, self._call = -1, self._whole
        self._first: dict[int, int] = {}  # layers' ids -> places of the calls
        self._times: Counter[int] = Counter()
        for place, call in enumerate(calls(model, []) if _has_graph(model) else ()):
            for layer in call.layers():
                self._first.setdefault(id(layer), place)
                self._times[id(layer)] += 1

    def order(self, layers: Iterable[keras.Layer]) -> list[keras.Layer]:
        """Layers in the order of the calls that they are first in, without those that are in none."""
        return sorted((one for one in layers if id(one) in self._first), key=lambda one: self._first[id(one)])

    def around(self, layer: keras.Layer) -> Call:
        """The call in which a layer computes; the whole model's where it is in several, or in one gone by.

        Calls before are computed now, so that layers must be asked for in their order to be found in time.
        """
        if self._times[id(layer)] != 1 or self._first[id(layer)] < self._place:
            return self._whole
        while self._place < self._first[id(layer)]:
            self._place, self._call = self._place + 1, next(self._calls)
        return self._call
