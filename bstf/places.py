"""The layers of a model: where they stand, which of them can be block sparse, how often each is applied."""

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops
from keras.src.models.functional import Functional  # Keras exports no name for it

from bstf.blocks import BlockShape
from bstf.layers import MaskedConv2D, MaskedDense

MASKED = {keras.layers.Conv2D: MaskedConv2D, keras.layers.Dense: MaskedDense}
PLAIN = {masked: plain for plain, masked in MASKED.items()}

# Layers that multiply their whole kernel at every output position.
CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Dense,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
)

Selection = str | Iterable[str] | Callable[[keras.Layer], bool] | None


class Place(NamedTuple):
    """A layer and where it stands: its name after the names of the nested models around it."""

    path: str
    layer: keras.Layer


def places(model: keras.Model) -> Iterator[Place]:
    """Every layer of a model once, in the order of `model.layers`, nested models replaced by their layers."""
    seen = set()

    def walk(graph: keras.Model, prefix: str) -> Iterator[Place]:
        for layer in graph.layers:
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            if is_graph(layer):
                yield from walk(layer, f"{prefix}{layer.name}/")
            else:
                yield Place(prefix + layer.name, layer)

    return walk(model, "")


def is_graph(layer: keras.Layer) -> bool:
    """Whether a layer is a model whose graph Keras knows: Sequential or functional."""
    return isinstance(layer, (keras.Sequential, Functional))


def is_masked(layer: keras.Layer) -> bool:
    """Whether a layer is a MaskedConv2D or a MaskedDense."""
    return type(layer) in PLAIN


def effective_kernel(layer: keras.Layer) -> np.ndarray:
    """The kernel (..., cin, cout) that a built layer computes with, as float."""
    return ops.convert_to_numpy(layer.masked_kernel() if is_masked(layer) else layer.kernel)


def ineligible(layer: keras.Layer, block: BlockShape) -> str | None:
    """Why a built layer can't get a Γ of such blocks, in a few words; None if it can."""
    if type(layer) not in MASKED and not is_masked(layer):
        return f"{type(layer).__name__} has no block-sparse form"
    return unfit(layer, block)


def unfit(layer: keras.Layer, block: BlockShape) -> str | None:
    """Why the kernel of a convolution or dense layer doesn't divide into such blocks; None if it does."""
    if getattr(layer, "groups", 1) != 1:
        return f"grouped (groups={layer.groups})"
    if getattr(layer, "quantization_mode", None) is not None:
        return f"quantised by Keras ({layer.quantization_mode})"
    cin, cout = layer.kernel.shape[-2:]
    if cin < block.bi:
        return f"{cin} input channel{'s' * (cin > 1)}, fewer than the {block.bi} of a block"
    if cout < block.bo:
        return f"{cout} output channel{'s' * (cout > 1)}, fewer than the {block.bo} of a block"
    return None


def eligible(model: keras.Model, block: BlockShape, layers: Selection = None) -> list[Place]:
    """The layers of a built model that can get a Γ of such blocks, of those that are selected.

    Args:
        model: a built model.
        block: the block's shape.
        layers: None for all, a regular expression for the whole name, names, or a callable `layer -> bool`.

    Returns:
        Conv2D, Dense and masked layers with their paths, in the model's order.

    Raises:
        ValueError: `layers` names none of the model's layers, or isn't a regular expression.

    Example:
        >>> [path for path, layer in eligible(model, BlockShape(8, 8))]
    """
    chosen = selected(model, layers)
    return [place for place in places(model) if id(place.layer) in chosen and ineligible(place.layer, block) is None]


def selected(model: keras.Model, layers: Selection) -> set[int]:
    """The ids of the layers that the user wants converted."""
    everything = list(places(model))
    if layers is None:
        return {id(layer) for _, layer in everything}
    if callable(layers):
        return {id(layer) for _, layer in everything if layers(layer)}
    if isinstance(layers, str):
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise ValueError(f"layers={layers!r} is not a regular expression: {error}.") from error
        chosen = {id(layer) for path, layer in everything if pattern.fullmatch(path) or pattern.fullmatch(layer.name)}
        if not chosen:
            raise ValueError(f"layers={layers!r} matches the whole name of no layer of '{model.name}'.")
        return chosen
    names = set(layers)
    unknown = names - {name for path, layer in everything for name in (path, layer.name)}
    if unknown:
        raise ValueError(f"'{model.name}' has no layers named {', '.join(sorted(map(repr, unknown)))}.")
    return {id(layer) for path, layer in everything if path in names or layer.name in names}


def output_positions(model: keras.Model) -> dict[int, int | None]:
    """Output positions (pixels) that each layer computes for one input, by id; None where a size is open."""
    counts: dict[int, int | None] = {}

    def walk(graph: keras.Model) -> None:
        function = graph._functional if isinstance(graph, keras.Sequential) else graph
        if function is None:
            return
        for node in itertools.chain.from_iterable(function._nodes_by_depth.values()):
            layer = node.operation
            if is_graph(layer):
                walk(layer)
                continue
            shape = node.outputs[0].shape
            first = getattr(layer, "data_format", None) == "channels_first"
            sizes = shape[2:] if first else shape[1:-1]
            before = counts.get(id(layer), 0)
            counts[id(layer)] = None if None in (before, *sizes) else before + math.prod(sizes)

    if is_graph(model):
        walk(model)
    return counts


def gammas_of(layers: Iterable[Place], block: BlockShape) -> dict[str, np.ndarray]:
    """Γ of the layers that are masked in such blocks already, by their paths."""
    masked = [place for place in layers if is_masked(place.layer) and place.layer.block == block]
    return {path: ops.convert_to_numpy(layer.gamma) for path, layer in masked}


@contextlib.contextmanager
def replaced_calls(layers: Sequence[keras.Layer], replacement: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, `replacement(layer, layer.call, *arguments)` computes in place of `layer.call`."""
    before = [vars(layer).get("call") for layer in layers]
    for layer in layers:
        layer.call = functools.partial(replacement, layer, layer.call)
    try:
        yield
    finally:
        for layer, own in zip(layers, before):
            del layer.call
            if own is not None:
                layer.call = own
