"""An mlir-aie design as data: one configuration of the array a step, each with its tiles, buffers, locks, streams,
descriptors, core programs and runtime sequence.

Addresses of buffers are in bytes, offsets, lengths, sizes and strides of descriptors in words of four bytes: buffers
are memrefs of i32. Tiles are named by where they lie on the part, counted from its corner, row 0 being the shims.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MM2S, S2MM = "MM2S", "S2MM"
"""Directions of a channel: memory to stream, stream to memory."""
WORD = 4
PACKETS = 32
"""Packet ids: 5 bits (AM020)."""
DIMENSIONS = 3
"""Of any descriptor: a fourth one, which memory tiles have, is a task's repetition to mlir-aie (AIEDMATasksToNPU)."""

SHIM, MEMTILE, CORE = "shim", "memtile", "core"


@dataclass(frozen=True)
class Part:
    """A part as mlir-aie knows it: name, number in its enumeration (AIEAttrs.td), columns, rows of memory tiles and of
    cores, and whether narrower devices of it have names too.
    """

    name: str
    number: int
    columns: int
    memtile_rows: int
    core_rows: int
    narrower: bool = False


PARTS = {
    "npu1": Part("npu1", 4, 4, 1, 4, narrower=True),
    "npu2": Part("npu2", 8, 8, 1, 4, narrower=True),
    "ve2302": Part("xcve2302", 2, 17, 1, 2),
    "ve2802": Part("xcve2802", 3, 38, 2, 8),
}
"""By the names of devices here (mlir-aie, AIETargetModel.h)."""


@dataclass(frozen=True, order=True)
class Tile:
    """A tile of the part by column and row."""

    column: int
    row: int

    def __str__(self) -> str:
        return f"tile ({self.column}, {self.row})"


@dataclass(frozen=True)
class Buffer:
    """`words` of a tile's memory at `address` bytes; `bank`: the one that holds all of it, if one does."""

    name: str
    tile: Tile
    address: int
    words: int
    bank: int | None = None


@dataclass(frozen=True)
class Lock:
    """A counting semaphore of a tile."""

    name: str
    tile: Tile
    number: int
    init: int


@dataclass(frozen=True, order=True)
class Port:
    """A channel of a tile's DMA."""

    tile: Tile
    direction: str
    channel: int

    def __str__(self) -> str:
        return f"{self.tile} {self.direction} {self.channel}"


@dataclass(frozen=True)
class Flow:
    """A stream from one channel to others, all of which get everything; `packet`: the id of its packets, or None for a
    circuit that nothing else shares.
    """

    source: Port
    targets: tuple[Port, ...]
    packet: int | None = None


ACQUIRE, RELEASE = "AcquireGreaterEqual", "Release"


@dataclass(frozen=True)
class UseLock:
    """Waits until a lock holds `value` and takes it, or gives it."""

    lock: str
    action: str
    value: int


@dataclass(frozen=True)
class Descriptor:
    """A buffer descriptor: walks `length` words of a buffer from `offset` on, by `sizes` and `strides`, outermost first
    (none: one word after the other). `buffer` None is the host's memory. `packet`: the id that its stream carries.
    """

    number: int
    buffer: str | None
    offset: int
    length: int
    sizes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    packet: int | None = None
    acquire: UseLock | None = None
    release: UseLock | None = None


Chain = tuple[Descriptor, ...]
"""Descriptors that run one after the other."""


@dataclass(frozen=True)
class Start:
    """A chain that a channel runs once, from the configuration on."""

    port: Port
    chain: Chain


@dataclass(frozen=True)
class Task:
    """The sequence writes a chain's descriptors and pushes it to a channel's queue; with `token` it can be awaited."""

    name: str
    port: Port
    chain: Chain
    token: bool


@dataclass(frozen=True)
class Await:
    """The sequence waits until a task is done; its descriptors are free then."""

    task: str


@dataclass(frozen=True)
class Slot:
    """A byte offset that moves with the iterations of a loop: `base + (first + i) % ring * advance`."""

    base: int
    advance: int
    ring: int
    first: int

    def at(self, iteration: int) -> int:
        """The offset in an iteration."""
        return self.base + (self.first + iteration) % self.ring * self.advance


@dataclass(frozen=True)
class Call:
    """A kernel on buffers of the core: `buffers` with the byte offsets where the kernel finds its data, and numbers."""

    kernel: str
    buffers: tuple[tuple[str, int | Slot], ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """Iterations [0, count) of a core; each takes locks, calls, gives locks, in this order."""

    count: int
    body: tuple[UseLock | Call, ...]


@dataclass(frozen=True)
class Core:
    """The program of a core."""

    tile: Tile
    loops: tuple[Loop, ...]


@dataclass
class Configuration:
    """What the array does in one step."""

    name: str
    buffers: list[Buffer] = field(default_factory=list)
    locks: list[Lock] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    cores: list[Core] = field(default_factory=list)
    sequence: list[Task | Await] = field(default_factory=list)

    @property
    def tiles(self) -> list[Tile]:
        """All tiles with something in them, in order."""
        ports = [port for flow in self.flows for port in (flow.source, *flow.targets)]
        ports += [one.port for one in (*self.starts, *self.sequence) if not isinstance(one, Await)]
        found = {port.tile for port in ports} | {one.tile for one in (*self.buffers, *self.locks, *self.cores)}
        return sorted(found)

    @property
    def kernels(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """The kernels that cores call: words of each buffer argument, and how many numbers follow them."""
        words = {buffer.name: buffer.words for buffer in self.buffers}
        found = {}
        for core in self.cores:
            for loop in core.loops:
                for call in loop.body:
                    if isinstance(call, Call):
                        found[call.kernel] = (tuple(words[name] for name, _ in call.buffers), len(call.numbers))
        return found

    def chains(self) -> list[tuple[Port, Chain]]:
        """All chains with their channels: those of the configuration, then those of the sequence."""
        return [(one.port, one.chain) for one in (*self.starts, *self.sequence) if not isinstance(one, Await)]


@dataclass
class Design:
    """A network for a part.

    `part`: family of devices, `npu1`; `columns`: how many the part has, or for an NPU how many of them the design
    takes; `host_words`: of the one buffer that the host gives; `configurations`: in the order in which they run.
    """

    name: str
    part: str
    columns: int
    host_words: int
    configurations: list[Configuration] = field(default_factory=list)

    def kind(self, tile: Tile) -> str:
        """Shim, memory tile or core."""
        return SHIM if tile.row == 0 else MEMTILE if tile.row <= PARTS[self.part].memtile_rows else CORE

    @property
    def device(self) -> str:
        """mlir-aie's name of the device, as of version 1.4."""
        part = PARTS[self.part]
        return part.name if self.columns == part.columns else f"{part.name}_{self.columns}col"
