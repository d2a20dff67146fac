"""Executes a design: memories, locks, DMA channels with their queues, streams, cores and the runtime sequence of every
configuration. It knows nothing of the program that the design was made of.

Streams hold nothing: words move when their source and all their targets are ready. Where two sources are ready for one
target at a time, nothing says whose words come first on the part, and that is an error here.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from bstf_compiler.aie import kernels, pointwise
from bstf_compiler.aie.mlir.model import (
    MM2S,
    RELEASE,
    Await,
    Call,
    Chain,
    Configuration,
    Core,
    Descriptor,
    Design,
    Flow,
    Port,
    Slot,
    Task,
    Tile,
    UseLock,
)

CORE_BYTES, MEMTILE_BYTES = 65_536, 524_288
_POISON = -86
"""What memory holds before anything is written, as in simulate.py."""

Kernel = Callable[..., None]
"""A kernel in Python: memory (int8) of the core, byte addresses of its buffers, and its numbers."""


class Stuck(RuntimeError):
    """A configuration that can't go on, or whose streams have no order."""


@dataclass
class _Channel:
    """A DMA channel: chains in its queue, and where it is in the first one."""

    port: Port
    queue: deque[tuple[str | None, Chain]] = field(default_factory=deque)
    place: int = 0
    words: np.ndarray | None = None  # addresses of the active descriptor's words; None if it waits for its lock
    at: int = 0

    @property
    def descriptor(self) -> Descriptor:
        return self.queue[0][1][self.place]

    @property
    def left(self) -> int:
        return 0 if self.words is None else len(self.words) - self.at


class Machine:
    """The memories of a part, and what runs on them.

    Args:
        design: what to execute.
        host: the host's buffer, int8; read and written.
        seed: of the order in which units are visited.
        kernels: by name, where others than the simulator's own are to run.

    Example:
        >>> Machine(read(text), host).run()
    """

    def __init__(
        self, design: Design, host: np.ndarray, seed: int = 0, kernels: Mapping[str, Kernel] | None = None
    ) -> None:
        self._design, self._kernels = design, kernels or KERNELS
        self._random = np.random.default_rng(seed)
        self._memories: dict[Tile | None, np.ndarray] = {None: host}

    def memory(self, tile: Tile | None) -> np.ndarray:
        """Bytes of a tile, or of the host (None)."""
        if tile not in self._memories:
            size = CORE_BYTES if self._design.kind(tile) == "core" else MEMTILE_BYTES
            self._memories[tile] = np.full(size, _POISON, np.int8)
        return self._memories[tile]

    def run(self) -> None:
        """Executes all configurations.

        Raises:
            Stuck: one of them doesn't end; the sentence names who waits for what.
        """
        for configuration in self._design.configurations:
            for _ in self.steps(configuration):
                pass

    def steps(self, configuration: Configuration) -> Iterator[None]:
        """Executes one configuration; yields while it goes on."""
        state = _State(self, configuration)
        units = state.units()
        while units:
            moved = False
            for number in self._random.permutation(len(units)):
                moved |= units[number]()
            yield
            if not moved:
                break
        state.finish()


class _State:
    """A configuration while it runs."""

    def __init__(self, machine: Machine, made: Configuration) -> None:
        self._machine, self._made = machine, made
        self._locks = {lock.name: lock.init for lock in made.locks}
        self._buffers = {buffer.name: buffer for buffer in made.buffers}
        self._channels: dict[Port, _Channel] = {}
        for flow in made.flows:
            for port in (flow.source, *flow.targets):
                self._channels.setdefault(port, _Channel(port))
        for port, _ in made.chains():
            self._channels.setdefault(port, _Channel(port))
        for start in made.starts:
            self._channels[start.port].queue.append((None, start.chain))
        self._flows: dict[tuple[Port, int | None], Flow] = {(f.source, f.packet): f for f in made.flows}
        self._senders: dict[Port, set[Port]] = defaultdict(set)
        for flow in made.flows:
            for target in flow.targets:
                self._senders[target].add(flow.source)
        self._held: dict[Port, Port] = {}  # by whose packet a target is being written
        self._done: set[str] = set()
        self._position = 0
        self._waiting: dict[Tile, object] = {}
        self._cores = {core.tile: self._core(core) for core in made.cores}

    def units(self) -> list[Callable[[], bool]]:
        """All that runs; each does what it can and says whether it did anything."""
        sources = [channel for channel in self._channels.values() if channel.port.direction == MM2S]
        units: list[Callable[[], bool]] = [self._sequence]
        units += [lambda tile=tile: self._step_core(tile) for tile in self._cores]
        units += [lambda channel=channel: self._send(channel) for channel in sources]
        return units

    def finish(self) -> None:
        """All is done, or an error that says what isn't."""
        left = [f"core {tile} waits for {what}" for tile, what in self._waiting.items() if tile in self._cores]
        left += [
            f"{channel.port} waits at {channel.descriptor}" for channel in self._channels.values() if channel.queue
        ]
        if self._position < len(self._made.sequence):
            left.append(f"the sequence waits at {self._made.sequence[self._position]}")
        if left:
            raise Stuck(f"configuration '{self._made.name}' never ends: {left[-1]} (and {len(left) - 1} more)")

    # --- locks ---

    def _take(self, use: UseLock | None) -> bool:
        if use is None:
            return True
        if use.action == RELEASE:
            self._locks[use.lock] += use.value
            return True
        if self._locks[use.lock] < use.value:
            return False
        self._locks[use.lock] -= use.value
        return True

    # --- sequence ---

    def _sequence(self) -> bool:
        moved = False
        while self._position < len(self._made.sequence):
            one = self._made.sequence[self._position]
            if isinstance(one, Await):
                if one.task not in self._done:
                    break
            else:
                self._push(one)
            self._position += 1
            moved = True
        return moved

    def _push(self, task: Task) -> None:
        self._channels[task.port].queue.append((task.name, task.chain))

    # --- streams ---

    def _send(self, source: _Channel) -> bool:
        """Moves as many words of the active descriptor as its targets have room for."""
        moved = False
        while source.queue and self._activate(source):
            targets = self._targets(source)
            if targets is None:
                break
            count = min(source.left, *(target.left for target in targets))
            self._copy(source, targets, count)
            moved = True
            finished = source.left == 0
            for channel in (source, *targets):
                if channel.left == 0:
                    self._complete(channel)
            for target in targets:
                self._held.pop(target.port, None)
                if not finished and len(self._senders[target.port]) > 1:
                    self._held[target.port] = source.port
        return moved

    def _targets(self, source: _Channel) -> list[_Channel] | None:
        """The channels that get the source's words, if all are ready for them."""
        flow = self._flows.get((source.port, source.descriptor.packet))
        if flow is None:
            raise Stuck(f"configuration '{self._made.name}': {source.port} sends where no stream leads")
        targets = [self._channels[port] for port in flow.targets]
        for target in targets:
            if self._held.get(target.port, source.port) != source.port:
                return None
            if not target.queue or not self._activate(target):
                return None
        for target in targets:
            self._check_order(source, target)
        return targets

    def _check_order(self, source: _Channel, target: _Channel) -> None:
        """No other source may want the same target now."""
        for port in self._senders[target.port] - {source.port}:
            other = self._channels[port]
            if not other.queue or not self._ready(other):
                continue
            flow = self._flows.get((port, other.descriptor.packet))
            if flow and target.port in flow.targets and target.port not in self._held:
                raise Stuck(
                    f"configuration '{self._made.name}': {source.port} and {port} send to {target.port} at one time, "
                    "and nothing says which comes first"
                )

    def _ready(self, channel: _Channel) -> bool:
        use = channel.descriptor.acquire
        return channel.words is not None or use is None or self._locks[use.lock] >= use.value

    def _activate(self, channel: _Channel) -> bool:
        """Takes the descriptor's lock, unless that is done."""
        if channel.words is None:
            if not self._take(channel.descriptor.acquire):
                return False
            channel.words, channel.at = self._walk(channel.descriptor), 0
        return True

    def _complete(self, channel: _Channel) -> None:
        """The next descriptor, or the next chain."""
        self._take(channel.descriptor.release)
        name, chain = channel.queue[0]
        channel.words, channel.place = None, channel.place + 1
        if channel.place == len(chain):
            channel.place = 0
            channel.queue.popleft()
            if name is not None:
                self._done.add(name)

    def _walk(self, one: Descriptor) -> np.ndarray:
        """Addresses of a descriptor's words, in words, in order."""
        start = one.offset + (self._buffers[one.buffer].address // 4 if one.buffer is not None else 0)
        if not one.sizes:
            return start + np.arange(one.length)
        offsets = np.zeros(1, np.int64)
        for size, stride in zip(one.sizes, one.strides):
            offsets = (offsets[:, None] + np.arange(size) * stride).ravel()
        return start + offsets

    def _words(self, channel: _Channel) -> np.ndarray:
        """The memory that the active descriptor walks, as words."""
        name = channel.descriptor.buffer
        tile = None if name is None else self._buffers[name].tile
        return self._machine.memory(tile)[: len(self._machine.memory(tile)) // 4 * 4].view(np.int32)

    def _copy(self, source: _Channel, targets: list[_Channel], count: int) -> None:
        values = self._words(source)[source.words[source.at : source.at + count]]
        for target in targets:
            self._words(target)[target.words[target.at : target.at + count]] = values
            target.at += count
        source.at += count

    # --- cores ---

    def _step_core(self, tile: Tile) -> bool:
        if tile not in self._cores:
            return False
        moved = False
        while True:
            waiting = self._waiting.get(tile)
            if waiting is not None and not self._take(waiting):
                return moved
            self._waiting.pop(tile, None)
            following = next(self._cores[tile], None)
            if following is None:
                del self._cores[tile]
                return True
            self._waiting[tile] = following
            moved = True

    def _core(self, core: Core) -> Iterator[UseLock]:
        """Runs a core's program up to each lock that it uses."""
        for loop in core.loops:
            for iteration in range(loop.count):
                for one in loop.body:
                    if isinstance(one, UseLock):
                        yield one
                    else:
                        self._call(core.tile, one, iteration)

    def _call(self, tile: Tile, call: Call, iteration: int) -> None:
        places = []
        for name, offset in call.buffers:
            at = offset.at(iteration) if isinstance(offset, Slot) else offset
            places.append(self._buffers[name].address + at)
        self._machine._kernels[call.kernel](self._machine.memory(tile), places, call.numbers)


def _conv(part: bool, added: bool) -> Kernel:
    def run(memory: np.ndarray, places: list[int], numbers: tuple[int, ...]) -> None:
        x, residual = places[0], places[1] if added else -1
        chunk, y = places[1 + added : 3 + added]
        scratch = places[-1] if part else 0
        shapes = numbers[:3], numbers[3:6], *(numbers[i : i + 2] for i in range(6, 14, 2))
        kernels.conv(memory, x, residual, y, chunk, scratch, bool(numbers[14]), bool(numbers[15]), *shapes)

    return run


def _pool(kernel: Kernel) -> Kernel:
    def run(memory: np.ndarray, places: list[int], numbers: tuple[int, ...]) -> None:
        x, chunk, y = places
        kernel(memory, x, y, chunk, numbers[:3], numbers[3:6], *(numbers[i : i + 2] for i in range(6, 14, 2)))

    return run


def _add(memory: np.ndarray, places: list[int], numbers: tuple[int, ...]) -> None:
    a, b, chunk, y = places
    pixels, channels, step = numbers
    pointwise.add(memory, a, b, y, chunk, (1, pixels, channels), step)


def _requantize(memory: np.ndarray, places: list[int], numbers: tuple[int, ...]) -> None:
    x, chunk, y = places
    pointwise.requantize(memory, x, y, chunk, numbers[0])


KERNELS: dict[str, Kernel] = {
    "bstf_conv": _conv(part=False, added=False),
    "bstf_conv_add": _conv(part=False, added=True),
    "bstf_conv_part": _conv(part=True, added=False),
    "bstf_conv_part_add": _conv(part=True, added=True),
    "bstf_maxpool": _pool(kernels.maxpool),
    "bstf_averagepool": _pool(kernels.averagepool),
    "bstf_add": _add,
    "bstf_requantize": _requantize,
}
"""What kernels of a design compute, by the simulator's own functions."""
