"""The instructions of a program: transfers and computations with resolved addresses, iterations and locks.

Tiles are named `ddr`, `m2` (memory tile 2) and `c1.3` (core of column 1, row 3). Every unit (a DMA channel or a core)
runs its instructions in order; units run at the same time and meet only at locks, which are counting semaphores.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("LOAD", "LOADW", "LOADFM", "LOADWM", "COMP", "WRITEFM", "WRITE")
"""LOAD: DDR to memory tile, activations. LOADW: the same, weights. LOADFM, LOADWM: memory tile to cores, activations
and weights. COMP: a core computes. WRITEFM: cores to memory tile. WRITE: memory tile to DDR."""

EACH, FIRST, LAST = "each", "first", "last"


@dataclass(frozen=True)
class LockAction:
    """Takes or gives `count` of a lock, in each iteration or only in the first or the last one."""

    lock: str
    count: int = 1
    when: str = EACH

    def applies(self, iteration: int, iterations: int) -> bool:
        """Whether the action happens in `iteration` of `iterations`."""
        if self.when == EACH:
            return True
        return iteration == (0 if self.when == FIRST else iterations - 1)


@dataclass(frozen=True)
class Access:
    """A box of bytes in the memory of one or more tiles (several: the same place in each, a broadcast).

    `sizes` (rows, pixels, bytes) and `strides` (bytes from row to row, from pixel to pixel); bytes are contiguous.
    In iteration i the box starts at `address + i * advance`, or, with a ring of `ring` slots, at
    `address + ((first + i) % ring) * advance`.
    """

    tiles: tuple[str, ...]
    address: int
    sizes: tuple[int, int, int]
    strides: tuple[int, int] = (0, 0)
    advance: int = 0
    ring: int = 0
    first: int = 0

    def start(self, iteration: int) -> int:
        """Address of the box in an iteration."""
        return self.address + ((self.first + iteration) % self.ring if self.ring else iteration) * self.advance

    @property
    def bytes(self) -> int:
        """Size of the box."""
        rows, pixels, length = self.sizes
        return rows * pixels * length

    @property
    def extent(self) -> int:
        """Bytes from the first to the last of the box, both included."""
        rows, pixels, length = self.sizes
        if not self.bytes:
            return 0
        return (rows - 1) * self.strides[0] + (pixels - 1) * self.strides[1] + length


@dataclass(frozen=True)
class Move:
    """Bytes of `source` (one tile), in order, to `target` (one or more tiles)."""

    source: Access
    target: Access


@dataclass(frozen=True)
class Transfer:
    """A DMA channel's instruction: in each iteration takes locks, makes its moves in order, gives locks. `ahead`: it is
    for the layer of the next step.
    """

    kind: str
    unit: str
    moves: tuple[Move, ...]
    iterations: int = 1
    acquire: tuple[LockAction, ...] = ()
    release: tuple[LockAction, ...] = ()
    ahead: bool = False

    @property
    def bytes(self) -> int:
        """Bytes through the channel in one iteration; a broadcast counts once."""
        return sum(move.source.bytes for move in self.moves)

    @property
    def work(self) -> int:
        """What the channel's time is proportional to: its bytes."""
        return self.bytes


@dataclass(frozen=True)
class Compute:
    """A core's instruction: one operation on buffers of its own memory.

    `parameters` holds the chunk of the packed tensor that the operation reads (see weights.py). The boxes of `inputs`
    and `output` are (rows, pixels, channels) of the tile; `block`: the output's first channel block in its tensor;
    `padding` (top, left): rows and pixels of the reach that lie before the tile (see reach.py). `begin` and `finish`
    frame a sum over several chunks of input channels, kept in int32 at `scratch`.
    A convolution with a second input adds it to its result. Of one iteration: `work`, multiply-adds of whole blocks
    (conv) or element operations (the rest), and `added`, element operations of that sum, are what time is counted by;
    `macs`, effective multiply-adds, leaves the padding of ragged blocks out.
    """

    unit: str
    op: str
    inputs: tuple[Access, ...]
    parameters: Access
    output: Access
    block: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    work: int
    added: int = 0
    macs: int = 0
    scratch: int = 0
    begin: bool = True
    finish: bool = True
    iterations: int = 1
    acquire: tuple[LockAction, ...] = ()
    release: tuple[LockAction, ...] = ()

    kind = "COMP"
    bytes = 0


Instruction = Transfer | Compute
