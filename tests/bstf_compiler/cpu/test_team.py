import os
import threading

import numba
import pytest
from numba import prange

from bstf_compiler.cpu import team


@numba.njit
def join(members, worker):
    team.join(members, worker)


@numba.njit(parallel=True, nogil=True)
def count(members, workers, tasks, taken):
    for worker in prange(workers):
        team.join(members, worker)
        while True:
            task = team.take(members, workers)
            if task >= 2 * tasks:
                break
            if task < tasks:
                team.done(members)
            else:
                team.wait(members, tasks)
            taken[task] += 1
        team.leave(members)


def test_every_task_is_taken_once():
    team.size(2, 0)
    for workers in (1, 2):
        numba.set_num_threads(min(workers, numba.config.NUMBA_NUM_THREADS))
        for tasks in (0, 1, 100):
            taken = [0] * (2 * tasks + 1)
            taken = numba.typed.List(taken)
            count(team.gather(workers), workers, tasks, taken)
            assert list(taken) == [1] * (2 * tasks) + [0]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system can't say where threads run")
def test_a_thread_leaves_a_core_that_is_taken_and_the_caller_stays():
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    members = team.gather(2)
    join(team.gather(1), 0)  # compiles
    found = []

    def worker():
        os.sched_setaffinity(0, cores[:1])
        join(members, 1)
        found.append(os.sched_getaffinity(0))

    members[-2] = cores[0]
    thread = threading.Thread(target=worker)
    thread.start()
    thread.join()
    assert found == [set(cores[1:])]
    for core in cores:
        members = team.gather(2)
        members[-2] = core
        join(members, 1)
    assert sorted(os.sched_getaffinity(0)) == cores


def test_size_of_a_team():
    most = numba.config.NUMBA_NUM_THREADS
    assert team.size(None, 0) == 1
    assert team.size(most + 5, 0) == most
    assert team.size(1, 2**40) == 1
