"""What a program that may come from anybody must keep before its rules are looked at and it is simulated: names that
exist, places inside the memories, work that comes to an end. What `compile` returns keeps all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from bstf_compiler.aie.code import Code, Port, Step
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.footprint import AddressSpace
from bstf_compiler.aie.isa import Access, Compute, Instruction, Transfer
from bstf_compiler.aie.memory import Place, layout_of
from bstf_compiler.aie.reach import BLOCK

_MOST_BYTES = 2**29  # of activations in DDR
_MOST_EVENTS = 2**22  # iterations of all instructions of a step, and the locks taken and given in them
_MOST_EVENTS_IN_ALL = 2**24
_MOST_LOOKS = 2**36  # at locks that units wait for, if in every iteration of a step all units wait
_MOST_WORK = 2**34  # bytes, and runs of bytes times 16, that all iterations of a program reach
_MOST_WINDOW = 2**16  # in each number of a window
_MOST_ALLOCATIONS = 2**13
_MOST_BUFFERS = 2**8
_MOST_POSITION = 200  # no float32 has more bits behind or before its point
_HOST = ("none", "softmax")


def insane(code: Code) -> Iterator[str]:
    """Sentences on what is out of range, each of which makes it unsafe to look further."""
    sizes = {"ddr": code.data_address + len(code.data), "memtile": code.device.memtile.memory_bytes}
    if not 0 <= code.data_address <= _MOST_BYTES:
        yield f"its data lies at byte {code.data_address:,} of DDR, {_MOST_BYTES:,} is the last that it may"
        return
    yield from _tensors(code, sizes)
    if len(code.allocations) > _MOST_ALLOCATIONS:
        yield f"it has {len(code.allocations):,} allocations, {_MOST_ALLOCATIONS:,} are the most"
    for one in code.allocations:
        if min(one.address, one.bytes, one.first) < 0 or not one.first <= one.last <= len(code.steps):
            yield f"allocation '{one.name}' holds {one.bytes} bytes at {one.address:#x} in {one.first} to {one.last}"
    for number, step in enumerate(code.steps):
        for sentence in (*_step(code, number, step), *_instructions(code, step)):
            yield f"layer '{step.layer}': {sentence}"
    if (events := sum(_events(step) for step in code.steps)) > _MOST_EVENTS_IN_ALL:
        yield f"its steps have {events:,} iterations and locks given in them, {_MOST_EVENTS_IN_ALL:,} are the most"
    if (looks := sum(_looks(step) for step in code.steps)) > _MOST_LOOKS:
        yield f"its instructions may have to look at locks {looks:,} times, {_MOST_LOOKS:,} are the most"
    if (work := sum(_work(do) for step in code.steps for do in step.instructions)) > _MOST_WORK:
        yield f"its instructions reach {work:,} bytes, {_MOST_WORK:,} are the most"


def _tensors(code: Code, sizes: dict[str, int]) -> Iterator[str]:
    """Tensors lie inside the memories, and ports are tensors."""
    for name, (place, channels, position) in code.tensors.items():
        channels_fit = 1 <= channels <= place.length and abs(position) <= _MOST_POSITION
        if not channels_fit or place.memory not in sizes or not _is_inside(code, place, sizes[place.memory]):
            yield f"tensor '{name}' has no place in a memory: {place}, {channels} channels at position {position}"
    inputs = {port.tensor: port for port in code.inputs}
    for port in (*code.inputs, *code.outputs):
        yield from _port(code, port, port in code.outputs)
    for affine in code.affines:
        shape = inputs[affine.input].shape if affine.input in inputs else (0, 0, 0)
        lengths = {len(affine.scale), len(affine.offset)}
        fits = lengths <= {1, shape[-1], prod(shape)} and _is_in_ddr(code, affine.tensor)
        if not fits or abs(affine.position) > _MOST_POSITION or code.tensors[affine.tensor][1] != shape[-1]:
            yield f"'{affine.tensor}' can't be made of input '{affine.input}'"


def _is_inside(code: Code, place: Place, size: int) -> bool:
    """Whether a tensor lies inside a memory of so many bytes."""
    rows, columns, blocks = place.shape
    least = min(*place.shape, place.address + 1, place.first + 1)
    if least < 1 or place.pixel % BLOCK or place.pixel < place.first * BLOCK + place.length:
        return False
    if place.memory == "ddr":
        return place.address + (rows * columns - 1) * place.pixel + place.length <= size
    if prod(place.shape) * BLOCK > size * code.device.memtiles:  # nor are there more boxes than fit
        return False
    boxes = [box for *_, box in layout_of(place, code.device).boxes((0, rows), (0, columns), (0, blocks))]
    return all(box.address >= 0 and box.address + box.extent <= size for box in boxes)


def _port(code: Code, port: Port, is_output: bool) -> Iterator[str]:
    known = code.tensors.get(port.tensor)
    size = prod(port.shape)
    ok = min(*port.shape, *port.user_shape, 1) >= 1 and size == prod(port.user_shape) and port.host in _HOST
    ok &= len(port.user_shape) >= 1 and abs(port.position or 0) <= _MOST_POSITION and size <= _MOST_BYTES
    if is_output or (known is not None and port.position is not None):
        ok &= _is_in_ddr(code, port.tensor) and (*known[0].shape[:2], known[1]) == port.shape
        ok &= port.position is not None
    if not ok:
        yield f"'{port.tensor}' can't be an {'output' if is_output else 'input'} of shape {port.shape}"


def _is_in_ddr(code: Code, tensor: str) -> bool:
    return tensor in code.tensors and code.tensors[tensor][0].memory == "ddr"


def _step(code: Code, number: int, step: Step) -> Iterator[str]:
    """A step's numbers are in range."""
    if step.output not in code.tensors:
        yield f"there is no tensor '{step.output}'"
        return
    rows = code.tensors[step.output][0].shape[0]
    before = code.steps[number - 1].stage if number else 0
    if not 0 <= step.rows[0] <= step.rows[1] <= rows or not before <= step.stage <= len(code.steps):
        yield f"it makes rows {step.rows} of {rows} in stage {step.stage}"
    if len(step.buffers) > _MOST_BUFFERS:
        yield f"it has {len(step.buffers)} buffers in a core, {_MOST_BUFFERS} are the most"
    for name, address, size in step.buffers:
        if min(address, size) < 0 or address + size > code.device.core.memory_bytes:
            yield f"buffer '{name}' leaves the core's memory"
    given = _events(step)
    if given > _MOST_EVENTS or min(step.locks.values(), default=0) < 0:
        yield f"it has {given:,} iterations and locks given in them, {_MOST_EVENTS:,} are the most"


def _events(step: Step) -> int:
    """Iterations of a step's instructions, and all that its locks are given and taken in them."""
    given = sum(abs(value) for value in step.locks.values())
    for do in step.instructions:
        given += do.iterations * (1 + sum(1 + action.count for action in (*do.acquire, *do.release)))
    return given


def _looks(step: Step) -> int:
    """Looks at locks if one instruction goes on at a time, and all other units wait for the last of their locks."""
    waits: dict[str, int] = {}  # the longest by unit
    for do in step.instructions:
        waits[do.unit] = max(waits.get(do.unit, 1), len(do.acquire))
    return sum(do.iterations for do in step.instructions) * sum(waits.values())


def _instructions(code: Code, step: Step) -> Iterator[str]:
    """Instructions are of a known kind and reach only memories that there are."""
    sizes = {"d": code.data_address + len(code.data), "m": code.device.memtile.memory_bytes}
    sizes["c"] = code.device.core.memory_bytes
    tiles, units = AddressSpace(code).starts.keys(), _units(code.device)
    if strange := [lock for lock in step.locks if lock.partition(":")[0] not in tiles]:
        yield f"lock {strange[0]} is of no tile"
    for do in step.instructions:
        place = f"{do.kind} on {do.unit}"
        if do.unit not in units.get(do.kind, ()) or do.iterations < 1:
            yield f"{place} is no instruction"
        elif not tiles >= {tile for access in accesses(do) for tile in access.tiles}:
            yield f"{place} reaches a tile that {code.device.name} doesn't have"
        elif any(_end(access, do.iterations) > sizes[tile[0]] for access in accesses(do) for tile in access.tiles):
            yield f"{place} reaches beyond the end of a memory"
        elif isinstance(do, Compute):
            yield from (f"{place} {what}" for what in _computation(code, do))


def _units(device: DeviceSpec) -> dict[str, set[str]]:
    """Names of all units by the kind of their instructions."""
    numbers = {"COMP": (f"{column}.{row}" for column in range(device.columns) for row in range(device.rows))}
    numbers |= {"LOAD": device.activation_tiles, "WRITE": device.activation_tiles}
    numbers |= dict.fromkeys(("LOADW", "LOADWM"), range(device.rows))
    numbers |= dict.fromkeys(("LOADFM", "WRITEFM"), range(device.columns))
    return {
        kind: {f"{'core' if kind == 'COMP' else kind.lower()}.{one}" for one in ones} for kind, ones in numbers.items()
    }


def _computation(code: Code, do: Compute) -> Iterator[str]:
    """A computation stays in one core, and its windows and blocks are some."""
    if {access.tiles for access in accesses(do)} != {(do.unit.replace("core.", "c"),)}:
        yield "reaches other memories than its core's"
    window = (*do.kernel, *do.strides, *do.dilation)
    if min(window) < 1 or max(*window, *map(abs, do.padding)) > _MOST_WINDOW:
        yield f"has a window of {do.kernel}, {do.strides}, {do.dilation}, {do.padding} before it"
    if any(access.extent != access.bytes for access in accesses(do)):
        yield "reads or makes a tile whose bytes don't lie one after the other"
    ends = [place for run in do.blocks for place in run]
    if any(stop <= start for start, stop in do.blocks) or ends != sorted(ends) or max(ends) * BLOCK > _MOST_BYTES:
        yield "makes output blocks in no order"
    elif sum(stop - start for start, stop in do.blocks) * BLOCK > code.device.core.memory_bytes:
        yield "makes more output blocks than its core holds"
    if do.scratch + 4 * do.output.bytes > code.device.core.memory_bytes and not (do.begin and do.finish):
        yield f"keeps sums at {do.scratch:#x}"


def _end(access: Access, iterations: int) -> int:
    """The byte after the last that an access reaches at the most."""
    turns = min(access.ring or iterations, access.first + iterations) - 1
    return access.address + turns * access.advance + access.extent


def _work(do: Instruction) -> int:
    """Bytes that all iterations of an instruction reach, and 16 for each run of them."""
    reached = sum(len(one.tiles) * (one.bytes + 16 * one.sizes[0] * one.sizes[1]) for one in accesses(do))
    windows = do.output.bytes * prod(do.kernel) * do.inputs[0].sizes[2] if isinstance(do, Compute) else 0
    return do.iterations * (reached + windows // 16)


def accesses(instruction: Instruction) -> list[Access]:
    """All that an instruction reaches."""
    if isinstance(instruction, Transfer):
        return [access for move in instruction.moves for access in (move.source, move.target)]
    return [*instruction.inputs, instruction.parameters, instruction.output]
