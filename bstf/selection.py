"""Which blocks a layer keeps: scores -> Γ. Pure functions of NumPy arrays.

Γ keeps the blocks whose scores have the largest sum, among all Γ with the wanted number of zeros and at
least `min_per_line` kept blocks in every row (input channels that still reach something) and column
(outputs that still depend on something). The best blocks alone may leave a line short; then one kept block
after the other is exchanged along the cheapest chain of exchanges that gives the line a block and leaves no
other line short. This is the successive shortest path method for a minimum cost flow (Ahuja, Magnanti,
Orlin, Network Flows, section 9.7): the sum stays the largest possible after every exchange.
"""

import math
import numbers

import numpy as np

SCOPES = ("layer",)
# Scores become integers of this size, so that the lengths of chains are exact and ties are ties.
_RESOLUTION = 2.0**36


def check_ratio(ratio: float) -> float:
    """Returns `ratio`, the fraction of zero blocks, or raises a ValueError if it isn't in [0, 1)."""
    if not isinstance(ratio, numbers.Real) or isinstance(ratio, bool) or not 0 <= ratio < 1:
        raise ValueError(
            f"ratio is the fraction of zero blocks, a number in [0, 1): 0 keeps all blocks; got {ratio!r}."
        )
    return float(ratio)


def check_scope(scope: str) -> str:
    """Returns `scope`, over which blocks compete with each other, or raises a ValueError if it is unknown."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)} (each layer meets the ratio); got {scope!r}.")
    return scope


def kept_blocks(rows: int, cols: int, ratio: float, min_per_line: int = 1) -> int:
    """The number of blocks that Γ keeps.

    Args:
        rows: rows of Γ.
        cols: columns of Γ.
        ratio: fraction of zero blocks, in [0, 1).
        min_per_line: kept blocks that every row and column needs; a line with fewer blocks keeps them all.

    Returns:
        `rows * cols - floor(ratio * rows * cols + 1/2)`, or the fewest that `min_per_line` allows if that
        is more.

    Raises:
        ValueError: `ratio` isn't in [0, 1), or `min_per_line` isn't an integer of at least 0.
    """
    zeros = math.floor(check_ratio(ratio) * rows * cols + 0.5)
    per_row, per_col = _floors(rows, cols, min_per_line)
    return max(rows * cols - zeros, rows * per_row, cols * per_col)


def select(scores: np.ndarray, ratio: float, min_per_line: int = 1) -> np.ndarray:
    """Chooses the blocks to keep.

    Args:
        scores: (rows, cols), finite; larger means keep.
        ratio: fraction of zero blocks, in [0, 1).
        min_per_line: kept blocks that every row and column of Γ needs at least.

    Returns:
        Γ: float32 (rows, cols) with `kept_blocks(...)` ones, whose scores have the largest sum possible (to
            one part in 2**36 of the largest score). Equal scores: the block that comes first in row order
            is kept.

    Raises:
        ValueError: `ratio` isn't in [0, 1), or `min_per_line` isn't an integer of at least 0.

    Example:
        >>> select(np.array([[4.0, 3.0], [2.0, 1.0]]), ratio=0.5)
        array([[1., 0.],
               [0., 1.]], dtype=float32)
    """
    scores = np.asarray(scores, dtype=np.float64)
    rows, cols = scores.shape
    per_row, per_col = _floors(rows, cols, min_per_line)
    best = np.argsort(-scores, axis=None, kind="stable")[: kept_blocks(rows, cols, ratio, min_per_line)]
    keep = np.zeros(scores.shape, dtype=bool)
    keep.flat[best] = True

    values = np.rint(scores / (np.abs(scores).max() or 1.0) * _RESOLUTION)
    for row in range(rows):
        while keep[row].sum() < per_row:
            _give_row_a_block(keep, values, row, per_row, per_col)
    for col in range(cols):
        while keep[:, col].sum() < per_col:
            _give_row_a_block(keep.T, values.T, col, per_col, per_row)
    return keep.astype(np.float32)


def _floors(rows: int, cols: int, min_per_line: int) -> tuple[int, int]:
    """Kept blocks needed in a row and in a column."""
    if not isinstance(min_per_line, numbers.Integral) or isinstance(min_per_line, bool) or min_per_line < 0:
        raise ValueError(f"min_per_line must be an integer of at least 0; got {min_per_line!r}.")
    return min(int(min_per_line), cols), min(int(min_per_line), rows)


def _give_row_a_block(keep: np.ndarray, values: np.ndarray, row: int, per_row: int, per_col: int) -> None:
    """Adds one block to `row` and removes one elsewhere at the least loss of value; changes `keep`.

    A chain adds a block in a row and drops one in a column, in turn: from `row` to a column (block added),
    from a column to a row (block dropped there), ... until a row that can spare a block. A column that can
    spare a block may also take the place of any other. Bellman-Ford finds the cheapest chain; whole numbers
    make it exact.
    """
    rows, cols = keep.shape
    spare_row = keep.sum(axis=1) > per_row
    spare_col = keep.sum(axis=0) > per_col
    added_cost = np.where(keep, np.inf, -values)
    dropped_cost = np.where(keep, values, np.inf)
    row_cost, row_from = np.full(rows, np.inf), np.zeros(rows, dtype=int)
    col_cost, col_from = np.full(cols, np.inf), np.zeros(cols, dtype=int)  # ~column: in place of that column
    row_cost[row] = 0.0

    changed = True
    while changed:
        reached = row_cost[:, None] + added_cost
        changed = _relax(col_cost, col_from, reached.min(axis=0), reached.argmin(axis=0))
        cheapest = int(col_cost.argmin())
        replaced = np.where(spare_col, col_cost[cheapest], np.inf)
        changed |= _relax(col_cost, col_from, replaced, np.full(cols, ~cheapest))
        reached = col_cost[None, :] + dropped_cost
        changed |= _relax(row_cost, row_from, reached.min(axis=1), reached.argmin(axis=1))

    at = int(np.where(spare_row, row_cost, np.inf).argmin())
    while at != row:
        col = row_from[at]
        keep[at, col] = False
        while col_from[col] < 0:
            col = ~col_from[col]
        at = col_from[col]
        keep[at, col] = True


def _relax(cost: np.ndarray, origin: np.ndarray, new_cost: np.ndarray, new_origin: np.ndarray) -> bool:
    """Takes over what is cheaper; tells whether anything was."""
    better = new_cost < cost
    cost[better] = new_cost[better]
    origin[better] = new_origin[better]
    return bool(better.any())
