"""Static rules of a program. Each is a generator of sentences, one a violation; a sound program has none."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from bstf_compiler.aie import events
from bstf_compiler.aie.code import Code, Step
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import Access, Compute, Instruction, Transfer


def verify(code: Code) -> list[str]:
    """All violations of the rules, as sentences that name the layer and the place; empty for a sound program."""
    found = list(_allocations(code))
    for step in code.steps:
        for rule in (_buffers, _moves, _computations, _accesses, _locks):
            found += [f"layer '{step.layer}': {violation}" for violation in rule(code, step)]
    return found


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
    """A computation reads boxes that fit what it writes; sums over several chunks stay in the buffer for sums."""
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
