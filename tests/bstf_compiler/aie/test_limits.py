"""What verify says of programs that no descriptors of a real part can do."""

from __future__ import annotations

import dataclasses
import re

import pytest

import bstf_compiler
from bstf_compiler.aie.isa import LockAction, Move, Transfer
from tests.bstf_compiler.networks import random_network


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
