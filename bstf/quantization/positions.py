"""Positions: the grid of a tensor, value = integer * 2**-position with an integer in [-128, 127].

The rules are those of the Vitis AI quantiser (TensorFlow 2 part where its parts differ): the non-overflow rule
gives the finest grid that holds the extremes, and the minimum of the squared error is sought on it and on the four
finer grids, which clip. Weights round half to even, activations half up: floor(x + 1/2).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

LOWEST, HIGHEST = -128, 127
CANDIDATES = 5
FINEST_POSITION = 32  # of tensors with hardly any magnitude, whose grid nothing else limits
ZERO_POSITION = 7  # of tensors without any: their magnitude says nothing, so the grid of [-1, 1)
_CHUNK = 1 << 13  # elements, so that the temporary arrays of a large tensor stay in cache

Rounding = Callable[[np.ndarray], np.ndarray]


def half_even(x: np.ndarray) -> np.ndarray:
    """Rounds to the nearest integer, ties to even: the rounding of weights and biases."""
    return np.rint(x)


def half_up(x: np.ndarray) -> np.ndarray:
    """Rounds to the nearest integer, ties up, floor(x + 1/2): the rounding of activations."""
    return np.floor(x + 0.5)


def to_integers(x: np.ndarray, position: int, rounding: Rounding) -> np.ndarray:
    """Integers of a tensor on a grid, clip(round(x * 2**position), -128, 127), in the dtype of `x`.

    A zero stays zero (and never becomes -0), whatever the position.
    """
    return np.clip(rounding(x * 2.0**position), LOWEST, HIGHEST) + 0.0


def to_grid(x: np.ndarray, position: int, rounding: Rounding) -> np.ndarray:
    """Values of a tensor on a grid: integers * 2**-position, in the dtype of `x`."""
    return to_integers(x, position, rounding) * 2.0**-position


def non_overflow(low: float, high: float, margin: float = 0.0) -> int:
    """Finest position on which no value of a range is clipped.

    Source: floor(-log2(max(low / -(128 + margin), high / (127 + margin)))), Vitis AI
    `get_quantize_pos_non_overflow` (TensorFlow 2) with margin 0; its C++ kernels and its ONNX and PyTorch parts
    have margin 1/2: there a value that rounds to an end of the grid isn't clipped either. An all-zero range
    gives `ZERO_POSITION`; every other position is at most `FINEST_POSITION`.

    Args:
        low: the smallest value.
        high: the largest value.
        margin: how far beyond the grid's ends a value may lie, in units of the grid.

    Returns:
        The position.

    Example:
        >>> non_overflow(-1.0, 0.5), non_overflow(0.0, 1.0)
        (7, 6)
        >>> non_overflow(0.0, 127.4 / 128), non_overflow(0.0, 127.4 / 128, margin=0.5)
        (6, 7)
    """
    step = max(low / (LOWEST - margin), high / (HIGHEST + margin))
    if step <= 0:
        return ZERO_POSITION
    mantissa, exponent = math.frexp(step)  # exact where log2 of a neighbour of a power of two is not
    return min(-exponent if mantissa > 0.5 else 1 - exponent, FINEST_POSITION)


def percentile(x: np.ndarray, share: float = 99.99) -> int:
    """Finest position on which a share of a tensor's values isn't clipped.

    Source: the percentile calibration of Wu et al. 2020 (arXiv 2004.09602), section 5: the range ends at a
    percentile of |x|; on it the non-overflow rule.

    Args:
        x: the tensor, of any shape, finite and with at least one element.
        share: of the values of |x|, in percent.

    Returns:
        The position, at most `FINEST_POSITION`. If the percentile is 0, as of a tensor of nearly all zeros,
        nothing is clipped.
    """
    bound = float(np.percentile(np.abs(x), share, method="higher")) or math.inf
    return non_overflow(max(float(x.min()), -bound), min(float(x.max()), bound))


def min_mse(x: np.ndarray, rounding: Rounding) -> int:
    """Position of the smallest squared error.

    The candidates are the non-overflow position p0 and p0 + 1 ... p0 + 4; of equal errors the first wins.
    Source: Vitis AI `get_quantize_pos_min_diffs`.

    Args:
        x: the tensor, of any shape, finite and with at least one element.
        rounding: `half_even` for weights and biases, `half_up` for activations.

    Returns:
        The position, at most `FINEST_POSITION`.
    """
    flat = np.asarray(x).reshape(-1)
    low, high = float(flat.min()), float(flat.max())
    if low == high == 0.0:
        return ZERO_POSITION
    first = non_overflow(low, high)
    candidates = range(first, min(first + CANDIDATES, FINEST_POSITION + 1))
    errors = np.zeros(len(candidates))
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK].astype(np.float64)
        for i, position in enumerate(candidates):
            scaled = chunk * 2.0**position
            scaled -= np.clip(rounding(scaled), LOWEST, HIGHEST)
            errors[i] += np.square(scaled, out=scaled).sum() * 4.0**-position
    return candidates[int(np.argmin(errors))]


def most_common(positions: Iterable[int]) -> int:
    """The position that most batches chose; of equally frequent ones the lowest, which clips least."""
    counts = Counter(positions)
    return min(counts, key=lambda position: (-counts[position], position))


# By what `quantize` calls them: from a batch of a tensor's values to its position.
ACTIVATION_RULES: dict[str, Callable[[np.ndarray], int]] = {
    "min_mse": lambda x: min_mse(x, half_up),
    "non_overflow": lambda x: non_overflow(float(x.min()), float(x.max())),
    "non_overflow_rounded": lambda x: non_overflow(float(x.min()), float(x.max()), margin=0.5),
    "percentile": percentile,
}
