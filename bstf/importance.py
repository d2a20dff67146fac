"""How much every block of a kernel matters: kernel -> one score a block, larger means keep.

A criterion is a function `(kernel, block) -> scores`, kernel (..., cin, cout) and scores
(ceil(cin / bi), ceil(cout / bo)); the ones below go by name, any other callable by itself. Those of
`STATISTICS` also need what data say about the kernel's weights: `(kernel, block, statistic) -> scores`.
"gamma" is the Γ that was trained with the kernel, and not a function of it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from bstf import curvature
from bstf.blocks import BlockShape, block_reduce, grid, nonzero_blocks
from bstf.layers import STRAIGHT_THROUGH
from bstf.objective import Loss
from bstf.places import Place, effective_kernel, is_masked
from bstf.selection import comparable
from bstf.suggestion import suggestion

Importance = Callable[..., np.ndarray]
TRAINED = "gamma"


def l1(kernel: np.ndarray, block: BlockShape) -> np.ndarray:
    """Sum of |w| over the block."""
    return block_reduce(np.abs(kernel), block, np.sum)


def l2(kernel: np.ndarray, block: BlockShape) -> np.ndarray:
    """Euclidean norm of the block: sqrt(sum of w^2)."""
    return np.sqrt(block_reduce(np.square(kernel), block, np.sum))


def variance(kernel: np.ndarray, block: BlockShape) -> np.ndarray:
    """Population variance of the block's weights, mean of (w - mean)^2: the paper's default criterion."""
    return block_reduce(kernel, block, np.var)


def tensor_variance(kernel: np.ndarray, block: BlockShape) -> np.ndarray:
    """Mean of (w - mean)^2 over the block, with the mean of the whole kernel: the paper's other variance."""
    return block_reduce(np.square(kernel - kernel.mean()), block, np.mean)


def wanda(kernel: np.ndarray, block: BlockShape, norm: np.ndarray) -> np.ndarray:
    """Sum of |w| times the norm of the input channel it is multiplied by (Sun et al., 2023).

    `norm` is (cin,), of `curvature.input_norm`.
    """
    return block_reduce(np.abs(kernel) * norm[:, None], block, np.sum)


def taylor(kernel: np.ndarray, block: BlockShape, gradient: np.ndarray) -> np.ndarray:
    """|sum of w * g| over the block: how the loss changes, to first order, without it (Molchanov et al., 2017).

    `gradient` is that of the mean loss, of the kernel's shape. The paper's equation 10 for a whole block.
    """
    return np.abs(block_reduce(kernel * gradient, block, np.sum))


def fisher(kernel: np.ndarray, block: BlockShape, mean_square_gradient: np.ndarray) -> np.ndarray:
    """Sum of w^2 E[g^2] over the block: second order with the empirical Fisher information for the Hessian.

    `mean_square_gradient` is the mean over examples of squared gradients, of the kernel's shape.
    """
    return block_reduce(np.square(kernel) * mean_square_gradient, block, np.sum)


def hessian(kernel: np.ndarray, block: BlockShape, diagonal: np.ndarray) -> np.ndarray:
    """Sum of w^2 h / 2 over the block: optimal brain damage (LeCun, Denker, Solla, 1990).

    The paper's equation 11 with the Hessian's diagonal h alone. `diagonal` is of the kernel's shape, and so
    is a score negative where the loss curves downwards.
    """
    return block_reduce(np.square(kernel) * diagonal, block, np.sum) / 2


CRITERIA: dict[str, Importance] = {
    "l1": l1,
    "l2": l2,
    "variance": variance,
    "tensor_variance": tensor_variance,
    "wanda": wanda,
    "taylor": taylor,
    "fisher": fisher,
    "hessian": hessian,
}
# What a criterion needs from data: (model, layers, data, loss, seed) -> an array for each layer's path.
STATISTICS: dict[str, Callable[..., curvature.Statistics]] = {
    "wanda": lambda model, layers, data, loss, seed: curvature.input_norm(model, layers, data),
    "taylor": lambda model, layers, data, loss, seed: curvature.mean_gradient(model, layers, data, loss),
    "fisher": lambda model, layers, data, loss, seed: curvature.mean_square_gradient(model, layers, data, loss),
    "hessian": lambda model, layers, data, loss, seed: curvature.hessian_diagonal(model, layers, data, loss, seed=seed),
}
# Changes of the loss: comparable between layers as they are.
LOSS_UNITS = ("taylor", "fisher", "hessian")


def check(importance: str | Importance) -> None:
    """Raises a ValueError unless blocks can be compared by it: a name of `CRITERIA`, "gamma", or a callable."""
    if importance != TRAINED:
        get(importance)


def get(importance: str | Importance) -> Importance:
    """Finds a criterion.

    Args:
        importance: a name of `CRITERIA`, or a callable `(kernel, block) -> scores`, returned as it is.

    Returns:
        The callable.

    Raises:
        ValueError: no criterion has this name, or `importance` is neither a name nor callable.

    Example:
        >>> scores = get("l2")(np.ones((3, 3, 16, 16)), BlockShape(8, 8))
    """
    if isinstance(importance, str) and importance in CRITERIA:
        return CRITERIA[importance]
    if isinstance(importance, str) or not callable(importance):
        raise ValueError(
            f"importance must be one of {', '.join(CRITERIA)}, or a callable (kernel, block) -> scores; "
            f"got {importance!r}{suggestion(str(importance), CRITERIA)}."
        )
    return importance


def needs_data(importance: str | Importance) -> bool:
    """Whether a criterion compares blocks by what data say about them."""
    return isinstance(importance, str) and importance in STATISTICS


def check_data(importance: str | Importance, data: Any) -> None:
    """Raises a ValueError if a criterion needs data and there are none."""
    if needs_data(importance) and data is None:
        raise ValueError(
            f"importance='{importance}' compares blocks by what they do on data: give data=(x, y) or batches of it."
        )


def between_layers(
    scores: Mapping[str, np.ndarray], importance: str | Importance, previous: Mapping[str, np.ndarray]
) -> Mapping[str, np.ndarray]:
    """Scores by which blocks of different layers can compete.

    Changes of the loss and trained Γ, which is 1 for a whole block, as they are, others `comparable`.
    """
    return scores if importance in (*LOSS_UNITS, TRAINED) else comparable(scores, previous)


def block_scores(
    kernel: np.ndarray,
    block: BlockShape,
    importance: str | Importance,
    layer: str = "kernel",
    statistic: np.ndarray | None = None,
) -> np.ndarray:
    """Scores the blocks of a layer's kernel, and checks what the criterion gave.

    Args:
        kernel: (..., cin, cout).
        block: the block's shape.
        importance: a name of `CRITERIA` or a callable `(kernel, block) -> scores`.
        layer: the layer's name, for the errors.
        statistic: what the data say about the kernel, for a criterion of `STATISTICS`.

    Returns:
        float64 (rows, cols); larger means keep. A block of zeros is worth no more than any other, even where
        others are worth less than nothing.

    Raises:
        ValueError: the criterion is unknown or misses its statistic, or gave another shape than Γ's, or a
            number that isn't finite.
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    criterion = get(importance)
    if needs_data(importance):
        check_data(importance, statistic)
        scores = criterion(kernel, block, statistic)
    else:
        scores = criterion(kernel, block)
    scores = np.asarray(scores, dtype=np.float64)
    expected = grid(*kernel.shape[-2:], block)
    if scores.shape != expected:
        raise ValueError(
            f"The importance of layer '{layer}' must be one score a block, shape {expected} "
            f"for its kernel {kernel.shape} in {block} blocks; got shape {scores.shape}."
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"The importance of layer '{layer}' has a score that is NaN or infinite.")
    return np.where(nonzero_blocks(kernel, block), scores, scores.min(initial=np.inf))


def model_scores(
    model: keras.Model,
    layers: Sequence[Place],
    block: BlockShape | Mapping[str, BlockShape],
    importance: str | Importance,
    *,
    data: Any = None,
    loss: Loss = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Scores the blocks of layers of a model.

    Args:
        model: a built model; it stays as it is.
        layers: layers that can have such blocks, see `bstf.places.eligible`.
        block: the block's shape, one for all or one for each path.
        importance: a name of `CRITERIA`, "gamma", or a callable `(kernel, block) -> scores`.
        data: what a criterion of `STATISTICS` reads, as in `bstf.batches.batches`; the others don't touch it.
        loss: what is derived, as in `bstf.objective.Objective`; None for the loss the model is compiled with.
        seed: of the random vectors of "hessian".

    Returns:
        float64 (rows, cols) by the layers' paths; larger means keep.

    Raises:
        ValueError: as `block_scores` and `bstf.curvature`; or importance is "gamma" and a layer has no trained Γ.
        TypeError: `data` is nothing that can be read.

    Example:
        >>> model_scores(model, eligible(model, block), block, "fisher", data=(x, y), loss="mse")
    """
    if not layers:
        return {}
    blocks = dict.fromkeys([path for path, _ in layers], block) if isinstance(block, BlockShape) else block
    if importance == TRAINED:
        return {path: _trained_gamma(path, layer, blocks[path]) for path, layer in layers}
    statistics: curvature.Statistics = {}
    if needs_data(importance):
        check_data(importance, data)
        statistics = STATISTICS[importance](model, layers, data, loss, seed)
    return {
        path: block_scores(effective_kernel(layer), blocks[path], importance, layer.name, statistics.get(path))
        for path, layer in layers
    }


def _trained_gamma(path: str, layer: keras.Layer, block: BlockShape) -> np.ndarray:
    if not (is_masked(layer) and layer.trainable_gamma and layer.block == block):
        raise ValueError(
            f"importance='{TRAINED}' compares blocks by a trained Γ, and layer '{path}' has none in {block} blocks: "
            "train what sparsify(model, block, trainable_gamma=True) returns first, or leave the layer out by layers=."
        )
    gamma = ops.convert_to_numpy(layer.soft_gamma).astype(np.float64)
    if not np.isfinite(gamma).all():
        raise ValueError(f"The trained Γ of layer '{path}' has a value that is NaN or infinite.")
    # The kernel is multiplied by a relaxed Γ, whose sign is no matter; straight through, it is a score.
    return gamma if layer.trainable_gamma == STRAIGHT_THROUGH else np.abs(gamma)
