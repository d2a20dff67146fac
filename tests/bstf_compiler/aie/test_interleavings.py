"""Random orders of what runs in parallel: a sound program gives one answer, a program without a lock another one."""

import dataclasses

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler import integer
from bstf_compiler.aie import events
from tests.bstf_compiler.aie.devices import small_device
from tests.bstf_compiler.networks import network_of_everything, random_images, random_network

SEEDS = range(20)


def same(one, two):
    pairs = zip(*(value if isinstance(value, list) else [value] for value in (one, two)), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("network", [random_network, network_of_everything])
@pytest.mark.parametrize("number", range(4))
def test_sound_programs_give_the_same_in_any_order(network, number):
    graph = network(number)
    program = bstf_compiler.compile(graph, small_device(3, 2, 16384, 65536))
    images = random_images(number, graph)
    expected = integer.run(graph, images)
    assert all(same(program.simulate(images, seed), expected) for seed in SEEDS)


def test_a_seed_is_an_order_and_different_seeds_are_different_orders():
    step = bstf_compiler.compile(random_network(0), "aie2_2x2").steps[0]
    orders = [events.run(step.instructions, step.locks, seed=seed).instruction.tolist() for seed in (1, 1, 2, 3)]
    assert orders[0] == orders[1] and orders[0] != orders[2] != orders[3]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def without(program, lock):
    """The program without one action: taking the lock."""
    for step in program.steps:
        for index, i in enumerate(step.instructions):
            kept = tuple(action for action in i.acquire if action.lock != lock)
            if kept != i.acquire and (i.iterations > 1 or lock.endswith(("full", "ready"))):
                step.instructions[index] = dataclasses.replace(i, acquire=kept)
                return program
    raise AssertionError(f"nobody takes {lock}")


@pytest.mark.parametrize(
    "lock", ["c0.0:in_full", "c0.0:w_full", "c0.0:out_full", "c1.0:in_free", "c1.0:out_free", "m0:w_full", "m0:ready"]
)
def test_a_missing_lock_shows_as_a_wrong_answer(lock):
    """Or as a chunk of bytes that nobody wrote, which no core computes with."""
    graph = random_network(10, layers=3, most_size=40)
    images = random_images(0, graph)
    expected = integer.run(graph, images)
    program = without(bstf_compiler.compile(graph, small_device(2, 2, 8192, 65536)), lock)

    def is_right(seed):
        try:
            return same(program.simulate(images, seed), expected)
        except ValueError as error:
            assert lock.endswith("w_full") and "the program is damaged" in str(error)
            return False

    assert not all(map(is_right, SEEDS))


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_refuses_seeds_out_of_range(seed):
    graph = random_network(0)
    with pytest.raises(ValueError, match="must be from 0"):
        bstf_compiler.compile(graph, "aie2_1x1").simulate(random_images(0, graph), seed)
