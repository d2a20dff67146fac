"""Descriptors walked as the manuals say (AM020, UG1603), by an interpreter of this file alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter, defaultdict, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bstf_compiler
from bstf_compiler import DeviceSpec, integer
from bstf_compiler.aie import descriptors, simulate
from bstf_compiler.aie.addressing import patterns
from bstf_compiler.aie.code import Code, Step
from bstf_compiler.aie.descriptors import MM2S, S2MM, Channel, Descriptor, lower
from bstf_compiler.aie.device import DescriptorLimits, Descriptors
from bstf_compiler.aie.isa import Access, Compute, LockAction, Move, Transfer
from bstf_compiler.graph import Graph, Window
from tests.bstf_compiler.aie.devices import entries
from tests.bstf_compiler.networks import Builder, network_of_everything, random_images, random_network

PARTS = ["npu1", "npu2", "ve2302", "ve2802", "npu1_2x3", "npu2_3x4", "ve2802_6x8"]
SAME = Window((3, 3), padding=(1, 1, 1, 1))


def residual_network(seed: int = 0) -> Graph:
    """A stem with a stride, a pool, two residual blocks, one of them with a stride, an average and a dense layer."""
    build = Builder(np.random.default_rng(seed))
    x = build.conv(build.input(37, 33, 3), 24, Window((7, 7), (2, 2), padding=(3, 3, 3, 3)), 0.0)
    x = build.max_pool(x, Window((3, 3), (2, 2), (1, 1, 1, 1)))
    y = build.conv(build.conv(x, 24, SAME), 72, Window((1, 1)), activation="linear")
    x = build.add(y, build.conv(x, 72, Window((1, 1)), activation="linear"), "relu")
    y = build.conv(build.conv(x, 40, Window((3, 3), (2, 2), padding=(1, 1, 1, 1))), 96, Window((1, 1)))
    x = build.add(y, build.conv(x, 96, Window((1, 1), (2, 2)), activation="linear"), "relu")
    x = build.average_pool(x, Window(build.graph.tensors[x].shape[1:3]))
    return build.finish(build.conv(x, 30, Window((1, 1)), activation="linear"))


def box(access: Access, iteration: int) -> np.ndarray:
    """Addresses of an access's bytes in an iteration, in order: as isa.py defines them."""
    rows, pixels, length = access.sizes
    row, pixel, byte = np.ogrid[:rows, :pixels, :length]
    return (access.start(iteration) + row * access.strides[0] + pixel * access.strides[1] + byte).ravel()


def walk(descriptor: Descriptor, run: int) -> np.ndarray:
    """Addresses of a descriptor's bytes in a run, in order: counters that wrap, but the outermost one."""
    slots, step = descriptor.iteration
    word = np.arange(math.prod(size for size, _ in descriptor.dimensions))
    offset, counter = np.full(len(word), (descriptor.first + run) % slots * step), word
    for place, (size, step) in enumerate(descriptor.dimensions):
        outermost = place == len(descriptor.dimensions) - 1
        offset = offset + (counter if outermost else counter % size) * step
        counter = counter // size
    return (descriptor.address + 4 * offset[:, None] + np.arange(4)).ravel()


def assert_fields_hold(descriptor: Descriptor, limits: DescriptorLimits):
    sizes, steps = zip(*descriptor.dimensions, strict=True)
    assert len(sizes) <= limits.dimensions and descriptor.address % 4 == 0
    assert all(size <= wrap for size, wrap in zip(sizes[:-1], limits.wraps))
    assert all(1 <= step <= limits.step_words for step in steps)
    assert 1 <= descriptor.words <= limits.length_words
    slots, step = descriptor.iteration
    assert 1 <= slots <= limits.iterations and 0 <= descriptor.first < slots
    assert slots == 1 or 1 <= step <= limits.step_words


def in_order(channel: Channel):
    """What a channel does: (instruction, iteration, descriptor, run), run by run."""
    runs = Counter()
    for task in channel.tasks:
        assert 1 <= task.runs <= 256
        for iteration in range(task.iteration, task.iteration + task.runs):
            for descriptor in channel.chains[task.chain]:
                yield task.instruction, iteration, descriptor, runs[task.chain]
            runs[task.chain] += 1


def assert_step_is_performed(step, channels: list[Channel]):
    """Each channel touches the bytes of its units' moves in their order; together they make all of them."""
    done = Counter()
    for channel in channels:
        seen, units = [], defaultdict(list)
        for key, group in itertools.groupby(in_order(channel), key=lambda item: item[:2]):
            (index, iteration), items = key, [(descriptor, run) for _, _, descriptor, run in group]
            do, memories = step.instructions[index], {descriptor.memory for descriptor, _ in items}
            seen.append(key)
            units[do.unit].append(key)
            sides = [move.source if channel.direction == MM2S else move.target for move in do.moves]
            mine = [(m, side) for side in sides for m in side.tiles if m in memories]
            assert np.array_equal(
                np.concatenate([walk(*item) for item in items]), np.concatenate([box(s, iteration) for _, s in mine])
            )
            names = [(descriptor.memory, descriptor.words * 4) for descriptor, _ in items]
            assert Counter(dict.fromkeys(memories, 0)) | _totals(names) == _totals((m, s.bytes) for m, s in mine)
            done.update({(index, iteration, channel.direction, memory): 1 for memory in memories})
        assert len(set(seen)) == len(seen) and all(keys == sorted(keys) for keys in units.values())
    assert done == {
        (index, iteration, direction, memory): 1
        for index, do in enumerate(step.instructions) if isinstance(do, Transfer)
        for iteration in range(do.iterations)
        for move in do.moves
        for direction, side in ((MM2S, move.source), (S2MM, move.target))
        for memory in side.tiles if side.bytes
    }  # fmt: skip


def _totals(pairs) -> Counter:
    found = Counter()
    for name, count in pairs:
        found[name] += count
    return found


def assert_limits_hold(device: DeviceSpec, channels: list[Channel]):
    """Fields, numbers of channels, reach, and who holds which descriptors."""
    held = defaultdict(list)
    for channel in channels:
        limits = {"s": device.descriptors.shim, "m": device.descriptors.memtile, "c": device.descriptors.core}
        limits = limits[channel.tile[0]]
        assert channel.number < limits.channels
        assert channel.longest <= len(channel.ids) <= channel.descriptors
        each = limits.count // limits.parities
        assert {one // each for one in channel.ids} == {channel.number % limits.parities}
        held[channel.tile] += channel.ids
        if channel.tile[0] == "s" and device.noc_columns:
            assert int(channel.tile[1:]) in device.noc_columns
        for chain, ids in zip(channel.chains, channel.chain_ids, strict=True):
            assert len(ids) == len(chain) and set(ids) <= set(channel.ids)
            assert len(set(ids)) == len(ids)
            for descriptor in chain:
                assert_fields_hold(descriptor, limits)
                if channel.tile[0] == "s":
                    assert descriptor.memory == "ddr"
                elif descriptor.memory != channel.tile:
                    apart = int(descriptor.memory[1:]) - int(channel.tile[1:])
                    assert channel.tile[0] == descriptor.memory[0] == "m" and abs(apart) == 1 and channel.number < 4
                for lock in (descriptor.acquire, descriptor.release):
                    assert lock is None or (lock[0].startswith(f"{descriptor.memory}:") and 1 <= lock[1] <= 63)
    assert all(len(set(ids)) == len(ids) for ids in held.values())


def assert_performed(program):
    for step, channels in zip(program.steps, lower(program), strict=True):
        assert_step_is_performed(step, channels)
        assert_limits_hold(program.device, channels)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("network", [residual_network, random_network, network_of_everything])
def test_descriptors_touch_the_bytes_of_the_moves_in_order(part, network):
    assert_performed(bstf_compiler.compile(network(1), part))


@pytest.mark.parametrize("part", PARTS)
def test_limits_of_real_parts_are_the_published_ones(part):
    """AM020 (array interface DMA, memory tile DMA), XD100 (buffer descriptors), and the field widths of aie-rt."""
    found = DeviceSpec.load(part).descriptors
    core = {"channels": 2, "locks": 16, "count": 16, "parities": 1, "dimensions": 3, "iterations": 2**6}
    core |= {"length_words": 2**14 - 1, "wraps": (2**8 - 1,) * 2, "step_words": 2**13}
    memtile = {"channels": 6, "locks": 64, "count": 48, "parities": 2, "dimensions": 4, "iterations": 2**6}
    memtile |= {"length_words": 2**17 - 1, "wraps": (2**10 - 1,) * 3, "step_words": 2**17}
    shim = core | {"length_words": 2**32 - 1, "wraps": (2**10 - 1,) * 2, "step_words": 2**20}
    assert dataclasses.asdict(found) == {"core": core, "memtile": memtile, "shim": shim}


def test_a_model_has_no_descriptors():
    program = bstf_compiler.compile(random_network(0), "aie2_2x2")
    with pytest.raises(ValueError, match="'aie2_2x2' is a model without buffer descriptors; compile for a part"):
        lower(program)


# --- any box, any limits ---

FIELDS = st.builds(
    DescriptorLimits,
    channels=st.just(2), locks=st.just(16), count=st.integers(4, 16), parities=st.sampled_from([1, 2]),
    dimensions=st.just(3), length_words=st.integers(1, 60), wraps=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    step_words=st.sampled_from([1, 8, 20, 200]), iterations=st.integers(1, 9),
)  # fmt: skip


@st.composite
def accesses(draw, tile: str, sizes: tuple[int, int, int]) -> Access:
    """A box of words with gaps or none between pixels and rows, that moves on, goes round a ring, or stays."""
    _, pixels, length = sizes
    pixel = length + 4 * draw(st.sampled_from([0, 0, 1, 5]))
    row = pixels * pixel + 4 * draw(st.sampled_from([0, 0, 3, 190]))
    ring = draw(st.integers(0, 4))
    first = draw(st.integers(0, ring - 1)) if ring else 0
    advance = 4 * draw(st.sampled_from([0, 1, 7, 30, 900]))
    return Access((tile,), 4 * draw(st.integers(0, 50)), sizes, (row, pixel), advance, ring, first)


@st.composite
def transfers(draw, tile: str) -> Transfer:
    """From a memory tile to one core, with locks in each iteration, the first or the last one."""
    moves = []
    for _ in range(draw(st.integers(1, 4))):
        sizes = (draw(st.integers(1, 4)), draw(st.integers(1, 5)), 4 * draw(st.integers(1, 13)))
        moves.append(Move(draw(accesses("m0", sizes)), draw(accesses(tile, sizes))))
    whens = st.sampled_from(["each", "first", "last"])
    locks = {end: (LockAction(f"{end}:a", draw(st.integers(1, 3)), draw(whens)),) for end in ("m0", tile)}
    return Transfer(
        "LOADFM", "loadfm.0", tuple(moves), draw(st.integers(1, 20)), locks["m0"] + locks[tile],
        tuple(LockAction(f"{end}:b", 1, draw(whens)) for end in ("m0", tile)),
    )  # fmt: skip


def code_of(device: DeviceSpec, instructions: list, locks: dict[str, int] | None = None) -> Code:
    step = Step("layer", "conv", "out", (0, 1), 0, True, locks or {}, [], instructions)
    return Code("drawn", device, [], [], [], {}, [], [step], 0, b"")


@settings(max_examples=300, deadline=None)
@given(sizes=st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(1, 40)), limits=FIELDS, data=st.data())
def test_walks_of_any_box_in_any_fields(sizes, limits, data):
    access = data.draw(accesses("m0", (*sizes[:2], 4 * sizes[2])))
    walks = patterns(access.sizes, access.strides, limits)
    found = [Descriptor("m0", access.address + offset, walk) for offset, walk in walks]
    for descriptor in found:
        assert_fields_hold(descriptor, limits)
    assert np.array_equal(np.concatenate([walk(one, 0) for one in found]), box(dataclasses.replace(access, ring=0), 0))


def test_walks_are_as_few_as_can_be():
    core, memtile = (getattr(DeviceSpec.load("npu1").descriptors, kind) for kind in ("core", "memtile"))
    assert patterns((2, 14, 64), (896, 64), core) == ((0, ((448, 1),)),)  # contiguous: no wrap holds
    assert patterns((2, 28, 64), (9000, 64), core) == ((0, ((224, 1), (2, 224), (2, 2250))),)  # 448 = 224 * 2 words
    assert patterns((9, 28, 64), (9000, 128), memtile) == ((0, ((16, 1), (28, 32), (9, 2250))),)
    assert len(patterns((3, 1, 4 * 257), (2000, 0), core)) == 3  # 257 is prime and passes the wrap: row by row
    assert len(patterns((1, 1, 65536), (0, 0), core)) == 2  # 16,384 words, one more than the length can say
    assert len(patterns((4, 5, 8), (40000, 32), core)) == 4  # the step from row to row has no room: row by row
    assert len(patterns((2, 3, 8), (0, 0), core)) == 6  # nor has a step of zero


@settings(max_examples=150, deadline=None)
@given(data=st.data(), core=FIELDS, memtile=FIELDS)
def test_any_transfers_with_any_fields(data, core, memtile):
    """Several instructions of two units that share channels where there are few of them."""
    spec = DeviceSpec.load("npu1_2x2")
    device = dataclasses.replace(spec, descriptors=Descriptors(core, dataclasses.replace(memtile, channels=1), core))
    drawn = [data.draw(transfers(f"c{column}.0")) for column in data.draw(st.lists(st.integers(0, 1), max_size=5))]
    units = [dataclasses.replace(do, unit=f"loadfm.{do.moves[0].target.tiles[0][1]}") for do in drawn]
    assert_performed(
        code_of(device, units, {f"{tile}:{name}": 999 for tile in ("m0", "c0.0", "c1.0") for name in "ab"})
    )


def test_locks_go_with_the_bytes():
    """Each tile's lock is taken before its first byte of an iteration and given after its last."""
    device, sizes = DeviceSpec.load("npu1"), (2, 3, 8)
    gap = Access(("m0",), 0, sizes, (100, 8), advance=200)
    core = Access(("c0.0",), 0, sizes, (24, 8), advance=48, ring=2, first=1)
    far = dataclasses.replace(gap, tiles=("m1",))
    do = Transfer(
        "LOADFM", "loadfm.0", (Move(gap, core), Move(far, dataclasses.replace(core, address=96))), 5,
        (LockAction("m0:ready", 1, "first"), LockAction("m1:ready", 2, "first"), LockAction("c0.0:in_free")),
        (LockAction("c0.0:in_full"),),
    )  # fmt: skip
    (channels,) = lower(code_of(device, [do]))
    received, sent = channels
    assert (received.name, sent.name) == ("c0.0 S2MM 0", "m0 MM2S 0")
    assert received.chains == [
        (
            Descriptor("c0.0", 0, ((12, 1),), (2, 12), 1, acquire=("c0.0:in_free", 1)),
            Descriptor("c0.0", 96, ((12, 1),), (2, 12), 1, release=("c0.0:in_full", 1)),
        )
    ]
    assert received.tasks == [descriptors.Task(chain=0, runs=5, instruction=0, iteration=0)]
    walk = ((6, 1), (2, 25))
    assert sent.chains == [
        (
            Descriptor("m0", 0, walk, acquire=("m0:ready", 1)),
            Descriptor("m1", 0, walk, acquire=("m1:ready", 2)),
        ),
        (Descriptor("m0", 200, walk, (4, 50)), Descriptor("m1", 200, walk, (4, 50))),
    ]
    assert [(task.chain, task.runs, task.iteration) for task in sent.tasks] == [(0, 1, 0), (1, 4, 1)]


def test_chains_serve_again():
    """A ring that goes on where it stopped, and a run of tiles that is sent again, take no new descriptors."""
    device, sizes = DeviceSpec.load("npu1"), (1, 1, 64)
    move = Move(Access(("m0",), 0, sizes, advance=64), Access(("c0.0",), 0, sizes, advance=64, ring=3))
    again = [
        Transfer(
            "LOADFM", "loadfm.0", (dataclasses.replace(move, target=dataclasses.replace(move.target, first=f)),), 7
        )
        for f in (0, 1, 2, 0)
    ]
    (channels,) = lower(code_of(device, again))
    assert [(len(channel.chains), len(channel.tasks)) for channel in channels] == [(1, 4), (1, 4)]
    (channels,) = lower(code_of(device, [again[0], again[2]]))
    assert [len(channel.chains) for channel in channels] == [2, 1]


# --- a machine of channels: locks, streams that wait for their receivers, cores ---


class Streams:
    """Runs a program by its descriptors in random order. A channel goes on when its lock is there; a sender when each
    of its receivers has taken all that was sent before, and awaits the sender's move next.
    """

    def __init__(self, program, images, seed: int) -> None:
        self.machine = simulate.Machine(program)
        self.machine._write_inputs(images)
        self.rng = np.random.default_rng(seed)
        for step, channels in zip(program.steps, lower(program), strict=True):
            self.step, self.locks = step, dict(step.locks)
            self.fifo = defaultdict(deque)  # by unit and receiver
            self.awaited = self.orders()
            works = [self.send(c) if c.direction == MM2S else self.receive(c) for c in channels]
            works += [self.core(unit) for unit in {i.unit for i in step.instructions if isinstance(i, Compute)}]
            self.run(works)
            assert not any(self.fifo.values()) and not any(self.awaited.values())

    def orders(self):
        """By unit and receiver: (instruction, iteration, move) and bytes of what comes, in order."""
        found = defaultdict(deque)
        for index, do in enumerate(self.step.instructions):
            for iteration in range(do.iterations if isinstance(do, Transfer) else 0):
                for n, move in enumerate(do.moves):
                    for tile in move.target.tiles if move.target.bytes else ():
                        found[do.unit, tile].append([(index, iteration, n), move.target.bytes])
        return found

    def run(self, works):
        """Visits works in random order until all are done; each yields whether it went on."""
        while works:
            moved = False
            self.rng.shuffle(works)
            for work in list(works):
                for _ in range(self.rng.integers(1, 5)):
                    went = next(work, None)
                    if went is None:
                        works.remove(work)
                    moved |= went is not False
                    if not went:
                        break
            assert moved, f"layer '{self.step.layer}' stands still"

    def take(self, lock):
        """Waits for a lock."""
        while lock and self.locks[lock[0]] < lock[1]:
            yield False
        if lock:
            self.locks[lock[0]] -= lock[1]

    def give(self, lock):
        if lock:
            self.locks[lock[0]] += lock[1]

    def pieces(self, channel: Channel):
        """Runs of a channel's descriptors, with the moves of which they are, byte by byte."""
        left, key = None, None
        for index, iteration, descriptor, run in in_order(channel):
            do = self.step.instructions[index]
            if key != (index, iteration):
                key = index, iteration
                sides = [move.source if channel.direction == MM2S else move.target for move in do.moves]
                mine = {d.memory for t in channel.tasks if t.instruction == index for d in channel.chains[t.chain]}
                left = [(n, side.bytes) for n, side in enumerate(sides) if mine & set(side.tiles)]
                left = np.repeat([n for n, _ in left], [size for _, size in left])
            addresses = walk(descriptor, run)
            yield do, key, descriptor, addresses, left[: len(addresses)]
            left = left[len(addresses) :]

    def send(self, channel: Channel):
        for do, key, descriptor, addresses, moves in self.pieces(channel):
            yield from self.take(descriptor.acquire)
            memory = self.machine._memories[descriptor.memory]
            for n in dict.fromkeys(moves.tolist()):
                ends, content = [(do.unit, tile) for tile in do.moves[n].target.tiles], memory[addresses[moves == n]]
                while any(self.fifo[end] or self.awaited[end][0][0] != (*key, n) for end in ends):
                    yield False
                for end in ends:
                    self.fifo[end].extend(content.tolist())
                    self.awaited[end][0][1] -= len(content)
                    if not self.awaited[end][0][1]:
                        self.awaited[end].popleft()
                yield True
            self.give(descriptor.release)
            yield True

    def receive(self, channel: Channel):
        for do, _, descriptor, wanted, _ in self.pieces(channel):
            yield from self.take(descriptor.acquire)
            memory, fifo = self.machine._memories[descriptor.memory], self.fifo[do.unit, descriptor.memory]
            while len(wanted):
                while not fifo:
                    yield False
                count = min(len(fifo), len(wanted))
                memory[wanted[:count]] = [fifo.popleft() for _ in range(count)]
                wanted = wanted[count:]
                yield True
            self.give(descriptor.release)
            yield True

    def core(self, unit: str):
        """A core's instructions: without locks of empty boxes, and behind one with all slots of the ring."""
        core = "c" + unit.removeprefix("core.")
        empty = {f"{core}:in_full": deque(), f"{core}:out_free": deque()}  # by tile: whether no DMA moves any of it
        for do in self.step.instructions:
            if isinstance(do, Transfer):
                moved = any(
                    core in side.tiles and side.bytes for move in do.moves for side in (move.source, move.target)
                )
                for action in do.release:
                    if action.lock in empty:
                        empty[action.lock] += [not moved] * do.iterations
        slots = {end: self.step.locks[f"{core}:{end}_free"] for end in ("in", "out")}
        passed = {"in": False, "out": False}
        for do in self.step.instructions:
            for iteration in range(do.iterations if do.unit == unit else 0):
                left_out = set()
                for action in do.acquire:
                    if not action.applies(iteration, do.iterations):
                        continue
                    end = action.lock.partition(":")[2].partition("_")[0]
                    if action.lock in empty and empty[action.lock].popleft():
                        left_out.add(end)
                        passed[end] = True
                        continue
                    others = slots[end] - 1 if passed.get(end) else 0
                    yield from self.take((action.lock, action.count + (others if end == "out" else 0)))
                    if others:
                        self.give((f"{core}:{end}_free", others))
                        passed[end] = False
                self.machine._compute(do, iteration)
                for action in do.release:
                    end = action.lock.partition(":")[2].partition("_")[0]
                    if action.applies(iteration, do.iterations) and end not in left_out:
                        self.give((action.lock, action.count))
                yield True


def assert_streams_compute(program, graph: Graph, seed: int):
    images, expected = random_images(seed, graph), integer.trace(graph, random_images(seed, graph))
    streams = Streams(program, [array[0] for array in simulate._images(program, images)], seed)
    for port in program.outputs:
        assert np.array_equal(streams.machine.tensor(port.tensor), expected[port.tensor][0])


@pytest.mark.parametrize("part", ["npu1", "npu2_3x4", "ve2302", "ve2802_6x8"])
@pytest.mark.parametrize("network", [residual_network, random_network, network_of_everything])
def test_a_machine_of_descriptors_computes_the_network(part, network):
    graph = network(2)
    assert_streams_compute(bstf_compiler.compile(graph, part), graph, seed=2)


@pytest.mark.parametrize("seed", range(40))
def test_machines_with_small_memories_and_few_descriptors(seed):
    """Bands, sums in pieces, shared channels, chains in parts, descriptors that are written again."""
    rng = np.random.default_rng(seed)
    graph = (random_network, network_of_everything)[seed % 2](seed)
    spec = entries(int(rng.integers(1, 6)), int(rng.integers(1, 4)), int(rng.choice([4096, 9000])))
    spec["memtile"]["memory_bytes"] = int(rng.choice([2048, 6000, 524288]))
    fields = {"channels": int(rng.integers(1, 4)), "locks": 64, "parities": int(rng.integers(1, 3)), "dimensions": 3}
    fields |= {"count": int(rng.integers(8, 16)), "length_words": int(rng.choice([40, 1000])), "wraps": [30, 9]}
    fields |= {"step_words": int(rng.choice([16, 5000])), "iterations": int(rng.integers(1, 9))}
    spec["descriptors"] = dict.fromkeys(("core", "memtile", "shim"), fields)
    try:
        program = bstf_compiler.compile(graph, DeviceSpec.from_dict(spec, "drawn device"))
    except ValueError as refusal:
        assert "layer '" in str(refusal)
        return
    assert_performed(program)
    assert_streams_compute(program, graph, seed)


# --- what verify says of programs that no descriptors can do ---


def broken(kind: str, change):
    """A sound program for npu1 with one instruction of a kind changed."""
    program = bstf_compiler.compile(random_network(2), "npu1")
    for step in program.steps:
        for index, do in enumerate(step.instructions):
            if do.kind == kind and do.moves and step.instructions[index].bytes:
                step.instructions[index] = change(do)
                return program, step.layer
    raise AssertionError(f"no {kind}")


def moved(do: Transfer, **changes) -> Transfer:
    first, *others = do.moves
    ends = (dataclasses.replace(first.source, **changes), dataclasses.replace(first.target, **changes))
    return dataclasses.replace(do, moves=(Move(*ends), *others))


def given_and_taken(do: Transfer, *more: LockAction) -> Transfer:
    return dataclasses.replace(do, acquire=(*do.acquire, *more), release=(*do.release, *more))


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("LOADFM", lambda i: moved(i, address=2), "address = 2 in m0; the DMA of m0 moves words of 4 bytes"),
        ("LOADFM", lambda i: moved(i, sizes=(1, 1, 7)), "length = 7 in c0.0; the DMA of c0.0 moves words of 4 bytes"),
        ("LOADFM", lambda i: moved(i, strides=(9, 8), sizes=(2, 1, 8)), "row stride = 9 in m0; .* words of 4 bytes"),
        ("LOADFM", lambda i: moved(i, strides=(8, 10), sizes=(1, 2, 8)), "pixel stride = 10 in m0; .* words of 4"),
        (
            "WRITEFM", lambda i: dataclasses.replace(moved(i, advance=6), iterations=2),
            "advance = 6 in c0.0; the DMA of c0.0 moves words of 4 bytes",
        ),
        ("LOAD", lambda i: moved(i, address=6), "address = 6 in ddr; the DMA of s0 moves words of 4 bytes"),
        (
            "LOADFM", lambda i: given_and_taken(i, LockAction("c0.0:out_free")),
            "takes 2 locks of c0.0 at once, c0.0:in_free, c0.0:out_free; a descriptor has 1 of each kind",
        ),
        (
            "LOADWM", lambda i: given_and_taken(i, LockAction("c0.0:w_free", 64)),
            "takes lock c0.0:w_free 65 times at once; a lock holds 63 at most",
        ),
        (
            "WRITEFM", lambda i: given_and_taken(i, LockAction("m3:done")),
            "gives lock m3:done, but its unit moves nothing of m3",
        ),
    ],
)  # fmt: skip
def test_what_descriptors_cannot_do_is_found(kind, change, words):
    program, layer = broken(kind, change)
    found = program.verify()
    assert any(re.search(f"layer '{layer}': {kind} on .*{words}", violation) for violation in found), found


def test_too_many_locks_and_too_large_ones_are_found():
    program = bstf_compiler.compile(random_network(2), "npu1")
    step = program.steps[0]
    step.locks |= {f"c0.0:lock{n}": 0 for n in range(11)} | {f"m3:lock{n}": 0 for n in range(64)} | {"m2:large": 64}
    of_m3 = sum(lock.startswith("m3:") for lock in step.locks)
    found = program.verify()
    assert f"layer '{step.layer}': c0.0 needs 17 locks, of which it has 16" in found
    assert f"layer '{step.layer}': m3 needs {of_m3} locks, of which it has 64" in found
    assert f"layer '{step.layer}': lock m2:large begins at 64, outside 0 to 63" in found


def test_a_model_has_no_such_limits():
    program = bstf_compiler.compile(random_network(2), "aie2_4x4")
    program.steps[0].locks |= {f"c0.0:lock{n}": 99 for n in range(99)}
    assert program.verify() == []


def test_a_device_with_fewer_descriptors_than_channels_is_refused():
    limits = dataclasses.asdict(DeviceSpec.load("npu1").descriptors)
    limits["memtile"]["count"] = 11
    with pytest.raises(
        ValueError, match=r"descriptors\.memtile has count = 11; 6 channels .* need 12 or more, one each"
    ):
        DeviceSpec.from_dict(entries() | {"descriptors": limits}, "device file 'x.toml'")


# --- as text ---


def test_the_listing_says_it_all(tmp_path):
    """Read back with a grammar of its own, it has the channels, chains and tasks of `lower`."""
    program = bstf_compiler.compile(residual_network(), "npu1")
    folder = program.write(tmp_path / "program")
    lines = iter((folder / "descriptors.txt").read_text().splitlines())
    for step, channels in zip(program.steps, lower(program), strict=True):
        head = next(lines)
        assert head.startswith(f".step {step.layer} rows {step.rows[0]}-{step.rows[1]}; most of one tile: ")
        tiles = _totals((channel.tile, channel.descriptors) for channel in channels)
        for kind, letter in (("shim", "s"), ("memtile", "m"), ("core", "c")):
            most = max((count for tile, count in tiles.items() if tile[0] == letter), default=0)
            assert (f"{kind} {most}" in head) == (most > 0)
        for channel in channels:
            assert next(lines) == f"{channel.name} bd {channel.ids[0]}-{channel.ids[-1]}"
            for number, (chain, ids) in enumerate(zip(channel.chains, channel.chain_ids)):
                for place, descriptor in enumerate(chain):
                    found = re.fullmatch(
                        r"  (\d+) bd (\d+) (\S+)@0x([0-9a-f]+)(?:\+(\d+)%(\d+)#(\d+))?\[(.+)\]"
                        r"(?: wait (\S+?)(?:\*(\d+))?)?(?: give (\S+?)(?:\*(\d+))?)?(?: next (\d+))?",
                        next(lines),
                    )
                    in_chain, bd, memory, address, step_words, slots, first, walk, *locks, following = found.groups()
                    assert (int(in_chain), int(bd)) == (number, ids[place])
                    assert (following is None) == (place + 1 == len(ids)) or int(following) == ids[place + 1]
                    take, give = ((lock, int(count or 1)) if lock else None for lock, count in (locks[:2], locks[2:]))
                    walk = tuple(tuple(map(int, pair.split("/"))) for pair in walk.split(","))
                    iteration = (int(slots), int(step_words)) if slots else (1, 0)
                    read = Descriptor(memory, int(address, 16), walk, iteration, int(first or 0), take, give)
                    assert read == (descriptor if slots else dataclasses.replace(descriptor, iteration=(1, 0)))
            for task in channel.tasks:
                do = step.instructions[task.instruction]
                assert next(lines) == f"  run {task.chain} x{task.runs} {do.kind} {do.unit} from {task.iteration}"
    assert next(lines, None) is None
    assert bstf_compiler.Program.load(folder) == program
    program.write(folder)
    program = bstf_compiler.compile(residual_network(), "aie2_2x2")
    assert not (program.write(folder) / "descriptors.txt").exists()
