"""Transfers as descriptors: the bytes that they touch, their order, locks and fields; and the text of them."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bstf_compiler
from bstf_compiler import DeviceSpec
from bstf_compiler.aie import descriptors
from bstf_compiler.aie.addressing import patterns
from bstf_compiler.aie.code import Code, Step
from bstf_compiler.aie.descriptors import Descriptor, lower
from bstf_compiler.aie.device import DescriptorLimits, Descriptors
from bstf_compiler.aie.isa import Access, LockAction, Move, Transfer
from tests.bstf_compiler.aie.walking import (
    assert_fields_hold,
    assert_performed,
    box,
    in_order,
    residual_network,
    totals,
    walk,
)
from tests.bstf_compiler.networks import network_of_everything, random_network

PARTS = ["npu1", "npu2", "ve2302", "ve2802", "npu1_2x3", "npu2_3x4", "ve2802_6x8"]


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


def test_locks_of_what_moves_nothing():
    """The next transfer waits until the ring is empty; a memory tile's locks go to the neighbours in time."""
    nothing, sizes = (1, 1, 0), (1, 1, 64)
    whole = Transfer(
        "LOADFM", "loadfm.0", (Move(Access(("m0",), 0, sizes), Access(("c0.0",), 0, sizes, advance=64, ring=3)),), 2,
        (LockAction("c0.0:in_free"),), (LockAction("c0.0:in_full"),),
    )  # fmt: skip
    empty = dataclasses.replace(whole, moves=(Move(Access(("m0",), 0, nothing), Access(("c0.0",), 0, nothing)),))
    first = dataclasses.replace(empty, acquire=(*empty.acquire, LockAction("m0:ready", 2, "first")))
    last = dataclasses.replace(empty, release=(*empty.release, LockAction("m0:done", 1, "last")))
    locks = {"c0.0:in_free": 3, "c0.0:in_full": 0, "m0:ready": 0, "m0:done": 0}
    (channels,) = lower(code_of(DeviceSpec.load("npu1"), [first, whole, whole, empty, empty, whole, last], locks))
    received, sent = (
        [(descriptor.acquire, descriptor.release) for _, _, descriptor, _ in in_order(channel)] for channel in channels
    )
    full = ("c0.0:in_full", 1)
    assert received == [((("c0.0:in_free", count), full)) for count in (3, 1, 1, 1, 3, 1)]
    assert sent == [(("m0:ready", 2), None), *[(None, None)] * 4, (None, ("m0:done", 1))]


def test_a_task_runs_no_more_often_than_its_repeat_count_can_say():
    ring = Access(("c0.0",), 0, (1, 1, 64), advance=64, ring=3)
    do = Transfer("LOADFM", "loadfm.0", (Move(Access(("m0",), 0, (1, 1, 64)), ring),), 600)
    (channels,) = lower(code_of(DeviceSpec.load("npu1"), [do, do]))
    for channel in channels:
        assert len(channel.chains) == 1
        assert [(task.runs, task.iteration) for task in channel.tasks] == [(256, 0), (256, 256), (88, 512)] * 2


# --- as text ---


def test_the_listing_says_it_all(tmp_path):
    """Read back with a grammar of its own, it has the channels, chains and tasks of `lower`."""
    program = bstf_compiler.compile(residual_network(), "npu1")
    folder = program.write(tmp_path / "program")
    lines = iter((folder / "descriptors.txt").read_text().splitlines())
    for step, channels in zip(program.steps, lower(program), strict=True):
        head = next(lines)
        assert head.startswith(f".step {step.layer} rows {step.rows[0]}-{step.rows[1]}; most of one tile: ")
        tiles = totals((channel.tile, channel.descriptors) for channel in channels)
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
