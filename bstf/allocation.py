"""A ratio for each layer, so that a model meets a target at the least loss."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from bstf.blocks import BlockShape, expand
from bstf.layouts import plane_shape
from bstf.objective import Loss
from bstf.places import Place, positions
from bstf.report import report
from bstf.selection import select
from bstf.sensitivity import measure

RATIOS = (0.25, 0.5, 0.75, 0.9)


def auto_ratios(
    model: keras.Model,
    layers: Sequence[Place],
    scores: Mapping[str, np.ndarray],
    block: BlockShape,
    data: Any,
    loss: Loss = None,
    *,
    macs: float | None = None,
    weights: float | None = None,
    min_per_line: int = 1,
    scope: str = "layer",
    previous: Mapping[str, np.ndarray] | None = None,
) -> dict[str, float]:
    """Chooses a ratio for each layer by the loss that is measured when it alone is sparse.

    Every layer is measured at the ratios of `RATIOS`. Losses of layers are taken to add up, and are
    interpolated in between; `allocate` finds the cheapest sum.

    Args:
        model: a built model.
        layers: the layers that can be sparse.
        scores: of their blocks, by path.
        block: the block's shape.
        data: examples with labels; read once.
        loss: as in `bstf.objective.Objective`.
        macs: the fraction of the dense model's multiply-adds that may remain, layers that can't be sparse
            included; or None.
        weights: the same for the weights of all kernels, if `macs` is None.
        min_per_line: kept blocks that every line of a Γ needs at least.
        scope: "layer", "column" or "row".
        previous: earlier Γ by path.

    Returns:
        A ratio in [0, 1) for each path; the target is met to within the blocks that rounding and lines cost.

    Raises:
        ValueError: the target isn't in (0, 1], can't be met, or the multiply-adds aren't known.
    """
    name, target = ("target_macs", macs) if macs is not None else ("target_bytes", weights)
    if not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise ValueError(f"{name} is a fraction of the dense model, in (0, 1]; got {target!r}.")
    if not layers:
        raise ValueError(f"No layer of '{model.name}' can be sparse in {block} blocks: there is nothing to choose for.")
    costs, total = _costs(model, layers, block, macs is not None)
    previous = previous or {}
    gammas = {
        path: [
            select(one, ratio, min_per_line, scope=scope, previous=previous.get(path), lasting=True)
            for ratio in (0, *RATIOS)
        ]
        for path, one in scores.items()
    }
    saved = {
        path: costs[path] * np.array([_dead_weights(gamma, layer, block) for gamma in gammas[path]])
        for path, layer in layers
    }
    least = 1 - sum(one[-1] for one in saved.values()) / total
    if least > target + 1e-12:
        raise ValueError(
            f"{name}={target} can't be met: with {RATIOS[-1]:.0%} of the blocks zero in every layer that can be "
            f"sparse, {least:.3f} of the dense '{model.name}' remains."
        )
    measured = measure(model, layers, {path: ones[1:] for path, ones in gammas.items()}, block, data, loss)
    losses = {path: [measured.base.loss] for path in gammas}
    for row in measured.rows:
        losses[row.layer].append(row.loss)
    steps = allocate(saved, {path: np.array(one) for path, one in losses.items()}, (1 - target) * total)
    met = {path: [float((gamma == 0).mean()) for gamma in ones] for path, ones in gammas.items()}
    units = {path: {"column": one.shape[0], "row": one.shape[1]}.get(scope, one.size) for path, one in scores.items()}
    return {path: _whole_blocks(_at(met[path], steps[path]), units[path]) for path in gammas}


def allocate(saved: Mapping[str, np.ndarray], losses: Mapping[str, np.ndarray], needed: float) -> dict[str, float]:
    """Goes up the layers' curves, always where the loss grows least for what is saved, until enough is saved.

    A layer that is broken can't break much more: its curve flattens, and the rest of it would look free. No
    step therefore counts as cheaper than the step before it. With that the curves are convex, and going up the
    cheapest step first gives the least sum of losses (the continuous relaxation of a multiple-choice knapsack:
    Kellerer, Pferschy, Pisinger, Knapsack Problems, section 11.2).

    Args:
        saved: for each layer what its steps save in all, not decreasing.
        losses: for each layer the loss at its steps, as many.
        needed: what must be saved.

    Returns:
        How many steps to go up in each layer; a fraction in one layer at most.

    Example:
        >>> allocate({"a": np.array([0.0, 4.0])}, {"a": np.array([1.0, 2.0])}, 2.0)
        {'a': 0.5}
    """
    steps = []
    for path, one in saved.items():
        gains = np.diff(one)
        prices = np.maximum.accumulate(np.diff(losses[path]) / np.where(gains > 0, gains, np.inf))
        steps += [(price, path, index, gain) for index, (price, gain) in enumerate(zip(prices, gains))]
    left = needed - sum(one[0] for one in saved.values())
    reached = dict.fromkeys(saved, 0.0)
    for _, path, index, gain in sorted(steps, key=lambda step: step[0]):
        if left <= 0:
            break
        reached[path] = index + (min(1.0, left / gain) if gain > 0 else 1.0)
        left -= gain
    return reached


def _costs(
    model: keras.Model, layers: Sequence[Place], block: BlockShape, macs: bool
) -> tuple[dict[str, float], float]:
    """What a weight of each layer costs, and all weights of the dense model: multiply-adds or weights."""
    rows = report(model, block).layers
    if not macs:
        return {path: 1.0 for path, _ in layers}, float(sum(math.prod(row.kernel) for row in rows))
    counts = positions(model)
    for path, layer in layers:
        if counts.get(id(layer)) is None:
            raise ValueError(
                f"target_macs needs the multiply-adds of layer '{path}', whose input has an open size: give the "
                "model a whole input shape, or use target_bytes."
            )
    costs = {path: float(counts[id(layer)]) for path, layer in layers}
    return costs, float(sum(row.dense_macs or 0 for row in rows))


def _dead_weights(gamma: np.ndarray, layer: keras.Layer, block: BlockShape) -> int:
    shape = plane_shape(layer)
    return math.prod(shape[:-2]) * int((expand(gamma, shape, block) == 0).sum())


def _at(values: Sequence[float], step: float) -> float:
    """The value at a whole or broken index."""
    return float(np.interp(step, np.arange(len(values)), values))


def _whole_blocks(ratio: float, blocks: int) -> float:
    """The ratio of the next whole number of zero blocks (of a line): rounding down would miss the target."""
    return min(math.ceil(ratio * blocks - 1e-9), blocks - 1) / blocks
