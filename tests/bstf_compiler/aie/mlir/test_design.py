"""Designs of programs: their text is read back, keeps the rules, and computes the program's bytes."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler.aie.mlir import host
from bstf_compiler.aie.mlir.design import CORE_SHIFT, design
from bstf_compiler.aie.mlir.generic import generic
from bstf_compiler.aie.mlir.machine import Machine, Stuck
from bstf_compiler.aie.mlir.model import CORE, MM2S, S2MM, Await, Core, Flow, Loop, Slot, Task, UseLock
from bstf_compiler.aie.mlir.reader import read
from bstf_compiler.aie.mlir.rules import check
from bstf_compiler.graph import Window
from tests.bstf_compiler.aie.mlir import dialects
from tests.bstf_compiler.aie.mlir.networks import bottlenecks, resnet20, small
from tests.bstf_compiler.aie.walking import residual_network
from tests.bstf_compiler.networks import Builder, random_network


def assert_sound(program, seeds: tuple[int, ...] = (0,)) -> str:
    """The text is the design, keeps the rules, and alone, with packed weights and images, gives the outputs of the
    program's simulation.
    """
    made = design(program)
    text = "\n".join(generic(made, "a test"))
    again = read(text)
    assert again == made
    assert check(again) == []
    images = host.random_images(program)
    wanted = host.expected(program, images)
    for seed in seeds:
        buffer = host.host_image(program, images)
        Machine(again, buffer, seed).run()
        for found, one in zip(host.outputs(program, buffer), wanted, strict=True):
            assert np.array_equal(found, one)
            assert len(np.unique(one)) > 1
    return text


@pytest.fixture(scope="module")
def resnet20_on_npu1():
    """CIFAR's ResNet-20, on all 4 x 4 cores."""
    return bstf_compiler.compile(resnet20(), "npu1")


def test_resnet20_on_npu1(resnet20_on_npu1):
    """The text is sound, and xDSL parses and verifies all of it."""
    text = assert_sound(resnet20_on_npu1, (0, 1))
    assert "arith.remui" in text and "aie.packet_flow" in text and "aie.memtile_dma" in text
    dialects.parse(text)


def test_upstream_takes_all_of_resnet20_on_npu1(resnet20_on_npu1, mlir_opt):
    assert mlir_opt("\n".join(generic(design(resnet20_on_npu1), "a test"))) == ""


def test_a_bottleneck_stage_on_ve2802():
    """ResNet50's first stage, on a region of four columns; xDSL parses and verifies the text of its heaviest step."""
    program = bstf_compiler.compile(bottlenecks(14, blocks=2), "ve2802_4x4")
    text = assert_sound(program)
    made = read(text)
    made.configurations = [max(made.configurations, key=lambda one: sum(len(chain) for _, chain in one.chains()))]
    dialects.parse("\n".join(generic(made, "")))
    assert {tile.row for one in made.configurations for tile in one.tiles if made.kind(tile) == CORE} == {3, 4, 5, 6}


def test_a_bottleneck_on_all_cores_of_ve2802():
    """38 columns of 8 cores: more of them than a memory tile has channels, and six times as many as there are shims."""
    program = bstf_compiler.compile(bottlenecks(14, blocks=1), "ve2802")
    made = design(program)
    assert check(made) == []
    assert {tile.column for one in made.configurations for tile in one.tiles if tile.row == 0} <= {
        2, 3, 6, 7, 14, 15, 22, 23, 30, 31, 34, 35,
    }  # fmt: skip
    images = host.random_images(program)
    buffer = host.host_image(program, images)
    Machine(made, buffer).run()
    assert np.array_equal(host.outputs(program, buffer)[0], host.expected(program, images)[0])


@pytest.mark.parametrize("part", ["npu1_2x3", "npu2_3x4", "ve2302_6x2", "ve2802_4x6"])
@pytest.mark.parametrize("network", [residual_network, random_network])
def test_networks_on_parts_and_regions(part, network):
    """Narrow images, cores without work, sums in parts, tensors that pass through DDR."""
    assert_sound(bstf_compiler.compile(network(0), part), (0, 1))


def test_where_many_feed_one_the_sequence_keeps_their_order():
    """Pools that deal channels over all columns; without the sequence's waits two sources would meet."""
    program = bstf_compiler.compile(residual_network(0), "npu2_6x4")
    made = design(program)
    assert any(several_sources(one) for one in made.configurations)
    images = host.random_images(program)
    broken = copy.deepcopy(made)
    for one in broken.configurations:
        if several_sources(one):
            one.sequence = [item for item in one.sequence if isinstance(item, Task)]
    with pytest.raises(Stuck, match="nothing says which comes first"):
        Machine(broken, host.host_image(program, images)).run()


def several_sources(one) -> bool:
    fed = [(target, flow.source) for flow in one.flows for target in flow.targets]
    return len(set(fed)) > len({target for target, _ in fed})


def test_where_things_lie():
    """Cores' buffers keep the program's addresses above the stack; packets have ids where streams share a channel."""
    program = bstf_compiler.compile(small(), "npu1")
    made = design(program)
    assert made.device == "npu1" and design(bstf_compiler.compile(small(), "npu1_2x4")).device == "npu1_2col"
    steps = [step for step in program.steps if step.instructions]
    for one, step in zip(made.configurations, steps, strict=True):
        wanted = {address + CORE_SHIFT for _, address, _ in step.buffers}
        assert {buffer.address for buffer in one.buffers if made.kind(buffer.tile) == CORE} <= wanted
        ways = {}
        for flow in one.flows:
            ways.setdefault(flow.source, []).append(flow.packet)
        assert all(len(ids) == 1 or None not in ids for ids in ways.values())


def test_a_slot_moves_round_its_ring():
    assert [Slot(64, 32, 3, 2).at(i) for i in range(4)] == [128, 64, 96, 128]


# --- what the machine must notice ---


@pytest.fixture
def two_steps():
    program = bstf_compiler.compile(small(), "npu1_2x2")
    return program, design(program)


def run(program, made):
    Machine(made, host.host_image(program, host.random_images(program))).run()


def test_a_lock_that_nobody_gives(two_steps):
    program, made = two_steps
    one = made.configurations[1]
    core = one.cores[0]
    last = core.loops[-1]
    uses = tuple(item for item in last.body if not (isinstance(item, UseLock) and item.action == "Release"))
    one.cores[0] = Core(core.tile, (*core.loops[:-1], Loop(last.count, uses)))
    with pytest.raises(Stuck, match=f"configuration '{one.name}' never ends: .* waits at"):
        run(program, made)


def test_a_stream_that_leads_nowhere(two_steps):
    program, made = two_steps
    one = made.configurations[0]
    one.flows = [flow for flow in one.flows if flow.source != one.starts[0].port]
    with pytest.raises(Stuck, match="sends where no stream leads"):
        run(program, made)


def test_two_sources_for_one_target(two_steps):
    program, made = two_steps
    one = made.configurations[0]
    flows = [flow for flow in one.flows if made.kind(flow.source.tile) == CORE]
    pair = [flow for flow in flows if flow.targets[0].tile == flows[0].targets[0].tile][:2]
    one.flows = [flow for flow in one.flows if flow not in pair]
    one.flows += [Flow(flow.source, pair[0].targets) for flow in pair]
    with pytest.raises(Stuck, match="send to .* at one time, and nothing says which comes first"):
        run(program, made)


def test_wrong_bytes_show(two_steps):
    """An offset that is four bytes off, and a kernel that reads another one: not the program's outputs."""
    program, made = two_steps
    wanted = host.expected(program, host.random_images(program))[0]
    for direction in (MM2S, S2MM):
        broken = copy.deepcopy(made)
        for one in broken.configurations:
            for things in (one.starts, one.sequence):
                for i, item in enumerate(things):
                    if isinstance(item, Await) or item.port.direction != direction:
                        continue
                    first = item.chain[0]
                    if first.length > 8 and first.offset > 0 and broken.kind(item.port.tile) == "memtile":
                        things[i] = replace(item, chain=(replace(first, offset=first.offset - 1), *item.chain[1:]))
        buffer = host.host_image(program, host.random_images(program))
        Machine(broken, buffer).run()
        assert not np.array_equal(host.outputs(program, buffer)[0], wanted)


# --- what can't be had ---


@pytest.mark.parametrize("device", ["aie2_2x2", "aie2_4x4_waaw"])
def test_a_model_is_no_part(device):
    with pytest.raises(ValueError, match=f"mlir-aie knows no device '{device}'; compile for npu1"):
        design(bstf_compiler.compile(small(), device))


def test_an_operation_without_a_kernel():
    build = Builder(np.random.default_rng(0))
    graph = build.finish(build.lookup(build.conv(build.input(5, 5, 8), 8, Window((1, 1)))))
    with pytest.raises(ValueError, match="layer 'lookup.*': there is no kernel for 'lookup' in mlir-aie's C\\+\\+"):
        design(bstf_compiler.compile(graph, "npu1"))


def test_too_many_streams_that_share_a_channel():
    with pytest.raises(ValueError, match="its streams need .* packet ids of the 32 that there are; compile for fewer"):
        design(bstf_compiler.compile(residual_network(1), "ve2802_6x8"))
