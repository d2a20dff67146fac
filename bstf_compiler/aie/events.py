"""Runs the locks of a step: a legal order of all iterations, and their times.

Units are queues of instructions; an instruction waits for its locks, works, gives locks. Tokens of a lock carry the
time at which they were given and are taken in that order, so with one taker a lock (or takers that are alike) times
don't depend on the order in which units are visited: the schedule is the earliest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba as nb
import numpy as np

from bstf_compiler.aie.isa import EACH, FIRST, Instruction

_WHEN = {EACH: 0, FIRST: 1}  # LAST: 2


@dataclass(frozen=True)
class Events:
    """What happened in a step, one entry an executed iteration, in a legal order.

    `instruction`, `iteration`: indices; `start`, `end`: seconds; `blocked`: instructions that could not finish (empty
    unless locks are wrong); `lock_values`: each lock's value at the end.
    """

    instruction: np.ndarray
    iteration: np.ndarray
    start: np.ndarray
    end: np.ndarray
    blocked: list[int]
    lock_values: dict[str, int]


def run(
    instructions: Sequence[Instruction],
    locks: dict[str, int],
    seconds: Sequence[float] | None = None,
    seed: int | None = None,
) -> Events:
    """Executes the locks of a step.

    Args:
        instructions: of all units; each unit's are in order.
        locks: initial value of every lock.
        seconds: of one iteration of each instruction; zeros if only the order matters.
        seed: of a random order, one of all that the locks allow; None visits units in turn.
    """
    number = {name: index for index, name in enumerate(locks)}
    units: dict[str, list[int]] = {}
    for index, instruction in enumerate(instructions):
        units.setdefault(instruction.unit, []).append(index)
    queue = np.array([index for queue in units.values() for index in queue], np.int64)
    queue_starts = np.cumsum([0] + [len(queue) for queue in units.values()]).astype(np.int64)
    iterations = np.array([i.iterations for i in instructions], np.int64)
    durations = np.zeros(len(instructions)) if seconds is None else np.array(seconds, np.float64)
    acquire = _actions([i.acquire for i in instructions], number)
    release = _actions([i.release for i in instructions], number)
    values = np.array(list(locks.values()), np.int64)
    capacity = values.copy()
    for index, instruction in enumerate(instructions):
        for action in instruction.release:
            times = iterations[index] if action.when == EACH else 1
            capacity[number[action.lock]] += action.count * times
    order, times, progress, final = _run(
        queue,
        queue_starts,
        iterations,
        durations,
        *acquire,
        *release,
        values,
        np.cumsum(capacity) - capacity,
        int(capacity.sum()),
        -1 if seed is None else seed,
    )
    return Events(
        order[:, 0], order[:, 1], times[:, 0], times[:, 1],
        [int(i) for i in np.flatnonzero(progress < iterations)],
        {name: int(final[index]) for name, index in number.items()},
    )  # fmt: skip


def _actions(lists: list, number: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.cumsum([0] + [len(actions) for actions in lists]).astype(np.int64)
    flat = [(number[a.lock], a.count, _WHEN.get(a.when, 2)) for actions in lists for a in actions]
    return starts, np.array(flat, np.int64).reshape(-1, 3)


@nb.njit(cache=True)
def _applies(when, iteration, iterations):  # noqa: ANN001
    return when == 0 or (when == 1 and iteration == 0) or (when == 2 and iteration == iterations - 1)


@nb.njit(cache=True)
def _run(
    queue, queue_starts, iterations, durations, acquire_starts, acquires, release_starts, releases,  # noqa: ANN001
    values, token_starts, tokens, seed,  # noqa: ANN001
):  # fmt: skip
    """Visits units in turn, in random order with a seed from 0 on; each goes on until a lock stops it, or with a seed
    half of the times for a few iterations; ends when no unit moves.
    """
    total = iterations.sum()
    order = np.empty((total, 2), np.int64)
    times = np.empty((total, 2), np.float64)
    token_time = np.zeros(tokens, np.float64)
    given = values.copy()
    taken = np.zeros_like(values)
    n_units = len(queue_starts) - 1
    cursor = queue_starts[:-1].copy()
    clock = np.zeros(n_units, np.float64)
    progress = np.zeros(len(iterations), np.int64)
    done = 0
    moved = True
    turns = np.arange(n_units)
    if seed >= 0:
        np.random.seed(seed)
    while moved:
        moved = False
        if seed >= 0:
            np.random.shuffle(turns)
        for unit in turns:
            left = np.random.randint(1, 4) if seed >= 0 and np.random.randint(2) else total
            while cursor[unit] < queue_starts[unit + 1] and left > 0:
                i = queue[cursor[unit]]
                iteration, n = progress[i], iterations[i]
                free = True
                for a in range(acquire_starts[i], acquire_starts[i + 1]):
                    lock, count, when = acquires[a]
                    if _applies(when, iteration, n) and given[lock] - taken[lock] < count:
                        free = False
                if not free:
                    break
                start = clock[unit]
                for a in range(acquire_starts[i], acquire_starts[i + 1]):
                    lock, count, when = acquires[a]
                    if _applies(when, iteration, n):
                        for _ in range(count):
                            start = max(start, token_time[token_starts[lock] + taken[lock]])
                            taken[lock] += 1
                end = start + durations[i]
                for a in range(release_starts[i], release_starts[i + 1]):
                    lock, count, when = releases[a]
                    if _applies(when, iteration, n):
                        for _ in range(count):
                            token_time[token_starts[lock] + given[lock]] = end
                            given[lock] += 1
                clock[unit] = end
                order[done, 0], order[done, 1] = i, iteration
                times[done, 0], times[done, 1] = start, end
                done += 1
                left -= 1
                moved = True
                progress[i] += 1
                if progress[i] == n:
                    cursor[unit] += 1
    return order[:done], times[:done], progress, given - taken
