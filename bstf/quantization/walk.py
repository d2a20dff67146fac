"""A fixed-point model, computed layer by layer, with a look at what each layer reads and yields."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras

from bstf.places import nodes


class Step(NamedTuple):
    """A layer, and the tensor that it yielded for the batch at hand.

    Attributes:
        layer: the layer.
        producers: names of the layers whose tensors it reads.
        inputs: what it reads.
        output: what it yields.
    """

    layer: keras.layers.Layer
    producers: tuple[str, ...]
    inputs: tuple[Any, ...]
    output: Any


def walk(
    model: keras.Model, images: Sequence[Any], change: Callable[[keras.layers.Layer, Any], Any] | None = None
) -> Iterator[Step]:
    """Computes a functional model that holds no other models, one layer after another.

    Only the tensors that later layers still read are held.

    Args:
        model: from `bstf.quantize` or `bstf.quantization.prepare`.
        images: of every input, float32 (n, *shape of the input).
        change: called with every layer and its output; what it returns takes the output's place.

    Yields:
        Each call of a layer, in order of computation.
    """
    computed = nodes(model)
    last_use = {id(tensor): number for number, node in enumerate(computed) for tensor in node.input_tensors}
    tensors = {id(entry): keras.ops.convert_to_tensor(x, "float32") for entry, x in zip(model.inputs, images)}
    for number, node in enumerate(computed):
        arguments, options = node.arguments.fill_in(tensors)
        output = node.operation(*arguments, **options)
        if change is not None:
            output = change(node.operation, output)
        (tensor,) = node.outputs
        tensors[id(tensor)] = output
        yield Step(
            layer=node.operation,
            producers=tuple(source._keras_history.operation.name for source in node.input_tensors),
            inputs=tuple(tensors[id(source)] for source in node.input_tensors),
            output=output,
        )
        for finished in {id(source) for source in (tensor, *node.input_tensors)}:
            if last_use.get(finished, number) == number:
                del tensors[finished]
