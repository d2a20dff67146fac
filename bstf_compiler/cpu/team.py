"""The threads of a product: how many, each on a core of its own, and how they wait for each other.

Numba's threads come from a pool that other libraries know how to start but not where to run. Two things cost
milliseconds there, on virtual machines above all. A sleeping thread is often woken on the core of the thread that woke
it, even if others are idle, and then both halve it. And a thread that spins while it waits takes the core from the very
thread it waits for, when another program keeps the machine busy. So here a thread of the pool that finds itself on a
core that its team already uses moves to another and stays off that one, and a thread that waits yields its core.

A kernel, called by `run`, gets its team as an int64 array and frames its work so:

    for worker in prange(workers):
        team.join(members, worker)
        while True:
            task = team.take(members, workers)
            ...
        team.leave(members)
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps

import numba
import numpy as np
from numba import types

from bstf_compiler.cpu import access
from bstf_compiler.cpu.compiled import inner

# Below this many multiply-adds a thread would wait for the other longer than it works.
_MACS_OF_A_THREAD = 2**20
# Places of a team's array: the next task, how many tasks are done, how many workers have joined and left, the calling
# thread as POSIX and as the system name it, then the core of each worker.
_TASK, _DONE, _JOINED, _LEFT, _CALLER, _CALLER_ID, _CORES = range(7)
# The longest affinity mask that is asked for, in 64-bit words: 1,024 cores.
_MASK_WORDS = 16

if sys.platform == "linux":
    _core = types.ExternalFunction("sched_getcpu", types.int32())
    _self = types.ExternalFunction("pthread_self", types.uintp())
    _yield_core = types.ExternalFunction("sched_yield", types.int32())
    _mask_type = types.CPointer(types.uint64)
    _get_affinity = types.ExternalFunction("sched_getaffinity", types.int32(types.int32, types.uintp, _mask_type))
    _set_affinity = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.uintp, _mask_type))
else:  # other systems have their own ways, and no way to ask

    @numba.njit(inline="always")
    def _yield_core():
        return 0


def once(build: Callable) -> Callable:
    """`functools.cache`, and two Python threads that need the same at once don't both build it."""
    built, building = cache(build), threading.Lock()

    @wraps(build)
    def get(*arguments: object) -> object:
        with building:
            return built(*arguments)

    return get


def size(threads: int | None, macs: int) -> int:
    """How many threads to use for so many multiply-adds: `threads`, or as many as are worth their start.

    Never more than Numba was given.
    """
    most = _start()
    if threads is None:
        threads = max(1, min(numba.get_num_threads(), macs // _MACS_OF_A_THREAD))
    return min(threads, most)


@once
def _start() -> int:
    """Starts Numba's threads, once; returns how many there are.

    GNU's OpenMP lets a thread that waits for work spin for milliseconds; it is told to sleep after some microseconds.
    The library reads this when it is loaded, and settings of the user's stay.
    """
    if numba.config.THREADING_LAYER == "default":
        numba.config.THREADING_LAYER = "threadsafe"  # `workqueue` aborts the process when two threads enter
    ours = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if ours:
        os.environ["GOMP_SPINCOUNT"] = "10000"
    try:
        numba.get_num_threads()  # loads the library
    finally:
        if ours:
            del os.environ["GOMP_SPINCOUNT"]
    return numba.config.NUMBA_NUM_THREADS


def gather(workers: int) -> np.ndarray:
    """The shared state of one call of a kernel by this Python thread, for so many workers."""
    members = np.zeros(_CORES + workers, np.int64)
    members[_CORES:] = -1
    members[_CALLER] = np.uint64(threading.get_ident()).astype(np.int64)
    members[_CALLER_ID] = threading.get_native_id()
    return members


@contextmanager
def limit(workers: int) -> Iterator[None]:
    """Sets how many threads a compiled function uses that this Python thread calls inside."""
    before = numba.get_num_threads()
    numba.set_num_threads(workers)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def run(kernel: Callable, workers: int, *arguments: object) -> None:
    """Calls kernel(*arguments, workers, members) with a new team."""
    with limit(workers):
        kernel(*arguments, workers, gather(workers))


@inner
def join(members, worker):
    """A worker's first step. It moves, if it isn't the caller's thread and a worker before it is on the same core."""
    _find_core(members, worker)
    access.fetch_add(members, _JOINED, 1)


@inner
def yield_to_missing(members, count):
    """As long as a worker is missing, its thread may be waiting for this core."""
    if access.atomic_load(members, _JOINED) < count:
        _yield_core()


@inner
def take(members, count):
    """The number of the next task, from 0."""
    yield_to_missing(members, count)
    return access.fetch_add(members, _TASK, 1)


@inner
def done(members):
    """Counts a task that others wait for."""
    access.fetch_add(members, _DONE, 1)


@inner
def wait(members, count):
    """Waits until so many tasks are done. Whoever has taken one is at work, so the wait ends."""
    wait_for(members, _DONE, count)


@inner
def wait_for(counters, place, count):
    """Waits until a counter has come to `count`."""
    while access.atomic_load(counters, place) < count:
        _yield_core()


@inner
def leave(members):
    """A worker's last step: waits until all that have joined are here, so that the pool's own wait is short."""
    access.fetch_add(members, _LEFT, 1)
    while access.atomic_load(members, _LEFT) < access.atomic_load(members, _JOINED):
        _yield_core()


if sys.platform == "linux":

    @inner
    def _find_core(members, worker):
        here = _core()
        members[_CORES + worker] = here
        taken = False
        for other in range(_CORES, _CORES + worker):
            taken |= members[other] == here
        if not taken or np.int64(_self()) == members[_CALLER]:
            return
        mask = np.zeros(_MASK_WORDS, np.uint64)
        if _get_affinity(numba.int32(members[_CALLER_ID]), 8 * _MASK_WORDS, mask.ctypes) < 0:
            return
        for other in range(_CORES, _CORES + worker):
            core = members[other]
            if core >= 0:
                mask[core // 64] &= ~(np.uint64(1) << np.uint64(core % 64))
        if mask.any():
            _set_affinity(numba.int32(0), 8 * _MASK_WORDS, mask.ctypes)

else:

    @inner
    def _find_core(members, worker):
        pass
