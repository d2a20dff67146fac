"""From operations to the table of steps for a number of images and threads: layouts, memory, tiles, tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import networkx as nx
import numpy as np

from bstf_compiler.cpu.kernels import conv, enlarge, functions, winograd
from bstf_compiler.cpu.kernels.step import (
    CONCAT,
    CONV,
    ELEMENTWISE,
    FROM_TILES,
    FUNCTION,
    LOAD,
    MAX_POOL,
    MEAN_POOL,
    PIXELS,
    RESIZE,
    SPLIT,
    STEP,
    TO_TILES,
    ZERO_MAX_POOL,
)
from bstf_compiler.cpu.layout import ALIGNMENT, Format, Grid, Layout, round_up
from bstf_compiler.cpu.operations import Operation
from bstf_compiler.cpu.simd import Isa
from bstf_compiler.cpu.tiles import empty

# Tasks a thread should find in a step.
_TASKS_OF_A_THREAD = 12
# Multiply-adds with a packed pixel of a channel that are worth the copy.
_PACKED_MACS = 48
# What is read again and again costs little if it fits this part of a level-2 cache.
_CACHED_BYTES = 2**19


@dataclass(frozen=True)
class Weights:
    """All convolutions' constants, one after another, and where each operation's begin."""

    values: np.ndarray
    starts: np.ndarray
    biases: np.ndarray
    first: dict[str, tuple[int, int, int, int]]  # values, entries, starts, biases, by output tensor
    entries: int

    @classmethod
    def of(cls, operations: Sequence[Operation], format: Format) -> Weights:
        """Gathers them."""
        first, values, starts, biases = {}, [], [], []
        places = [0, 0, 0, 0]
        for one in operations:
            if one.weights is not None:
                parts = one.weights.values, one.weights.channels, one.weights.starts, one.weights.bias
            elif one.constants is not None:
                parts = np.empty(0, format.dtype), (), np.empty(0, np.int64), one.constants
            else:
                continue
            first[one.output] = tuple(places)
            places = [place + len(part) for place, part in zip(places, parts)]
            for whole, part in zip((values, starts, biases), (parts[0], *parts[2:])):
                whole.append(part)
        joined = empty(places[0], format.dtype)
        if values:
            np.concatenate(values, out=joined)
        return cls(
            joined,
            np.concatenate([*starts, np.empty(0, np.int64)]),
            np.concatenate([*biases, np.zeros(ALIGNMENT, format.dtype)]),  # vectors run over the end
            first,
            places[1],
        )


@dataclass(frozen=True)
class Plan:
    """All that an inference of a fixed number of images needs, but the weights.

    Attributes:
        steps: the table (`STEP`), one row an operation.
        offsets: from an output pixel to the input pixel of each entry of the weights (int32).
        masks: nonzero where a pixel belongs to an image.
        layouts: by tensor.
        elements: of the memory of all activations.
        live: most elements that are in use at a time: no placement needs less.
    """

    steps: np.ndarray
    offsets: np.ndarray
    masks: np.ndarray
    layouts: dict[str, Layout]
    elements: int
    live: int


def make_plan(
    operations: Sequence[Operation],
    shapes: dict[str, tuple[int, int, int]],
    outputs: Sequence[str],
    weights: Weights,
    images: int,
    threads: int,
    format: Format,
    isa: Isa,
) -> Plan:
    """Plans an inference of so many images.

    Args:
        operations: in order.
        shapes: (height, width, channels) of the graph's tensors.
        outputs: tensors that are needed at the end.
        weights: of these operations.
        images: how many.
        threads: how many will share out the tasks.
        format: of the activations.
        isa: what the kernels are compiled for.
    """
    lanes = format.lanes(isa)
    shapes = _all_shapes(operations, shapes, format)
    layouts = _layouts(operations, shapes, images, format)
    wholes = _wholes(operations, layouts)
    sizes = {name: layout.planes * layout.plane(lanes) for name, layout in layouts.items() if wholes[name][0] == name}
    places, elements, live = _allocate(operations, sizes, wholes, outputs)
    if elements >= 2**31:  # the distances of `offsets` are int32
        raise ValueError(f"the activations of {images} images take {elements} elements, 2**31 at most: give fewer")
    for name, (whole, planes) in wholes.items():
        offset = places[whole] + planes * layouts[whole].plane(lanes)
        layouts[name] = replace(layouts[name], offset=offset)
    masks, mask_places = _masks(layouts, _padded(operations), lanes, format)
    steps = np.zeros(len(operations), STEP)
    offsets = np.zeros(max(1, weights.entries), np.int32)
    for step, one in zip(steps, operations):
        y = layouts[one.output]
        step["kind"], step["images"], step["planes"] = one.kind, images, y.planes
        step["mask"], step["other"], step["scale"] = mask_places.get(one.output, -1), -1, -1
        step["low"], step["high"], step["factor"], step["zero"] = *one.bounds, one.factor, format.zero
        step["shift"], step["up"], step["other_up"], step["cut"] = astuple(one.shifts)
        step["lead"], step["length"] = y.lead, round_up(y.length, lanes)
        _describe(step, "y", y, lanes)
        if one.inputs:
            _describe(step, "x", layouts[one.inputs[0]], lanes)
        step["channels"] = layouts[one.inputs[0]].planes if one.inputs else y.channels
        if one.kind == LOAD:
            step["x_height"], step["x_width"], step["image"] = y.height, y.width, images * one.before
        if one.kind in (FUNCTION, PIXELS):
            step["channels"] = y.channels if one.kind == PIXELS else -(-y.channels // format.channels)
        if one.function:
            step["function"] = functions.loop(one.function)
        if one.kind == CONCAT:
            continue
        if len(one.inputs) == 2:
            other = layouts[one.inputs[1]]
            step["other"], step["other_plane"], step["join"] = other.offset + other.lead, other.plane(lanes), one.join
            if one.kind == ELEMENTWISE and _meets_a_pixel(one, shapes):
                step["other_image"] = other.grid.rows * other.grid.pitch
        step["top"], _, step["left"], _ = one.window.padding
        step["down"], step["across"] = one.window.strides
        if one.kind in (MAX_POOL, ZERO_MAX_POOL, MEAN_POOL) and y.width == 1:
            step["across"] = 1  # any stride will do, and with this one kernels load whole vectors
        step["window_height"], step["window_width"] = one.window.kernel
        if one.kind == TO_TILES:  # a task transforms some planes of the input
            step["planes"] = layouts[one.inputs[0]].planes
        step["part"] = conv.part_channels(step["planes"])
        step["scratch"] = _scratch(step, one, lanes, format)
        step["tasks"] = min(images * y.height if one.kind == LOAD else step["planes"], _wanted(threads))
        if one.kind == SPLIT:
            step["window_height"], step["window_width"] = _phases(one)
        elif one.constants is not None:
            step["scale"] = weights.first[one.output][3]
        elif one.kind == CONV:
            x = layouts[one.inputs[0]]
            step["values"], step["offsets"], step["starts"], step["bias"] = weights.first[one.output]
            entries = slice(step["offsets"], step["offsets"] + len(one.weights.channels))
            offsets[entries] = _offsets(one, x, lanes)
            _cut(step, one.weights, x, threads, lanes, conv.tile_vectors(isa, format))
            plane = one.weights.channels // format.channels
            if _packing_pays(one.weights) and np.array_equal(offsets[entries], plane * step["stride"]):
                _pack(step, x, lanes)
                offsets[entries] = plane * step["stride"]
    return Plan(steps, offsets, masks, layouts, elements, live)


def _wanted(threads: int) -> int:
    """Tasks to make of a step."""
    return _TASKS_OF_A_THREAD * threads if threads > 1 else 1


def _describe(step: np.void, side: str, layout: Layout, lanes: int) -> None:
    """Writes a tensor's layout into the step, as its input "x" or output "y"."""
    step[side] = layout.offset + layout.lead
    step[f"{side}_plane"] = layout.plane(lanes)
    step[f"{side}_pitch"], step[f"{side}_rows"] = layout.grid.pitch, layout.grid.rows
    step[f"{side}_height"], step[f"{side}_width"] = layout.height, layout.width


def _scratch(step: np.void, one: Operation, lanes: int, format: Format) -> int:
    """Elements of scratch that a thread needs for a step."""
    if one.kind == RESIZE:
        return enlarge.scratch(step["x_width"], lanes, format)
    if one.kind == TO_TILES:
        return 0
    if one.kind == FROM_TILES:
        return winograd.scratch(step["x_width"], lanes)
    padded = max(step["left"] + step["x_width"], (step["y_width"] - 1) * step["across"] + step["window_width"])
    loaded = step["x_width"] * max(4, step["channels"]) if one.kind == LOAD else 0
    return max(5 * padded, loaded) + (8 + step["across"]) * lanes


def _phases(split: Operation) -> tuple[int, int]:
    """Rows and columns of the grid of images that a split makes: no more than the window reads."""
    return tuple(min(pair) for pair in zip(split.window.extent, split.window.strides))


def _all_shapes(
    operations: Sequence[Operation], shapes: dict[str, tuple[int, int, int]], format: Format
) -> dict[str, tuple[int, int, int]]:
    """Shapes of the graph's tensors, and of those between the operations of a layer."""
    shapes, unsplit = dict(shapes), {}
    for one in operations:
        if one.output in shapes:
            continue
        height, width, channels = shapes[one.inputs[0]]
        if one.kind == SPLIT:  # the images of the grid are channels
            (rows, columns), (sh, sw) = one.window.extent, one.window.strides
            out_height, out_width = one.window.output_size(height, width)
            unsplit[one.output] = height, width
            height, width = out_height + (rows - 1) // sh, out_width + (columns - 1) // sw
            channels = math.prod(_phases(one)) * round_up(channels, _step(one.inputs[0], channels, operations, format))
        elif one.kind == TO_TILES:
            height, width = one.window.output_size(height, width)
            channels = math.prod(one.window.kernel) * conv.part_channels(channels)
        elif one.kind == CONV:
            height, width = one.window.output_size(*unsplit.get(one.inputs[0], (height, width)))
            channels = one.weights.shape[3]
        shapes[one.output] = height, width, channels
    return shapes


def _step(name: str, channels: int, operations: Sequence[Operation], format: Format) -> int:
    """Channels are stored in multiples of this: of an element's only in images of few, before any convolution."""
    source = next(one for one in operations if one.output == name)
    if source.kind == SPLIT and math.prod(_phases(source)) > 1:  # made of whole steps already
        return format.channels
    if source.kind == CONV or channels >= conv.DEPTH:
        return conv.DEPTH
    return format.channels if source.kind == LOAD else _step(source.inputs[0], channels, operations, format)


def _padded(operations: Sequence[Operation]) -> dict[str, list[tuple[int, int, int, int]]]:
    """By tensor: the paddings that convolutions without strides need around it, or around what it is a part of."""
    padded: dict[str, list[tuple[int, int, int, int]]] = {}
    for one in reversed(operations):
        if one.kind == CONV and one.window.strides == (1, 1) and any(one.window.padding):
            padded.setdefault(one.inputs[0], []).append(one.window.padding)
        elif one.kind == CONCAT and one.output in padded:
            for part in one.inputs:
                padded.setdefault(part, []).extend(padded[one.output])
    return padded


def _layouts(
    operations: Sequence[Operation], shapes: dict[str, tuple[int, int, int]], images: int, format: Format
) -> dict[str, Layout]:
    """Every tensor's layout. Tensors that convolutions, concatenations and elementwise operations join share a grid."""
    joined = nx.Graph()
    for one in operations:
        joined.add_node(one.output)
        if one.kind in (CONV, CONCAT, FUNCTION):
            joined.add_edges_from((name, one.output) for name in one.inputs)
        elif one.kind == ELEMENTWISE:  # one pixel for a whole image is read as it lies
            near = one.inputs[:1] if _meets_a_pixel(one, shapes) else one.inputs
            joined.add_edges_from((name, one.output) for name in near)
        elif one.kind == FROM_TILES:
            joined.add_edges_from((name, one.output) for name in one.inputs[1:])
    padded = _padded(operations)
    ragged = {
        one.output
        for one in operations
        if one.kind in (TO_TILES, FROM_TILES) or (one.kind == ELEMENTWISE and _meets_a_pixel(one, shapes))
    }
    layouts = {}
    for names in nx.connected_components(joined):
        pads = {name: np.max([(0, 0, 0, 0), *padded.get(name, [])], axis=0) for name in names}
        pitch = max(shapes[name][1] + max(pads[name][2:]) for name in names)
        rows = max(shapes[name][0] + max(pads[name][:2]) for name in names)
        before = max(top * pitch + left for top, _, left, _ in pads.values())
        after = max(bottom * pitch + right for _, bottom, _, right in pads.values())
        if names & ragged:  # vectors write a row's, or an image's, last pixels or tiles, wherever they start
            after = max(after, ALIGNMENT)
        grid = Grid(int(pitch), int(rows), int(before), int(after))
        for name in names:
            height, width, channels = shapes[name]
            step = _step(name, channels, operations, format)
            layouts[name] = Layout(format, grid, images, height, width, channels, step)
    return layouts


def _meets_a_pixel(one: Operation, shapes: dict[str, tuple[int, int, int]]) -> bool:
    """Whether an elementwise operation joins images with one pixel for all of each."""
    return len(one.inputs) == 2 and shapes[one.inputs[1]][:2] != shapes[one.output][:2]


def _wholes(operations: Sequence[Operation], layouts: dict[str, Layout]) -> dict[str, tuple[str, int]]:
    """The tensor in whose memory each tensor lies, itself unless it is a part of it, and after how many planes."""
    wholes = {one.output: (one.output, 0) for one in operations}
    for one in reversed(operations):
        if one.kind == CONCAT:
            whole, planes = wholes[one.output]
            for part in one.inputs:
                wholes[part] = whole, planes
                planes += layouts[part].planes
    return wholes


def _allocate(
    operations: Sequence[Operation],
    sizes: dict[str, int],
    wholes: dict[str, tuple[str, int]],
    outputs: Sequence[str],
) -> tuple[dict[str, int], int, int]:
    """Places tensors so that those alive at the same time don't overlap: the largest first, each as low as it fits.

    Returns:
        Offsets by tensor, the elements used in all, and the most that are alive at a time.
    """
    born, dies = {}, {}
    for index, one in enumerate(operations):
        born.setdefault(wholes[one.output][0], index)
        dies.update(dict.fromkeys([wholes[name][0] for name in (*one.inputs, one.output)], index))
    dies.update(dict.fromkeys([wholes[name][0] for name in outputs], len(operations)))
    placed: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], born[name])):
        others = sorted(
            (placed[other], placed[other] + sizes[other])
            for other in placed
            if born[other] <= dies[name] and born[name] <= dies[other]
        )
        at = 0
        for start, stop in others:
            if at + sizes[name] <= start:
                break
            at = max(at, round_up(stop, ALIGNMENT))
        placed[name] = at
    live = max(
        sum(sizes[name] for name in sizes if born[name] <= index <= dies[name]) for index in range(len(operations))
    )
    return placed, max(placed[name] + sizes[name] for name in sizes), live


def _masks(
    layouts: dict[str, Layout], padded: dict[str, list[tuple[int, int, int, int]]], lanes: int, format: Format
) -> tuple[np.ndarray, dict[str, int]]:
    """Where pixels are, for each tensor that needs zeros elsewhere; tensors of one shape and grid share a mask."""
    masks, places, known, size = [], {}, {}, 0
    for name in padded:
        layout = layouts[name]
        key = layout.grid, layout.height, layout.width
        if key not in known:
            grid = layout.grid
            mask = np.zeros((layout.images, grid.rows, grid.pitch), format.dtype)
            mask[:, : layout.height, : layout.width] = 1
            whole = np.zeros(round_up(layout.length, lanes), format.dtype)
            whole[: layout.length] = mask.ravel()[: layout.length]
            known[key] = size
            masks.append(whole)
            size += len(whole)
        places[name] = known[key]
    return np.concatenate([*masks, np.zeros(1, format.dtype)]), places


def _offsets(one: Operation, x: Layout, lanes: int) -> np.ndarray:
    """From an output pixel to the input pixel of each entry."""
    weights, window = one.weights, one.window
    row, column = (weights.positions * window.dilation).T
    plane = weights.channels // x.format.channels
    if window.strides == (1, 1):
        row, column = row - window.padding[0], column - window.padding[2]
    else:
        rows, columns = _phases(one)
        row, phase_row = np.divmod(row, window.strides[0])
        column, phase_column = np.divmod(column, window.strides[1])
        plane = plane + (phase_row * columns + phase_column) * (x.planes // (rows * columns))
    return plane * x.plane(lanes) + row * x.grid.pitch + column


def _cut(step: np.void, weights: conv.ConvWeights, x: Layout, threads: int, lanes: int, widest: int) -> None:
    """Cuts a convolution into tiles of at most `widest` vectors, and tasks, and chooses the order of loops."""
    vectors = step["length"] // lanes
    wide, rest = divmod(vectors, conv.VECTORS) if widest == conv.VECTORS else (0, vectors)
    if rest == 1 and wide:  # two tiles of two vectors are faster than one of three and one of one
        wide, middle, narrow = wide - 1, 2, 0
    else:
        middle, narrow = rest // 2, rest % 2
    step["wide"], step["middle"], step["narrow"] = wide, middle, narrow
    step["shape"], step["tiles"] = weights.shape_of_tiles, len(weights.starts) - 1
    step["tile_planes"] = weights.columns // x.format.channels
    step["part"] = step["tiles"] // weights.parts if weights.shape_of_tiles == conv.DEEP else step["tiles"]
    pixel_tiles, tiles = wide + middle + narrow, len(weights.starts) - 1
    # The outer loop's operand is read once, the inner one's once for each of its tiles, unless a cache holds it.
    image_bytes, weight_bytes = 4 * x.planes * x.plane(lanes) // weights.parts, weights.values.nbytes
    weights_again = 0 if weight_bytes <= _CACHED_BYTES else weight_bytes * pixel_tiles
    read_once = image_bytes <= _CACHED_BYTES or weights.shape_of_tiles == conv.THIN
    images_again = 0 if read_once else image_bytes * tiles
    step["channels_first"] = weights_again > images_again or (weights.parts > 1 and weights_again == images_again)
    wanted = _wanted(threads)
    outer, inner = (tiles, pixel_tiles) if step["channels_first"] else (pixel_tiles, tiles)
    parts = min(outer, wanted)
    others = min(inner, -(-wanted // parts))
    step["parts"] = others if step["channels_first"] else parts
    step["tasks"] = parts * others
    step["stride"] = x.plane(lanes)


def _packing_pays(weights: conv.ConvWeights) -> bool:
    """Whether panels are read often enough, if the convolution reads the pixel that it computes and no other.

    They don't pay for the tiles of Winograd's method: their short planes are in the first cache as they lie.
    """
    in_one_part = weights.shape_of_tiles == conv.DEEP and weights.parts == 1
    return in_one_part and weights.macs >= _PACKED_MACS * weights.shape[2]


def _pack(step: np.void, x: Layout, lanes: int) -> None:
    """Lets a convolution pack panels of the pixels of a tile."""
    tiles = step["wide"] + step["middle"] + step["narrow"]
    step["stride"] = lanes * (conv.VECTORS if step["wide"] else 2 if step["middle"] else 1)
    step["panel"] = x.planes * step["stride"]
    # Where weights are the inner loop's operand one panel is in use, else those of all tiles of a task.
    step["scratch"] = step["panel"] * (-(-tiles // step["parts"]) if step["channels_first"] else 1)
