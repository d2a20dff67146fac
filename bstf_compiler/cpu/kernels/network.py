"""A whole network in one call: compiled code that walks through a table of steps.

A small layer takes some 10 microseconds, as long as a call from Python. So the threads are started once an inference,
and meet before the next step. Each thread has a share of a step's tasks, and when it is done takes from those of others
what they have left: shares of pixels are mostly the same from step to step, so a thread finds in its own cache what it
wrote.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from numba import prange

from bstf_compiler.cpu import access, kept, simd, team
from bstf_compiler.cpu.kernels import conv, enlarge, functions, loads, planes, pools, winograd, word_planes
from bstf_compiler.cpu.kernels.conv import DEEP, SHALLOW, THIN
from bstf_compiler.cpu.kernels.elementwise import elementwise
from bstf_compiler.cpu.kernels.step import (
    CONV,
    ELEMENTWISE,
    FROM_TILES,
    FUNCTION,
    LOAD,
    MEAN_POOL,
    PIXELS,
    RESIZE,
    SPLIT,
    TO_TILES,
)
from bstf_compiler.cpu.layout import ALIGNMENT, FLOATS, WORDS, Format
from bstf_compiler.cpu.simd import Isa


def _planes(isa: Isa, format: Format) -> Callable:
    """Compiles a task of a step without weights: some planes."""
    join, resize, pixels = elementwise(isa, format), enlarge.resize(isa, format), enlarge.pixels(format)
    function = functions.float_function if format == FLOATS else functions.word_function(isa)
    work = _float_windows(isa) if format == FLOATS else _word_windows(isa)

    def task_(step, task, memory, biases, masks, line):
        activations, constants, insides, scratch = (
            simd.pointer(memory), simd.pointer(biases), simd.pointer(masks), simd.pointer(line)
        )  # fmt: skip
        for plane in range(task * step.planes // step.tasks, (task + 1) * step.planes // step.tasks):
            if step.kind == SPLIT:
                planes.split(step, plane, activations)
            elif step.kind == ELEMENTWISE:
                join(step, plane, activations, constants, insides)
            elif step.kind == FUNCTION:
                function(step, plane, memory, biases, masks)
            elif step.kind == RESIZE:
                resize(step, plane, activations, constants, scratch)
            elif step.kind == PIXELS:
                pixels(step, plane, activations)
            else:
                work(step, plane, activations, constants, scratch)

    return numba.njit(inline="always")(task_)


def _float_windows(isa: Isa) -> Callable:
    """Compiles what works window by window in float32: pools, and the tiles of Winograd's method."""
    max_pool, mean_pool = (pools.pool(isa, FLOATS, maximum) for maximum in (True, False))
    to_tiles, from_tiles = winograd.input_transform(isa), winograd.output_transform(isa)

    def work(step, plane, memory, biases, line):
        if step.kind == TO_TILES:
            to_tiles(step, plane, memory)
        elif step.kind == FROM_TILES:
            from_tiles(step, plane, memory, biases, line)
        elif step.kind == MEAN_POOL:
            mean_pool(step, plane, memory, line)
        else:
            max_pool(step, plane, memory, line)

    return numba.njit(inline="always")(work)


def _word_windows(isa: Isa) -> Callable:
    """Compiles what works window by window on words: pools."""
    max_pool, mean_pool = pools.pool(isa, WORDS, maximum=True), word_planes.mean_pool(isa)

    def work(step, plane, memory, biases, line):
        if step.kind == MEAN_POOL:
            mean_pool(step, plane, memory, biases, line)
        else:
            max_pool(step, plane, memory, line)

    return numba.njit(inline="always")(work)


def _convolution(isa: Isa, format: Format) -> Callable:
    """Compiles a task of a convolution.

    It takes and returns which pixels are packed in `line`: a tile's place, or that of a part of them; -1 for none.
    """
    lanes = format.lanes(isa)

    def of_width(vectors: int) -> Callable:
        """Compiles a tile of so many vectors of pixels, of any shape."""
        deep, shallow, thin = (conv.tile_kernel(isa, format, vectors, shape) for shape in (DEEP, SHALLOW, THIN))

        def tile(step, pixel, channels, first, source, base, memory, values, offsets, starts, biases, masks):
            if step.shape == DEEP:
                deep(step, pixel, channels, first, source, base, memory, values, offsets, starts, biases, masks)
            elif step.shape == SHALLOW:
                shallow(step, pixel, channels, first, source, base, memory, values, offsets, starts, biases, masks)
            else:
                thin(step, pixel, channels, first, source, base, memory, values, offsets, starts, biases, masks)

        return numba.njit(nogil=True, error_model="numpy")(tile)

    tile_3, tile_2, tile_1 = (of_width(vectors) for vectors in (3, 2, 1))
    pack = conv.pack_panel(isa, format)

    def pixel_of(step, place):
        return lanes * (place + 2 * min(place, step.wide) + max(0, min(place - step.wide, step.middle)))

    def tile(step, place, channels, panel, line, memory, values, offsets, starts, biases, masks):
        pixel, first = pixel_of(step, place), channels * step.tile_planes + channels // step.part
        source, base = (line, panel * step.panel) if step.panel else (memory, step.x + pixel)
        if place < step.wide:
            tile_3(step, pixel, channels, first, source, base, memory, values, offsets, starts, biases, masks)
        elif place < step.wide + step.middle:
            tile_2(step, pixel, channels, first, source, base, memory, values, offsets, starts, biases, masks)
        else:
            tile_1(step, pixel, channels, first, source, base, memory, values, offsets, starts, biases, masks)

    pixel_of, tile = (numba.njit(inline="always")(function) for function in (pixel_of, tile))

    def task_(step, task, packed, line, memory, values, offsets, starts, biases, masks):
        tiles = step.wide + step.middle + step.narrow
        slices = step.tasks // step.parts
        part, piece = task // slices, task % slices  # a thread that packed the pixels of a part finds its other slices
        first, last = part * tiles // step.parts, (part + 1) * tiles // step.parts
        top, bottom = piece * step.tiles // slices, (piece + 1) * step.tiles // slices
        activations, weights, places = simd.pointer(memory), simd.pointer(values), simd.pointer(offsets)
        begins, sums, insides, panels = (
            simd.pointer(starts), simd.pointer(biases), simd.pointer(masks), simd.pointer(line)
        )  # fmt: skip
        if step.channels_first:
            if step.panel and packed != part:
                for pixels in range(first, last):
                    pack(step, pixel_of(step, pixels), activations, panels, (pixels - first) * step.panel)
            for channels in range(top, bottom):
                for pixels in range(first, last):
                    panel = pixels - first
                    tile(step, pixels, channels, panel, panels, activations, weights, places, begins, sums, insides)
            packed = part
        else:
            for pixels in range(first, last):
                if step.panel and packed != pixels:
                    pack(step, pixel_of(step, pixels), activations, panels, 0)
                for channels in range(top, bottom):
                    tile(step, pixels, channels, 0, panels, activations, weights, places, begins, sums, insides)
                packed = pixels
        if step.mask >= 0 and part == 0:
            for plane in range(top * step.tile_planes, min(bottom * step.tile_planes, step.planes)):
                planes.clear(step, memory, step.y + plane * step.y_plane, step.length)
        return packed

    return numba.njit(inline="always")(task_)


@team.once
def executor(isa: Isa, format: Format) -> Callable:
    """The compiled walk through a table of steps (`STEP`) on activations in a format; it compiles at its first call.

    It takes the table, the images (flat, NHWC, those of one input after another's), the memory of all activations,
    values, offsets, starts and biases of the convolutions, the masks, counters of tasks taken and of tasks done for
    each step, when each step that has tasks ends, and the team.
    """
    convolve, work_on_planes = _convolution(isa, format), _planes(isa, format)
    load = loads.load(format)

    def execute(steps, images, memory, values, offsets, starts, biases, masks, counts, ends, workers, members):
        for worker in prange(workers):
            line = access.on_a_line(np.empty(steps.scratch.max() + ALIGNMENT, memory.dtype))
            team.join(members, worker)
            for place in range(len(steps)):
                step, packed, done = steps[place], -1, len(steps) * workers + place
                for turn in range(workers):
                    share = (worker + turn) % workers  # its own, and then what others have left
                    first, last = share * step.tasks // workers, (share + 1) * step.tasks // workers
                    while True:
                        team.yield_to_missing(members, workers)
                        task = first + access.fetch_add(counts, place * workers + share, 1)
                        if task >= last:
                            break
                        if step.kind == CONV:
                            packed = convolve(step, task, packed, line, memory, values, offsets, starts, biases, masks)
                        elif step.kind == LOAD:
                            rows = step.images * step.x_height
                            first_row, last_row = task * rows // step.tasks, (task + 1) * rows // step.tasks
                            load(step, first_row, last_row, images, memory, biases, line)
                        else:
                            work_on_planes(step, task, memory, biases, masks, line)
                        if access.fetch_add(counts, done, 1) == step.tasks - 1:
                            ends[place] = access.now()
                team.wait_for(counts, done, step.tasks)
            team.leave(members)

    return kept.kernel(isa, format)(execute)
