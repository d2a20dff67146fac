"""A program as buffer descriptors: what the DMA of each tile does, step by step.

A transfer is a stream. The DMA that reads the source sends it (MM2S), the DMA of each target receives it (S2MM), and
each walks memory in its own way. DDR is walked by the DMA of a shim (`s2` is column 2's), a core by its own. So is a
memory tile, but for LOADFM: the tile of the column that computes also sends what the column needs of its neighbours
(AM020, memory tile DMA: channels 0-3 reach the tiles to the west and east); what lies further away its own tile sends.

A descriptor's base moves on by a step each time it runs and comes back after as many runs as there are slots, the way
of a ring and of a run of tiles alike (AM020, array interface: iteration-state offset). Descriptors of one iteration are
a chain; a task runs a chain so many times.

What is assumed of the host, which only writes registers: before a step it sets the locks and writes descriptors; then
it pushes tasks to the queues of the channels, four deep (AM020, array interface DMA). Where a step needs more
descriptors than its tile has, the host writes those of a task when earlier ones in the same places are done.
Streams bring the bytes of a transfer in the order of its moves. Where several DMAs send to one channel (cores to a
memory tile) whoever routes them must keep that order; it isn't said here how.

A tile that a transfer moves no bytes of (a core whose part of a narrow image is empty, or that reads no kept block)
takes no part in it, and neither DMA nor core takes or gives a lock of a core for an empty box. The rings' slots are
passed over all the same, so what comes next waits until the ring is empty: the DMA takes all slots of an input, and the
core gives the others back when it finds its own full; of its output the core takes all and gives the others back. Locks
of a memory tile are taken with the unit's next bytes of that tile, and given with the last ones before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from math import prod

import numpy as np

from bstf_compiler.aie import events
from bstf_compiler.aie.addressing import WORD, Dimensions, patterns
from bstf_compiler.aie.code import Code, Step
from bstf_compiler.aie.device import DescriptorLimits, DeviceSpec
from bstf_compiler.aie.isa import EACH, FIRST, KINDS, LAST, Access, LockAction, Transfer

MM2S, S2MM = "MM2S", "S2MM"
"""Directions of a channel: memory to stream, stream to memory."""
_REACHING = 4
"""Channels of a memory tile, from 0 on, that reach its neighbours (AM020, memory tile DMA); LOADFM has the first."""
_RUNS = 256
"""The most runs of one task: its repeat count, one less, has 8 bits (mlir-aie, NpuPushQueueOp)."""


@dataclass(frozen=True)
class Descriptor:
    """One buffer descriptor.

    `memory`: what it walks, `ddr` or a tile; `address`: the first byte there; `dimensions`: (size, step) in words,
    innermost first. `iteration`: (slots, step in words): run r starts (first + r) % slots steps after the address.
    `acquire`, `release`: (lock, count) taken before each run and given after it.
    """

    memory: str
    address: int
    dimensions: Dimensions
    iteration: tuple[int, int] = (1, 0)
    first: int = 0
    acquire: tuple[str, int] | None = None
    release: tuple[str, int] | None = None

    @property
    def words(self) -> int:
        """Length in words."""
        return prod(size for size, _ in self.dimensions)


Chain = tuple[Descriptor, ...]
"""Descriptors that run one after another: each but the last has a next one."""


@dataclass(frozen=True)
class Task:
    """`runs` of a chain of its channel, for iterations of an instruction of the step from `iteration` on. A part of an
    iteration's descriptors if they are more than the channel can hold.
    """

    chain: int
    runs: int
    instruction: int
    iteration: int


@dataclass
class Channel:
    """What one channel of a tile's DMA does in a step. `ids`: the descriptors of the tile that are the channel's."""

    tile: str
    direction: str
    number: int
    chains: list[Chain] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    ids: range = range(0)

    @property
    def name(self) -> str:
        """Tile, direction and number, `m0 MM2S 1`."""
        return f"{self.tile} {self.direction} {self.number}"

    @property
    def descriptors(self) -> int:
        """Different descriptors of the step."""
        return sum(map(len, self.chains))

    @property
    def longest(self) -> int:
        """Descriptors of the longest chain: what the channel needs at once."""
        return max(map(len, self.chains), default=0)

    @property
    def chain_ids(self) -> list[list[int]]:
        """For each chain the descriptors of the tile that hold it: those of the channel in turn."""
        starts = accumulate(map(len, self.chains), initial=0)
        return [
            [self.ids[(start + place) % len(self.ids)] for place in range(len(chain))]
            for start, chain in zip(starts, self.chains)
        ]


def limits_of(device: DeviceSpec, tile: str) -> DescriptorLimits:
    """The limits of the DMA of a tile: `s2`, `m0` or `c1.3`.

    Raises:
        ValueError: the device has no descriptors.
    """
    if device.descriptors is None:
        raise ValueError(
            f"device '{device.name}' is a model without buffer descriptors; compile for a part that has them, npu1, "
            "npu2, ve2302 or ve2802, or give its device file a section [descriptors]"
        )
    kinds = {"s": device.descriptors.shim, "m": device.descriptors.memtile, "c": device.descriptors.core}
    return kinds[tile[0]]


def lower(code: Code) -> Iterator[list[Channel]]:
    """The descriptors and tasks of a program on a device that has descriptors.

    Args:
        code: a program that keeps the rules of verify.py.

    Yields:
        For each step the channels that have something to do, by tile, direction and number.

    Raises:
        ValueError: the device has no descriptors.

    Example:
        >>> for step, channels in zip(program.steps, descriptors.lower(program)):
        ...     print(step.layer, sum(channel.descriptors for channel in channels))
    """
    limits_of(code.device, "s0")
    numbers = _numbers(code)
    return (_lower_step(code.device, step, numbers) for step in code.steps)


# --- which channels ---

Port = tuple[str, str, str]
"""Tile, direction and unit: what is given a channel."""
Part = list[tuple[str, Access]]
"""What one channel does of a transfer: memories and boxes, in order."""


@dataclass(frozen=True)
class Performed:
    """A transfer, its index in the step, and the ports that perform it."""

    index: int
    transfer: Transfer
    ports: dict[Port, Part]


def performed(device: DeviceSpec, step: Step) -> list[Performed]:
    """The transfers of a step with the DMAs that perform them; empty boxes are left out."""
    found, walkers = [], {}
    for index, do in enumerate(step.instructions):
        if not isinstance(do, Transfer):
            continue
        ports: dict[Port, Part] = {}
        for move in do.moves:
            for access, direction in ((move.source, MM2S), (move.target, S2MM)):
                for memory in access.tiles if access.bytes else ():
                    tile = memory
                    if memory[0] != "c":
                        if (do.unit, memory) not in walkers:
                            walkers[do.unit, memory] = _walker(device, do, memory)
                        tile = walkers[do.unit, memory]
                    ports.setdefault((tile, direction, do.unit), []).append((memory, access))
        found.append(Performed(index, do, ports))
    return found


def _walker(device: DeviceSpec, do: Transfer, memory: str) -> str:
    """The tile whose DMA walks a memory for a unit."""
    number = int(do.unit.rpartition(".")[2])
    if memory == "ddr":  # units of a kind are spread evenly over the columns with a shim DMA
        place = number if do.kind == "LOADW" else device.activation_tiles.index(number)
        columns = device.noc_columns or range(device.columns)
        return f"s{columns[place * len(columns) // device.units(do.kind)]}"
    if do.kind == "LOADFM" and memory[0] == "m":
        home, tile = device.activation_tiles[device.activation_tile(number)], int(memory[1:])
        if abs(tile - home) <= 1 and max(tile, home) < device.columns:  # the tiles of one row, a column each
            return f"m{home}"
    return memory


def _numbers(code: Code) -> dict[Port, int]:
    """A channel number for every port, the same in all steps, so that streams needn't be routed again.

    Every kind of transfer has a channel of its own as links.rate assumes; channels left over go, one by one, to the
    kind with the most units a channel. A kind's units take its channels in turn.
    """
    units: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for step in code.steps:
        for one in performed(code.device, step):
            for tile, direction, unit in one.ports:
                units[tile, direction][one.transfer.kind].add(unit)
    numbers = {}
    for (tile, direction), by_kind in units.items():
        channels, kinds = limits_of(code.device, tile).channels, sorted(by_kind, key=KINDS.index)
        shares = dict.fromkeys(kinds, 1)
        for _ in range(channels - len(kinds)):
            most = max(kinds, key=lambda kind: len(by_kind[kind]) / shares[kind])
            shares[most] += len(by_kind[most]) > shares[most]
        # Of a memory tile what LOADFM sends and what WRITEFM brings take different halves of the descriptors.
        start = 0 if direction == MM2S else limits_of(code.device, tile).parities - 1
        for kind in kinds:
            for place, unit in enumerate(sorted(by_kind[kind], key=lambda unit: int(unit.rpartition(".")[2]))):
                numbers[tile, direction, unit] = (start + place % min(shares[kind], _REACHING)) % channels
            start += shares[kind]
    return numbers


# --- what they do in a step ---


@dataclass(frozen=True)
class _Job:
    """Iterations [start, stop) of an instruction on one channel, with one chain for all of them."""

    instruction: int
    start: int
    stop: int
    chain: Chain


def _lower_step(device: DeviceSpec, step: Step, numbers: dict[Port, int]) -> list[Channel]:
    jobs: dict[tuple[str, str, int], list[_Job]] = defaultdict(list)
    transfers = performed(device, step)
    actions = lock_actions(transfers, step.locks)
    for one in transfers:
        for (tile, direction, unit), part in one.ports.items():
            made = _jobs(one, part, actions, limits_of(device, tile))
            jobs[tile, direction, numbers[tile, direction, unit]] += made
    places = sorted(jobs)
    most = _longest_chains(device, {place: max(len(job.chain) for job in jobs[place]) for place in places})
    channels = []
    for place in places:
        channel = Channel(*place)
        _fill(channel, _in_turn(step, jobs[place]), most[place])
        channels.append(channel)
    _share_ids(device, channels)
    return channels


Actions = dict[tuple[int, str], tuple[list[LockAction], list[LockAction]]]
"""What is taken and given, by index of the transfer and memory."""


def lock_actions(transfers: list[Performed], locks: dict[str, int]) -> Actions:
    """What a step's transfers take and give, by index of the transfer and memory; where one moves nothing of a memory,
    as the head of this file says. `locks`: their values when the step begins.
    """
    found: Actions = {}
    pending: dict[tuple[str, str], list[LockAction]] = defaultdict(list)  # not taken yet, by unit and memory
    last: dict[tuple[str, str], int] = {}  # the unit's last transfer that moved bytes of the memory
    for one in transfers:
        do, index = one.transfer, one.index
        for memory in {memory for part in one.ports.values() for memory, _ in part}:
            found[index, memory] = (pending.pop((do.unit, memory), []), [])
            last[do.unit, memory] = index
        for action in do.acquire:
            memory = tile_of(action.lock)
            if (index, memory) in found:
                found[index, memory][0].append(action)
            elif memory[0] == "m":
                pending[do.unit, memory].append(_all_at_once(action, FIRST, do.iterations))
            elif locks.get(action.lock, 0) > 1:  # free slots, one of them taken in any case
                pending[do.unit, memory] = [LockAction(action.lock, locks[action.lock] - 1, FIRST)]
        for action in do.release:
            memory = tile_of(action.lock)
            if (index, memory) in found:
                found[index, memory][1].append(action)
            elif memory[0] == "m" and (do.unit, memory) in last:
                before = found[last[do.unit, memory], memory]
                before[1].append(_all_at_once(action, LAST, do.iterations))
    return found


def _all_at_once(action: LockAction, when: str, iterations: int) -> LockAction:
    """What an action does in all iterations, in one of another transfer's."""
    return LockAction(action.lock, action.count * (iterations if action.when == EACH else 1), when)


def tile_of(lock: str) -> str:
    """The tile that has a lock."""
    return lock.partition(":")[0]


def _jobs(one: Performed, part: Part, actions: Actions, limits: DescriptorLimits) -> list[_Job]:
    """A transfer on one channel, its iterations cut where a descriptor with other fields must take over."""
    iterations = one.transfer.iterations
    pairs = {memory: actions[one.index, memory] for memory, _ in part}
    cuts = {0, iterations}
    for action in (action for pair in pairs.values() for side in pair for action in side):
        cuts |= {1} if action.when == FIRST else {iterations - 1} if action.when == LAST else set()
    most = min(_most_runs(access, limits) for _, access in part)
    jobs = []
    for low, high in pairwise(sorted(cuts)):
        for start in range(low, high, most):
            stop = min(start + most, high)
            locks = {memory: tuple(_acting(side, start, iterations) for side in pair) for memory, pair in pairs.items()}
            jobs.append(_Job(one.index, start, stop, _chain(part, start, stop, locks, limits)))
    return jobs


def _most_runs(access: Access, limits: DescriptorLimits) -> int:
    """How many iterations of an access one descriptor can run."""
    if not access.advance or access.ring == 1:
        return _RUNS
    if not 0 < access.advance <= limits.step_words * WORD or access.ring > limits.iterations:
        return 1
    return _RUNS if access.ring else min(limits.iterations, _RUNS)


_Lock = tuple[str, int] | None


def _acting(actions: list[LockAction], iteration: int, iterations: int) -> _Lock:
    """The lock, of one tile, that acts in an iteration, and its count."""
    acting = [action for action in actions if action.applies(iteration, iterations)]
    return (acting[0].lock, sum(action.count for action in acting)) if acting else None


def _chain(part: Part, start: int, stop: int, locks: dict[str, tuple[_Lock, _Lock]], limits: DescriptorLimits) -> Chain:
    """The descriptors of iterations [start, stop); of each memory the first takes its lock, the last gives it."""
    walks = []
    for memory, access in part:
        base, iteration, first = access.start(start), (1, 0), 0
        if stop - start > 1 and access.advance and access.ring != 1:
            iteration = (access.ring or stop - start, access.advance // WORD)
            if access.ring:
                base, first = access.address, (access.first + start) % access.ring
        for offset, walk in patterns(access.sizes, access.strides, limits):
            walks.append((memory, base + offset, walk, iteration, first))
    takes, gives = {}, {}
    for place, (memory, *_) in enumerate(walks):
        takes.setdefault(memory, place)
        gives[memory] = place
    chain = []
    for place, walk in enumerate(walks):
        take, give = locks[walk[0]]
        chain.append(
            Descriptor(*walk, take if takes[walk[0]] == place else None, give if gives[walk[0]] == place else None)
        )
    return tuple(chain)


# --- the order of tasks, and the descriptors that they share ---


def _in_turn(step: Step, jobs: list[_Job]) -> Iterator[tuple[_Job, int, int]]:
    """Jobs with the iterations [start, stop) to do: in the order of the unit's instructions, or, if several units share
    the channel, in the order of a run of the step's locks, so that none waits for what comes behind it.
    """
    if len({step.instructions[job.instruction].unit for job in jobs}) == 1:
        yield from ((job, job.start, job.stop) for job in jobs)
        return
    order = events.run(step.instructions, step.locks)
    mine = np.isin(order.instruction, [job.instruction for job in jobs])
    cut = {(job.instruction, iteration): job for job in jobs for iteration in range(job.start, job.stop)}
    for index, iteration in zip(order.instruction[mine].tolist(), order.iteration[mine].tolist()):
        yield cut[index, iteration], iteration, iteration + 1


def _fill(channel: Channel, turns: Iterable[tuple[_Job, int, int]], most: int) -> None:
    """Gives a channel its tasks, and its chains: one serves again where it has come to the slot that is wanted."""
    known: dict[tuple, list[int]] = defaultdict(list)
    runs: list[int] = []

    def add(chain: Chain, number: int, instruction: int, iteration: int) -> None:
        key = tuple((d.memory, d.address, d.dimensions, d.iteration, d.acquire, d.release) for d in chain)
        for place in known[key]:
            pairs = zip(channel.chains[place], chain)
            if all((had.first + runs[place] - want.first) % had.iteration[0] == 0 for had, want in pairs):
                break
        else:
            place = len(channel.chains)
            channel.chains.append(chain)
            known[key].append(place)
            runs.append(0)
        runs[place] += number
        task = Task(place, number, instruction, iteration)
        if channel.tasks:
            last = channel.tasks[-1]
            same = (last.chain, last.instruction, last.iteration + last.runs) == (place, instruction, iteration)
            if same and last.runs + number <= _RUNS:
                task = replace(channel.tasks.pop(), runs=last.runs + number)
        channel.tasks.append(task)

    for job, start, stop in turns:
        if len(job.chain) <= most:
            add(_after(job.chain, start - job.start), stop - start, job.instruction, start)
            continue
        for iteration in range(start, stop):
            chain = _after(job.chain, iteration - job.start)
            for part in range(0, len(chain), most):
                add(chain[part : part + most], 1, job.instruction, iteration)


def _after(chain: Chain, runs: int) -> Chain:
    """A chain that begins at the slot of a later run."""
    if not runs:
        return chain
    return tuple(replace(one, first=(one.first + runs) % one.iteration[0]) for one in chain)


def _group(device: DeviceSpec, tile: str, number: int) -> range:
    """The descriptors of a tile that a channel of a number can use."""
    limits = limits_of(device, tile)
    each = limits.count // limits.parities
    parity = number % limits.parities
    return range(parity * each, (parity + 1) * each)


def _longest_chains(device: DeviceSpec, longest: dict[tuple[str, str, int], int]) -> dict[tuple[str, str, int], int]:
    """How long each channel's chains may be, so that one of every channel finds room at the same time."""
    groups = defaultdict(list)
    for tile, direction, number in longest:
        groups[tile, _group(device, tile, number)].append((tile, direction, number))
    most = {}
    for (_, ids), places in groups.items():
        fits = (n for n in range(len(ids), 0, -1) if sum(min(n, longest[place]) for place in places) <= len(ids))
        most |= dict.fromkeys(places, next(fits))
    return most


def _share_ids(device: DeviceSpec, channels: list[Channel]) -> None:
    """Deals the descriptors of a tile to its channels: all that they use in the step, or else as many as there are, and
    to none fewer than its longest chain.
    """
    groups = defaultdict(list)
    for channel in channels:
        groups[channel.tile, _group(device, channel.tile, channel.number)].append(channel)
    for (_, ids), members in groups.items():
        for most in range(len(ids), -1, -1):
            shares = [max(channel.longest, min(channel.descriptors, most)) for channel in members]
            if sum(shares) <= len(ids):
                break
        start = 0
        for channel, share in zip(members, shares):
            channel.ids = ids[start : start + share]
            start += share
