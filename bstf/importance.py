"""How much every block of a kernel matters: kernel -> one score a block, larger means keep.

A criterion is a function `(kernel, block) -> scores`, kernel (..., cin, cout) and scores
(ceil(cin / bi), ceil(cout / bo)); the ones below go by name, any other callable by itself.
"""

from collections.abc import Callable

import numpy as np

from bstf.blocks import BlockShape, block_reduce, grid

Importance = Callable[[np.ndarray, BlockShape], np.ndarray]


def l1(kernel: np.ndarray, block: BlockShape) -> np.ndarray:
    """Sum of |w| over the block."""
    return block_reduce(np.abs(kernel), block, np.sum)


def l2(kernel: np.ndarray, block: BlockShape) -> np.ndarray:
    """Euclidean norm of the block: sqrt(sum of w^2)."""
    return np.sqrt(block_reduce(np.square(kernel), block, np.sum))


def variance(kernel: np.ndarray, block: BlockShape) -> np.ndarray:
    """Population variance of the block's weights, mean of (w - mean)^2: the paper's default criterion."""
    return block_reduce(kernel, block, np.var)


CRITERIA: dict[str, Importance] = {"l1": l1, "l2": l2, "variance": variance}


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
            f"got {importance!r}."
        )
    return importance


def block_scores(
    kernel: np.ndarray, block: BlockShape, importance: str | Importance, layer: str = "kernel"
) -> np.ndarray:
    """Scores the blocks of a layer's kernel, and checks what the criterion gave.

    Args:
        kernel: (..., cin, cout).
        block: the block's shape.
        importance: a name of `CRITERIA` or a callable `(kernel, block) -> scores`.
        layer: the layer's name, for the errors.

    Returns:
        float64 (rows, cols); larger means keep.

    Raises:
        ValueError: the criterion is unknown, or gave another shape than Γ's, or a number that isn't finite.
    """
    kernel = np.asarray(kernel, dtype=np.float64)
    scores = np.asarray(get(importance)(kernel, block), dtype=np.float64)
    expected = grid(*kernel.shape[-2:], block)
    if scores.shape != expected:
        raise ValueError(
            f"The importance of layer '{layer}' must be one score a block, shape {expected} "
            f"for its kernel {kernel.shape} in {block} blocks; got shape {scores.shape}."
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"The importance of layer '{layer}' has a score that is NaN or infinite.")
    return scores
