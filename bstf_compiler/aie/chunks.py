"""Whether a chunk of the packed tensor fits the computation that reads it: every index in it stays inside the tiles.

A program may come from anybody, and its rules (verify.py) see instructions, not what their bytes hold. So the simulator
looks at each chunk when a core is about to read it, wherever its bytes come from. Shifts, bounds, bias and weights may
be any numbers: they change what is computed, not where.
"""

# As in kernels.py: plain integers and a flat int8 memory. Each rule returns (sentence, value, limit), 0 if all is well.
# ruff: noqa: ANN001

from __future__ import annotations

import numba as nb
import numpy as np

from bstf_compiler.aie.isa import Compute
from bstf_compiler.aie.kernels import LANES, words

_SENTENCES = (
    "",
    "needs {} bytes, it has {}",
    "is for {} output blocks, its instruction makes {}",
    "names input block {}, the tile has {}",
    "names input block {} at or after the next one, {}; they ascend",
    "has {} output channels from each input channel, {} is the least",
    "has factors for {} rows or columns of a window of {}",
    "scales by {}, {} is the least",
    "reads row or column {} of a tile of {}",
    "reads channel {} of a tile of {}",
)
_BYTES, _BLOCKS, _BLOCK, _ORDER, _SPREAD, _TABLE, _FACTOR, _PIXEL, _CHANNEL = range(1, len(_SENTENCES))


def misfit(do: Compute, memory: np.ndarray, chunk: int) -> str | None:
    """What is wrong with the chunk at an address of a core's memory, for a computation that keeps the static rules."""
    size, shape, out_shape = do.parameters.bytes, do.inputs[0].sizes, do.output.sizes
    rule = _RULES.get(do.op)
    if rule is not None:
        found = rule(memory, chunk, size, shape, out_shape, do.kernel, do.padding, do.blocks[0][0], len(do.inputs) > 1)
    elif do.op == "concat":
        found = _concat(memory, chunk, size, np.array([one.sizes for one in do.inputs]), out_shape, do.blocks[0][0])
    else:
        return None  # reads no index
    number, value, limit = found
    return f"the chunk of {do.unit} {_SENTENCES[number].format(value, limit)}" if number else None


@nb.njit(cache=True, nogil=True)
def _conv(memory, chunk, size, shape, out_shape, kernel, before, block, residual):
    blocks, taps = out_shape[2] // LANES, kernel[0] * kernel[1]
    if words(memory, chunk, 4)[3] != blocks:
        return _BLOCKS, np.int64(words(memory, chunk, 4)[3]), blocks
    index = 16 + 4 * LANES * blocks
    if index + 2 * blocks > size:
        return _BYTES, index + 2 * blocks, size
    counts = memory[chunk + index : chunk + index + 2 * blocks].view(np.uint16)
    kept = 0
    for one in range(blocks):
        kept += np.int64(counts[one])
    if kept and taps > size:
        return _BYTES, taps * LANES * LANES, size
    needed = index + (2 * (blocks + kept) + 15) // 16 * 16 + kept * taps * LANES * LANES + 24 * residual
    if needed > size:
        return _BYTES, needed, size
    rows = memory[chunk + index + 2 * blocks : chunk + index + 2 * (blocks + kept)].view(np.uint16)
    entry = 0
    for one in range(blocks):
        last = -1
        for _ in range(counts[one]):
            row = np.int64(rows[entry])
            if row >= shape[2] // LANES:
                return _BLOCK, row, shape[2] // LANES
            if row <= last:
                return _ORDER, last, row
            last = row
            entry += 1
    return 0, 0, 0


@nb.njit(cache=True, nogil=True)
def _depthwise(memory, chunk, size, shape, out_shape, kernel, before, block, residual):
    needed = 16 + (4 + kernel[0] * kernel[1]) * out_shape[2]
    if needed > size:
        return _BYTES, needed, size
    if words(memory, chunk, 4)[3] < 1:
        return _SPREAD, np.int64(words(memory, chunk, 4)[3]), 1
    if shape[2] < 1:
        return _CHANNEL, 0, shape[2]
    return 0, 0, 0


@nb.njit(cache=True, nogil=True)
def _averagepool(memory, chunk, size, shape, out_shape, kernel, before, block, residual):
    header = words(memory, chunk, 5)
    for axis in range(2):
        table = np.int64(header[3 + axis])
        if table != 1 and table != kernel[axis]:
            return _TABLE, table, kernel[axis]
    needed = 20 + 4 * np.int64(header[3]) * header[4]
    if needed > size:
        return _BYTES, needed, size
    return 0, 0, 0


@nb.njit(cache=True, nogil=True)
def _resize(memory, chunk, size, shape, out_shape, kernel, before, block, residual):
    """Of nearest and depthtospace, whose tiles hold every pixel that they read."""
    header, computed = words(memory, chunk, 3), out_shape[0] * out_shape[1]  # no pixels for a core without a share
    for axis in range(2):
        factor = np.int64(header[1 + axis])
        if factor < 1:
            return _FACTOR, factor, 1
        last = out_shape[axis] - 1 + before[axis]
        if computed and (before[axis] < 0 or last // factor >= shape[axis]):
            return _PIXEL, min(before[axis], last // factor), shape[axis]
    return 0, 0, 0


@nb.njit(cache=True, nogil=True)
def _bilinear(memory, chunk, size, shape, out_shape, kernel, before, block, residual):
    header, computed = words(memory, chunk, 3), out_shape[0] * out_shape[1]
    for axis in range(2):
        if header[1 + axis] < 1:
            return _FACTOR, np.int64(header[1 + axis]), 1
        if computed and shape[axis] < 1:
            return _PIXEL, 0, shape[axis]
    return 0, 0, 0


@nb.njit(cache=True, nogil=True)
def _depthtospace(memory, chunk, size, shape, out_shape, kernel, before, block, residual):
    found = _resize(memory, chunk, size, shape, out_shape, kernel, before, block, residual)
    if found[0]:
        return found
    header = words(memory, chunk, 3)
    total, parts = np.int64(header[0]), np.int64(header[1]) * header[2]
    first = 0 if parts == 1 else block * LANES
    if parts > 1 and total > shape[2]:
        return _CHANNEL, total, shape[2]
    own = min(out_shape[2], total - block * LANES)
    if own > 0 and (parts - 1) * total + first + own > shape[2]:
        return _CHANNEL, (parts - 1) * total + first + own - 1, shape[2]
    return 0, 0, 0


@nb.njit(cache=True, nogil=True)
def _concat(memory, chunk, size, shapes, out_shape, block):
    if 12 * len(shapes) > size:
        return _BYTES, 12 * len(shapes), size
    for part in range(len(shapes)):
        pixels, channels = shapes[part, 0] * shapes[part, 1], shapes[part, 2]
        header = words(memory, chunk + 12 * part, 3)
        start, stop = np.int64(header[1]), np.int64(header[1]) + header[2]
        low, high = max(start, block * LANES), min(stop, block * LANES + out_shape[2])
        read = (low - start) % LANES + high - low
        if pixels * channels and high > low and read > channels:
            return _CHANNEL, read - 1, channels
    return 0, 0, 0


_RULES = {
    "conv": _conv,
    "depthwise": _depthwise,
    "averagepool": _averagepool,
    "nearest": _resize,
    "bilinear": _bilinear,
    "depthtospace": _depthtospace,
}
