"""Descriptors walked as the manuals say (AM020, UG1603), by an interpreter of this file alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bstf_compiler
from bstf_compiler import DeviceSpec, integer
from bstf_compiler.aie import descriptors, simulate
from bstf_compiler.aie.addressing import patterns
from bstf_compiler.aie.descriptors import MM2S, S2MM, Channel, Descriptor, lower
from bstf_compiler.aie.device import DescriptorLimits
from bstf_compiler.aie.isa import Access, Compute, LockAction, Move, Transfer
from bstf_compiler.graph import Graph, Window
from tests.bstf_compiler.networks import Builder, network_of_everything, random_images, random_network

PARTS = ["npu1", "npu2", "ve2302", "ve2802", "npu1_2x3", "npu2_3x4", "ve2802_6x8"]
LIMITS = DeviceSpec.load("npu1").descriptors
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
        limits = {"s": LIMITS.shim, "m": LIMITS.memtile, "c": LIMITS.core}[channel.tile[0]]
        assert channel.number < {"s": 2, "m": 6, "c": 2}[channel.tile[0]]
        assert channel.longest <= len(channel.ids) <= channel.descriptors
        if channel.tile[0] == "m":
            assert set(channel.ids) <= set(range(24) if channel.number % 2 == 0 else range(24, 48))
        else:
            assert set(channel.ids) <= set(range(16))
        held[channel.tile] += channel.ids
        if channel.tile[0] == "s" and device.noc_columns:
            assert int(channel.tile[1:]) in device.noc_columns
        for place, chain in enumerate(channel.chains):
            ids = [channel.id(place, i) for i in range(len(chain))]
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


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("network", [residual_network, random_network, network_of_everything])
def test_descriptors_touch_the_bytes_of_the_moves_in_order(part, network):
    program = bstf_compiler.compile(network(1), part)
    for step, channels in zip(program.steps, lower(program), strict=True):
        assert_step_is_performed(step, channels)
        assert_limits_hold(program.device, channels)


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

    def core(self, unit: str):
        """A core's instructions; it doesn't wait for tiles that nobody moves."""
        moved = defaultdict(list)  # by lock that a DMA gives or takes: whether it moves anything then
        for do in self.step.instructions:
            if isinstance(do, Transfer):
                tiles = {t for m in do.moves for a in (m.source, m.target) if a.bytes for t in a.tiles}
                for action in (*do.acquire, *do.release):
                    moved[action.lock] += [action.lock.partition(":")[0] in tiles] * (do.iterations * action.count)
        moved = {lock: iter(flags) for lock, flags in moved.items()}
        for do in self.step.instructions:
            if do.unit != unit:
                continue
            for iteration in range(do.iterations):
                for action in do.acquire:
                    if action.applies(iteration, do.iterations) and next(moved[action.lock]):
                        yield from self.take((action.lock, action.count))
                self.machine._compute(do, iteration)
                for action in do.release:
                    if action.applies(iteration, do.iterations) and next(moved[action.lock], True):
                        self.give((action.lock, action.count))
                yield True


@pytest.mark.parametrize("part", ["npu1", "npu2_3x4", "ve2302", "ve2802_6x8"])
@pytest.mark.parametrize("network", [residual_network, random_network, network_of_everything])
def test_a_machine_of_descriptors_computes_the_network(part, network):
    graph = network(2)
    program = bstf_compiler.compile(graph, part)
    images = random_images(2, graph)
    expected = integer.trace(graph, images)
    streams = Streams(program, [array[0] for array in simulate._images(program, images)], seed=0)
    for port in program.outputs:
        assert np.array_equal(streams.machine.tensor(port.tensor), expected[port.tensor][0])
