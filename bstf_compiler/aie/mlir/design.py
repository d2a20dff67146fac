"""Program to design: a configuration of the array a step, with the sequence that drives it.

A channel's runs of the step become descriptors, one each. Where all runs of a reading channel find room at once they
are its chain from the configuration on. All others are tasks of the sequence: with half of its descriptors a channel
works, while the sequence writes the other half, when what they held is done. Tasks are pushed in the order in which the
step's events can happen, so that the sequence never waits for what it has yet to push.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from bstf_compiler.aie.code import Code, Step
from bstf_compiler.aie.descriptors import limits_of
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import Compute
from bstf_compiler.aie.mlir.cores import core_programs
from bstf_compiler.aie.mlir.model import (
    ACQUIRE,
    MM2S,
    PACKETS,
    PARTS,
    RELEASE,
    S2MM,
    WORD,
    Await,
    Buffer,
    Chain,
    Configuration,
    Descriptor,
    Design,
    Flow,
    Lock,
    Port,
    Start,
    Task,
    Tile,
    UseLock,
)
from bstf_compiler.aie.mlir.streams import Channel, Run, Streams, streams

CORE_SHIFT = 1408
"""The program's address 0 of a core: below lie the stack, which mlir-aie puts first, and room for parameters."""
BANK = 16_384
"""Bytes of a core's memory bank as programs see it (UG1603)."""


def design(code: Code) -> Design:
    """The mlir-aie design of a program.

    Raises:
        ValueError: the device is no part that mlir-aie knows, a layer has an operation without a kernel, or streams
            need more packet ids than there are.
    """
    family, first_column = part_of(code.device)
    columns = code.device.columns if PARTS[family].narrower else PARTS[family].columns
    words = -(-(code.data_address + len(code.data)) // WORD)
    made = Design(_symbol(code.name), family, columns, words)
    for number, step in enumerate(code.steps):
        if step.instructions:
            made.configurations.append(_Writer(code, step, first_column).configuration(f"step{number}"))
    return made


def part_of(device: DeviceSpec) -> tuple[str, int]:
    """A device's family, and the part's column where its region begins.

    Raises:
        ValueError: mlir-aie knows no such part.
    """
    family = re.match(r"[a-z0-9]+", device.name)[0]
    if family not in PARTS or device.descriptors is None:
        raise ValueError(
            f"mlir-aie knows no device '{device.name}'; compile for {', '.join(PARTS)} or a region of one, "
            "like npu1_4x2"
        )
    whole = DeviceSpec.load(family)
    for start in range(whole.columns - device.columns + 1):
        inside = tuple(c - start for c in whole.noc_columns if start <= c < start + device.columns)
        if inside == device.noc_columns and whole.rows >= device.rows:
            return family, start
    raise ValueError(f"device '{device.name}' is no region of {family}; mlir-aie has no name for it")


def _symbol(name: str) -> str:
    """A name that MLIR takes as an identifier."""
    return re.sub(r"\W", "_", name)


@dataclass
class _Window:
    """Runs of a channel that one task does; `fences`: what must have arrived before it is pushed."""

    channel: Channel
    runs: list[Run]
    fences: list[tuple[Channel, int]]
    ids: range
    number: int

    @property
    def key(self) -> tuple[int, bool]:
        """Receivers are ready before what they receive is sent."""
        return self.runs[0].move, self.channel[1] == MM2S


class _Writer:
    """Writes the configuration of one step."""

    def __init__(self, code: Code, step: Step, first_column: int) -> None:
        self._code, self._step, self._device = code, step, code.device
        self._first_column, self._memtile_rows = first_column, code.device.memtile.rows
        self._streams: Streams = streams(code, step)

    def configuration(self, name: str) -> Configuration:
        """The whole configuration."""
        made = Configuration(name)
        cores = sorted({do.parameters.tiles[0] for do in self._step.instructions if isinstance(do, Compute)})
        ahead = {run.memory for runs in self._streams.runs.values() for run in runs if run.memory[0] == "c"}
        made.buffers = self._core_buffers(sorted({*cores, *ahead})) + self._memtile_buffers()
        made.locks = self._locks()
        names = {lock: self._lock_name(lock) for lock in self._step.locks}
        tiles = {core: self._tile(core) for core in cores}
        made.cores = core_programs(self._step, tiles, made.buffers, names, CORE_SHIFT)
        made.flows, packets = self._flows()
        self._buffers = defaultdict(list)
        for buffer in made.buffers:
            self._buffers[buffer.tile].append(buffer)
        self._schedule(made, packets)
        return made

    def _tile(self, name: str) -> Tile:
        """Where a tile of the program is on the part: `s2`, `m0`, `c1.3`."""
        if name[0] == "c":
            column, row = map(int, name[1:].split("."))
            return Tile(self._first_column + column, 1 + self._memtile_rows + row)
        number = int(name[1:])
        if name[0] == "s":
            return Tile(self._first_column + number, 0)
        return Tile(self._first_column + number % self._device.columns, 1 + number // self._device.columns)

    def _port(self, channel: Channel) -> Port:
        return Port(self._tile(channel[0]), channel[1], channel[2])

    # --- memory and locks ---

    def _core_buffers(self, cores: list[str]) -> list[Buffer]:
        found = []
        for core in cores:
            tile = self._tile(core)
            for name, address, size in self._step.buffers:
                start = address + CORE_SHIFT
                bank = start // BANK if start // BANK == (start + size - 1) // BANK else None
                label = f"{_symbol(name)}_{tile.column}_{tile.row}"
                found.append(Buffer(label, tile, start, -(-size // WORD), bank))
        return found

    def _memtile_buffers(self) -> list[Buffer]:
        stage = self._step.stage
        held = [one for one in self._code.allocations if one.first <= stage <= one.last]
        runs = (run for runs in self._streams.runs.values() for run in runs)
        touched = {(run.memory, run.address) for run in runs if run.memory[0] == "m"}
        found = []
        for memory in sorted({memory for memory, _ in touched}, key=lambda name: int(name[1:])):
            tile = self._tile(memory)
            for one in held:
                if any(m == memory and one.address <= at < one.address + one.bytes for m, at in touched):
                    label = f"{_symbol(one.name)}_{one.address}_{tile.column}_{tile.row}"
                    found.append(Buffer(label, tile, one.address, -(-one.bytes // WORD)))
        return found

    def _lock_name(self, lock: str) -> str:
        tile, _, name = lock.partition(":")
        place = self._tile(tile)
        return f"{_symbol(name)}_{place.column}_{place.row}"

    def _locks(self) -> list[Lock]:
        numbers: dict[Tile, int] = defaultdict(int)
        found = []
        for lock, init in self._step.locks.items():
            tile = self._tile(lock.partition(":")[0])
            found.append(Lock(self._lock_name(lock), tile, numbers[tile], init))
            numbers[tile] += 1
        return found

    # --- streams ---

    def _flows(self) -> tuple[list[Flow], dict[tuple[Channel, tuple[Channel, ...]], int]]:
        """All streams, and the packet ids of those that share a channel, by source and targets."""
        sent = {(c, run.targets): None for c, runs in self._streams.runs.items() for run in runs if c[1] == MM2S}
        fed, feeds = defaultdict(set), defaultdict(set)
        for source, targets in sent:
            feeds[source].add(targets)
            for target in targets:
                fed[target].add(source)
        shared = {source for source, ways in feeds.items() if len(ways) > 1}
        shared |= {source for sources in fed.values() if len(sources) > 1 for source in sources}
        packets = self._packet_ids([way for way in sent if way[0] in shared])
        flows = [Flow(self._port(s), tuple(map(self._port, t)), packets.get((s, t))) for s, t in sent]
        return sorted(flows, key=lambda flow: (flow.source, flow.targets)), packets

    def _packet_ids(self, ways: list[tuple[Channel, tuple[Channel, ...]]]) -> dict:
        """The lowest ids such that streams with one id have no column in common, between their ends and at them."""
        spans = {}
        for source, targets in ways:
            columns = [self._tile(tile).column for tile, *_ in (source, *targets)]
            spans[source, targets] = min(columns), max(columns)
        ids: dict[tuple, int] = {}
        ends: dict[int, int] = {}  # by id, the last column that it is used in
        for way in sorted(ways, key=lambda way: (spans[way], way)):
            low, high = spans[way]
            ids[way] = next(number for number in range(len(ways)) if ends.get(number, -1) < low)
            ends[ids[way]] = high
        if len(ends) > PACKETS:
            raise ValueError(
                f"layer '{self._step.layer}': its streams need {len(ends)} packet ids of the {PACKETS} that there are; "
                "compile for fewer columns or rows"
            )
        return ids

    # --- descriptors ---

    def _schedule(self, made: Configuration, packets: dict) -> None:
        """Starts and tasks: windows in the order of their first moves."""
        windows = []
        for channel, ids in self._shares().items():
            runs = self._streams.runs[channel]
            if self._stays(channel, runs, len(ids)):
                made.starts.append(Start(self._port(channel), self._chain(made, channel, runs, ids, packets)))
            else:
                windows += self._windows(channel, runs, ids)
        done: dict[str, list[int]] = {}  # last move of each task
        tasks: dict[Channel, list[str]] = defaultdict(list)
        awaited: set[str] = set()

        def wait(name: str) -> None:
            if name not in awaited:
                awaited.add(name)
                made.sequence.append(Await(name))

        for window in sorted(windows, key=lambda window: window.key):
            own = tasks[window.channel]
            if len(own) > 1:
                wait(own[-2])
            for channel, move in window.fences:
                for name in tasks[channel]:
                    if done[name] <= move:
                        wait(name)
            tile, direction, number = self._port(window.channel).tile, *window.channel[1:]
            name = f"{direction.lower()}_{tile.column}_{tile.row}_{number}_{window.number}"
            chain = self._chain(made, window.channel, window.runs, window.ids, packets)
            made.sequence.append(Task(name, self._port(window.channel), chain, token=True))
            own.append(name)
            done[name] = window.runs[-1].move
        for channel, names in tasks.items():
            if channel[1] == S2MM:  # when all has arrived, all is done
                for name in names:
                    wait(name)
        made.sequence = [
            Task(one.name, one.port, one.chain, one.name in awaited) if isinstance(one, Task) else one
            for one in made.sequence
        ]

    def _shares(self) -> dict[Channel, range]:
        """The descriptors of each channel: one for each run, or else as many as there are, shared evenly."""
        groups = defaultdict(list)
        for channel in sorted(self._streams.runs):
            limits = limits_of(self._device, channel[0])
            groups[channel[0], channel[2] % limits.parities].append(channel)
        found = {}
        for (tile, parity), channels in groups.items():
            limits = limits_of(self._device, tile)
            size = limits.count // limits.parities
            wanted = [len(self._streams.runs[channel]) for channel in channels]
            most = next(n for n in range(size, 0, -1) if sum(min(n, want) for want in wanted) <= size)
            start = parity * size
            for channel, want in zip(channels, wanted):
                found[channel] = range(start, start + min(most, want))
                start += min(most, want)
        return found

    def _stays(self, channel: Channel, runs: list[Run], room: int) -> bool:
        """Whether a channel's runs are its chain from the configuration on."""
        fenced = any(run.move in self._streams.fences for run in runs)
        return channel[1] == MM2S and channel[0][0] != "s" and len(runs) <= room and not fenced

    def _windows(self, channel: Channel, runs: list[Run], ids: range) -> list[_Window]:
        """A channel's runs cut at fences, and where its descriptors end; two windows in turn hold them."""
        fences = self._streams.fences
        cuts = {0, len(runs)}
        for place, (one, two) in enumerate(pairwise(runs), start=1):
            fenced = fences.get(two.move, []) if one.move != two.move else []
            if (channel[1] == MM2S and fenced) or any(where == channel for where, _ in fenced):
                cuts.add(place)
        single = len(cuts) == 2 and len(runs) <= len(ids)
        half = len(ids) if single else max(1, len(ids) // 2)
        bounds = []
        for low, high in pairwise(sorted(cuts)):
            bounds += [(start, min(start + half, high)) for start in range(low, high, half)]
        found = []
        for number, (low, high) in enumerate(bounds):
            first = 0 if single else number % 2 * half % len(ids)
            mine = fences.get(runs[low].move, []) if channel[1] == MM2S else []
            found.append(_Window(channel, runs[low:high], mine, ids[first : first + half], number))
        return found

    def _chain(self, made: Configuration, channel: Channel, runs: list[Run], ids: range, packets: dict) -> Chain:
        return tuple(
            self._descriptor(made, run, number, packets.get((channel, run.targets))) for number, run in zip(ids, runs)
        )

    def _descriptor(self, made: Configuration, run: Run, number: int, packet: int | None) -> Descriptor:
        if run.memory == "ddr":
            name, offset = None, run.address
        else:
            buffer = self._buffer_at(run.memory, run.address)
            name, offset = buffer.name, self._in_memory(run) - buffer.address
        length, walk = prod(size for size, _ in run.dimensions), run.dimensions[::-1]
        linear = len(walk) == 1 and walk[0][1] == 1
        sizes, strides = ((), ()) if linear else zip(*walk)
        return Descriptor(
            number, name, offset // WORD, length, tuple(sizes), tuple(strides), packet, *self._pair(made, run)
        )  # fmt: skip

    def _in_memory(self, run: Run) -> int:
        return run.address + (CORE_SHIFT if run.memory[0] == "c" else 0)

    def _buffer_at(self, memory: str, address: int) -> Buffer:
        at = address + (CORE_SHIFT if memory[0] == "c" else 0)
        for buffer in self._buffers[self._tile(memory)]:
            if buffer.address <= at < buffer.address + WORD * buffer.words:
                return buffer
        raise ValueError(f"layer '{self._step.layer}': byte {address} of {memory} lies in no buffer; please report it")

    def _pair(self, made: Configuration, run: Run) -> tuple[UseLock | None, UseLock | None]:
        """A descriptor takes one lock and gives one; where there is only one of them the other is a lock of the same
        tile that is always zero, taken or given no times.
        """
        if run.acquire is None and run.release is None:
            return None, None
        take, give = run.acquire, run.release
        idle = None if take and give else self._idle(made, self._tile((take or give)[0].partition(":")[0]))
        acquire = UseLock(self._lock_name(take[0]), ACQUIRE, take[1]) if take else UseLock(idle, ACQUIRE, 0)
        return acquire, UseLock(self._lock_name(give[0]), RELEASE, give[1]) if give else UseLock(idle, RELEASE, 0)

    def _idle(self, made: Configuration, tile: Tile) -> str:
        """The lock of a tile that is always zero."""
        name = f"idle_{tile.column}_{tile.row}"
        if all(lock.name != name for lock in made.locks):
            made.locks.append(Lock(name, tile, sum(lock.tile == tile for lock in made.locks), 0))
        return name
