"""The rules that mlir-aie and the part set for a design (mlir-aie, AIEDialect.cpp and AIEXDialect.cpp; AM020; UG1603).

Each rule is a generator of (place, sentence) for what breaks it, by name in `RULES`. A design that keeps them all has
sound structure: what is in it exists, fits, is in reach, adds up. Whether it ends is what machine.py shows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from bstf_compiler.aie.device import DescriptorLimits, DeviceSpec
from bstf_compiler.aie.mlir.machine import CORE_BYTES, KERNELS, MEMTILE_BYTES
from bstf_compiler.aie.mlir.model import (
    ACQUIRE,
    CORE,
    DIMENSIONS,
    MEMTILE,
    MM2S,
    PACKETS,
    PARTS,
    RELEASE,
    S2MM,
    SHIM,
    WORD,
    Await,
    Call,
    Configuration,
    Descriptor,
    Design,
    Flow,
    Port,
    Slot,
    Task,
    Tile,
    UseLock,
)

STACK = 1024
"""Bytes at the start of a core's memory that its stack takes (aie.core, stack_size)."""
QUEUE = 4
"""Tasks that a channel's queue holds (AM020, array interface DMA)."""
LOCK_VALUE = 63
"""The most that a lock can hold (mlir-aie, getMaxLockValue)."""
_SIZE = 512
"""The most that a dimension can have (mlir-aie's check of dma_bd)."""
_REACHING = 4
"""Channels of a memory tile that reach its neighbours (AM020)."""


@dataclass(frozen=True)
class Violation:
    """What breaks a rule: its name, the place, and a sentence with limit and value."""

    rule: str
    place: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.place}: {self.sentence}"


Found = Iterator[tuple[str, str]]


def check(design: Design) -> list[Violation]:
    """All violations; none for what `design()` makes.

    Example:
        >>> assert not check(read(text))
    """
    found = []
    for configuration in design.configurations:
        view = _View(design, configuration)
        if view.unknown:
            place, sentence = view.unknown[0]
            found.append(Violation("names", f"{configuration.name}, {place}", sentence))
            continue  # the other rules look things up
        for name, rule in RULES.items():
            found += [Violation(name, f"{configuration.name}, {place}", text) for place, text in rule(view)]
    return found


class _View:
    """A configuration with its things by name, and names that stand for nothing."""

    def __init__(self, design: Design, made: Configuration) -> None:
        self.design, self.made = design, made
        self.buffers = {one.name: one for one in made.buffers}
        self.locks = {one.name: one for one in made.locks}
        self.limits = DeviceSpec.load(design.part).descriptors
        self.noc_columns = set(DeviceSpec.load(design.part).noc_columns or range(design.columns))
        self.chains = made.chains()
        self.unknown = list(self._unknown())

    def _unknown(self) -> Found:
        for kind, names in (("buffers", self.made.buffers), ("locks", self.made.locks)):
            for name, count in Counter(one.name for one in names).items():
                if count > 1:
                    yield f"'{name}'", f"{count} {kind} have this name"
        for place, use in self.uses():
            if use.lock not in self.locks:
                yield place, f"uses lock '{use.lock}', which isn't declared"
        for port, one in self.descriptors():
            if one.buffer is not None and one.buffer not in self.buffers:
                yield f"{port}, descriptor {one.number}", f"walks buffer '{one.buffer}', which isn't declared"
        for core in self.made.cores:
            for loop in core.loops:
                for call in (one for one in loop.body if isinstance(one, Call)):
                    for name in (name for name, _ in call.buffers if name not in self.buffers):
                        yield f"core {core.tile}", f"calls {call.kernel} on buffer '{name}', which isn't declared"
        tasks: set[str] = set()
        for one in self.made.sequence:
            if isinstance(one, Await) and one.task not in tasks:
                yield "sequence", f"awaits task '{one.task}', which it hasn't started"
            elif isinstance(one, Task):
                if one.name in tasks:
                    yield "sequence", f"starts task '{one.name}' twice"
                tasks.add(one.name)

    def descriptors(self) -> Iterator[tuple[Port, Descriptor]]:
        """All descriptors with their channels."""
        for port, chain in self.chains:
            yield from ((port, one) for one in chain)

    def uses(self) -> Iterator[tuple[str, UseLock]]:
        """All lock actions with their places, one for each time."""
        for port, one in self.descriptors():
            for use in (one.acquire, one.release):
                if use is not None:
                    yield f"{port}, descriptor {one.number}", use
        for core in self.made.cores:
            for loop in core.loops:
                for use in (one for one in loop.body if isinstance(one, UseLock)):
                    for _ in range(loop.count):
                        yield f"core {core.tile}", use

    def tile_limits(self, tile: Tile) -> DescriptorLimits:
        return {CORE: self.limits.core, MEMTILE: self.limits.memtile, SHIM: self.limits.shim}[self.design.kind(tile)]


# --- tiles and memory ---


def _tiles(view: _View) -> Found:
    part = PARTS[view.design.part]
    rows = 1 + part.memtile_rows + part.core_rows
    for tile in view.made.tiles:
        if not (0 <= tile.column < view.design.columns and 0 <= tile.row < rows):
            yield str(tile), f"lies outside of the {view.design.columns} columns and {rows} rows of {part.name}"
        elif tile.row == 0 and tile.column not in view.noc_columns:
            yield str(tile), f"is a shim without a DMA; {part.name} has them in columns {sorted(view.noc_columns)}"


def _placed(view: _View) -> Found:
    for core in view.made.cores:
        if view.design.kind(core.tile) != CORE:
            yield f"core {core.tile}", f"lies on a {view.design.kind(core.tile)} tile"
        if not core.loops:
            yield f"core {core.tile}", "has an empty body"
    for one in (*view.made.buffers, *view.made.locks):
        if view.design.kind(one.tile) == SHIM:
            yield f"'{one.name}'", "lies on a shim, where the design has neither buffers nor locks"


def _memory(view: _View) -> Found:
    by_tile = defaultdict(list)
    for one in view.made.buffers:
        low, high = (STACK, CORE_BYTES) if view.design.kind(one.tile) == CORE else (0, MEMTILE_BYTES)
        end = one.address + WORD * one.words
        if one.address < low or end > high:
            yield (
                f"buffer '{one.name}' on {one.tile}",
                f"takes bytes {one.address} to {end}, outside of {low} to {high}",
            )
        if one.address % WORD or one.words < 1:
            yield f"buffer '{one.name}' on {one.tile}", f"has address {one.address} and {one.words} words"
        by_tile[one.tile].append(one)
    for tile, buffers in by_tile.items():
        ordered = sorted(buffers, key=lambda one: one.address)
        for one, two in pairwise(ordered):
            if one.address + WORD * one.words > two.address:
                yield str(tile), f"buffers '{one.name}' and '{two.name}' overlap"


def _bank(view: _View) -> Found:
    for one in (one for one in view.made.buffers if one.bank is not None):
        size = CORE_BYTES // 4 if view.design.kind(one.tile) == CORE else MEMTILE_BYTES // 8
        first, last = one.address // size, (one.address + WORD * one.words - 1) // size
        if (first, last) != (one.bank, one.bank):
            yield f"buffer '{one.name}' on {one.tile}", f"lies in banks {first} to {last}, not in bank {one.bank}"


def _locks(view: _View) -> Found:
    numbers = Counter((lock.tile, lock.number) for lock in view.made.locks)
    for lock in view.made.locks:
        place = f"lock '{lock.name}' on {lock.tile}"
        if not 0 <= lock.number < (count := view.tile_limits(lock.tile).locks):
            yield place, f"has number {lock.number} of {count}"
        if not 0 <= lock.init <= LOCK_VALUE:
            yield place, f"begins at {lock.init}, outside of 0 to {LOCK_VALUE}"
        if numbers[lock.tile, lock.number] > 1:
            yield place, f"shares number {lock.number} with another"
    for place, use in view.uses():
        if not 0 <= use.value <= LOCK_VALUE:
            yield place, f"changes lock '{use.lock}' by {use.value}, outside of 0 to {LOCK_VALUE}"


def _balance(view: _View) -> Found:
    """Each lock ends as it began: the next configuration finds nothing half done."""
    values: Counter[str] = Counter()
    for _, use in view.uses():
        if use.action == RELEASE:
            values[use.lock] += use.value
        else:
            values[use.lock] -= use.value
    for name, change in values.items():
        if change:
            lock = view.locks[name]
            yield f"lock '{name}' on {lock.tile}", f"begins at {lock.init} and ends at {lock.init + change}"


# --- descriptors ---


def _reach(view: _View) -> Found:
    """A core's DMA reaches its own memory and locks, a memory tile's also its neighbours' from channels 0 to 3."""
    for port, one in view.descriptors():
        place = f"{port}, descriptor {one.number}"
        kind = view.design.kind(port.tile)
        if (one.buffer is None) != (kind == SHIM):
            yield place, "walks the host's memory" if one.buffer is None else f"of a shim walks buffer '{one.buffer}'"
            continue
        named = [] if one.buffer is None else [("buffer", view.buffers[one.buffer])]
        named += [("lock", view.locks[use.lock]) for use in (one.acquire, one.release) if use is not None]
        for what, thing in named:
            apart = abs(thing.tile.column - port.tile.column)
            neighbours = kind == MEMTILE and apart == 1 and thing.tile.row == port.tile.row
            if thing.tile != port.tile and not (neighbours and port.channel < _REACHING):
                yield place, f"uses {what} '{thing.name}' of {thing.tile}, out of its reach"


def _core_reach(view: _View) -> Found:
    """A core uses its own memory and locks here."""
    for core in view.made.cores:
        for one in (one for loop in core.loops for one in loop.body):
            names = [one.lock] if isinstance(one, UseLock) else [name for name, _ in one.buffers]
            for name in names:
                thing = view.locks.get(name) or view.buffers[name]
                if thing.tile != core.tile:
                    yield f"core {core.tile}", f"uses '{name}' of {thing.tile}"


def _count(view: _View) -> Found:
    for port, one in view.descriptors():
        count = view.tile_limits(port.tile).count
        if not 0 <= one.number < count:
            yield (
                f"{port}, descriptor {one.number}",
                f"is beyond the {count} descriptors of a {view.design.kind(port.tile)} tile",
            )


def _parity(view: _View) -> Found:
    """Even channels of a memory tile have the first half of its descriptors, odd ones the other."""
    for port, one in view.descriptors():
        limits = view.tile_limits(port.tile)
        each = limits.count // limits.parities
        if 0 <= one.number < limits.count and one.number // each != port.channel % limits.parities:
            half = port.channel % limits.parities
            yield (
                f"{port}, descriptor {one.number}",
                f"isn't one of the channel's, {half * each} to {(half + 1) * each - 1}",
            )


def _own(view: _View) -> Found:
    """A descriptor isn't written while it may be in use."""
    held: dict[tuple[Tile, int], str] = {}
    tasks: dict[str, Task] = {}
    for port, chain in ((one.port, one.chain) for one in view.made.starts):
        yield from _hold(held, port, chain, f"the chain of {port}")
    for one in view.made.sequence:
        if isinstance(one, Task):
            tasks[one.name] = one
            yield from _hold(held, one.port, one.chain, f"task '{one.name}'")
        else:
            task = tasks[one.task]
            for key in [
                key for key, owner in held.items() if owner == f"task '{one.task}'" and key[0] == task.port.tile
            ]:
                del held[key]


def _hold(held: dict[tuple[Tile, int], str], port: Port, chain: tuple[Descriptor, ...], owner: str) -> Found:
    for one in chain:
        key = port.tile, one.number
        if key in held:
            yield f"{port}, descriptor {one.number}", f"is written for {owner} while {held[key]} may use it"
        held[key] = owner


def _channels(view: _View) -> Found:
    ports = {port for port, _ in view.chains}
    ports |= {port for flow in view.made.flows for port in (flow.source, *flow.targets)}
    for port in sorted(ports):
        count = view.tile_limits(port.tile).channels
        if not 0 <= port.channel < count:
            yield str(port), f"is beyond the {count} channels of a {view.design.kind(port.tile)} tile"
    for port, count in Counter(one.port for one in view.made.starts).items():
        if count > 1:
            yield str(port), f"begins {count} chains; a channel of a DMA region begins one"


def _length(view: _View) -> Found:
    for port, one in view.descriptors():
        most = view.tile_limits(port.tile).length_words
        if not 1 <= one.length <= most:
            yield f"{port}, descriptor {one.number}", f"has a length of {one.length} words, outside of 1 to {most}"
        if one.sizes and prod(one.sizes) != one.length:
            yield f"{port}, descriptor {one.number}", f"walks {prod(one.sizes)} words, its length says {one.length}"


def _bounds(view: _View) -> Found:
    for port, one in view.descriptors():
        words = view.design.host_words if one.buffer is None else view.buffers[one.buffer].words
        last = one.offset + (
            sum((n - 1) * step for n, step in zip(one.sizes, one.strides)) if one.sizes else one.length - 1
        )
        if one.offset < 0 or last >= words:
            name = "the host's buffer" if one.buffer is None else f"buffer '{one.buffer}'"
            yield (
                f"{port}, descriptor {one.number}",
                f"reaches words {one.offset} to {last} of {name}, which has {words}",
            )


def _dimensions(view: _View) -> Found:
    for port, one in view.descriptors():
        most = min(view.tile_limits(port.tile).dimensions, DIMENSIONS)
        if len(one.sizes) > most or len(one.sizes) != len(one.strides):
            yield (
                f"{port}, descriptor {one.number}",
                f"has {len(one.sizes)} sizes and {len(one.strides)} strides of {most}",
            )


def _wrap(view: _View) -> Found:
    for port, one in view.descriptors():
        wraps = view.tile_limits(port.tile).wraps
        for place, size in enumerate(reversed(one.sizes)):
            most = min(_SIZE, wraps[place]) if place < min(len(wraps), len(one.sizes) - 1) else _SIZE
            if not 1 <= size <= most:
                yield (
                    f"{port}, descriptor {one.number}",
                    f"has size {size} in dimension {place}, outside of 1 to {most}",
                )


def _stride(view: _View) -> Found:
    for port, one in view.descriptors():
        most = view.tile_limits(port.tile).step_words
        for place, step in enumerate(reversed(one.strides)):
            if not 1 <= step <= most:
                yield (
                    f"{port}, descriptor {one.number}",
                    f"has stride {step} in dimension {place}, outside of 1 to {most}",
                )


def _pair(view: _View) -> Found:
    """A descriptor takes one lock and gives one, both of one tile, or touches none (the tool's lowering of tasks, which
    also takes no times of what isn't zero for a wait until it is).
    """
    given = {use.lock for _, use in view.uses() if use.action == RELEASE and use.value}
    for port, one in view.descriptors():
        place = f"{port}, descriptor {one.number}"
        if (one.acquire is None) != (one.release is None):
            yield place, "uses one lock; a descriptor takes one and gives one, or uses none"
        elif one.acquire and (one.acquire.action, one.release.action) != (ACQUIRE, RELEASE):
            yield place, "must take with AcquireGreaterEqual and give with Release"
        elif one.acquire and view.locks[one.acquire.lock].tile != view.locks[one.release.lock].tile:
            yield place, f"takes '{one.acquire.lock}' of one tile and gives '{one.release.lock}' of another"
        elif (
            one.acquire and one.acquire.value == 0 and (view.locks[one.acquire.lock].init or one.acquire.lock in given)
        ):
            yield place, f"takes no times of '{one.acquire.lock}', which isn't always zero"


# --- streams ---


def _flows(view: _View) -> Found:
    """A channel's streams are one circuit or packets, and what a circuit feeds nothing else does."""
    sources, fed = defaultdict(list), defaultdict(list)
    for flow in view.made.flows:
        if (flow.source.direction, {port.direction for port in flow.targets}) != (MM2S, {S2MM}):
            yield str(flow.source), "is no stream from memory to memory"
        sources[flow.source].append(flow)
        for target in flow.targets:
            fed[target].append(flow)
    for what, groups in (("begins", sources), ("ends", fed)):
        for port, flows in groups.items():
            if len(flows) > 1 and any(flow.packet is None for flow in flows):
                yield str(port), f"is where a circuit {what}, and {len(flows) - 1} other streams"


def _packets(view: _View) -> Found:
    """Ids fit their field, and streams of one id have no column in common."""
    by_id: dict[int, list[Flow]] = defaultdict(list)
    for flow in (flow for flow in view.made.flows if flow.packet is not None):
        if not 0 <= flow.packet < PACKETS:
            yield str(flow.source), f"has packets with id {flow.packet}, outside of 0 to {PACKETS - 1}"
        by_id[flow.packet].append(flow)
    for number, flows in by_id.items():
        spans = sorted((*_span(flow), flow.source) for flow in flows)
        for (_, high, one), (low, _, two) in pairwise(spans):
            if low <= high:
                yield str(two), f"has packets with id {number} in column {low}, where those of {one} have it too"


def _span(flow: Flow) -> tuple[int, int]:
    columns = [port.tile.column for port in (flow.source, *flow.targets)]
    return min(columns), max(columns)


def _arrival(view: _View) -> Found:
    """What a channel sends has a stream, and every channel receives as many words as are sent to it."""
    flows = {(flow.source, flow.packet): flow for flow in view.made.flows}
    sent: Counter[Port] = Counter()
    received: Counter[Port] = Counter()
    for port, one in view.descriptors():
        if port.direction == S2MM:
            received[port] += one.length
            continue
        if (port, one.packet) not in flows:
            what = "on no circuit" if one.packet is None else f"with packet id {one.packet}, which has no stream"
            yield f"{port}, descriptor {one.number}", f"sends {what}"
            continue
        for target in flows[port, one.packet].targets:
            sent[target] += one.length
    for port in sorted(sent.keys() | received.keys()):
        if sent[port] != received[port]:
            yield str(port), f"receives {received[port]} words, {sent[port]} are sent to it"


# --- cores and sequence ---


def _calls(view: _View) -> Found:
    """Kernels exist, have one type each, and find their data inside of their buffers."""
    types: dict[str, tuple] = {}
    for core in view.made.cores:
        for loop in core.loops:
            for call in (one for one in loop.body if isinstance(one, Call)):
                place = f"core {core.tile}"
                if call.kernel not in KERNELS:
                    yield place, f"calls '{call.kernel}', which isn't among {', '.join(KERNELS)}"
                kind = tuple(view.buffers[name].words for name, _ in call.buffers), len(call.numbers)
                if types.setdefault(call.kernel, kind) != kind:
                    yield place, f"calls '{call.kernel}' with other types than another core"
                for name, offset in call.buffers:
                    most = WORD * view.buffers[name].words
                    steps = [offset] if not isinstance(offset, Slot) else [offset.at(i) for i in range(loop.count)]
                    if min(steps) < 0 or max(steps) >= most or any(step % WORD for step in steps):
                        yield place, f"calls '{call.kernel}' at byte {max(steps)} of '{name}', which has {most}"


def _queue(view: _View) -> Found:
    """A channel's queue holds four tasks."""
    waiting: dict[Port, list[str]] = defaultdict(list)
    ports: dict[str, Port] = {}
    for start in view.made.starts:
        waiting[start.port].append("the configuration's chain")
    for one in view.made.sequence:
        if isinstance(one, Await):
            names = waiting[ports[one.task]]
            if one.task in names:
                del names[: names.index(one.task) + 1]  # those before it are done too
            continue
        ports[one.name] = one.port
        waiting[one.port].append(one.name)
        if len(waiting[one.port]) > QUEUE:
            yield (
                f"task '{one.name}'",
                f"is number {len(waiting[one.port])} in the queue of {one.port}, which holds {QUEUE}",
            )


def _tokens(view: _View) -> Found:
    """What is awaited sends a token, and all that arrives is awaited, so that the configuration ends with its data."""
    tasks = {one.name: one for one in view.made.sequence if isinstance(one, Task)}
    awaited = {one.task for one in view.made.sequence if isinstance(one, Await)}
    for name in sorted(awaited):
        if not tasks[name].token:
            yield f"task '{name}'", "is awaited, but sends no token"
    tokens: dict[Port, list[str]] = defaultdict(list)
    for one in view.made.sequence:
        if isinstance(one, Task):
            tokens[one.port] += [one.name] * one.token
        elif tokens[tasks[one.task].port][:1] == [one.task]:
            tokens[tasks[one.task].port].pop(0)
        elif tasks[one.task].token:
            yield f"task '{one.task}'", f"isn't the one whose token {tasks[one.task].port} sends next"
    last = {task.port: name for name, task in tasks.items() if task.port.direction == S2MM}
    for port, name in last.items():
        if name not in awaited:
            yield f"task '{name}'", f"is the last one of {port}, and the sequence doesn't await it"
    for start in view.made.starts:
        if start.port.direction == S2MM:
            yield str(start.port), "receives from the configuration on, and nothing says when it is done"


RULES: dict[str, Callable[[_View], Found]] = {
    "tile": _tiles, "place": _placed, "memory": _memory, "bank": _bank, "lock": _locks, "lock-balance": _balance,
    "reach": _reach, "core-reach": _core_reach, "descriptor-count": _count, "parity": _parity,
    "descriptor-in-use": _own, "channel": _channels, "length": _length, "bounds": _bounds, "dimensions": _dimensions,
    "wrap": _wrap, "stride": _stride, "lock-pair": _pair, "flow": _flows, "packet": _packets, "arrival": _arrival,
    "call": _calls, "queue": _queue, "token": _tokens,
}  # fmt: skip
"""All rules by name."""
