"""No read before a write. The other rules are tested with test_program.py's broken programs."""

import dataclasses

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler.graph import Window
from tests.bstf_compiler.aie.devices import small_device
from tests.bstf_compiler.networks import Builder, network_of_everything, random_network

SAME = Window((3, 3), padding=(1, 1, 1, 1))


def program_of(device="aie2_2x2", channels=16):
    """Two convolutions, and the sum of their results."""
    build = Builder(np.random.default_rng(0))
    x = build.conv(build.input(8, 6, channels), channels, SAME, 0.0)
    return bstf_compiler.compile(build.finish(build.add(x, build.conv(x, channels, SAME, 0.0))), device)


def only_violation(program):
    (violation,) = program.verify()
    return violation


@pytest.mark.parametrize(
    ("step", "kind", "reader"),
    [
        (0, "LOAD", "LOADFM on loadfm.0"),
        (0, "LOADW", "LOADWM on loadwm.0"),
        (0, "LOADFM", "COMP on core.0.0"),
        (0, "LOADWM", "COMP on core.0.0"),
        (0, "WRITEFM", "LOADFM on loadfm"),
        (2, "WRITEFM", "WRITE on write.0"),
    ],
)
def test_a_transfer_that_moves_nothing_leaves_its_reader_without_data(step, kind, reader):
    program = program_of()
    instructions = program.steps[step].instructions
    index = next(n for n, i in enumerate(instructions) if i.kind == kind)
    instructions[index] = dataclasses.replace(instructions[index], moves=())
    assert reader in only_violation(program) and "before it is written" in only_violation(program)


def test_an_output_that_is_not_written():
    program = program_of()
    last = program.steps[-1]
    last.instructions = [i for i in last.instructions if i.kind != "WRITE"]
    for index, i in enumerate(last.instructions):
        kept = tuple(action for action in i.release if not action.lock.endswith("done"))
        last.instructions[index] = dataclasses.replace(i, release=kept)
    assert only_violation(program) == "output 'add2' is not whole when the last step ends"


def test_a_core_that_does_not_wait_for_its_input_reads_too_early():
    program = program_of()
    for step in program.steps:
        for index, i in enumerate(step.instructions):
            if i.kind == "COMP":
                kept = tuple(action for action in i.acquire if not action.lock.endswith("in_full"))
                step.instructions[index] = dataclasses.replace(i, acquire=kept)
            if i.kind == "LOADFM":
                kept = tuple(action for action in i.release if not action.lock.endswith("in_full"))
                step.instructions[index] = dataclasses.replace(i, release=kept)
        step.instructions.sort(key=lambda i: i.kind == "LOADFM")  # the order in which units are visited
    assert "COMP on core" in only_violation(program)


def test_a_step_that_is_left_out():
    program = program_of()
    del program.steps[0]
    assert "layer 'conv1': LOAD" in only_violation(program)


def test_steps_in_another_order():
    program = program_of()
    program.steps.reverse()
    assert any("before it is written" in violation for violation in program.verify())


def test_sums_that_begin_nowhere():
    program = program_of(small_device(2, 2, 4096, 65536), 72)
    instructions = program.steps[0].instructions
    index = next(n for n, i in enumerate(instructions) if i.kind == "COMP" and not i.finish)
    instructions[index] = dataclasses.replace(instructions[index], begin=False)
    assert "COMP on core.0.0 reads byte" in only_violation(program)


def test_an_input_that_the_host_does_not_write():
    program = program_of()
    program.inputs = [dataclasses.replace(program.inputs[0], tensor="another")]
    assert "LOAD on load.0 reads byte 0x300 of ddr" in only_violation(program)


@pytest.mark.parametrize("network", [random_network, network_of_everything])
@pytest.mark.parametrize("memtile", [2048, 524288])
def test_sound_programs_read_nothing_before_it_is_written(network, memtile):
    sound = 0
    for seed in range(12):
        try:
            program = bstf_compiler.compile(network(seed), small_device(2, 3, 8192, memtile))
        except ValueError:
            continue
        assert program.verify() == []
        sound += 1
    assert sound > 3


@pytest.mark.parametrize("what", ["output", "sums"])
def test_a_chunk_that_its_own_computation_writes_over(what):
    """Its indices are looked at before the computation begins, so they have to stay as they are."""
    program = program_of()
    step = program.steps[0]
    step.buffers[:] = [("sums", 0, program.device.core.memory_bytes)]
    index, do = next((n, i) for n, i in enumerate(step.instructions) if i.kind == "COMP")
    chunk = do.parameters.address
    changes = {"scratch": chunk, "finish": False} if what == "sums" else {}
    output = dataclasses.replace(do.output, address=chunk if what == "output" else do.output.address)
    step.instructions[index] = dataclasses.replace(do, output=output, **changes)
    assert any(f"[{chunk:#x}, " in text and "over its chunk at" in text for text in program.verify())
