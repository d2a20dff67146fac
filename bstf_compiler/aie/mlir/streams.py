"""What every DMA channel does in a step: which stream it serves, which boxes it walks, in which order, with what locks.

A step's transfers are taken in one legal order (events.py). A transfer is cut into its moves: one channel reads, one or
several write. Reading and writing channels are numbered here, step by step, for a configuration has streams of its own:
what different cores send to one memory tile arrives on different channels while it has enough of them.

Where a channel is fed by several others all the same, nothing in the streams keeps their order. There the sequence
does: `fences` name what must have arrived before a move may begin, and the sequence waits for it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from bstf_compiler.aie import events
from bstf_compiler.aie.addressing import Dimensions, patterns
from bstf_compiler.aie.code import Code, Step
from bstf_compiler.aie.descriptors import Performed, limits_of, lock_actions, performed, tile_of
from bstf_compiler.aie.device import DescriptorLimits, DeviceSpec
from bstf_compiler.aie.isa import Access, LockAction
from bstf_compiler.aie.mlir.model import DIMENSIONS, MM2S, S2MM, WORD

Lock = tuple[str, int] | None
"""Name of a lock and how often it is taken or given."""
Channel = tuple[str, str, int]
"""Tile as in the program, direction, number."""
_Stream = tuple[str, str, str]
"""Tile, direction and what has a channel of its own there."""

_LONGEST_SIZE = 512
"""The most that mlir-aie takes as a size of a dimension (its check of dma_bd), which is less than wraps can hold."""
_REACHING = 4
"""Channels of a memory tile that reach its neighbours (AM020, memory tile DMA)."""


@dataclass
class Run:
    """One run of a descriptor: the move that it is part of, its memory, first byte, dimensions (size, step) in words,
    innermost first, and locks. `targets`: where a reading channel sends it.
    """

    move: int
    memory: str
    address: int
    dimensions: Dimensions
    acquire: Lock = None
    release: Lock = None
    targets: tuple[Channel, ...] = ()


@dataclass
class Streams:
    """A step's runs by channel, and the fences: by move, the moves that must have arrived before, with their channel.

    `written`: those of WRITEFM in memory tiles, by channel and memory.
    """

    runs: dict[Channel, list[Run]] = field(default_factory=lambda: defaultdict(list))
    fences: dict[int, list[tuple[Channel, int]]] = field(default_factory=lambda: defaultdict(list))
    written: dict[tuple[Channel, str], list[Run]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class _Move:
    """A move of one iteration: `order` counts all moves of the step."""

    order: int
    one: Performed
    iteration: int
    source: tuple[_Stream, Access]
    targets: tuple[tuple[_Stream, str, Access], ...]


def streams(code: Code, step: Step) -> Streams:
    """The streams of a step.

    Raises:
        ValueError: the order of events is not one that the locks allow.
    """
    transfers = performed(code.device, step)
    moves = list(_moves(step, transfers))
    numbers = _channels(code.device, moves)
    actions = lock_actions(transfers, step.locks)
    made = Streams()
    for group in _iterations(moves):
        _append(code.device, made, group, numbers, actions)
    _give_together(made, transfers)
    _fence(made)
    return made


def _moves(step: Step, transfers: list[Performed]) -> Iterator[_Move]:
    """All moves in one legal order."""
    by_index = {one.index: one for one in transfers}
    walkers = {}
    for one in transfers:
        for (tile, direction, _), part in one.ports.items():
            for memory, access in part:
                walkers[one.index, direction, memory, id(access)] = tile
    order = events.run(step.instructions, step.locks)
    if order.blocked:
        raise ValueError(f"layer '{step.layer}' never ends: its locks are wrong; compile again")
    count = 0
    for index, iteration in zip(order.instruction.tolist(), order.iteration.tolist()):
        if (one := by_index.get(index)) is None:
            continue
        kind, unit = one.transfer.kind, one.transfer.unit
        for move in one.transfer.moves:
            if not move.source.bytes:
                continue
            origin = move.source.tiles[0]
            source = (walkers[index, MM2S, origin, id(move.source)], MM2S, unit)
            targets = []
            for memory in move.target.tiles:
                own = f"{unit} {source[0]}" if kind == "WRITEFM" else unit  # a channel for each core that writes
                tile = walkers[index, S2MM, memory, id(move.target)]
                targets.append(((tile, S2MM, own if memory[0] == "m" else kind), memory, move.target))
            yield _Move(count, one, iteration, (source, move.source), tuple(targets))
            count += 1


def _iterations(moves: list[_Move]) -> Iterator[list[_Move]]:
    """The moves of one iteration of one transfer at a time."""
    group: list[_Move] = []
    for move in moves:
        if group and (move.one.index, move.iteration) != (group[0].one.index, group[0].iteration):
            yield group
            group = []
        group.append(move)
    if group:
        yield group


# --- channels ---


def _channels(device: DeviceSpec, moves: list[_Move]) -> dict[_Stream, int]:
    """A number for each stream of a tile: channels of their own while there are enough, those that reach neighbours
    first, and about as many runs for both halves of a memory tile's descriptors.
    """
    runs: Counter[_Stream] = Counter()
    reaching: set[_Stream] = set()
    for move in moves:
        stream, access = move.source
        runs[stream] += 1
        if access.tiles[0][0] == "m" and access.tiles[0] != stream[0]:
            reaching.add(stream)
        for target, *_ in move.targets:
            runs[target] += 1
    numbers: dict[_Stream, int] = {}
    used: Counter[tuple[str, str, int]] = Counter()
    load: Counter[tuple[str, int]] = Counter()
    for stream in sorted(runs, key=lambda one: (one not in reaching, -runs[one], one)):
        tile, direction, _ = stream
        limits = limits_of(device, tile)
        free = range(min(_REACHING, limits.channels) if stream in reaching else limits.channels)
        number = min(free, key=lambda n: (used[tile, direction, n], load[tile, n % limits.parities], n))
        numbers[stream] = number
        used[tile, direction, number] += 1
        load[tile, number % limits.parities] += runs[stream]
    return numbers


# --- runs ---


def _append(
    device: DeviceSpec, made: Streams, group: list[_Move], numbers: dict[_Stream, int],
    actions: dict[tuple[int, str], tuple[list[LockAction], list[LockAction]]],
) -> None:  # fmt: skip
    """The runs of one iteration: of each memory the first takes its lock, the last gives it."""
    fresh: dict[tuple[_Stream, str], list[Run]] = defaultdict(list)
    for move in group:
        stream, access = move.source
        targets = tuple((tile, way, numbers[tile, way, what]) for (tile, way, what), *_ in move.targets)
        places = [(stream, access.tiles[0], access, targets)]
        places += [(target, memory, box, ()) for target, memory, box in move.targets]
        for place, memory, box, sent in places:
            for address, walk in walks(box, box.start(move.iteration), limits_of(device, place[0])):
                run = Run(move.order, memory, address, walk, targets=sent)
                made.runs[place[0], place[1], numbers[place]].append(run)
                fresh[place, memory].append(run)
    one, iteration = group[0].one, group[0].iteration
    for (place, memory), mine in fresh.items():
        take, give = actions[one.index, memory]
        if one.transfer.kind == "WRITEFM" and memory[0] == "m":
            made.written[(*place[:2], numbers[place]), memory] += mine
            give = []
        mine[0].acquire = _acting(take, iteration, one.transfer.iterations)
        mine[-1].release = _acting(give, iteration, one.transfer.iterations)


def _acting(actions: list[LockAction], iteration: int, iterations: int) -> Lock:
    acting = [action for action in actions if action.applies(iteration, iterations)]
    return (acting[0].lock, sum(action.count for action in acting)) if acting else None


def walks(box: Access, start: int, limits: DescriptorLimits) -> list[tuple[int, Dimensions]]:
    """First bytes and dimensions of the descriptors that visit a box; no size is more than mlir-aie takes, unless all
    words follow one another.
    """
    wraps = tuple(min(wrap, _LONGEST_SIZE) for wrap in limits.wraps)[: DIMENSIONS - 1]
    narrow = replace(limits, wraps=wraps, dimensions=min(limits.dimensions, DIMENSIONS))
    found = []
    for offset, walk in patterns(box.sizes, box.strides, narrow):
        *inner, (size, step) = walk
        most = size if len(walk) == 1 and step == 1 else _LONGEST_SIZE
        for first in range(0, size, most):
            part = (*inner, (min(most, size - first), step))
            found.append((start + offset + first * step * WORD, part))
    return found


def _give_together(made: Streams, transfers: list[Performed]) -> None:
    """What WRITEFM gives of a memory tile each channel that it writes through gives, with its last run; who takes it
    takes as many.
    """
    given = {a.lock for one in transfers if one.transfer.kind == "WRITEFM" for a in one.transfer.release}
    for lock in sorted(name for name in given if name[0] == "m"):
        last = [runs[-1] for (_, memory), runs in made.written.items() if memory == tile_of(lock)]
        for run in last:
            run.release = (lock, 1)
        for run in (run for runs in made.runs.values() for run in runs):
            if run.acquire and run.acquire[0] == lock:
                run.acquire = (lock, len(last))


def _fence(made: Streams) -> None:
    """Where a channel is fed by several, each move from another one than before waits for what came before."""
    sources = {run.move: channel for channel, runs in made.runs.items() for run in runs if channel[1] == MM2S}
    for channel, runs in made.runs.items():
        if channel[1] != S2MM:
            continue
        before = None
        for run in runs:
            if before is not None and sources[run.move] != sources[before]:
                made.fences[run.move].append((channel, before))
            before = run.move
