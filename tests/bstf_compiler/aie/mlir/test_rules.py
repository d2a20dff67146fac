"""Designs with one thing broken: each is refused with the rule's name and the place."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

import bstf_compiler
from bstf_compiler.aie.mlir.design import design
from bstf_compiler.aie.mlir.model import (
    ACQUIRE,
    CORE,
    MEMTILE,
    MM2S,
    S2MM,
    Await,
    Buffer,
    Call,
    Configuration,
    Core,
    Design,
    Flow,
    Lock,
    Loop,
    Start,
    Task,
    Tile,
    UseLock,
)
from bstf_compiler.aie.mlir.rules import RULES, check
from tests.bstf_compiler.aie.mlir.networks import small


@pytest.fixture(scope="module")
def sound() -> Design:
    return design(bstf_compiler.compile(small(), "npu1"))


BREAKS = {}
"""What breaks a rule: by name of the rule, functions that change a configuration and say what the sentence holds."""


def breaks(rule: str):
    def keep(change):
        BREAKS.setdefault(rule, []).append(change)
        return change

    return keep


def on(design: Design, things, kind: str):
    """The first index of a thing that lies on a kind of tile."""
    return next(i for i, one in enumerate(things) if design.kind(one.tile) == kind)


def change_descriptor(design: Design, made: Configuration, wanted, change) -> str:
    """Changes the first descriptor of a chain that is wanted; returns its place."""
    for things in (made.starts, made.sequence):
        for i, one in enumerate(things):
            if isinstance(one, (Start, Task)):
                for k, descriptor in enumerate(one.chain):
                    if wanted(one.port, descriptor):
                        new = change(descriptor)
                        things[i] = replace(one, chain=(*one.chain[:k], new, *one.chain[k + 1 :]))
                        return f"{one.port}, descriptor {new.number}"
    raise AssertionError("no such descriptor")


def with_buffer(port, descriptor) -> bool:
    return descriptor.buffer is not None


@breaks("tile")
def beyond_the_columns(design, made):
    tile = Tile(9, 3)
    made.buffers.append(Buffer("far", tile, 2048, 4))
    return f"{tile}: lies outside of the 4 columns"


@breaks("place")
def core_on_a_memory_tile(design, made):
    made.cores[0] = replace(made.cores[0], tile=Tile(0, 1))
    return "core tile (0, 1): lies on a memtile tile"


@breaks("place")
def core_without_a_body(design, made):
    made.cores[0] = replace(made.cores[0], loops=())
    return f"core {made.cores[0].tile}: has an empty body"


@breaks("memory")
def address_beyond_a_memory_tile(design, made):
    i = on(design, made.buffers, MEMTILE)
    made.buffers[i] = replace(made.buffers[i], address=524_288 - 4)
    return f"buffer '{made.buffers[i].name}' on {made.buffers[i].tile}: takes bytes 524284"


@breaks("memory")
def buffer_in_the_stack_of_a_core(design, made):
    i = on(design, made.buffers, CORE)
    made.buffers[i] = replace(made.buffers[i], address=512, bank=None)
    return f"on {made.buffers[i].tile}: takes bytes 512"


@breaks("memory")
def overlapping_buffers(design, made):
    i = on(design, made.buffers, CORE)
    one = made.buffers[i]
    made.buffers.append(replace(one, name="twin", address=one.address + 4 * one.words - 4, bank=None))
    return f"{one.tile}: buffers '{one.name}' and 'twin' overlap"


@breaks("bank")
def wrong_bank(design, made):
    i = on(design, made.buffers, CORE)
    made.buffers[i] = replace(made.buffers[i], bank=made.buffers[i].bank ^ 1)
    return f"not in bank {made.buffers[i].bank}"


@breaks("lock")
def seventeenth_lock(design, made):
    i = on(design, made.locks, CORE)
    made.locks[i] = replace(made.locks[i], number=16)
    return f"lock '{made.locks[i].name}' on {made.locks[i].tile}: has number 16 of 16"


@breaks("lock")
def lock_that_begins_too_high(design, made):
    made.locks[0] = replace(made.locks[0], init=64)
    return "begins at 64, outside of 0 to 63"


@breaks("lock")
def two_locks_of_one_number(design, made):
    made.locks.append(replace(made.locks[0], name="twin"))
    return "shares number"


@breaks("lock-balance")
def lock_that_is_given_twice(design, made):
    core = made.cores[0]
    give = next(use for loop in core.loops for use in loop.body if isinstance(use, UseLock) and use.action != ACQUIRE)
    made.cores[0] = replace(core, loops=(*core.loops, Loop(1, (give,))))
    return f"lock '{give.lock}' on {core.tile}: begins at"


@breaks("reach")
def memory_of_another_core(design, made):
    far = Tile(3, 5)
    made.buffers.append(Buffer("far", far, 60_000, 4))
    place = change_descriptor(
        design, made, lambda port, one: design.kind(port.tile) == CORE and port.tile != far,
        lambda one: replace(one, buffer="far", offset=0),
    )  # fmt: skip
    return place + ": uses buffer 'far' of tile (3, 5), out of its reach"


@breaks("reach")
def memory_tile_two_columns_away(design, made):
    tile = Tile(3, 1)
    made.buffers.append(Buffer("far", tile, 500_000, 4))
    place = change_descriptor(
        design, made, lambda port, one: port.tile == Tile(0, 1), lambda one: replace(one, buffer="far", offset=0)
    )
    return place + ": uses buffer 'far' of tile (3, 1)"


@breaks("core-reach")
def lock_of_another_core(design, made):
    one, two = made.cores[0], made.cores[1].tile
    lock = next(lock.name for lock in made.locks if lock.tile == two)
    made.cores[0] = replace(one, loops=(*one.loops, Loop(1, (UseLock(lock, ACQUIRE, 1),))))
    return f"core {one.tile}: uses '{lock}' of {two}"


@breaks("descriptor-count")
def seventeenth_descriptor(design, made):
    place = change_descriptor(
        design, made, lambda port, one: design.kind(port.tile) == CORE, lambda one: replace(one, number=16)
    )
    return place + ": is beyond the 16 descriptors of a core tile"


@breaks("parity")
def descriptor_of_the_other_half(design, made):
    place = change_descriptor(
        design, made, lambda port, one: design.kind(port.tile) == MEMTILE and port.channel % 2 == 0,
        lambda one: replace(one, number=40),
    )  # fmt: skip
    return place + ": isn't one of the channel's, 0 to 23"


@breaks("descriptor-in-use")
def descriptor_of_a_chain_that_runs(design, made):
    start = next(one for one in made.starts if len(one.chain) > 1)
    i = made.starts.index(start)
    made.starts[i] = replace(start, chain=(*start.chain[:-1], replace(start.chain[-1], number=start.chain[0].number)))
    return f"{start.port}, descriptor {start.chain[0].number}: is written"


@breaks("channel")
def third_channel_of_a_core(design, made):
    i = next(i for i, one in enumerate(made.starts) if design.kind(one.port.tile) == CORE)
    made.starts[i] = replace(made.starts[i], port=replace(made.starts[i].port, channel=2))
    return f"{made.starts[i].port}: is beyond the 2 channels of a core tile"


@breaks("channel")
def two_chains_of_one_channel(design, made):
    made.starts.append(made.starts[0])
    return f"{made.starts[0].port}: begins 2 chains"


@breaks("length")
def descriptor_of_no_length(design, made):
    place = change_descriptor(design, made, with_buffer, lambda one: replace(one, length=0, sizes=(), strides=()))
    return place + ": has a length of 0 words, outside of 1 to"


@breaks("length")
def length_that_its_sizes_are_not(design, made):
    place = change_descriptor(
        design, made, lambda port, one: one.sizes, lambda one: replace(one, length=one.length + 1)
    )
    return place + ": walks"


@breaks("bounds")
def walk_beyond_its_buffer(design, made):
    place = change_descriptor(design, made, with_buffer, lambda one: replace(one, offset=100_000))
    return place + ": reaches words 100000"


@breaks("dimensions")
def fourth_dimension_of_a_core(design, made):
    place = change_descriptor(
        design, made, lambda port, one: design.kind(port.tile) == CORE,
        lambda one: replace(one, sizes=(1, 1, 1, one.length), strides=(1, 1, 1, 1)),
    )  # fmt: skip
    return place + ": has 4 sizes and 4 strides of 3"


@breaks("wrap")
def wrap_too_large(design, made):
    place = change_descriptor(
        design, made, lambda port, one: design.kind(port.tile) == CORE,
        lambda one: replace(one, length=256, sizes=(1, 256), strides=(1, 1)),
    )  # fmt: skip
    return place + ": has size 256 in dimension 0, outside of 1 to 255"


@breaks("wrap")
def size_that_the_tool_refuses(design, made):
    place = change_descriptor(
        design, made, lambda port, one: design.kind(port.tile) == MEMTILE,
        lambda one: replace(one, length=1026, sizes=(513, 2), strides=(2, 1)),
    )  # fmt: skip
    return place + ": has size 513 in dimension 1, outside of 1 to 512"


@breaks("stride")
def stride_beyond_its_field(design, made):
    place = change_descriptor(
        design, made, lambda port, one: design.kind(port.tile) == CORE,
        lambda one: replace(one, length=2, sizes=(2, 1), strides=(8193, 1)),
    )  # fmt: skip
    return place + ": has stride 8193 in dimension 1, outside of 1 to 8192"


@breaks("stride")
def stride_of_zero(design, made):
    place = change_descriptor(
        design, made, with_buffer, lambda one: replace(one, length=2, sizes=(2, 1), strides=(0, 1))
    )
    return place + ": has stride 0"


@breaks("lock-pair")
def lock_that_is_never_given(design, made):
    place = change_descriptor(design, made, lambda port, one: one.release, lambda one: replace(one, release=None))
    return place + ": uses one lock"


@breaks("lock-pair")
def locks_of_two_tiles(design, made):
    far = Lock("far", Tile(1, 1), 60, 0)
    made.locks.append(far)
    place = change_descriptor(
        design, made, lambda port, one: port.tile == Tile(0, 1) and one.release,
        lambda one: replace(one, release=UseLock("far", "Release", 0)),
    )  # fmt: skip
    return place + ": takes"


@breaks("lock-pair")
def no_times_of_a_lock_that_is_not_zero(design, made):
    place = change_descriptor(
        design, made, lambda port, one: one.acquire and one.acquire.value,
        lambda one: replace(one, acquire=replace(one.acquire, value=0)),
    )  # fmt: skip
    return place + ": takes no times of"


@breaks("flow")
def circuit_and_packets_from_one_channel(design, made):
    flow = next(flow for flow in made.flows if flow.packet is None)
    made.flows.append(replace(flow, packet=7))
    return f"{flow.source}: is where a circuit begins, and 1 other streams"


@breaks("packet")
def packet_id_beyond_its_field(design, made):
    made.flows = [replace(flow, packet=32 + i) for i, flow in enumerate(made.flows)]
    return "has packets with id 32, outside of 0 to 31"


@breaks("packet")
def one_packet_id_twice_in_a_column(design, made):
    flow = next(flow for flow in made.flows if design.kind(flow.source.tile) == CORE)
    other = replace(flow.source, channel=1)
    made.flows += [Flow(flow.source, flow.targets, 9), Flow(other, flow.targets, 9)]
    return "has packets with id 9 in column"


@breaks("arrival")
def words_that_nobody_sends(design, made):
    place = change_descriptor(
        design, made, lambda port, one: port.direction == S2MM and one.length > 1,
        lambda one: replace(one, length=one.length - 1, sizes=(), strides=()),
    )  # fmt: skip
    return place.partition(",")[0]


@breaks("arrival")
def packets_without_a_stream(design, made):
    place = change_descriptor(
        design, made, lambda port, one: port.direction == MM2S, lambda one: replace(one, packet=31)
    )
    return place + ": sends with packet id 31, which has no stream"


def change_call(made: Configuration, change) -> Core:
    core = made.cores[0]
    for k, loop in enumerate(core.loops):
        body = tuple(change(one) if isinstance(one, Call) else one for one in loop.body)
        made.cores[0] = core = replace(core, loops=(*core.loops[:k], replace(loop, body=body), *core.loops[k + 1 :]))
    return core


@breaks("call")
def kernel_that_is_not_there(design, made):
    core = change_call(made, lambda call: replace(call, kernel="softmax"))
    return f"core {core.tile}: calls 'softmax'"


@breaks("call")
def kernel_beyond_its_buffer(design, made):
    core = change_call(made, lambda call: replace(call, buffers=((call.buffers[0][0], 1 << 20), *call.buffers[1:])))
    return f"core {core.tile}: calls"


@breaks("queue")
def fifth_task_in_a_queue(design, made):
    task = next(one for one in made.sequence if isinstance(one, Task))
    made.sequence = [replace(task, name=f"task{i}", token=False) for i in range(5)]
    return f"task 'task4': is number 5 in the queue of {task.port}, which holds 4"


@breaks("token")
def await_without_a_token(design, made):
    made.sequence = [replace(one, token=False) if isinstance(one, Task) else one for one in made.sequence]
    return "is awaited, but sends no token"


@breaks("token")
def tokens_out_of_turn(design, made):
    task = next(one for one in made.sequence if isinstance(one, Task) and one.token)
    i = made.sequence.index(task)
    made.sequence.insert(i, replace(task, name="before"))
    return f"task '{task.name}': isn't the one whose token {task.port} sends next"


@breaks("token")
def data_that_nobody_awaits(design, made):
    last = max(i for i, one in enumerate(made.sequence) if isinstance(one, Await))
    name = made.sequence.pop(last).task
    return f"task '{name}': is the last one of"


def test_a_sound_design_keeps_all_rules(sound):
    assert check(sound) == []


def test_each_rule_is_broken_here():
    assert BREAKS.keys() == RULES.keys()


@pytest.mark.parametrize("rule, change", [(rule, one) for rule, several in BREAKS.items() for one in several])
def test_a_broken_design_is_refused_with_rule_and_place(sound, rule, change):
    made = copy.deepcopy(sound.configurations[len(sound.configurations) // 2])
    broken = replace(sound, configurations=[made])
    wanted = change(broken, made)
    found = [str(one) for one in check(broken) if one.rule == rule]
    assert any(wanted in one and one.startswith(f"{rule}: {made.name}, ") for one in found), (wanted, found)


def test_names_that_stand_for_nothing(sound):
    for change, sentence in {
        lambda made: made.locks.pop(): "which isn't declared",
        lambda made: made.buffers.clear(): "which isn't declared",
        lambda made: made.locks.append(Lock(made.locks[0].name, Tile(0, 2), 9, 0)): "locks have this name",
        lambda made: made.sequence.append(Await("nothing")): "awaits task 'nothing', which it hasn't started",
        lambda made: made.sequence.insert(1, made.sequence[0]): "twice",
    }.items():
        broken = replace(sound, configurations=[copy.deepcopy(sound.configurations[0])])
        change(broken.configurations[0])
        assert any(one.rule == "names" and sentence in str(one) for one in check(broken)), sentence
