"""Exchanges of kept blocks that give lines what they miss, at the least loss of value.

A row that misses a block gets one along a chain: a block is added in the row, one dropped in the same column,
one added in that block's row, ... until a row that can spare a block. A column that can spare one may take the
place of any other in the chain. The cheapest chains, one after the other, keep the sum of kept values the
largest possible: this is the successive shortest path method for a minimum cost flow (Ahuja, Magnanti, Orlin,
Network Flows, section 9.7).

Prices make the chains short to find (section 9.8, reduced costs). Every row and column has a bonus, and the
whole Γ a threshold, so that for the values of kept blocks

    worth = value + bonus of the row + bonus of the column - threshold >= 0

and <= 0 for all others; a line that can spare a block has no bonus. With them no step of a chain costs less than
nothing: what is farther than the nearest row that can spare a block need not be looked at. That row is near, as
the block of least worth is worth little.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Exchange:
    """Γ, the values of its blocks, and prices that prove that it keeps the largest sum.

    Attributes:
        keep: bool (rows, cols), changed in place.
        values: (rows, cols), whole numbers, so that sums are exact; -inf where no block may be kept.
        row_floor: (rows,), kept blocks that each row needs.
        col_floor: (cols,), kept blocks that each column needs; a column that has fewer loses none.
        row_bonus: (rows,).
        col_bonus: (cols,).
        threshold: what a block in lines without bonus must be worth to be kept.
        fixed: columns keep the number of blocks they have.
    """

    keep: np.ndarray
    values: np.ndarray
    row_floor: np.ndarray
    col_floor: np.ndarray
    row_bonus: np.ndarray
    col_bonus: np.ndarray
    threshold: float = 0.0
    fixed: bool = False

    def transposed(self) -> "Exchange":
        """The same Γ with rows for columns; it shares the arrays, and takes over from here."""
        return Exchange(
            np.asfortranarray(self.keep).T,
            np.asfortranarray(self.values).T,
            self.col_floor,
            self.row_floor,
            self.col_bonus,
            self.row_bonus,
            self.threshold,
        )

    def fill_rows(self) -> np.ndarray:
        """Gives every row its floor; one block more is kept only if no row can spare one. Returns `keep`."""
        self.row_count, self.col_count = self.keep.sum(axis=1), self.keep.sum(axis=0)
        self.col_floor_now = np.minimum(self.col_floor, self.col_count)
        self.spare_row = self.row_count > self.row_floor
        self.spare_col = self._can_spare(np.arange(len(self.col_count)))
        self.cheapest = np.empty(len(self.keep))  # kept value of each row in the columns that can spare a block
        self.cheapest_col = np.empty(len(self.keep), dtype=int)
        self._find_cheapest(np.arange(len(self.keep)))
        for row in np.flatnonzero(self.row_count < self.row_floor):
            while self.row_count[row] < self.row_floor[row]:
                chain = Chain(self, int(row))
                chain.price()
                self._update(*chain.apply())
        return self.keep

    def worth(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """(rows, cols), what the blocks where these lines cross are worth."""
        bonus = (self.row_bonus[rows] - self.threshold)[:, None] + self.col_bonus[cols]
        return self.values[np.ix_(rows, cols)] + bonus

    def _can_spare(self, cols: np.ndarray) -> np.ndarray:
        """Columns above their floor; without one they have no bonus either, and count as such."""
        if self.fixed:
            return np.zeros(len(cols), dtype=bool)
        return (self.col_count[cols] > self.col_floor_now[cols]) | (self.col_floor_now[cols] == 0)

    def _find_cheapest(self, rows: np.ndarray) -> None:
        kept = np.where(self.keep[rows] & self.spare_col, self.values[rows], np.inf)
        self.cheapest_col[rows] = kept.argmin(axis=1)
        self.cheapest[rows] = kept.min(axis=1)

    def _update(self, added: list[tuple[int, int]], dropped: list[tuple[int, int]]) -> None:
        """Follows a change of `keep` at some (row, col)."""
        for sign, blocks in ((1, added), (-1, dropped)):
            for row, col in blocks:
                self.row_count[row] += sign
                self.col_count[col] += sign
        rows, cols = (np.unique(lines) for lines in zip(*added, *dropped))
        self.spare_row[rows] = self.row_count[rows] > self.row_floor[rows]
        changed = cols[self.spare_col[cols] != self._can_spare(cols)]
        self.spare_col[changed] ^= True
        stale = np.isin(self.cheapest_col, changed) | self.keep[:, changed].any(axis=1)
        stale[rows] = True
        self._find_cheapest(np.flatnonzero(stale))


class Chain:
    """The cheapest chain of exchanges that gives a row a block.

    Its nodes are rows, the tight columns, that can't spare a block, and a hub for all columns that can. A
    distance is the least loss of worth on the way from the row.
    """

    def __init__(self, exchange: Exchange, row: int) -> None:
        self.exchange, self.row = exchange, row
        rows, cols = exchange.keep.shape
        self.tight = np.flatnonzero(~exchange.spare_col)
        self.row_distance, self.row_from = np.full(rows, np.inf), np.zeros(rows, dtype=int)  # -1: from the hub
        self.col_distance, self.col_from = np.full(cols, np.inf), np.zeros(cols, dtype=int)
        self.hub_distance, self.hub_from = np.inf, -1
        self.row_distance[row] = 0.0
        self._search()

    @property
    def end(self) -> int | None:
        """The nearest row that can spare a block, None if none is reached."""
        ends = np.where(self.exchange.spare_row, self.row_distance, np.inf)
        nearest = int(ends.argmin())
        return nearest if ends[nearest] < np.inf else None

    @property
    def length(self) -> float:
        """The loss of worth by the chain, as far as it is known."""
        return np.inf if self.end is None else self.row_distance[self.end]

    def _search(self) -> None:
        """Follows all chains as long as they are shorter than the shortest complete one."""
        rows = np.array([self.row])
        while rows.size:
            hub, before = self.hub_distance, self.row_distance.copy()
            cols = self._add(rows)
            if self.hub_distance < hub:
                self._drop_in_spare_columns()
            cols = cols[self.col_distance[cols] < self.length]
            if cols.size:
                self._drop_in(cols)
            nearer = (self.row_distance < before) & (self.row_distance < self.length)
            rows = np.flatnonzero(nearer & ~self.exchange.spare_row)

    def _add(self, rows: np.ndarray) -> np.ndarray:
        """Adds a block in one of the rows; returns the tight columns that are nearer now."""
        e = self.exchange
        to_hub = rows[self.row_distance[rows] < self.hub_distance]
        cols = np.arange(e.keep.shape[1]) if to_hub.size and not e.fixed else self.tight
        if not cols.size:
            return cols
        lines = np.ix_(rows, cols)
        distance = np.where(e.keep[lines], np.inf, self.row_distance[rows][:, None] - e.worth(rows, cols))
        best = distance.argmin(axis=0)
        distance = distance[best, np.arange(len(cols))]
        nearer = distance < self.col_distance[cols]
        cols, distance = cols[nearer], distance[nearer]
        self.col_distance[cols], self.col_from[cols] = distance, rows[best[nearer]]
        if cols.size and not e.fixed:
            to_hub = distance + e.col_bonus[cols]
            col = int(to_hub.argmin())
            if to_hub[col] < self.hub_distance:
                self.hub_distance, self.hub_from = to_hub[col], int(cols[col])
        return cols[~e.spare_col[cols]]

    def _drop_in_spare_columns(self) -> None:
        e = self.exchange
        self._reach(self.hub_distance + e.cheapest + (e.row_bonus - e.threshold), np.full(len(e.cheapest), -1))

    def _drop_in(self, cols: np.ndarray) -> None:
        e = self.exchange
        rows = np.flatnonzero(e.keep[:, cols].any(axis=1))
        distance = np.where(e.keep[np.ix_(rows, cols)], self.col_distance[cols] + e.worth(rows, cols), np.inf)
        best = distance.argmin(axis=1)
        everywhere = np.full(len(self.row_distance), np.inf)
        everywhere[rows] = distance[np.arange(len(rows)), best]
        origin = np.zeros(len(everywhere), dtype=int)
        origin[rows] = cols[best]
        self._reach(everywhere, origin)

    def _reach(self, distance: np.ndarray, origin: np.ndarray) -> None:
        nearer = distance < self.row_distance
        self.row_distance[nearer], self.row_from[nearer] = distance[nearer], origin[nearer]

    def price(self) -> None:
        """Changes bonuses and threshold so that the chain costs nothing and all worths keep their signs."""
        e, length = self.exchange, self.length
        if length == np.inf:
            reached = np.concatenate([self.row_distance, self.col_distance, [self.hub_distance]])
            length = reached[np.isfinite(reached)].max()
        raised = max(length - self.hub_distance, 0.0)
        self.last_col = int((self.col_distance + e.col_bonus).argmin())
        e.row_bonus += np.maximum(length - self.row_distance, 0.0)
        e.col_bonus[self.tight] += raised - np.maximum(length - self.col_distance[self.tight], 0.0)
        e.threshold += raised

    def apply(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Changes Γ along the chain, back to front; returns the (row, col) added and dropped."""
        e, at, added, dropped = self.exchange, self.end, [], []
        if at is None:  # no block can be spared: one more is kept
            at = int(self.col_from[self.last_col])
            added.append((at, self.last_col))
        while at != self.row:
            origin = int(self.row_from[at])
            dropped.append((at, int(e.cheapest_col[at]) if origin < 0 else origin))
            col = self.hub_from if origin < 0 else origin
            at = int(self.col_from[col])
            added.append((at, col))
        for block in dropped:
            e.keep[block] = False
        for block in added:
            e.keep[block] = True
        return added, dropped
