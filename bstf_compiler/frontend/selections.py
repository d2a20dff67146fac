"""Handlers of operations that take parts of a tensor, or give it another order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bstf_compiler.frontend.handlers import require
from bstf_compiler.graph import Conv, DepthToSpace, MatMul, MaxPool, Transpose, Window

if TYPE_CHECKING:
    import tensorflow as tf

    from bstf_compiler.frontend.savedmodel import _Reader


def _slice(reader: _Reader, op: tf.Operation) -> None:
    """Rows and columns from one to another, or every n-th of them; or channels; or one channel, which `_pack` reads."""
    before = reader.shape(op.inputs[0])
    ranges, single = _sliced(reader, op, before)
    pixels, channels = ranges[1:-1], ranges[-1]
    whole = [range(size) for size in before[1:-1]] == pixels
    if single:
        require(reader, op, whole, "a channel of some rows and columns")
    elif whole:
        _select(reader, op, list(channels))
    else:
        require(reader, op, channels == range(before[-1]), "a slice of pixels and channels at once")
        crop = [(one.start, size - one.stop) for one, size in zip(pixels, before[1:])]
        steps = tuple(one.step for one in pixels)
        if steps == (1, 1):
            reader.add(op, DepthToSpace((1, 1), (*crop[0], *crop[1])), [reader.input(op)])
            return
        every = all(step > 0 and one == range(0, size, step) for one, size, step in zip(pixels, before[1:], steps))
        require(reader, op, every, "such a choice of pixels")
        reader.add(op, MaxPool(Window((1, 1), steps)), [reader.input(op)])


def _sliced(reader: _Reader, op: tf.Operation, shape: tuple[int, ...]) -> tuple[list[range], bool]:
    """What a slice takes of every axis, and whether it drops the last one."""
    begin, end, strides = (reader.constant(op, place).tolist() for place in (1, 2, 3))
    masks = {what: op.get_attr(f"{what}_mask") for what in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    parts = [
        slice(None if masks["begin"] >> place & 1 else first, None if masks["end"] >> place & 1 else last, step)
        for place, (first, last, step) in enumerate(zip(begin, end, strides))
    ]
    dropped = masks["shrink_axis"]
    if masks["ellipsis"]:
        place = masks["ellipsis"].bit_length() - 1
        filling = len(shape) - len(parts) + 1
        parts[place : place + 1] = [slice(None)] * filling
        dropped = dropped << (filling - 1) if dropped >> place else dropped
    parts += [slice(None)] * (len(shape) - len(parts))
    first = parts[0]
    all_images = first.start in (None, 0) and first.stop is None and first.step in (None, 1)  # the batch is of any size
    plain = all_images and dropped in (0, 1 << len(shape) - 1) and len(shape) in (2, 4)
    plain = plain and not masks["new_axis"] and 0 not in strides
    require(reader, op, plain, "a slice other than of rows, columns and channels")
    if dropped:
        parts[-1] = slice(begin[-1], begin[-1] + 1 or None)
    ranges = [range(size)[one] for size, one in zip(shape, parts)]
    require(reader, op, all(ranges), "an empty slice")
    return ranges, bool(dropped)


def _reverse(reader: _Reader, op: tf.Operation) -> None:
    shape = reader.shape(op.inputs[0])
    axes = [int(axis) % len(shape) for axis in reader.constant(op, 1)]
    require(reader, op, axes == [len(shape) - 1], f"a reversal of the axes {axes}")
    _select(reader, op, list(reversed(range(shape[-1]))))


def _pack(reader: _Reader, op: tf.Operation) -> None:
    """Single channels of one tensor, put together in any order."""
    slices = [reader.source(op, place) for place in range(len(op.inputs))]
    known = all(one.type == "StridedSlice" for one in slices) and len({one.inputs[0].name for one in slices}) == 1
    shape = reader.shape(slices[0].inputs[0]) if known else ()
    taken = [_sliced(reader, one, shape) for one in slices] if known else []
    known = known and all(single for _, single in taken) and op.get_attr("axis") in (-1, len(shape) - 1)
    require(reader, op, known, "a stack of other tensors than single channels of one")
    _select(reader, op, [ranges[-1].start for ranges, _ in taken], reader.input(slices[0]))


def _select(reader: _Reader, op: tf.Operation, channels: list[int], source: str | None = None) -> None:
    """Channels of an operation's input (or of `source`) in any order: a product with ones."""
    source = source or reader.input(op)
    count = reader.channels(source)
    if channels == list(range(count)):
        reader.alias(op, source)
        return
    ones = np.zeros((count, len(channels)), np.float32)
    ones[channels, range(len(channels))] = 1
    if op.outputs[0].shape.rank == 2:
        reader.add(op, MatMul(), [source, reader.made(op, "channels", ones)])
    else:
        reader.add(op, Conv(Window((1, 1))), [source, reader.made(op, "channels", ones[None, None])])


def _transpose(reader: _Reader, op: tf.Operation) -> None:
    axes = tuple(int(axis) for axis in reader.constant(op, 1))
    require(reader, op, axes[0] == 0, "a transposition of the batch")
    if axes == tuple(range(len(axes))):
        reader.alias(op)
    else:
        reader.add(op, Transpose(axes), [reader.input(op)])


HANDLERS = {"StridedSlice": _slice, "ReverseV2": _reverse, "Pack": _pack, "Transpose": _transpose}
