"""Which blocks layers keep: scores -> Γ. Pure functions of NumPy arrays.

Γ keeps the blocks whose scores have the largest sum, among all Γ with the wanted number of zeros and at
least `min_per_line` kept blocks in every row (input channels that still reach something) and column
(outputs that still depend on something). The best blocks alone may leave a line short; then blocks are
exchanged, see `bstf.exchange`.
"""

import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from bstf.exchange import Exchange
from bstf.suggestion import suggestion

SCOPES = ("layer", "global", "column", "row")
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
    """Returns `scope`, which blocks compete with each other, or raises a ValueError if it is unknown."""
    if scope not in SCOPES:
        raise ValueError(
            f"scope must be one of {', '.join(SCOPES)}: blocks compete with those of their layer, of all layers, "
            f"or of their column or row of Γ; got {scope!r}."
        )
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
    return max(rows * cols - _zeros(ratio, rows * cols), _fewest((rows, cols), min_per_line))


def select(
    scores: np.ndarray,
    ratio: float,
    min_per_line: int = 1,
    *,
    scope: str = "layer",
    previous: np.ndarray | None = None,
    lasting: bool = False,
) -> np.ndarray:
    """Chooses the blocks that one layer keeps.

    Args:
        scores: (rows, cols), finite; larger means keep.
        ratio: fraction of zero blocks, in [0, 1).
        min_per_line: kept blocks that every row and column of Γ needs at least.
        scope: "layer": all blocks compete. "column": every column keeps as many blocks, so that all outputs
            cost the same and cores or threads that share them have even loads. "row": every row does.
        previous: an earlier Γ of the layer: blocks that are zero in it stay zero. If it has more zeros than
            wanted it comes back as it is; a line that keeps too few in it keeps those.
        lasting: this Γ will be the `previous` of others: it holds one that is as sparse as `min_per_line` allows,
            so that every ratio can be reached from here. Where the best Γ holds none, the best of those that are
            as sparse as that is kept within it, and the sum is less than the largest (to one part in 2**35).

    Returns:
        Γ: float32 (rows, cols) whose scores have the largest sum possible (to one part in 2**36 of the
        largest score). It has `kept_blocks(...)` ones; or `rows - floor(ratio * rows + 1/2)` in every
        column for scope "column", or the fewest more that `min_per_line` allows. Only a `previous` can make
        these numbers smaller, or larger where its zeros leave no other way to fill the lines. Equal scores:
        the block that comes first in row order is kept.

    Raises:
        ValueError: `ratio` isn't in [0, 1), `min_per_line` isn't an integer of at least 0, `scope` is
            "global" or unknown, or `previous` has another shape.

    Example:
        >>> select(np.array([[4.0, 3.0], [2.0, 1.0]]), ratio=0.5)
        array([[1., 0.],
               [0., 1.]], dtype=float32)
    """
    scores = np.asarray(scores, dtype=np.float64)
    alive = np.ones(scores.shape, dtype=bool) if previous is None else np.asarray(previous) != 0
    if alive.shape != scores.shape:
        raise ValueError(f"previous is a Γ of shape {alive.shape}, but the scores are {scores.shape}.")
    if check_scope(scope) == "row":
        turned = select(scores.T, ratio, min_per_line, scope="column", previous=alive.T, lasting=lasting)
        return np.ascontiguousarray(turned.T)
    if scope == "column":
        count = len(scores) - _zeros(ratio, len(scores))
        return _chosen(_best_of_columns, scores, count, min_per_line, alive, lasting)
    if scope == "global":
        raise ValueError("scope='global' compares layers with each other: use select_all.")
    return _chosen(_best, scores, scores.size - _zeros(ratio, scores.size), min_per_line, alive, lasting)


def select_all(
    scores: Mapping[str, np.ndarray],
    ratio: float | Mapping[str, float],
    min_per_line: int = 1,
    *,
    scope: str = "layer",
    previous: Mapping[str, np.ndarray] | None = None,
    lasting: bool = False,
) -> dict[str, np.ndarray]:
    """Chooses the blocks that every layer of a model keeps.

    With scope "global" every layer keeps as many blocks as it has among the best of all layers, and at least
    the fewest that `min_per_line` allows it, which the other layers make up for; then `select` chooses them
    in each layer. The scores must be comparable between layers: see `comparable`.

    Args:
        scores: (rows, cols) for each layer, by its name.
        ratio: fraction of zero blocks; for scope "global" of all layers' blocks together, else of each
            layer's, one for all or one for each name.
        min_per_line: kept blocks that every row and column of a Γ needs at least.
        scope: "layer", "global", "column" or "row".
        previous: earlier Γ by layers' names, for all layers or some; blocks that are zero in it stay zero.
        lasting: these Γ will be the `previous` of others, see `select`.

    Returns:
        Γ: float32 (rows, cols) for each layer.

    Raises:
        ValueError: as `select`; or scope is "global" and there is a ratio for each layer.

    Example:
        >>> select_all({"a": np.ones((4, 4)), "b": 2 * np.ones((4, 4))}, 0.5, scope="global")
    """
    previous = previous or {}
    if check_scope(scope) != "global":
        ratios = ratio if isinstance(ratio, Mapping) else dict.fromkeys(scores, ratio)
        return {
            name: select(layer, ratios[name], min_per_line, scope=scope, previous=previous.get(name), lasting=lasting)
            for name, layer in scores.items()
        }
    if isinstance(ratio, Mapping):
        raise ValueError("scope='global' lets all layers compete for one ratio: give a number, or another scope.")
    alive = {name: np.asarray(previous.get(name, np.ones(layer.shape))) != 0 for name, layer in scores.items()}
    counts = _global_counts(scores, ratio, min_per_line, alive)
    return {
        name: _chosen(_best, np.asarray(layer, dtype=np.float64), counts[name], min_per_line, alive[name], lasting)
        for name, layer in scores.items()
    }


def comparable(
    scores: Mapping[str, np.ndarray], previous: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Divides the scores of each layer by their mean magnitude, so that layers can be compared by them.

    The size of a layer's weights says little: batch normalisation makes it arbitrary, and a block of a 3x3
    kernel sums over nine times the weights of a 1x1 kernel's. Blocks are compared by how far they stand
    above or below their layer's own. Scores in units of the loss need no such thing.

    Args:
        scores: (rows, cols) for each layer. Blocks of score 0 don't count for the mean.
        previous: earlier Γ by layers' names, for all layers or some; blocks that are zero in it don't count either.

    Returns:
        The same with a mean magnitude of 1; layers of zeros as they are.

    Example:
        >>> comparable({"a": np.array([[1.0, 3.0]])})
        {'a': array([[0.5, 1.5]])}
    """
    previous, result = previous or {}, {}
    for name, layer in scores.items():
        counted = layer[(layer != 0) & (np.asarray(previous.get(name, 1)) != 0)]
        result[name] = layer / (np.abs(counted).mean() if counted.size else 1.0)
    return result


def layer_ratios(names: Sequence[str], ratio: Mapping[str, float]) -> dict[str, float]:
    """Finds the ratio of every layer.

    Args:
        names: the layers' paths, "model/layer" inside nested models.
        ratio: ratios by regular expressions, or plain names, for the whole path or the name at its end. The
            first that matches counts.

    Returns:
        A ratio for each name; 0, which keeps all blocks, for a layer that nothing matches. A last entry
        ".*" says otherwise.

    Raises:
        ValueError: a ratio isn't in [0, 1), a key is no regular expression or matches no layer.

    Example:
        >>> layer_ratios(["stem", "block1/conv"], {"stem": 0.25, ".*conv": 0.75})
        {'stem': 0.25, 'block1/conv': 0.75}
    """
    found = dict.fromkeys(names, 0.0)
    for pattern, value in reversed(ratio.items()):
        check_ratio(value)
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"ratio has the key {pattern!r}, which isn't a regular expression: {error}.") from error
        matched = [name for name in names if compiled.fullmatch(name) or compiled.fullmatch(name.rpartition("/")[2])]
        if not matched:
            known = [*names, *(name.rpartition("/")[2] for name in names)]
            raise ValueError(
                f"ratio has the key {pattern!r}{suggestion(pattern, known)}, which matches no layer that can be made "
                f"sparse; they are {', '.join(names)}."
            )
        found.update(dict.fromkeys(matched, float(value)))
    return found


def _chosen(
    best: Callable[[np.ndarray, int, int, np.ndarray], np.ndarray],
    scores: np.ndarray,
    count: int,
    min_per_line: int,
    alive: np.ndarray,
    lasting: bool,
) -> np.ndarray:
    """Γ, float32, of `count` blocks, in all or in a column as `best` counts them."""
    keep = best(scores, count, min_per_line, alive)
    if lasting and not _lasts(keep, min_per_line, best):
        sparsest = best(scores, 0, min_per_line, alive)
        reserved = np.where(sparsest, 2 * (np.abs(scores).max() or 1.0), scores)
        keep = best(reserved, count, min_per_line, alive)
    return keep.astype(np.float32)


def _lasts(keep: np.ndarray, min_per_line: int, best: Callable) -> bool:
    """Whether Γ holds one that is as sparse as a full Γ could become.

    Such a one has lines of one direction with their floor exactly, and all others with theirs at least. It is there
    if and only if a flow fills the lines of the other direction without more than that floor anywhere (Ford and
    Fulkerson, Flows in Networks, section II.10, feasible subgraphs).
    """
    (rows, cols), (per_row, per_col) = keep.shape, _floors(*keep.shape, min_per_line)
    if best is _best_of_columns:
        per_col = max(per_col, -(-rows * per_row // cols))
    source, sink = rows + cols, rows + cols + 1
    at_row, at_col = np.nonzero(keep)
    lines = np.arange(rows + cols)
    tails = np.concatenate([at_row, np.full(rows, source), lines[rows:]])
    heads = np.concatenate([rows + at_col, lines[:rows], np.full(cols, sink)])
    capacities = np.repeat([1, per_row, per_col], [len(at_row), rows, cols]).astype(np.int32)
    network = csr_array((capacities, (tails, heads)), shape=(sink + 1, sink + 1))
    return maximum_flow(network, source, sink).flow_value == min(rows * per_row, cols * per_col)


def _best(scores: np.ndarray, count: int, min_per_line: int, alive: np.ndarray) -> np.ndarray:
    """The `count` blocks of largest sum, or more, that leave no line short: bool (rows, cols)."""
    row_floor, col_floor = _floors_of(alive, min_per_line)
    count = max(count, row_floor.sum(), col_floor.sum())
    values = _whole_numbers(scores, alive)
    kept = np.argsort(-values, axis=None, kind="stable")[: min(count, int(alive.sum()))]
    keep = np.zeros(scores.shape, dtype=bool)
    keep.flat[kept] = True
    threshold = values.flat[kept[-1]] if len(kept) else 0.0
    bonuses = np.zeros(scores.shape[0]), np.zeros(scores.shape[1])
    exchange = Exchange(keep, values, row_floor, col_floor, *bonuses, threshold)
    wide = scores.shape[0] < scores.shape[1]
    if wide:  # the long side first takes far less time
        exchange = exchange.transposed()
    exchange.fill_rows()
    keep = exchange.transposed().fill_rows()
    return keep if wide else keep.T


def _best_of_columns(scores: np.ndarray, count: int, min_per_line: int, alive: np.ndarray) -> np.ndarray:
    """The `count` blocks in every column of largest sum, or more, that leave no row short: bool (rows, cols)."""
    rows, cols = scores.shape
    row_floor, col_floor = _floors_of(alive, min_per_line)
    count = max(count, col_floor.max(), -(-row_floor.sum() // cols))
    values = _whole_numbers(scores, alive)
    ranks = np.argsort(np.argsort(-values, axis=0, kind="stable"), axis=0, kind="stable")
    keep = (ranks < count) & alive
    worst = np.where(keep, values, np.inf).min(axis=0, initial=np.inf)
    bonus = np.where(np.isfinite(worst), -worst, 0.0)  # of a column without any block: whatever
    Exchange(keep, values, row_floor, col_floor, np.zeros(rows), bonus, fixed=True).fill_rows()
    return keep


def _global_counts(
    scores: Mapping[str, np.ndarray], ratio: float, min_per_line: int, alive: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """How many blocks each layer keeps of the best of all."""
    fewest = {name: min(int(alive[name].sum()), _fewest(one.shape, min_per_line)) for name, one in scores.items()}
    total = sum(one.size for one in scores.values())
    total -= _zeros(ratio, total)
    counts: dict[str, int] = {}
    while True:
        free = [name for name in scores if name not in counts]
        values = np.concatenate([np.asarray(scores[name])[alive[name]] for name in free] or [np.zeros(0)])
        owners = np.concatenate([np.full(int(alive[name].sum()), i) for i, name in enumerate(free)] or [np.zeros(0)])
        best = np.argsort(-values, kind="stable")[: max(0, total - sum(counts.values()))]
        found = dict(zip(free, np.bincount(owners[best].astype(int), minlength=len(free)).tolist()))
        short = {name: fewest[name] for name in free if found[name] < fewest[name]}
        if not short:
            return counts | found
        counts |= short


def _fewest(shape: tuple[int, int], min_per_line: int) -> int:
    per_row, per_col = _floors(*shape, min_per_line)
    return max(shape[0] * per_row, shape[1] * per_col)


def _zeros(ratio: float, blocks: int) -> int:
    return math.floor(check_ratio(ratio) * blocks + 0.5)


def _floors(rows: int, cols: int, min_per_line: int) -> tuple[int, int]:
    """Kept blocks needed in a row and in a column."""
    if not isinstance(min_per_line, numbers.Integral) or isinstance(min_per_line, bool) or min_per_line < 0:
        raise ValueError(f"min_per_line must be an integer of at least 0; got {min_per_line!r}.")
    return min(int(min_per_line), cols), min(int(min_per_line), rows)


def _floors_of(alive: np.ndarray, min_per_line: int) -> tuple[np.ndarray, np.ndarray]:
    """Kept blocks needed in every row and in every column, no more than there are."""
    per_row, per_col = _floors(*alive.shape, min_per_line)
    return np.minimum(alive.sum(axis=1), per_row), np.minimum(alive.sum(axis=0), per_col)


def _whole_numbers(scores: np.ndarray, alive: np.ndarray) -> np.ndarray:
    largest = np.abs(scores).max(initial=0.0) or 1.0
    return np.where(alive, np.rint(scores / largest * _RESOLUTION), -np.inf)
