"""A parallel merge sort: O(K log K) steps for K keys in any order, sorted and reversed ones included."""

from __future__ import annotations

import numba
import numpy as np
from numba import prange

from bstf_compiler.cpu import kept, team

# Runs of so many keys are sorted by insertion.
_RUN = 32


def sort(keys: np.ndarray, threads: int | None = None) -> np.ndarray:
    """The order of the keys: `keys[sort(keys)]` rises, and equal keys stay in their order.

    Each thread sorts its share, merging runs of growing length; then shares are merged pair by pair, each merge cut
    into as many independent parts as there are threads (O. Green, S. Odeh, Y. Birk, "Merge path", 2014).

    Args:
        keys: (K,) integers of at most 64 bits.
        threads: as for a product.

    Returns:
        (K,) int64.
    """
    count = len(keys)
    workers = team.size(threads, 32 * count)
    keys, order = keys.astype(np.int64), np.arange(count)
    to_keys, to_order = np.empty_like(keys), np.empty_like(order)
    bounds = np.arange(workers + 1) * count // workers
    with team.limit(workers):
        _sort_shares(keys, order, to_keys, to_order, bounds)
        while len(bounds) > 2:
            _merge_shares(keys, order, to_keys, to_order, bounds, workers)
            keys, to_keys, order, to_order = to_keys, keys, to_order, order
            bounds = np.append(bounds[:-1:2], count)
    return order


@kept.kernel()
def _sort_shares(keys, order, to_keys, to_order, bounds):
    """Sorts each share in place."""
    for share in prange(len(bounds) - 1):
        first, last = bounds[share], bounds[share + 1]
        for start in range(first, last, _RUN):
            _insert(keys, order, start, min(last, start + _RUN))
        length, here = _RUN, True
        while length < last - first:
            for start in range(first, last, 2 * length):
                middle, stop = min(last, start + length), min(last, start + 2 * length)
                if here:
                    _merge(keys, order, start, middle, middle, stop, to_keys, to_order, start)
                else:
                    _merge(to_keys, to_order, start, middle, middle, stop, keys, order, start)
            length, here = 2 * length, not here
        if not here:
            keys[first:last] = to_keys[first:last]
            order[first:last] = to_order[first:last]


@kept.kernel()
def _merge_shares(keys, order, to_keys, to_order, bounds, parts):
    """Merges shares 0 and 1, 2 and 3 and so on, each pair in `parts` parts."""
    pairs = len(bounds) // 2
    for task in prange(pairs * parts):
        pair, part = task // parts, task % parts
        first, middle = bounds[2 * pair], bounds[2 * pair + 1]
        last = bounds[min(2 * pair + 2, len(bounds) - 1)]
        start, stop = part * (last - first) // parts, (part + 1) * (last - first) // parts
        left, left_stop = _split(keys, first, middle, last, start), _split(keys, first, middle, last, stop)
        _merge(
            keys, order, left, left_stop, middle + start - (left - first), middle + stop - (left_stop - first),
            to_keys, to_order, first + start,
        )  # fmt: skip


@numba.njit(nogil=True)
def _insert(keys, order, start, stop):
    """Sorts a short run by insertion."""
    for place in range(start + 1, stop):
        key, index, hole = keys[place], order[place], place
        while hole > start and keys[hole - 1] > key:
            keys[hole], order[hole] = keys[hole - 1], order[hole - 1]
            hole -= 1
        keys[hole], order[hole] = key, index


@numba.njit(nogil=True)
def _merge(keys, order, left, left_stop, right, right_stop, to_keys, to_order, at):
    """Merges two sorted runs into `to_keys` from `at` on; of equal keys, the left run's come first."""
    while left < left_stop and right < right_stop:
        if keys[right] < keys[left]:
            to_keys[at], to_order[at] = keys[right], order[right]
            right += 1
        else:
            to_keys[at], to_order[at] = keys[left], order[left]
            left += 1
        at += 1
    for start, stop in ((left, left_stop), (right, right_stop)):
        for place in range(start, stop):
            to_keys[at], to_order[at] = keys[place], order[place]
            at += 1


@numba.njit(nogil=True)
def _split(keys, first, middle, last, count):
    """Up to where the first run [first, middle) gives its part of the `count` smallest keys of two runs."""
    low, high = max(first, first + count - (last - middle)), min(middle, first + count)
    while low < high:
        guess = (low + high) // 2
        if keys[middle + count - (guess - first) - 1] < keys[guess]:
            high = guess
        else:
            low = guess + 1
    return low
