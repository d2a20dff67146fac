"""Programs that would lead a simulator out of a memory, or keep it busy for ever, are refused when they are loaded."""

import dataclasses

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler.aie.isa import LockAction, Transfer
from bstf_compiler.graph import Window
from tests.bstf_compiler.networks import Builder

IDLE = Transfer("LOAD", "load.0", ())


def program():
    build = Builder(np.random.default_rng(0))
    x = build.conv(build.input(4, 4, 16), 16, Window((1, 1)))
    return bstf_compiler.compile(build.finish(build.add(x, build.conv(x, 16, Window((1, 1))))), "aie2_1x1")


def replaced(kind, change):
    """Changes the first instruction of a kind."""

    def edit(steps):
        for step in steps:
            for number, instruction in enumerate(step.instructions):
                if instruction.kind == kind:
                    step.instructions[number] = change(instruction)
                    return

    return edit


def with_input(**changes):
    return lambda do: dataclasses.replace(do, inputs=(dataclasses.replace(do.inputs[0], **changes), *do.inputs[1:]))


def idle_steps(steps):
    steps[:] = [
        dataclasses.replace(steps[0], instructions=[dataclasses.replace(IDLE, iterations=2**22 - 2**16)])
        for _ in range(5)
    ]


def long_wait(steps):
    lock = next(iter(steps[0].locks))
    steps[0].instructions += [
        dataclasses.replace(IDLE, acquire=(LockAction(lock, 0),) * 2**17, iterations=1),
        dataclasses.replace(IDLE, kind="WRITE", unit="write.0", iterations=2**20),
    ]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (replaced("COMP", with_input(strides=(0, 0))), "COMP on core.0.0 reads or makes a tile whose bytes don't lie"),
        (replaced("COMP", lambda do: dataclasses.replace(do, padding=(2**40, 0))), "has a window of"),
        (replaced("COMP", lambda do: dataclasses.replace(do, strides=(1, 2**40))), "has a window of"),
        (replaced("COMP", lambda do: dataclasses.replace(do, op="add")), "which add can't"),
        (replaced("LOADFM", lambda do: dataclasses.replace(do, iterations=2**23)), "4,194,304 are the most"),
        (
            replaced("LOADFM", lambda do: dataclasses.replace(do, release=(LockAction("c0.0:in_full", 2**23),))),
            "iterations and locks given in them, 4,194,304 are the most",
        ),
        (idle_steps, "its steps have .* iterations and locks given in them, 16,777,216 are the most"),
        (long_wait, "its instructions may have to look at locks .* times, 68,719,476,736 are the most"),
    ],
)
def test_what_would_never_end_or_leave_a_memory_is_not_loaded(edit, sentence):
    made = program()
    bstf_compiler.Program.parse(made.assembly.encode(), made.data)
    edit(made.steps)
    with pytest.raises(ValueError, match=f"holds an unsound program: .*{sentence}.*; compile again"):
        bstf_compiler.Program.parse(made.assembly.encode(), made.data)
