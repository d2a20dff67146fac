"""Descriptors walked as the manuals say (AM020, UG1603), by an interpreter of this file alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import numpy as np

from bstf_compiler.aie.descriptors import MM2S, S2MM, Channel, Descriptor, lower
from bstf_compiler.aie.device import DescriptorLimits, DeviceSpec
from bstf_compiler.aie.isa import Access, Transfer
from bstf_compiler.graph import Graph, Window
from tests.bstf_compiler.networks import Builder

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
            assert Counter(dict.fromkeys(memories, 0)) | totals(names) == totals((m, s.bytes) for m, s in mine)
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


def totals(pairs) -> Counter:
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
