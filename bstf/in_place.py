"""Sparsity without a copy: masked layers in a subclassed model, and fewer blocks in any model that has them.

`bstf.sparsify` copies a model along its graph, which a subclassed model doesn't have. `sparsify_layers` replaces the
layers in the model itself, `prune` chooses Γ once there are weights to choose by.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from bstf import layouts
from bstf.blocks import BlockShape
from bstf.conversion import clone, transfer_weights
from bstf.importance import Importance, between_layers, model_scores
from bstf.importance import check as check_importance
from bstf.objective import Loss
from bstf.places import MASKED, Place, Selection, everywhere, is_graph, masked_places, places, selected, unfit
from bstf.selection import check_ratio, check_scope, layer_ratios, select_all


def sparsify_layers(model: keras.Model, block: int | Sequence[int] = 8, *, layers: Selection = None) -> None:
    """Gives a subclassed model masked layers in place of its own, with Γ of ones; changes the model.

    Looks at the attributes of the model and of all layers in it, and into lists, tuples, sets and dictionaries there.
    A layer that several of them hold stays one. Sequential and functional models in it are replaced by what
    `bstf.sparsify` makes of them with ratio 0. Layers that aren't built yet become masked ones whatever their input
    channels will be; those that are keep their weights.

    Then train with `bstf.callbacks.BlockSparsity`, or choose Γ at once with `bstf.prune`. Called at the end of the
    model's own `__init__` it makes `model.save` and `keras.models.load_model` work as usual; otherwise call it again
    on a fresh model before `load_weights`.

    Args:
        model: a subclassed model, before it is trained. Of a Sequential or functional one only the layers inside other
            layers are replaced: `bstf.sparsify` copies the rest.
        block: an int, or (input channels, output channels) of a block.
        layers: which layers to replace, as in `bstf.sparsify`.

    Raises:
        ValueError: no layer can be replaced, the model has been trained already, or `layers` names none of its layers.
        TypeError: `model` isn't a Keras model.

    Example:
        >>> model = MyModel()
        >>> bstf.sparsify_layers(model, block=8)
        >>> model.compile("adam", "sparse_categorical_crossentropy")
        >>> model.fit(x, y, epochs=20, callbacks=[bstf.callbacks.BlockSparsity(bstf.schedules.Cubic(0.5, end=10))])
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"sparsify_layers takes a keras.Model; got {type(model).__name__}.")
    shape = BlockShape.of(block)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        raise ValueError(
            f"'{model.name}' has been trained: its optimizer holds the variables of the layers that would go. Replace "
            "layers first, or compile the model with a new optimizer."
        )
    everything = [Place(path, layer) for path, layer, _ in everywhere(model)]
    chosen = selected(everything, layers, model.name)
    fixed = {id(layer) for _, layer in places(model)} if is_graph(model) else set()
    # A variable that another layer holds as well, as SpectralNormalization does, would stay behind there.
    held = collections.Counter(
        id(one) for layer in (model, *(one.layer for one in everything)) for one in layer._trainable_variables
    )
    tied = {id(layer) for _, layer in everything if any(held[id(one)] > 1 for one in layer._trainable_variables)}
    wanted = {id(layer) for _, layer in everything if id(layer) in chosen - fixed - tied and _replaceable(layer, shape)}
    if not wanted:
        raise ValueError(
            f"'{model.name}' has no layer that sparsify_layers could replace: it looks for {', '.join(_names())} in "
            "attributes, lists and dictionaries. Layers that build() creates don't exist before the model is called; "
            "bstf.sparsify copies a Sequential or functional model."
        )
    _Replacement(shape, wanted).inside(model)
    model.train_function = model.test_function = model.predict_function = None  # traced with the layers before


def prune(
    model: keras.Model,
    ratio: float | Mapping[str, float] = 0.5,
    *,
    importance: str | Importance = "l2",
    scope: str = "layer",
    min_per_line: int = 1,
    data: Any = None,
    loss: Loss = None,
    seed: int = 0,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> None:
    """Zeroes blocks of a model's masked layers, at once; changes the model. What is dead stays dead.

    Args:
        model: with masked layers that are built, of any kind.
        ratio: fraction of zero blocks, or a dictionary of them by layers' names, as in `bstf.sparsify`.
        importance: how blocks are compared, as in `bstf.sparsify`.
        scope: which blocks compete with each other, as in `bstf.sparsify`.
        min_per_line: kept blocks that every row and column of Γ needs at least.
        data: what criteria that need data look at, as in `bstf.sparsify`.
        loss: what they derive, as in `bstf.sparsify`.
        seed: of the random vectors of "hessian".
        optimizer: the one that trains the model, if it has taken a step; None for the one it is compiled with.

    Raises:
        ValueError: the model has no masked layer, or one that isn't built, or an argument is out of range.

    Example:
        >>> bstf.sparsify_layers(model, block=8)
        >>> model(x[:1])
        >>> bstf.prune(model, ratio=0.5)
    """
    check_scope(scope)
    check_importance(importance)
    masked = masked_places(model)
    paths = [path for path, _ in masked]
    ratio = layer_ratios(paths, ratio) if isinstance(ratio, Mapping) else check_ratio(ratio)
    how = {"importance": importance, "scope": scope, "min_per_line": min_per_line, "data": data, "loss": loss}
    take_blocks(model, masked, ratio, optimizer or getattr(model, "optimizer", None), **how, seed=seed)


def take_blocks(
    model: keras.Model,
    masked: Sequence[Place],
    ratio: float | Mapping[str, float],
    optimizer: keras.optimizers.Optimizer | None,
    *,
    importance: str | Importance,
    scope: str,
    min_per_line: int,
    data: Any,
    loss: Loss,
    seed: int,
) -> None:
    """Brings masked layers to a ratio, one for all or one for each path; scores blocks only if some go.

    Raises:
        ValueError: as `prune`.
    """
    for path, layer in masked:
        if not layer.built:
            raise ValueError(f"Layer '{path}' has no weights yet: call the model on data once, or let it load them.")
    previous = {path: ops.convert_to_numpy(layer.gamma) for path, layer in masked}
    how = {"scope": scope, "previous": previous, "lasting": True}
    possible = select_all(previous, ratio, min_per_line, **how)  # how many blocks go, without any scores
    if all((possible[path] == gamma).all() for path, gamma in previous.items()):
        return
    blocks = {path: layer.block for path, layer in masked}
    scores = model_scores(model, masked, blocks, importance, data=data, loss=loss, seed=seed)
    if scope == "global":
        scores = between_layers(scores, importance, previous)
    gammas = select_all(scores, ratio, min_per_line, **how)
    for path, layer in masked:
        if (gammas[path] != previous[path]).any():
            layer.set_gamma(gammas[path], optimizer)


def _names() -> list[str]:
    return [plain.__name__ for plain in MASKED]


def _replaceable(layer: keras.Layer, block: BlockShape) -> bool:
    """Whether a layer can become a masked one; of a layer without weights that depends on its arguments alone."""
    if type(layer) not in MASKED:
        return False
    return (unfit(layer, block) if layer.built else layouts.refusal(layer)) is None


class _Replacement:
    """Replaces layers wherever a model holds them; each by one masked layer, however often it is held."""

    def __init__(self, block: BlockShape, wanted: set[int]) -> None:
        self.block, self.wanted = block, wanted
        self.replaced: dict[int, keras.Layer] = {}
        self.originals: list[keras.Layer] = []  # alive, so that no other layer gets one's id
        self.seen: set[int] = set()

    def inside(self, outer: keras.Layer) -> None:
        """Replaces what a layer holds, and what those layers hold."""
        if id(outer) in self.seen:
            return
        self.seen.add(id(outer))
        held = list(outer._flatten_layers(include_self=False, recursive=False))
        if not (is_graph(outer) and outer.built):  # the layers of a graph stand in it: `masked` replaces it as a whole
            exchanges = {id(layer): self.masked(layer) for layer in held}
            for layer in held:
                if exchanges[id(layer)] is not layer and outer._tracker.is_in_store("layers", layer):
                    outer._tracker.replace_tracked_value("layers", layer, exchanges[id(layer)])
            for name, value in list(vars(outer).items()):
                changed = _exchanged(value, exchanges)
                if changed is not value:
                    vars(outer)[name] = changed
            held = list(exchanges.values())
        for layer in held:
            self.inside(layer)

    def masked(self, layer: keras.Layer) -> keras.Layer:
        """What stands for a layer from now on: itself, where nothing is to be replaced."""
        if id(layer) not in self.replaced:
            self.originals.append(layer)
            self.replaced[id(layer)] = self._new(layer)
        return self.replaced[id(layer)]

    def _new(self, layer: keras.Layer) -> keras.Layer:
        if is_graph(layer) and layer.built:
            if not any(id(one) in self.wanted for _, one in places(layer)):
                return layer
            return clone(layer, self.masked)[0]  # other layers stay, and so what they share and hold
        if id(layer) not in self.wanted:
            return layer
        new = MASKED[type(layer)].from_config({**layer.get_config(), "block": list(self.block)})
        if layer.built:
            new.build_from_config(layer.get_build_config())
            transfer_weights(layer, new)
        return new


def _exchanged(value: Any, exchanges: Mapping[int, keras.Layer]) -> Any:
    """A value with layers exchanged: lists, sets and dictionaries are changed, tuples made anew."""
    if isinstance(value, keras.Layer):
        return exchanges.get(id(value), value)
    # Keras' own lists, dictionaries and sets refuse new layers in what is built; the plain ones' methods don't.
    if isinstance(value, list):
        for index, item in enumerate(value):
            list.__setitem__(value, index, _exchanged(item, exchanges))
    elif isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(value, key, _exchanged(item, exchanges))
    elif isinstance(value, set):
        for item in [item for item in value if id(item) in exchanges]:
            set.discard(value, item)
            set.add(value, exchanges[id(item)])
    elif isinstance(value, tuple):
        items = [_exchanged(item, exchanges) for item in value]
        if any(one is not other for one, other in zip(items, value)):
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
