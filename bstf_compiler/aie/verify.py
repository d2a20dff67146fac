"""Static rules of a program. Each is a generator of sentences, one a violation; a sound program has none."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from bstf_compiler.aie import events, footprint, layout
from bstf_compiler.aie.code import WEIGHTS, WEIGHTS_AHEAD, Code, Step
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.footprint import AddressSpace
from bstf_compiler.aie.isa import Access, Compute, Instruction, Transfer
from bstf_compiler.aie.limits import dma_violations
from bstf_compiler.aie.memory import CHUNKS, STAGING, Allocation
from bstf_compiler.aie.reach import BLOCK

_OLD = 2  # a byte of a staging buffer that was written in the step before


def verify(code: Code) -> list[str]:
    """All violations of the rules, as sentences that name the layer and the place; empty for a sound program."""
    found = list(_allocations(code))
    for step in code.steps:
        for rule in (_buffers, _moves, _computations, _dealing, _accesses, _locks, _placing, _descriptors):
            found += [f"layer '{step.layer}': {violation}" for violation in rule(code, step)]
    return found or list(_reads(code))


def _allocations(code: Code) -> Iterator[str]:
    """Allocations of memory tiles lie inside, and don't overlap while both are held."""
    for one in code.allocations:
        if one.address < 0 or one.address + one.bytes > code.device.memtile.memory_bytes:
            yield f"'{one.name}' at {one.address:#x}, {one.bytes} bytes, leaves the memory tile"
    for one, two in combinations(code.allocations, 2):
        together = one.first <= two.last and two.first <= one.last
        if together and one.address < two.address + two.bytes and two.address < one.address + one.bytes:
            yield f"'{one.name}' and '{two.name}' overlap in the memory tiles"


def _buffers(code: Code, step: Step) -> Iterator[str]:
    """Buffers of a core don't overlap."""
    for (name, address, size), (name2, address2, size2) in combinations(step.buffers, 2):
        if address < address2 + size2 and address2 < address + size:
            yield f"core buffers '{name}' and '{name2}' overlap"


def _moves(code: Code, step: Step) -> Iterator[str]:
    """A move writes as many bytes as it reads."""
    for instruction in step.instructions:
        if isinstance(instruction, Transfer):
            for move in instruction.moves:
                if move.source.sizes != move.target.sizes or len(move.source.tiles) != 1:
                    yield f"{_place(instruction)} moves {move.source.sizes} into {move.target.sizes}"


def _computations(code: Code, step: Step) -> Iterator[str]:
    """A computation reads boxes that fit what it writes, and leaves its chunk alone; sums over several chunks stay in
    the buffer for sums.
    """
    sums = [(address, size) for name, address, size in step.buffers if name == "sums"]
    for instruction in step.instructions:
        if not isinstance(instruction, Compute):
            continue
        if not _fits(instruction):
            boxes = ", ".join(str(access.sizes) for access in instruction.inputs)
            chunk = instruction.parameters.bytes
            yield (
                f"{_place(instruction)} makes {instruction.output.sizes} from {boxes} and a chunk of {chunk} bytes, "
                f"which {instruction.op} can't"
            )
        if not (instruction.begin and instruction.finish) and not any(
            address == instruction.scratch and 4 * instruction.output.bytes <= size for address, size in sums
        ):
            yield f"{_place(instruction)} keeps sums at {instruction.scratch:#x}, outside the buffer for sums"
        low, high = _range(instruction.parameters, instruction.iterations)
        for first, last in _writes(instruction):
            if max(first, low) < min(last, high):
                yield f"{_place(instruction)} writes [{first:#x}, {last:#x}) over its chunk at [{low:#x}, {high:#x})"


def _writes(do: Compute) -> Iterator[tuple[int, int]]:
    """What a computation writes of its core in all iterations: its output, and sums that another one goes on with."""
    yield _range(do.output, do.iterations)
    if not (do.begin and do.finish):
        yield do.scratch, do.scratch + 4 * do.output.bytes


def _dealing(code: Code, step: Step) -> Iterator[str]:
    """The cores' pieces cover every output block of every pixel once."""
    made: dict[int, int] = {}  # pixels by output block
    for do in (i for i in step.instructions if isinstance(i, Compute) and i.finish):
        rows, columns, channels = do.output.sizes
        numbers = _numbers(do)
        if len(numbers) * BLOCK != channels:
            yield f"{_place(do)} makes {channels} channels of {len(numbers)} output blocks"
        for block in numbers:
            made[block] = made.get(block, 0) + rows * columns * do.iterations
    if not made:
        return
    width, blocks = code.tensors[step.output][0].shape[1:]
    pixels = (step.rows[1] - step.rows[0]) * width
    if step.op == "concat":  # numbers only those that it copies
        blocks = max(made) + 1
    for block in sorted({*made, *range(blocks)}):
        if made.get(block, 0) != (pixels if block < blocks else 0):
            yield f"cores make output block {block} for {made.get(block, 0)} pixels, the step has {pixels}"
            return


def _placing(code: Code, step: Step) -> Iterator[str]:
    """WRITEFM takes the output blocks of a convolution from where cores have them to where its tensor has them."""
    if step.op != "conv":
        return
    place = code.tensors[step.output][0]
    ring = next((address for name, address, _ in step.buffers if name == "output"), 0)
    base, block = _written_at(code, step)
    made: dict[str, list[tuple[list[int], int]]] = {}  # what each core makes, in turn: blocks, pixels
    for do in (i for i in step.instructions if isinstance(i, Compute) and i.finish):
        made.setdefault(do.output.tiles[0], []).append((_numbers(do), do.output.sizes[0] * do.output.sizes[1]))
    turns = {core: iter(pieces) for core, pieces in made.items()}
    for transfer in (i for i in step.instructions if i.kind == "WRITEFM"):
        for core in (action.lock.partition(":")[0] for action in transfer.acquire):
            numbers, pixels = next(turns.get(core, iter(())), ([], 0))
            taken: dict[tuple[int, int], int] = {}  # pixels by block of the tile, and of the tensor
            for move in (move for move in transfer.moves if move.source.tiles[0] == core):
                pitch, blocks = move.target.strides[0], move.target.strides[1] // BLOCK
                starts = {f"m{tile}": start for tile, start, _ in layout.spans(place.shape[1], blocks, code.device)}
                first = (move.source.address - ring) % move.source.strides[1] // BLOCK
                there = ((move.target.address - base) % pitch // BLOCK + starts[move.target.tiles[0]]) % blocks - block
                for i in range(move.source.sizes[2] // BLOCK):
                    pair, area = (first + i, there + i), move.source.sizes[0] * move.source.sizes[1]
                    taken[pair] = taken.get(pair, 0) + area
            if taken and taken != dict.fromkeys(enumerate(numbers), pixels):
                yield f"{_place(transfer)} takes blocks of {core} to other places than those that it made"
                return


def _numbers(do: Compute) -> list[int]:
    """The output blocks that a computation makes."""
    return [block for start, stop in do.blocks for block in range(start, stop)]


def _written_at(code: Code, step: Step) -> tuple[int, int]:
    """Address of what a step writes in memory tiles, and its first block in a pixel there: its tensor, or the staging
    buffer of its band.
    """
    place = code.tensors[step.output][0]
    if place.memory != "ddr":
        return place.address - place.first * BLOCK, place.first
    bands = [other.rows for other in code.steps if other.stage == step.stage]
    buffers = min(2, len(bands))
    slot = bands.index(step.rows) % buffers
    staging = [a for a in code.allocations if a.name == STAGING + step.output and a.first <= step.stage <= a.last]
    return next((a.address + slot * (a.bytes // buffers) for a in staging), 0), 0


_CHUNK_WORDS = {
    "conv": 12, "depthwise": 12, "add": 6, "product": 3, "requantize": 3, "lookup": 64, "maxpool": 1, "averagepool": 6,
    "concat": 3, "nearest": 3, "bilinear": 3, "depthtospace": 3,
}  # fmt: skip
"""The least that an operation reads of its chunk, in words of four bytes, by the layouts of weights.py."""


def _fits(do: Compute) -> bool:
    """Whether a computation is known, and its chunk and the boxes that it reads have the sizes that it needs."""
    if do.parameters.bytes < 4 * _CHUNK_WORDS.get(do.op, do.parameters.bytes):
        return False
    (rows, pixels, channels), (in_rows, in_pixels, in_channels) = do.output.sizes, do.inputs[0].sizes
    if do.op in ("add", "product"):
        if len(do.inputs) != 2:
            return False
        one, two = do.inputs
        return one.sizes == do.output.sizes and two.sizes in (do.output.sizes, (1, 1, channels))
    if do.op == "conv" and len(do.inputs) > 1 and not (do.finish and do.inputs[1].sizes == do.output.sizes):
        return False
    if do.op in ("requantize", "lookup"):
        return do.inputs[0].sizes == do.output.sizes
    if do.op == "concat":
        return all(access.sizes[:2] == (rows, pixels) for access in do.inputs if access.bytes)
    if do.op in ("maxpool", "averagepool", "nearest", "bilinear") and in_channels != channels:
        return False
    if do.op in ("conv", "depthwise", "maxpool", "averagepool") and pixels and in_rows * in_pixels:
        sizes = zip((rows, pixels), do.strides, do.kernel, do.dilation, do.padding)
        reach = [(out - 1) * stride + (size - 1) * step + 1 - before for out, stride, size, step, before in sizes]
        return in_rows <= reach[0] and in_pixels <= reach[1]  # no more than the windows meet
    return do.op in _CHUNK_WORDS


def _accesses(code: Code, step: Step) -> Iterator[str]:
    """In every iteration an access stays inside the memory of its tiles, and there inside one buffer or allocation that
    is held at that time.
    """
    device = code.device
    limits = {"d": code.data_address + len(code.data), "m": device.memtile.memory_bytes}
    limits["c"] = device.core.memory_bytes - device.core.reserved_bytes
    held = {
        "d": [(0, limits["d"])],
        "m": [(a.address, a.address + a.bytes) for a in code.allocations if a.first <= step.stage <= a.last],
        "c": [(address, address + size) for _, address, size in step.buffers],
    }
    tiles = _tiles(device)
    for instruction in step.instructions:
        for access in _accesses_of(instruction):
            if not tiles.issuperset(access.tiles):
                yield f"{_place(instruction)} reaches {', '.join(access.tiles)}, which {device.name} doesn't have"
                continue
            low, high = _range(access, instruction.iterations)
            kind = access.tiles[0][0]
            if low < 0 or high > limits[kind]:
                place = f"[{low:#x}, {high:#x}) of {access.tiles[0]}"
                yield f"{_place(instruction)} reaches {place}, which ends at {limits[kind]:#x}"
            elif high > low and not any(start <= low and high <= stop for start, stop in held[kind]):
                yield f"{_place(instruction)} reaches [{low:#x}, {high:#x}) of {access.tiles[0]}, held by no buffer"


def _tiles(device: DeviceSpec) -> set[str]:
    """Names of all memories of a device."""
    cores = {f"c{column}.{row}" for column in range(device.columns) for row in range(device.rows)}
    return cores | {f"m{tile}" for tile in range(device.memtiles)} | {"ddr"}


def _locks(code: Code, step: Step) -> Iterator[str]:
    """All instructions finish, and cores' and chunk slots' locks end as they began."""
    for instruction in step.instructions:
        for action in (*instruction.acquire, *instruction.release):
            if action.lock not in step.locks:
                yield f"{_place(instruction)} uses lock {action.lock}, which is not declared"
                return
    outcome = events.run(step.instructions, step.locks)
    if outcome.blocked:
        yield f"deadlock: {_place(step.instructions[outcome.blocked[0]])} never gets its locks"
        return
    for name, value in outcome.lock_values.items():
        if value != step.locks[name]:
            yield f"lock {name} ends at {value}, it began at {step.locks[name]}"


def _descriptors(code: Code, step: Step) -> Iterator[str]:
    """On a real part, descriptors and locks of the DMAs can do what the transfers ask (see limits.py)."""
    reached = {tile for do in step.instructions for access in _accesses_of(do) for tile in access.tiles}
    if reached <= _tiles(code.device):  # otherwise there are sentences on it already
        yield from dma_violations(code.device, step)


def _reads(code: Code) -> Iterator[str]:
    """Every byte that an instruction reads was written before: earlier in the step, in a tensor that is still held from
    an earlier step, in a staging buffer in the step before, in the packed data, or in the network's inputs; and so were
    the network's outputs. It needs a program that keeps the other rules.
    """
    space = AddressSpace(code)
    written = np.zeros(space.bytes, np.uint8)
    memtiles, cores = space.starts["m0"], space.starts["c0.0"]
    written[code.data_address : memtiles] = 1
    host_written = {part.tensor for part in (*code.inputs, *code.affines)}
    for name in host_written & code.tensors.keys():
        footprint.mark(written, _box_of(space, code, name), np.ones(1, np.int64), np.ones(1, np.uint8))
    tiles = written[memtiles:cores].reshape(code.device.memtiles, -1)
    staging = [a for a in code.allocations if a.name.startswith(STAGING)]
    for number, step in enumerate(code.steps):
        staged = [tiles[:, a.address : a.address + a.bytes] for a in staging if a.first <= step.stage <= a.last]
        for buffer in staged:
            buffer[:] *= _OLD
        violation = _first_unwritten(space, step, written)
        if violation is not None:
            yield f"layer '{step.layer}': {violation}"
            return  # what follows from it would be no news
        _forget_cores(space, code, number, written)
        for buffer in staged:
            buffer[buffer == _OLD] = 0
        after = code.steps[number + 1].stage if number + 1 < len(code.steps) else step.stage + 1
        for held in _given_up(code, step.stage, after):
            tiles[:, held.address : held.address + held.bytes] = 0
    for port in code.outputs:
        box, once = _box_of(space, code, port.tensor), np.zeros(1, np.int64)
        if footprint.first_unwritten(written, box, np.zeros(1, np.bool_), np.arange(2), once, once)[0] >= 0:
            yield f"output '{port.tensor}' is not whole when the last step ends"


def _forget_cores(space: AddressSpace, code: Code, number: int, written: np.ndarray) -> None:
    """Nothing stays in the cores after a step but the weights of a layer that goes on, or those loaded ahead."""
    step, following = code.steps[number], code.steps[number + 1 : number + 2]
    if not step.instructions:
        return
    goes_on = WEIGHTS if following and following[0].stage == step.stage else WEIGHTS_AHEAD
    cores = written[space.starts["c0.0"] :].reshape(-1, code.device.core.memory_bytes)
    forgotten = 0  # up to here
    for address, size in sorted((address, size) for name, address, size in step.buffers if name == goes_on):
        cores[:, forgotten:address] = 0
        forgotten = max(forgotten, address + size)
    cores[:, forgotten:] = 0


def _box_of(space: AddressSpace, code: Code, name: str) -> np.ndarray:
    """The bytes of a tensor in DDR, as a box."""
    place = code.tensors[name][0]
    sizes = (place.shape[0], place.shape[1], place.length)
    access = Access(("ddr",), place.address, sizes, (place.shape[1] * place.pixel, place.pixel))
    return np.array(space.boxes(access), np.int64)


def _given_up(code: Code, stage: int, after: int) -> Iterator[Allocation]:
    """What memory tiles held in a step of `stage` and no longer hold in the next step, of stage `after`."""
    heirs = {(a.address, a.bytes) for a in code.allocations if stage < a.first <= after}
    for held in code.allocations:
        if held.first <= stage <= held.last:
            # An output may take the place of an input that its step still reads.
            ends = held.last < after and (held.address, held.bytes) not in heirs
            if ends or (held.name == CHUNKS and held.last == stage):
                yield held


def _first_unwritten(space: AddressSpace, step: Step, written: np.ndarray) -> str | None:
    """Walks a step's events; a sentence on the first byte that is read too early, None if there is none."""
    boxes, writes, owners, starts = [], [], [], [0]
    for number, instruction in enumerate(step.instructions):
        for access, is_write in _in_order(instruction):
            made = space.boxes(access)
            boxes += made
            writes += [is_write] * len(made)
            owners += [(number, access)] * len(made)
        starts.append(len(boxes))
    if not boxes:
        return None
    order = events.run(step.instructions, step.locks)
    found, at = footprint.first_unwritten(
        written, np.array(boxes, np.int64), np.array(writes), np.array(starts), order.instruction, order.iteration
    )
    if found < 0:
        return None
    number, access = owners[found]
    tile = access.tiles[0]
    return f"{_place(step.instructions[number])} reads byte {at - space.starts[tile]:#x} of {tile} before it is written"


def _in_order(instruction: Instruction) -> list[tuple[Access, bool]]:
    """What an instruction reads and writes (True) in one iteration, in order."""
    if isinstance(instruction, Transfer):
        return [pair for move in instruction.moves for pair in ((move.source, False), (move.target, True))]
    found = [(access, False) for access in (*instruction.inputs, instruction.parameters) if access.bytes]
    sums = Access(instruction.parameters.tiles, instruction.scratch, (1, 1, 4 * instruction.output.bytes))
    if not instruction.begin:
        found.append((sums, False))
    return [*found, (instruction.output, True) if instruction.finish else (sums, True)]


def _place(instruction: Instruction) -> str:
    return f"{instruction.kind} on {instruction.unit}"


def _accesses_of(instruction: Instruction) -> list[Access]:
    if isinstance(instruction, Compute):
        return [*instruction.inputs, instruction.parameters, instruction.output]
    return [access for move in instruction.moves for access in (move.source, move.target)]


def _range(access: Access, iterations: int) -> tuple[int, int]:
    """First byte and byte after the last, over all iterations."""
    if access.ring and iterations >= access.ring:
        low, high = access.address, access.address + (access.ring - 1) * access.advance
    elif access.ring:
        starts = [access.start(iteration) for iteration in range(iterations)]
        low, high = min(starts), max(starts)
    else:
        low, high = access.address, access.address + (iterations - 1) * access.advance
    return low, high + access.extent
