"""The weights of a layer on their way: from DDR to chunk slots in the memory tiles (LOADW), from there to slots in the
cores (LOADWM).

The step before goes on to load the first chunks, so that a layer finds them when it begins. Slots are counted by locks:
`w_free` and `w_full` of a memory tile and of a core, `next_free` and `next_full` of a memory tile for what is loaded
ahead. Each ends as it began: chunks that are there already are taken without a lock, and as many of the last ones are
not given back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np

from bstf_compiler.aie.boxes import slot
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import Access, LockAction, Move, Transfer
from bstf_compiler.aie.pipeline import Idle, ahead
from bstf_compiler.aie.tiling import Ring


@dataclass(frozen=True)
class Chunk:
    """A packed chunk in DDR."""

    address: int
    bytes: int


_NONE = Chunk(0, 0)


@dataclass(frozen=True)
class WeightStream:
    """The chunks of a layer's band, by row of cores in the order of their use.

    `ring`: their slots in each core; `address`: of their slots in the memory tiles; `cores`: names, by row; `loaded`:
    how many of each row are in the memory tiles or the cores when the step begins; `sent`: how many are in the cores.
    """

    device: DeviceSpec
    ring: Ring
    address: int
    chunks: dict[int, list[Chunk]]
    cores: dict[int, tuple[str, ...]]
    loaded: int = 0
    sent: int = 0

    @property
    def uses(self) -> int:
        """Chunks of the row that has most."""
        return max(map(len, self.chunks.values()))

    def begun(self, idle: Idle, room: int) -> WeightStream:
        """The stream when the step before has gone on to load its first chunks.

        Args:
            idle: what is left of its time.
            room: how many slots of the cores are free then.
        """
        longest = np.array(
            [max(chunk.bytes for chunk in row) for row in zip_longest(*self.chunks.values(), fillvalue=_NONE)]
        )
        there = ahead(longest, self.device, self.ring.slots, room, idle)
        return replace(self, loaded=there.loaded, sent=there.sent)

    def after(self, band: WeightStream) -> WeightStream:
        """The stream after that of the band before, whose chunks are still in the cores if they all have slots."""
        stay = self.uses if band.uses <= self.ring.slots else 0
        return replace(self, loaded=stay, sent=stay)

    def locks(self) -> dict[str, int]:
        """The locks of the layer's own step."""
        found, slots = {}, self.ring.slots
        for row, chunks in self.chunks.items():
            loaded, sent = min(self.loaded, len(chunks)), min(self.sent, len(chunks))
            for core in self.cores[row]:
                found |= {f"{core}:w_free": slots - sent, f"{core}:w_full": 0}
            found |= {self._lock("w_free", row): slots - loaded + sent, self._lock("w_full", row): 0}
        return found

    def waits(self, row: int, use: int) -> bool:
        """Whether a core has to wait for a chunk."""
        return use >= self.sent

    def frees(self, row: int, use: int) -> bool:
        """Whether a core gives a chunk's slot back."""
        return use < len(self.chunks[row]) - self.sent

    def transfers(self) -> Iterator[Transfer]:
        """LOADW and LOADWM of all chunks that the step before has left."""
        for row, chunks in self.chunks.items():
            free, full = self._lock("w_free", row), self._lock("w_full", row)
            loaded, sent = min(self.loaded, len(chunks)), min(self.sent, len(chunks))
            for use in range(sent, len(chunks)):
                if use >= loaded:
                    yield self._load(row, use, (free,), (full,))
                here = (full,) if use >= loaded else ()
                back = (free,) if use < len(chunks) - (loaded - sent) else ()
                cores = self.cores[row]
                yield self._send(
                    row,
                    use,
                    (*here, *(f"{core}:w_free" for core in cores)),
                    (*back, *(f"{core}:w_full" for core in cores)),
                )

    def locks_ahead(self) -> dict[str, int]:
        """The locks of what the step before does."""
        names = (self._lock(name, row) for row in self.chunks for name in ("next_free", "next_full") if self.sent)
        return dict.fromkeys(names, 0)

    def transfers_ahead(self) -> Iterator[Transfer]:
        """LOADW and LOADWM that the step before does, in its own queues."""
        slots = self.ring.slots
        for row, chunks in self.chunks.items():
            free, full = self._lock("next_free", row), self._lock("next_full", row)
            loaded, sent = min(self.loaded, len(chunks)), min(self.sent, len(chunks))
            for use in range(loaded):
                taken, given = (free,) if use >= slots else (), (full,) if use < sent else ()
                yield replace(self._load(row, use, taken, given), ahead=True)
                if use < sent:
                    back = (free,) if use + slots < loaded else ()
                    yield replace(self._send(row, use, (full,), back), ahead=True)

    def _lock(self, name: str, row: int) -> str:
        """A lock of a row's chunk slots in its memory tile; with a number where a tile feeds several rows."""
        tile, place = self.device.weight_tile(row)
        return f"m{tile}:{name}{place or ''}"

    def _slot(self, row: int, use: int) -> Access:
        tile, place = self.device.weight_tile(row)
        ring = replace(self.ring, address=self.address + place * self.ring.total)
        return slot((f"m{tile}",), ring, self.chunks[row][use].bytes, use)

    def _load(self, row: int, use: int, acquire: tuple[str, ...], release: tuple[str, ...]) -> Transfer:
        chunk = self.chunks[row][use]
        move = Move(Access(("ddr",), chunk.address, (1, 1, chunk.bytes)), self._slot(row, use))
        return Transfer("LOADW", f"loadw.{row}", (move,), 1, *_actions(acquire, release))

    def _send(self, row: int, use: int, acquire: tuple[str, ...], release: tuple[str, ...]) -> Transfer:
        target = slot(self.cores[row], self.ring, self.chunks[row][use].bytes, use)
        move = Move(self._slot(row, use), target)
        return Transfer("LOADWM", f"loadwm.{row}", (move,), 1, *_actions(acquire, release))


def _actions(acquire: tuple[str, ...], release: tuple[str, ...]) -> tuple[tuple[LockAction, ...], ...]:
    return tuple(map(LockAction, acquire)), tuple(map(LockAction, release))
