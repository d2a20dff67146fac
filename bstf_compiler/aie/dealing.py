"""Which output channel blocks each core computes, so that the slowest core of a round is as fast as can be.

A layer's blocks go to `rounds` x `rows` pieces of at most as many blocks as an even share has. Where all blocks cost
the same, shares are contiguous. Where zero blocks make them differ, blocks are dealt longest first (Graham, Bounds on
multiprocessing timing anomalies, 1969), pieces that are alike meet in a round, and exchanges improve the result.
"""

# Compiled functions take plain arrays: annotations would repeat their docstrings.
# ruff: noqa: ANN001

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numba as nb
import numpy as np

from bstf_compiler.aie.layer import share

_PASSES = 8
"""Times that all exchanges are tried at most; three or four find nothing more."""


@dataclass(frozen=True)
class Piece:
    """Some channel blocks: ascending runs [start, stop) with gaps between; none if there is nothing."""

    runs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, blocks: Iterable[int]) -> Piece:
        """The piece of some blocks.

        Example:
            >>> Piece.of([5, 1, 2]).runs
            ((1, 3), (5, 6))
        """
        runs: list[tuple[int, int]] = []
        for block in sorted(blocks):
            if runs and runs[-1][1] == block:
                runs[-1] = runs[-1][0], block + 1
            else:
                runs.append((block, block + 1))
        return cls(tuple(runs))

    @cached_property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(stop - start for start, stop in self.runs)

    @cached_property
    def numbers(self) -> list[int]:
        """The blocks, ascending."""
        return [block for start, stop in self.runs for block in range(start, stop)]

    @cached_property
    def places(self) -> list[tuple[int, int, int]]:
        """Of each run: how many blocks come before it, its first block, its blocks."""
        sizes = [stop - start for start, stop in self.runs]
        before = accumulate(sizes, initial=0)
        return [(earlier, start, size) for earlier, (start, _), size in zip(before, self.runs, sizes)]

    @property
    def span(self) -> tuple[int, int]:
        """From the first block to the last one, both included: [start, stop)."""
        return (self.runs[0][0], self.runs[-1][1]) if self.runs else (0, 0)


Pieces = tuple[tuple[Piece, ...], ...]
"""Output blocks by round and row of cores: each block in one piece. Only the last round may leave rows without any."""


def contiguous(blocks: int, rounds: int, rows: int) -> Pieces:
    """Even shares of neighbouring blocks, larger ones first."""
    parts = [Piece((part,) if part[0] < part[1] else ()) for part in share(blocks, rounds * rows)]
    return _by_round(parts, rows)


def by_parts(blocks: int, rounds: int, parts: int, rows: int) -> Pieces:
    """Even shares of neighbouring blocks, larger ones first, for `parts` columns of cores in each round, and in these
    for the rows.

    Example:
        >>> [[piece.blocks for piece in row] for row in by_parts(6, 1, 2, 2)]
        [[2, 1, 2, 1]]
    """
    made = []
    for start, stop in share(blocks, rounds * parts):
        own = [(start + first, start + last) for first, last in share(stop - start, rows)]
        made += [Piece((run,) if run[0] < run[1] else ()) for run in own]
    return tuple(tuple(made[first : first + parts * rows]) for first in range(0, len(made), parts * rows))


def balanced(costs: np.ndarray, rounds: int, rows: int) -> Pieces:
    """Shares of about equal cost.

    Args:
        costs: of each output block and input chunk (blocks, chunks), integers.
        rounds: number of rounds.
        rows: rows of cores.

    Returns:
        The pieces, those with the highest costs in the first round.

    Example:
        >>> balanced(np.array([[9], [1], [8], [2]]), 1, 2)
        ((Piece(runs=((0, 2),)), Piece(runs=((2, 4),))),)
    """
    limit = -(-len(costs) // (rounds * rows))
    owner = _longest_first(costs, rounds * rows, limit)
    parts = [np.flatnonzero(owner == piece) for piece in range(rounds * rows)]
    total = costs.sum(axis=1)
    parts.sort(key=lambda part: (-total[part].sum(), -len(part), *part[:1]))
    return _by_round([Piece.of(part.tolist()) for part in parts], rows)


def refined(pieces: Pieces, costs: np.ndarray) -> Pieces:
    """Pieces after exchanges of blocks: first those that lower the sum of peaks, the highest cost in every round and
    input chunk, then those that join runs and don't raise it.

    Args:
        pieces: of all output blocks.
        costs: of each output block and input chunk (blocks, chunks), integers.
    """
    rows, count = len(pieces[0]), len(costs)
    parts = [piece for row in pieces for piece in row]
    limit = max(piece.blocks for piece in parts)
    owner = np.empty(limit * len(parts), np.int64)  # those from `count` on are free places
    free = count
    for number, piece in enumerate(parts):
        owner[piece.numbers] = number
        after = free + limit - piece.blocks
        owner[free:after], free = number, after
    padded = np.zeros((len(owner), costs.shape[1]), np.int64)
    padded[:count] = costs
    _exchange(padded, owner, count, len(parts), rows)
    return _by_round([Piece.of(np.flatnonzero(owner[:count] == n).tolist()) for n in range(len(parts))], rows)


def _by_round(parts: list[Piece], rows: int) -> Pieces:
    """Parts in groups of `rows`; in a group by first block, empty ones last."""
    groups = [parts[first : first + rows] for first in range(0, len(parts), rows)]
    return tuple(tuple(sorted(group, key=lambda piece: (not piece.runs, piece.span))) for group in groups)


@nb.njit(cache=True)
def _longest_first(costs, pieces, limit):
    """The piece of each block: in falling order of cost, each to the piece that has room and costs least in the input
    chunks in which the block does.
    """
    owner = np.empty(len(costs), np.int64)
    load, held = np.zeros((pieces, costs.shape[1]), np.int64), np.zeros(pieces, np.int64)
    for block in np.argsort(-costs.sum(axis=1), kind="mergesort"):
        best, least = -1, 0
        for piece in range(pieces):
            if held[piece] == limit:
                continue
            met = 0
            for chunk in range(costs.shape[1]):
                met += load[piece, chunk] * costs[block, chunk]
            if best < 0 or met < least or (met == least and held[piece] < held[best]):
                best, least = piece, met
        owner[block] = best
        load[best] += costs[block]
        held[best] += 1
    return owner


@nb.njit(cache=True)
def _exchange(costs, owner, count, pieces, rows):
    """Swaps the pieces of blocks or free places, first to lower peaks, then to join runs."""
    chunks = costs.shape[1]
    load, held = np.zeros((pieces, chunks), np.int64), np.zeros(pieces, np.int64)
    for block in range(len(owner)):
        load[owner[block]] += costs[block]
        held[owner[block]] += block < count
    for join in (False, True):
        for _ in range(_PASSES):
            changed = False
            for a in range(count):
                for b in range(a + 1, len(owner)):
                    p, q = owner[a], owner[b]
                    if p == q or (b >= count and held[p] == 1):  # no piece becomes empty
                        continue
                    if join:
                        better = _joined(owner, count, a, b) > 0 and _gain(costs, load, rows, a, b, p, q)[0] <= 0
                    else:
                        higher, wider = _gain(costs, load, rows, a, b, p, q)
                        better = higher < 0 or (higher == 0 and wider < 0)
                    if better:
                        change = costs[b] - costs[a]
                        load[p] += change
                        load[q] -= change
                        if b >= count:
                            held[p] -= 1
                            held[q] += 1
                        owner[a], owner[b] = q, p
                        changed = True
            if not changed:
                break


@nb.njit(cache=True)
def _gain(costs, load, rows, a, b, p, q):
    """What swapping block a of piece p and block b of piece q adds to the sum of peaks, and to that of squares."""
    higher = wider = 0
    for chunk in range(costs.shape[1]):
        change = costs[b, chunk] - costs[a, chunk]
        if change == 0:
            continue
        wider += 2 * change * (load[p, chunk] - load[q, chunk] + change)
        first, second = p // rows * rows, q // rows * rows
        higher += _peak_change(load[first : first + rows, chunk], p - first, q - first, change)
        if second != first:
            higher += _peak_change(load[second : second + rows, chunk], p - second, q - second, change)
    return higher, wider


@nb.njit(cache=True)
def _peak_change(load, p, q, change):
    """How much the highest load of a round grows with `change` at p and less that at q, where it has them."""
    before = after = 0
    for row in range(len(load)):
        before = max(before, load[row])
        after = max(after, load[row] + change * (row == p) - change * (row == q))
    return after - before


@nb.njit(cache=True)
def _joined(owner, count, a, b):
    """How many more neighbours share a piece if blocks a < b swap theirs."""
    before = _neighbours(owner, count, a, b)
    owner[a], owner[b] = owner[b], owner[a]
    after = _neighbours(owner, count, a, b)
    owner[a], owner[b] = owner[b], owner[a]
    return after - before


@nb.njit(cache=True)
def _neighbours(owner, count, a, b):
    """Pairs of neighbours in one piece, of those with block a or b (their own pair counts twice, and never changes)."""
    found = 0
    for first in (a - 1, a, b - 1, b):
        if 0 <= first < count - 1:
            found += owner[first] == owner[first + 1]
    return found
