import dataclasses
import errno
import re

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler import files, integer
from bstf_compiler.aie import text
from bstf_compiler.aie.isa import Compute, LockAction, Transfer
from bstf_compiler.aie.memory import Allocation
from bstf_compiler.graph import Window
from tests.bstf_compiler.aie.devices import small_device
from tests.bstf_compiler.networks import Builder, network_of_everything, random_images, random_network

SEEDS = [0, 1, 2, 5]


def program_of(seed=0, device="aie2_3x3", network=random_network):
    return bstf_compiler.compile(network(seed), device)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("device", ["aie2_1x1", "aie2_4x4", small_device(2, 3, 16384, 16384)])
@pytest.mark.parametrize("network", [random_network, network_of_everything])
def test_text_parses_back_without_loss(seed, device, network):
    program = program_of(seed, device, network)
    assert type(program)(**vars(text.parse(program.assembly, program.data))) == program


def test_write_and_load(tmp_path):
    graph = random_network(3)
    program = bstf_compiler.compile(graph, "aie2_2x2")
    folder = program.write(tmp_path / "out" / "program")
    assert {path.name for path in folder.iterdir()} == {
        "program.asm",
        "data.bin",
        "layers.csv",
        "trace.json",
        "report.html",
        "timeline.png",
    }
    again = bstf_compiler.Program.load(folder)
    images = random_images(3, graph)
    assert again == program
    assert np.array_equal(again.simulate(images), program.simulate(images))
    assert again.estimate().total_seconds == program.estimate().total_seconds
    program.write(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["program"]


def test_same_graph_gives_the_same_bytes():
    one, two = program_of(4), program_of(4)
    assert one.assembly == two.assembly and one.data == two.data


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'thesis\.txt'"):
        program_of().write(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.bin").write_text("mine too")
    with pytest.raises(ValueError, match=r"holds 'data\.bin'"):
        program_of().write(tmp_path / "other")
    with pytest.raises(ValueError, match="no part of a program"):
        program_of().write("/")


def test_a_write_that_fails_leaves_the_earlier_program(tmp_path, monkeypatch):
    folder = program_of(1).write(tmp_path / "program")
    before = (folder / "program.asm").read_bytes()

    def fail(one, other):
        raise OSError(errno.EIO, "disk lost")

    monkeypatch.setattr(files, "_exchange", fail)
    with pytest.raises(OSError, match="Can't write .*: input/output error"):
        program_of(2).write(folder)
    assert (folder / "program.asm").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["program"]


def test_damaged_programs_are_refused(tmp_path):
    folder = program_of().write(tmp_path / "program")
    asm, data = (folder / "program.asm").read_bytes(), (folder / "data.bin").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(asm)
        where = rng.integers(len(asm) - 1)
        broken[where] = (broken[where] + rng.integers(1, 255)) % 256
        (folder / "program.asm").write_bytes(bytes(broken))
        with pytest.raises(ValueError, match="compile again"):
            bstf_compiler.Program.load(folder)
    for size in (0, 10, len(asm) // 2, len(asm) - 2):
        (folder / "program.asm").write_bytes(asm[:size])
        with pytest.raises(ValueError, match="compile again"):
            bstf_compiler.Program.load(folder)
    (folder / "program.asm").write_bytes(asm)
    (folder / "data.bin").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="data image is damaged"):
        bstf_compiler.Program.load(folder)
    (folder / "data.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no data\.bin"):
        bstf_compiler.Program.load(folder)


def test_of_another_version_is_refused():
    program = program_of()
    body = program.assembly.rpartition(".end ")[0].replace(f'"version":{text.VERSION}', '"version":9', 1)
    content = body + text._meta("end", {"sha256": text._digest(body.encode())}) + "\n"
    with pytest.raises(ValueError, match="version 9"):
        text.parse(content, program.data)


# --- static rules: each with a broken program ---


def edited(program, change, kind):
    """The program with `change` applied to its first instruction of a kind that moves something."""
    for step in program.steps:
        for index, instruction in enumerate(step.instructions):
            if instruction.kind == kind and (isinstance(instruction, Compute) or instruction.moves):
                step.instructions[index] = change(instruction)
                return program
    raise AssertionError(f"no {kind}")


def moved(instruction: Transfer, **changes):
    move = instruction.moves[0]
    target = dataclasses.replace(move.target, **changes)
    return dataclasses.replace(instruction, moves=(dataclasses.replace(move, target=target), *instruction.moves[1:]))


def resized(instruction: Compute, sizes):
    return dataclasses.replace(instruction, output=dataclasses.replace(instruction.output, sizes=sizes))


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("LOADFM", lambda i: moved(i, address=10**6), "which ends at"),
        ("LOADFM", lambda i: moved(i, address=i.moves[0].target.address + 60000), "held by no buffer|which ends at"),
        ("LOADFM", lambda i: moved(i, sizes=(1, 1, 1)), "moves .* into"),
        ("LOADW", lambda i: moved(i, address=500000), "held by no buffer|which ends at"),
        ("WRITEFM", lambda i: dataclasses.replace(i, acquire=()), "lock .* ends at|deadlock"),
        ("COMP", lambda i: resized(i, (1, 1, 8)), "makes .* from .*, which averagepool can't"),
        ("COMP", lambda i: dataclasses.replace(i, op="fft"), "which fft can't"),
        ("COMP", lambda i: dataclasses.replace(i, op="lookup"), "which lookup can't"),
        ("COMP", lambda i: dataclasses.replace(i, begin=False, scratch=10**6), "outside the buffer for sums"),
        ("LOADWM", lambda i: moved(i, tiles=("c9.9",)), "reaches c9.9, which aie2_3x3 doesn't have"),
        ("COMP", lambda i: dataclasses.replace(i, release=()), "lock .* ends at|deadlock"),
        ("COMP", lambda i: dataclasses.replace(i, acquire=(*i.acquire, LockAction("c0.0:in_full", 9))), "deadlock"),
        ("COMP", lambda i: dataclasses.replace(i, acquire=(LockAction("c0.0:nothing"),)), "not declared"),
    ],
)
def test_broken_instructions_are_found(kind, change, words):
    program = edited(program_of(2), change, kind)
    violations = program.verify()
    assert any(re.search(words, violation) for violation in violations), violations


def test_overlapping_memory_is_found():
    program = program_of(2)
    one = program.allocations[0]
    program.allocations.append(Allocation("intruder", one.address, 1, one.first, one.last))
    assert any("intruder" in violation and "overlap" in violation for violation in program.verify())
    program.allocations.append(Allocation("giant", 0, 10**7, 99, 99))
    assert any("'giant'" in violation and "leaves the memory tile" in violation for violation in program.verify())


def test_overlapping_core_buffers_are_found():
    program = program_of(2)
    name, address, _ = program.steps[0].buffers[0]
    program.steps[0].buffers.append(("intruder", address, 8))
    assert any(name in violation and "intruder" in violation for violation in program.verify())


@pytest.mark.parametrize("network", [random_network, network_of_everything])
def test_compiled_programs_are_sound(network):
    for seed in SEEDS:
        assert program_of(seed, network=network).verify() == []


def test_a_deadlocked_program_says_so_when_simulated():
    graph = random_network(2)
    program = bstf_compiler.compile(graph, "aie2_2x2")
    edited(program, lambda i: dataclasses.replace(i, release=()), "LOADFM")
    with pytest.raises(ValueError, match="waits for ever"):
        program.simulate(random_images(2, graph))


@pytest.mark.parametrize("image", [False, True])
def test_the_hosts_part_is_in_the_text_and_named(image, tmp_path):
    build = Builder(np.random.default_rng(0))
    x = build.affine(build.input(6, 5, 3), image=image)
    graph = build.finish(build.conv(x, 10, Window((3, 3))), softmax=True)
    program = bstf_compiler.compile(graph, "aie2_2x2")
    assert program.host_parts == ("affine 'affine0' of input 'image'", "softmax of 'conv1'")
    assert (
        f'.host_affine {{"input":"image","tensor":"affine0","scale":[{graph.tensors["image scale"].data.flat[0]}'
        in program.assembly
    )
    again = bstf_compiler.Program.load(program.write(tmp_path / "program"))
    images = random_images(0, graph, 2)
    assert again == program and np.array_equal(again.simulate(images), integer.run(graph, images))
    (affine,) = again.affines
    edited = dataclasses.replace(again, affines=[dataclasses.replace(affine, offset=affine.offset[:2])])
    with pytest.raises(ValueError, match=r"'affine0'.*constant of 2 numbers for images \(6, 5, 3\).*compile again"):
        edited.simulate(images)
