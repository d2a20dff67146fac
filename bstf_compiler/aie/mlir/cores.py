"""The programs of the cores: loops that take locks, call a kernel and give locks.

A core's runs of equal tiles become loops, cut where a lock is only taken first or only given last. Where a tile is
empty the DMA moves nothing and touches no lock of the core (descriptors.py), and neither does the core; it passes over
slots of its rings with the DMA, so what comes next must find the ring empty: of its input the DMA takes all slots and
the core gives the others back, of its output the core does both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from bstf_compiler.aie.code import Step
from bstf_compiler.aie.isa import FIRST, LAST, Access, Compute, LockAction, Transfer
from bstf_compiler.aie.mlir.model import ACQUIRE, RELEASE, Buffer, Call, Core, Loop, Slot, Tile, UseLock

KERNELS = ("conv", "maxpool", "averagepool", "add", "requantize")
"""The operations that kernels/ has."""


@dataclass
class _State:
    """What a core has passed over without touching its locks."""

    input: bool = False
    output: bool = False
    loops: list[Loop] = field(default_factory=list)


def core_programs(
    step: Step, tiles: dict[str, Tile], buffers: list[Buffer], names: dict[str, str], shift: int
) -> list[Core]:
    """The program of every core of a step.

    Args:
        step: its instructions.
        tiles: where each core is.
        buffers: all buffers of the cores.
        names: of locks in the design, by those in the program.
        shift: bytes between the program's addresses and those of the buffers.

    Raises:
        ValueError: a layer has an operation that has no kernel.
    """
    if step.op not in KERNELS and any(isinstance(do, Compute) for do in step.instructions):
        raise ValueError(
            f"layer '{step.layer}': there is no kernel for '{step.op}' in mlir-aie's C++, only for "
            f"{', '.join(KERNELS)}; end the network before it or simulate it here"
        )
    own: dict[Tile, list[Buffer]] = defaultdict(list)
    for buffer in buffers:
        own[buffer.tile].append(buffer)
    loaded, written = _moved(step)
    states: dict[str, _State] = defaultdict(_State)
    for do in (one for one in step.instructions if isinstance(one, Compute)):
        core = do.parameters.tiles[0]
        moves = next(loaded[core]), next(written[core]) if do.finish else True
        _append(states[core], do, moves, step.locks, _Places(own[tiles[core]], shift))
    return [
        Core(tiles[core], tuple(Loop(loop.count, _named(loop.body, names)) for loop in state.loops))
        for core, state in states.items()
    ]


def _named(body: tuple[UseLock | Call, ...], names: dict[str, str]) -> tuple[UseLock | Call, ...]:
    return tuple(replace(one, lock=names[one.lock]) if isinstance(one, UseLock) else one for one in body)


def _moved(step: Step) -> tuple[dict[str, Iterator[bool]], dict[str, Iterator[bool]]]:
    """Of each core, whether the transfers that bring its tiles move any bytes, and those that take its results."""
    loaded, written = defaultdict(list), defaultdict(list)
    for do in (one for one in step.instructions if isinstance(one, Transfer)):
        if do.kind == "LOADFM":
            touched = {tile for move in do.moves if move.target.bytes for tile in move.target.tiles}
            cores = [a.lock.partition(":")[0] for a in do.release if a.lock.endswith(":in_full")]
            for core in cores:
                loaded[core].append(core in touched)
        elif do.kind == "WRITEFM":
            touched = {move.source.tiles[0] for move in do.moves if move.source.bytes}
            for core in (a.lock.partition(":")[0] for a in do.acquire):
                written[core].append(core in touched)
    return ({core: iter(found) for core, found in side.items()} for side in (loaded, written))


@dataclass(frozen=True)
class _Places:
    """Finds the buffer of an access."""

    buffers: list[Buffer]
    shift: int

    def of(self, access: Access, iterations: int) -> tuple[str, int | Slot]:
        """Name of the buffer and the offset of the access there."""
        starts = [access.start(i) + self.shift for i in range(iterations)]
        for buffer in self.buffers:
            if buffer.address <= min(starts) and max(starts) + access.extent <= buffer.address + 4 * buffer.words:
                if len(set(starts)) == 1:
                    return buffer.name, starts[0] - buffer.address
                base = access.address + self.shift - buffer.address
                ring = access.ring or access.first + iterations
                return buffer.name, Slot(base, access.advance, ring, access.first)
        raise ValueError(f"bytes {min(starts)} to {max(starts) + access.extent} of a core lie in no buffer")

    def at(self, address: int) -> tuple[str, int]:
        """Name of the buffer at an address, and the offset there."""
        for buffer in self.buffers:
            if buffer.address <= address + self.shift < buffer.address + 4 * buffer.words:
                return buffer.name, address + self.shift - buffer.address
        raise ValueError(f"address {address} of a core lies in no buffer")


def _append(state: _State, do: Compute, moves: tuple[bool, bool], locks: dict[str, int], places: _Places) -> None:
    """The loops of an instruction: the same locks in each iteration of one."""
    core, (fetched, kept) = do.parameters.tiles[0], moves
    gives_back = fetched and state.input
    refills = kept and do.finish and state.output
    untouched = {f"{core}:{name}" for name, used in (("in", fetched), ("out", kept)) if not used}
    acquire = [a for a in do.acquire if a.lock.rpartition("_")[0] not in untouched]
    release = [a for a in do.release if a.lock.rpartition("_")[0] not in untouched]
    cuts = {0, do.iterations}
    if gives_back or refills or any(action.when == FIRST for action in acquire):
        cuts.add(1)
    if any(action.when == LAST for action in release):
        cuts.add(do.iterations - 1)
    for start, stop in pairwise(sorted(cuts)):
        taken = _uses(acquire, ACQUIRE, start, do.iterations)
        if start == 0 and gives_back:
            taken.append(UseLock(f"{core}:in_free", RELEASE, locks[f"{core}:in_free"] - 1))
        if start == 0 and refills:
            free, slots = f"{core}:out_free", locks[f"{core}:out_free"]
            taken = [replace(use, value=slots) if use.lock == free else use for use in taken]
            taken.append(UseLock(free, RELEASE, slots - 1))
        call = [_call(do, start, stop - start, places)] if do.output.bytes else []
        body = (*(use for use in taken if use.value), *call, *_uses(release, RELEASE, start, do.iterations))
        if body:
            state.loops.append(Loop(stop - start, body))
    state.input = not fetched
    if do.finish:
        state.output = not kept


def _uses(actions: list[LockAction], way: str, start: int, iterations: int) -> list[UseLock]:
    return [UseLock(a.lock, way, a.count) for a in actions if a.applies(start, iterations)]


def _call(do: Compute, start: int, count: int, places: _Places) -> Call:
    """The kernel's call for `count` iterations from `start` on."""

    def place(access: Access) -> tuple[str, int | Slot]:
        if not access.bytes:  # of a core that reads nothing the kernel gets the buffer all the same
            return places.at(access.address)
        name, offset = places.of(access, do.iterations)
        if not isinstance(offset, Slot):
            return name, offset
        moved = replace(offset, first=(offset.first + start) % offset.ring)
        return name, moved if count > 1 else moved.at(0)

    (rows, pixels, channels), shape = do.output.sizes, do.inputs[0].sizes
    inputs, ends = [place(access) for access in do.inputs], [place(do.parameters), place(do.output)]
    kernel, numbers = f"bstf_{do.op}", (*shape, *do.output.sizes, *do.kernel, *do.strides, *do.dilation, *do.padding)
    if do.op == "conv":
        numbers = (*numbers, int(do.begin), int(do.finish))
        if not (do.begin and do.finish):
            kernel += "_part"
            ends.append(places.at(do.scratch))
        if len(inputs) > 1:
            kernel += "_add"
    elif do.op == "add":
        numbers = (rows * pixels, channels, 0 if do.inputs[1].sizes != shape else channels)
    elif do.op == "requantize":
        numbers = (do.output.bytes,)
    return Call(kernel, (*inputs, *ends), numbers)
