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

from bstf import layers, layouts
from bstf.blocks import BlockShape

MASKED = {plain: getattr(layers, f"Masked{plain.__name__}") for plain in layouts.LAYOUTS}
PLAIN = {masked: plain for plain, masked in MASKED.items()}

DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)

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


class Inside(NamedTuple):
    """A layer at any depth: its path, and the innermost layer around it that is no model, None if there is none."""

    path: str
    layer: keras.Layer
    owner: keras.Layer | None


def everywhere(model: keras.Model) -> Iterator[Inside]:
    """Every layer of a model once, those inside other layers and subclassed models too, each with a path of its own."""
    seen, paths = set(), set()

    def walk(outer: keras.Layer, prefix: str, owner: keras.Layer | None) -> Iterator[Inside]:
        for layer in outer._flatten_layers(include_self=False, recursive=False):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            path = next(one for one in _numbered(prefix + layer.name) if one not in paths)
            paths.add(path)
            if not is_graph(layer):
                yield Inside(path, layer, owner)
            yield from walk(layer, f"{path}/", owner if isinstance(layer, keras.Model) else layer)

    return walk(model, "", None)


def _numbered(path: str) -> Iterator[str]:
    """The path, then with numbers: layers of a subclassed model may have one name."""
    yield path
    yield from (f"{path}_{number}" for number in itertools.count(2))


def masked_places(model: keras.Model) -> list[Place]:
    """The masked layers of a model, wherever they stand.

    Raises:
        ValueError: it has none.
    """
    masked = [Place(path, layer) for path, layer, _ in everywhere(model) if is_masked(layer)]
    if not masked:
        raise ValueError(
            f"'{model.name}' has no masked layer to make sparser: give the model that bstf.sparsify(model, ratio=0) "
            "returns, or give a subclassed one masked layers with bstf.sparsify_layers(model)."
        )
    return masked


def is_graph(layer: keras.Layer) -> bool:
    """Whether a layer is a model whose graph Keras knows: Sequential or functional."""
    return isinstance(layer, (keras.Sequential, Functional))


def is_masked(layer: keras.Layer) -> bool:
    """Whether a layer is one of `bstf.layers`, with a Γ."""
    return type(layer) in PLAIN


def effective_kernel(layer: keras.Layer) -> np.ndarray:
    """The kernel (..., cin, cout) that a built layer computes with, as float."""
    kernel = layer.masked_kernel() if is_masked(layer) else getattr(layer, layouts.layout(layer).kernel)
    return layouts.to_planes(layer, ops.convert_to_numpy(kernel))


def ineligible(layer: keras.Layer, block: BlockShape) -> str | None:
    """Why a built layer can't get a Γ of such blocks, in a few words; None if it can."""
    if type(layer) not in MASKED and not is_masked(layer):
        return f"{type(layer).__name__} has no block-sparse form"
    return unfit(layer, block)


def unfit(layer: keras.Layer, block: BlockShape) -> str | None:
    """Why the kernel of a layer that has a layout doesn't divide into such blocks; None if it does."""
    reason = layouts.refusal(layer)
    if reason is not None:
        return reason
    if getattr(layer, "quantization_mode", None) is not None:
        return f"quantised by Keras ({layer.quantization_mode})"
    cin, cout = layouts.plane_shape(layer)[-2:]
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
        Layers of `MASKED` and masked ones with their paths, in the model's order.

    Raises:
        ValueError: `layers` names none of the model's layers, or isn't a regular expression.

    Example:
        >>> [path for path, layer in eligible(model, BlockShape(8, 8))]
    """
    everything = list(places(model))
    chosen = selected(everything, layers, model.name)
    return [place for place in everything if id(place.layer) in chosen and ineligible(place.layer, block) is None]


def selected(everything: Sequence[Place], layers: Selection, model: str) -> set[int]:
    """The ids of the layers that the user wants converted, of all those of a model of this name."""
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
            raise ValueError(f"layers={layers!r} matches the whole name of no layer of '{model}'.")
        return chosen
    names = set(layers)
    unknown = names - {name for path, layer in everything for name in (path, layer.name)}
    if unknown:
        raise ValueError(f"'{model}' has no layers named {', '.join(sorted(map(repr, unknown)))}.")
    return {id(layer) for path, layer in everything if path in names or layer.name in names}


def nodes(graph: keras.Model) -> list[Any]:
    """The nodes of Keras of everything that a Sequential or functional model calls, in the order of computation."""
    function = graph._functional if isinstance(graph, keras.Sequential) else graph
    depths = function._nodes_by_depth if function is not None else {}  # none before a Sequential model is built
    return [node for depth in sorted(depths, reverse=True) for node in depths[depth] if not node.is_input]


def positions(model: keras.Model) -> dict[int, int | None]:
    """How often each layer multiplies its kernel for one input of the model, by id; None where a size is open.

    At each of its output positions, a transposed convolution at each of its inputs'. Those of an EinsumDense are as
    many, and its inputs' sizes are known where those of its outputs are open.
    """
    counts: dict[int, int | None] = {}

    def walk(graph: keras.Model) -> None:
        for node in nodes(graph):
            layer = node.operation
            if is_graph(layer):
                walk(layer)
                continue
            if isinstance(layer, (keras.layers.Conv2DTranspose, keras.layers.EinsumDense)):
                shape = node.arguments.keras_tensors[0].shape
                axes = layouts.input_axes(layer, len(shape))
            else:
                shape = node.outputs[0].shape
                axes = layouts.output_axes(layer, len(shape))
            sizes = [size for axis, size in enumerate(shape) if axis and axis not in axes]
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
