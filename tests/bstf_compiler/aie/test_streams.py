"""Networks computed by descriptors alone: DMAs that wait for locks, streams that wait for receivers, and cores."""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler import DeviceSpec, integer
from bstf_compiler.aie import simulate
from bstf_compiler.aie.descriptors import MM2S, Channel, lower
from bstf_compiler.aie.isa import Compute, Transfer
from bstf_compiler.graph import Graph
from tests.bstf_compiler.aie.devices import entries
from tests.bstf_compiler.aie.walking import assert_performed, in_order, residual_network, walk
from tests.bstf_compiler.networks import network_of_everything, random_images, random_network


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
                self.machine._compute(self.step, do, iteration)
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


@pytest.mark.parametrize("seed", [*range(40), 268])  # 268: a core that reads nothing of some pieces, between others
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
