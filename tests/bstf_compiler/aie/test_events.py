import numpy as np

from bstf_compiler.aie import events
from bstf_compiler.aie.isa import FIRST, LAST, LockAction, Transfer


def instruction(unit, iterations=1, acquire=(), release=()):
    return Transfer("LOAD", unit, (), iterations, tuple(acquire), tuple(release))


def test_producer_and_consumer_overlap_as_far_as_the_ring_allows():
    make = instruction("a", 4, [LockAction("free")], [LockAction("full")])
    use = instruction("b", 4, [LockAction("full")], [LockAction("free")])
    order = events.run([make, use], {"free": 2, "full": 0}, [1.0, 3.0])
    starts = {(i, n): s for i, n, s in zip(order.instruction, order.iteration, order.start)}
    assert [starts[0, n] for n in range(4)] == [0, 1, 4, 7]
    assert [starts[1, n] for n in range(4)] == [1, 4, 7, 10]
    assert order.end.max() == 13
    assert order.lock_values == {"free": 2, "full": 0} and not order.blocked


def test_a_taker_of_several_waits_for_the_last():
    slow = instruction("a", 1, release=[LockAction("done")])
    fast = instruction("b", 1, release=[LockAction("done")])
    last = instruction("c", 1, [LockAction("done", 2)])
    order = events.run([slow, fast, last], {"done": 0}, [5.0, 1.0, 1.0])
    assert order.end.max() == 6


def test_first_and_last_iterations():
    loop = instruction("a", 3, [LockAction("go", 1, FIRST)], [LockAction("end", 1, LAST)])
    order = events.run([loop], {"go": 1, "end": 0})
    assert order.lock_values == {"go": 0, "end": 1}
    assert np.array_equal(order.iteration, [0, 1, 2])


def test_deadlock_is_reported():
    one = instruction("a", 1, [LockAction("x")], [LockAction("y")])
    two = instruction("b", 1, [LockAction("y")], [LockAction("x")])
    order = events.run([one, two], {"x": 0, "y": 0})
    assert order.blocked == [0, 1] and len(order.instruction) == 0
