"""sparsify and densify: copies of a model with other layers of the same names and the same weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.saving.serialization_lib import SafeModeScope

from bstf import layouts
from bstf.allocation import auto_ratios
from bstf.blocks import BlockShape
from bstf.importance import TRAINED, Importance, between_layers, model_scores
from bstf.importance import check as check_importance
from bstf.layers import ARGUMENTS, GAMMA, SOFT_GAMMA, STRAIGHT_THROUGH, check_group_lasso, check_trainable_gamma
from bstf.objective import Loss
from bstf.places import MASKED, PLAIN, Selection, eligible, everywhere, gammas_of, is_graph, is_masked, places
from bstf.selection import check_ratio, check_scope, comparable, layer_ratios, select_all


def sparsify(
    model: keras.Model,
    block: int | Sequence[int] = 8,
    ratio: float | str | Mapping[str, float] = 0.5,
    *,
    importance: str | Importance = "l2",
    scope: str = "layer",
    min_per_line: int = 1,
    layers: Selection = None,
    data: Any = None,
    loss: Loss = None,
    seed: int = 0,
    target_macs: float | None = None,
    target_bytes: float | None = None,
    trainable_gamma: bool | str = False,
    gamma_regularizer: str | keras.regularizers.Regularizer | None = None,
    group_lasso: float = 0.0,
) -> keras.Model:
    """Copies a model with block-sparse convolutions and dense layers; the original stays as it is.

    Every eligible `Conv1D`, `Conv2D`, `Conv3D`, `Conv2DTranspose`, `SeparableConv2D`, `Dense` and `EinsumDense`
    becomes its masked form of the same name, with the same weights on the blocks that Γ keeps and zeros elsewhere.
    `bstf.report` lists what was left alone, and why. In a layer that is masked in such blocks already, what is dead
    stays dead.

    Args:
        model: a Sequential or functional model, with its weights; models nested in it are converted too.
        block: an int, or (input channels, output channels) of a block.
        ratio: the fraction of blocks that become zero, in [0, 1): each layer gets `floor(ratio * blocks +
            1/2)` zero blocks, less only what `min_per_line` forbids. Or a dictionary of ratios by regular
            expressions (or plain names) that match a whole layer name or "model/layer" path; the first that
            matches counts, and a layer that none matches gets ratio 0: Γ, but no zeros. Or "auto": each
            layer gets the ratio by which the model meets `target_macs` or `target_bytes` at the least growth
            of the loss, measured on `data` one layer at a time without training back (see `bstf.sensitivity`
            and `bstf.allocation`), to within rounding to whole blocks.
        importance: how blocks are compared. By their weights: "l1", "l2", "variance", "tensor_variance"; by the Γ
            that was trained: "gamma"; by their weights and inputs: "wanda"; by what the loss on `data` does
            without them: "taylor", "fisher", "hessian" (see `bstf.importance` for the formulas); or a callable
            `(kernel, block) -> scores` with kernel (..., cin, cout) and one score a block, larger means keep.
        scope: which blocks compete with each other. "layer": those of a layer. "column" or "row": those of a
            column or row of Γ, all of which then keep as many blocks, so that cores and threads that share a
            layer's outputs or inputs have even loads. "global": those of all layers together, by scores that
            are divided by their layer's mean magnitude (see `bstf.selection.comparable` for why) unless they
            are changes of the loss; `ratio` is then that of all blocks together.
        min_per_line: kept blocks that every row and column of Γ needs at least.
        layers: which layers to convert, None for all: a regular expression that matches the whole name,
            names, or a callable `layer -> bool`. Inside nested models "model/layer" works too.
        data: what ratio "auto" measures with, and what the last four criteria of names look at: a tuple `(x, y)`
            of arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or any iterable of batches `(x, y)`;
            "wanda" takes x without y too. It is read once by each of the two; a few hundred training examples
            do.
        loss: a Keras loss, its name, or a callable `(labels, outputs) -> loss`; None for the one the model is
            compiled with.
        seed: of the random vectors of "hessian".
        target_macs: with ratio "auto", the fraction of the dense model's multiply-adds that may remain, in
            (0, 1]; what layers cost that can't be sparse is counted.
        target_bytes: with ratio "auto", the same for the bytes of all kernels (biases and batch normalisation
            aren't counted), whatever the number format.
        trainable_gamma: whether to train Γ with the weights (the paper's section III-D). True: besides the blocks
            that `ratio` takes, usually 0, the kernel of every block is multiplied by a trainable number, at first 1.
            "straight_through": the numbers are scores, at first those of `importance`; the forward pass keeps the
            blocks of the largest, `ratio` of each layer's being zero, and the gradient reaches all. Either way no
            block dies yet: call `sparsify(trained, ratio, importance="gamma")` after the training.
        gamma_regularizer: a Keras regulariser of the trained Γ of each layer, such as those of `bstf.penalties`.
        group_lasso: strength of a penalty on the norms of the blocks (`bstf.penalties.GroupLasso`) that a training
            adds to its loss. It drives blocks towards zero before they are chosen: with ratio 0 first, then without
            it and with a ratio. The penalty is gone in any further copy that isn't given it again.

    Returns:
        The copy, not compiled: compile it with a new optimizer.

    Raises:
        ValueError: an argument is out of range, the model isn't built or can't be cloned, a weight is NaN, or
            a criterion misses data or a loss, or can't compute with them.
        TypeError: `model` isn't a Keras model, or `data` is nothing that can be read.

    Example:
        >>> sparse = bstf.sparsify(model, block=8, ratio=0.5)
        >>> sparse.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        >>> sparse.fit(x, y)

        With a trained Γ:

        >>> soft = bstf.sparsify(model, ratio=0.5, trainable_gamma="straight_through")
        >>> soft.compile("adam", "sparse_categorical_crossentropy")
        >>> soft.fit(x, y)
        >>> sparse = bstf.sparsify(soft, ratio=0.5, importance="gamma")
    """
    shape = BlockShape.of(block)
    check_scope(scope)
    check_trainable_gamma(trainable_gamma, gamma_regularizer)
    check_group_lasso(group_lasso)
    _check_targets(ratio, scope, data, target_macs, target_bytes)
    check_importance(importance)
    check_model(model, "sparsify")
    targets = eligible(model, shape, layers)
    _check_finite(model)
    previous = gammas_of(targets, shape)
    scores = model_scores(model, targets, shape, importance, data=data, loss=loss, seed=seed)
    if scope == "global":
        scores = between_layers(scores, importance, previous)
    if isinstance(ratio, Mapping):
        ratio = layer_ratios(list(scores), ratio)
    elif ratio == "auto":
        wanted = {"macs": target_macs, "weights": target_bytes, "min_per_line": min_per_line, "scope": scope}
        ratio = auto_ratios(model, targets, scores, shape, data, loss, previous=previous, **wanted)
    chosen = select_all(scores, ratio, min_per_line, scope=scope, previous=previous, lasting=True)
    paths = {id(layer): path for path, layer in targets}
    training = {"trainable_gamma": trainable_gamma, "gamma_regularizer": gamma_regularizer, "group_lasso": group_lasso}

    def masked(layer: keras.Layer) -> keras.Layer:
        if id(layer) not in paths:
            return same(layer)
        config = {**layer.get_config(), "block": list(shape), "gamma_ratio": 0.0, **training}
        if trainable_gamma == STRAIGHT_THROUGH:
            config["gamma_ratio"] = float((chosen[paths[id(layer)]] == 0).mean())
        return (type(layer) if is_masked(layer) else MASKED[type(layer)]).from_config(config)

    copy, copies = clone(model, masked)
    for layer, new in copies:
        transfer_weights(layer, new)
        path = paths.get(id(layer))
        if path is None:
            continue
        if trainable_gamma == STRAIGHT_THROUGH:
            _start_scores(layer, new, scores[path])
            new.set_gamma(previous.get(path, np.ones_like(chosen[path])))
        else:
            if importance == TRAINED and layer.trainable_gamma != trainable_gamma:
                layouts.variable(new).assign(_kernel_to_round(layer))
            new.set_gamma(chosen[path])
    return copy


def _start_scores(layer: keras.Layer, new: keras.Layer, scores: np.ndarray) -> None:
    """Gives a straight-through layer the scores of the criterion, unless they have been trained already."""
    if not (is_masked(layer) and layer.trainable_gamma == STRAIGHT_THROUGH and layer.block == new.block):
        new.soft_gamma.assign(comparable({"": scores})[""])


def _kernel_to_round(layer: keras.Layer) -> Any:
    """The kernel of a layer whose trained Γ is rounded now.

    A floor for rows and columns may keep blocks that the forward pass of a straight-through layer leaves out:
    they get their weights back.
    """
    whole = layer.trainable_gamma == STRAIGHT_THROUGH
    return getattr(layer, layouts.layout(layer).kernel) if whole else layer.masked_kernel()


def densify(model: keras.Model) -> keras.Model:
    """Copies a model with plain layers in place of the masked ones, the zeros in their kernels.

    Args:
        model: a Sequential or functional model, nested ones included.

    Returns:
        The copy, not compiled: the same layer names and outputs, and nothing of bstf in it.

    Raises:
        ValueError: the model isn't built or can't be cloned.
        TypeError: `model` isn't a Keras model.

    Example:
        >>> bstf.densify(sparse).save("plain.keras")
    """
    check_model(model, "densify")
    hidden = [path for path, layer, owner in everywhere(model) if owner is not None and is_masked(layer)]
    if hidden:
        raise ValueError(
            f"Layer '{hidden[0]}' is masked inside a layer that is no model, where densify and export can't reach it: "
            "leave it out of sparsify_layers with its argument `layers`."
        )

    def plain(layer: keras.Layer) -> keras.Layer:
        if not is_masked(layer):
            return same(layer)
        config = {name: value for name, value in layer.get_config().items() if name not in ARGUMENTS}
        return PLAIN[type(layer)].from_config(config)

    copy, copies = clone(model, plain)
    for layer, new in copies:
        transfer_weights(layer, new)
    return copy


def transfer_weights(source: keras.Layer, target: keras.Layer) -> None:
    """Copies the weights of a layer or model into another with the same layers, masked or plain.

    A weights file of a dense model can't be loaded into a masked one - Keras files weights under the class of
    their layer: load it into the dense model, then transfer. Γ of a masked target survives a plain source; it
    is taken over from a masked one with the same blocks. A trained Γ that the target can't have goes into its
    kernel, which is multiplied by it.

    Args:
        source: where the weights come from.
        target: the same layers in the same order, of the same shapes.

    Raises:
        ValueError: the two don't have the same layers; layers before the first difference are transferred.

    Example:
        >>> dense.load_weights("dense.weights.h5")
        >>> transfer_weights(dense, sparse)
    """
    sources, targets = _owners(source), _owners(target)
    for old, new in zip(sources, targets):
        store: dict[str, Any] = {}
        old.save_own_variables(store)
        # Copies: JAX gives a variable's memory to the step that trains it, which would take it from the other model.
        store = {key: np.array(ops.convert_to_numpy(value)) for key, value in store.items()}
        gamma, soft = (store.pop(key, None) if is_masked(old) else None for key in (GAMMA, SOFT_GAMMA))
        fits = gamma is not None and is_masked(new) and old.block == new.block
        if is_masked(new):
            store[GAMMA] = gamma if fits else ops.convert_to_numpy(new.gamma)
        if is_masked(new) and new.trainable_gamma:
            store[SOFT_GAMMA] = ops.convert_to_numpy(new.soft_gamma)
        keeps_soft = fits and old.trainable_gamma == new.trainable_gamma
        if soft is not None and keeps_soft:
            store[SOFT_GAMMA] = soft
        try:
            new.load_own_variables(store)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"The weights of layer '{old.name}' don't fit layer '{new.name}' of '{target.name}': {error}"
            ) from error
        if soft is not None and not keeps_soft:
            kernel = old.masked_kernel()  # what trained Γ does is in the weights then
            layouts.variable(new).assign(new._mask(kernel) if is_masked(new) else kernel)
    if len(sources) != len(targets):
        raise ValueError(
            f"'{source.name}' has {len(sources)} layers with weights and '{target.name}' has {len(targets)}: "
            "weights are transferred between models with the same layers only."
        )


def _owners(layer: keras.Layer) -> list[keras.Layer]:
    """The layer and the layers inside it, as far as they have variables of their own."""
    return [one for one in layer._flatten_layers() if one._trainable_variables or one._non_trainable_variables]


def check_model(model: keras.Model, action: str) -> None:
    """Raises a TypeError or ValueError unless it is a built model that can be copied; `action` is who wants to."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"{action} takes a keras.Model; got {type(model).__name__}.")
    if not is_graph(model):
        raise ValueError(
            f"{action} can't copy '{model.name}': it is a subclassed model (class {type(model).__name__}), "
            "and Keras doesn't record which layers such a model calls. Make it functional first, which keeps "
            "its layers and weights: inputs = keras.Input(shape); keras.Model(inputs, model.call(inputs)). "
            "Or replace its layers in place: bstf.sparsify_layers(model)."
        )
    if not model.built:
        raise ValueError(
            f"{action} needs the weights of '{model.name}', which isn't built yet: start it with a "
            "keras.Input or call it on data once."
        )


def _check_targets(ratio: Any, scope: str, data: Any, macs: float | None, weights: float | None) -> None:
    """Raises a ValueError unless there is a ratio, or "auto" with what it needs."""
    targets = (macs is not None) + (weights is not None)
    if ratio != "auto":
        if not isinstance(ratio, Mapping):
            check_ratio(ratio)
        if targets:
            raise ValueError("target_macs and target_bytes choose the ratios of layers: use them with ratio='auto'.")
    elif targets != 1:
        raise ValueError("ratio='auto' needs a target: give target_macs or target_bytes, one of them.")
    elif scope == "global":
        raise ValueError("scope='global' and ratio='auto' both choose the ratios of layers: use one of them.")
    elif data is None:
        raise ValueError("ratio='auto' measures the loss of sparse layers: give data=(x, y) or batches of it.")


def _check_finite(model: keras.Model) -> None:
    for path, layer in places(model):
        for weight in layer.weights:
            value = ops.convert_to_numpy(weight)
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                raise ValueError(
                    f"Layer '{path}' has NaN or infinite values in its {weight.name}: blocks can't be "
                    "compared by such weights. Load a checkpoint from before the training diverged."
                )


def clone(
    model: keras.Model, replace: Callable[[keras.Layer], keras.Layer]
) -> tuple[keras.Model, list[tuple[keras.Layer, keras.Layer]]]:
    """Rebuilds a model from replaced layers.

    Args:
        model: built, Sequential or functional.
        replace: gives the new layer for each.

    Returns:
        The copy, not compiled and without the weights, and every (layer, replacement), nested ones too.

    Raises:
        ValueError: what `replace` raises.

    Example:
        >>> copy, pairs = clone(model, same)
    """
    copies: dict[int, tuple[keras.Layer, keras.Layer]] = {}

    def copied(layer: keras.Layer) -> keras.Layer:
        if id(layer) not in copies:
            copies[id(layer)] = layer, graph(layer) if is_graph(layer) else replace(layer)
        return copies[id(layer)][1]

    def graph(one: keras.Model) -> keras.Model:
        compiled, one.compiled = one.compiled, False  # Keras would copy, and check, loss and optimizer too
        try:
            if isinstance(one, keras.Sequential):
                new = keras.models.clone_model(one, clone_function=copied)
            else:
                # Keras names the inputs of a clone after its tensors, not after the inputs.
                inputs = keras.tree.map_structure(_same_input, one.input)
                new = keras.models.clone_model(one, clone_function=copied, input_tensors=inputs)
        finally:
            one.compiled = compiled
        if not new.built:
            new.build(one.input_shape)  # a Sequential without an Input
        if not one.trainable:
            new.trainable = False
        return new

    copy = graph(model)
    # Operations such as keras.ops.relu stand in a graph too, and have no weights.
    layers = [pair for pair in copies.values() if isinstance(pair[0], keras.Layer) and not is_graph(pair[0])]
    return copy, layers


def _same_input(tensor: keras.KerasTensor) -> keras.KerasTensor:
    layer = tensor._keras_history.operation
    return type(layer).from_config(layer.get_config()).output


def same(layer: keras.Layer) -> keras.Layer:
    """A new layer of the same class and config."""
    try:
        with SafeModeScope(False):  # a Lambda of the user's own model in memory, not one from a file
            return type(layer).from_config(layer.get_config())
    except Exception as error:
        raise ValueError(
            f"Layer '{layer.name}' (class {type(layer).__name__}) can't be copied: give its class a "
            f"get_config with every argument of its constructor. Keras says: {error}"
        ) from error
