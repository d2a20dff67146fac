"""What the data say about every weight: gradients, squared gradients, the Hessian's diagonal, input norms.

Each function reads the data once and holds one batch and a few numbers a weight. Derivatives are those
of the loss of `bstf.objective`, batch normalisation and dropout in inference mode.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from bstf import layouts
from bstf.batches import Batch, Progress, batches, number_of_batches
from bstf.objective import Loss, Objective
from bstf.places import Place, replaced_calls

Statistics = dict[str, np.ndarray]
_PROBES = 4


def mean_gradient(model: keras.Model, layers: Sequence[Place], data: Any, loss: Loss = None) -> Statistics:
    """The gradient of the mean loss by every weight: g = E[dL/dw].

    Args:
        model: a built model.
        layers: the convolutions and dense layers to look at, for instance those of `bstf.places.eligible`.
        data: examples with labels, as in `bstf.batches.batches`.
        loss: as in `bstf.objective.Objective`; the mean over a batch, or batches must be of one size.

    Returns:
        float64 (..., cin, cout) of the kernels' sizes by the layers' paths. Exactly zero in blocks that are masked.

    Raises:
        ValueError: no data, no loss, one that can't be computed or isn't finite.
        TypeError: `data` is nothing that can be read.

    Example:
        >>> mean_gradient(model, eligible(model, BlockShape.of(8)), (x, y))["conv"].shape
        (3, 3, 16, 32)
    """
    objective = Objective(model, [layer for _, layer in layers], loss)
    return _mean_over_examples(layers, data, objective.kernels, lambda batch: objective.gradient(batch)[1])


def mean_square_gradient(model: keras.Model, layers: Sequence[Place], data: Any, loss: Loss = None) -> Statistics:
    """The diagonal of the empirical Fisher information: E[(dL/dw)^2], squared example by example.

    Squaring the gradient of a batch instead would give another, smaller number: gradients of examples cancel
    in it. Examples therefore go through the model one at a time.

    Args:
        model: a built model.
        layers: the layers to look at.
        data: examples with labels.
        loss: the loss of one example.

    Returns:
        float64 (..., cin, cout) of the kernels' sizes by the layers' paths.

    Raises:
        ValueError: as `mean_gradient`.
        TypeError: as `mean_gradient`.

    Example:
        >>> fisher = mean_square_gradient(model, eligible(model, BlockShape.of(8)), (x[:256], y[:256]))
    """
    objective = Objective(model, [layer for _, layer in layers], loss)

    def squares(batch: Batch) -> list[np.ndarray]:
        return [total.astype(np.float64) / batch.size for total in objective.square_gradients(batch)[1]]

    return _mean_over_examples(layers, data, objective.kernels, squares)


def hessian_diagonal(
    model: keras.Model,
    layers: Sequence[Place],
    data: Any,
    loss: Loss = None,
    *,
    probes: int = _PROBES,
    seed: int = 0,
) -> Statistics:
    """An unbiased estimate of the diagonal of the mean loss's Hessian: E[z * (H z)] with z of random signs.

    Hutchinson's estimator (Bekas, Kokiopoulou, Saad, An estimator for the diagonal of a matrix, 2007). One
    product H z costs about two gradients and never forms H. The error of an entry falls with the root of the
    number of probes and grows with its row's off-diagonal entries.

    Args:
        model: a built model.
        layers: the layers to look at; z and H range over all their kernels together.
        data: examples with labels.
        loss: as in `mean_gradient`.
        probes: random vectors for each batch.
        seed: of the random vectors.

    Returns:
        float64 (..., cin, cout) of the kernels' sizes by the layers' paths; entries may be negative.

    Raises:
        ValueError: as `mean_gradient`, and if `probes` is less than 1.
        TypeError: as `mean_gradient`.

    Example:
        >>> hessian_diagonal(model, eligible(model, BlockShape.of(8)), (x, y), probes=16, seed=1)
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1; got {probes}.")
    objective = Objective(model, [layer for _, layer in layers], loss)
    rng = np.random.default_rng(seed)

    def diagonal(batch: Batch) -> list[np.ndarray]:
        totals = [np.zeros(kernel.shape) for kernel in objective.kernels]
        for _ in range(probes):
            signs = [rng.integers(0, 2, total.shape).astype(np.float32) * 2 - 1 for total in totals]
            _, products = objective.hessian_product(batch, signs)
            for total, sign, product in zip(totals, signs, products):
                total += sign * product
        return [total / probes for total in totals]

    return _mean_over_examples(layers, data, objective.kernels, diagonal)


def input_norm(model: keras.Model, layers: Sequence[Place], data: Any) -> Statistics:
    """How large each input channel of a layer is: sqrt(E[sum of x^2 over positions]), over the examples.

    The norm of Wanda (Sun et al., A simple and effective pruning approach for large language models, 2023),
    tokens being the positions of an image here. A layer that is called several times sums over its calls.

    Args:
        model: a built model.
        layers: the layers to look at.
        data: examples; labels aren't needed.

    Returns:
        float64 (cin,) by the layers' paths.

    Raises:
        ValueError: no data, or inputs that the model can't compute.
        TypeError: as `mean_gradient`.

    Example:
        >>> input_norm(model, eligible(model, BlockShape.of(8)), x)["conv"].shape
        (16,)
    """
    sums = {id(layer): np.zeros(layouts.plane_shape(layer)[-2]) for _, layer in layers}
    progress, seen = Progress(number_of_batches(data), "batch"), 0

    def measured(layer: keras.Layer, call: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        axes = layouts.input_axes(layer, len(inputs.shape))
        squares = ops.square(ops.cast(layouts.multiplied(layer, inputs), "float32"))
        by_channel = layouts.channels_last(squares, axes, ops)
        sums[id(layer)] += ops.convert_to_numpy(ops.sum(by_channel, axis=tuple(range(len(by_channel.shape) - 1))))
        return call(inputs, *args, **kwargs)

    with replaced_calls([layer for _, layer in layers], measured):
        for batch in batches(data, labels=False):
            try:
                model(batch.x, training=False)
            except (ValueError, TypeError) as error:
                first = str(error).strip().splitlines()[0]
                raise ValueError(f"'{model.name}' can't compute a batch of data: {first}") from error
            seen += batch.size
            progress.step()
    progress.finish()
    return {path: np.sqrt(sums[id(layer)] / seen) for path, layer in layers}


def _mean_over_examples(
    layers: Sequence[Place], data: Any, likes: Sequence[Any], terms: Callable[[Batch], list[np.ndarray]]
) -> Statistics:
    """The mean over all examples of what `terms` gives as the mean over a batch, an array a kernel."""
    totals = [np.zeros(like.shape) for like in likes]
    progress, seen = Progress(number_of_batches(data), "batch"), 0
    for batch in batches(data, labels=True):
        for total, term in zip(totals, terms(batch)):
            total += batch.size * term.astype(np.float64)
        seen += batch.size
        progress.step()
    progress.finish()
    return {path: layouts.to_planes(layer, total / seen) for (path, layer), total in zip(layers, totals)}
