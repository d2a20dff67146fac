"""Static rules of a program. Each is a generator of sentences, one a violation; a sound program has none."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from bstf_compiler.aie import events
from bstf_compiler.aie.code import Code, Step
from bstf_compiler.aie.isa import Access, Compute, Instruction, Transfer


def verify(code: Code) -> list[str]:
    """All violations of the rules, as sentences that name the layer and the place; empty for a sound program."""
    found = list(_allocations(code))
    for step in code.steps:
        for rule in (_buffers, _moves, _addresses, _regions, _locks):
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


def _addresses(code: Code, step: Step) -> Iterator[str]:
    """Every access stays inside the memory of its tiles in every iteration."""
    limits = {"d": code.data_address + len(code.data), "m": code.device.memtile.memory_bytes}
    limits["c"] = code.device.core.memory_bytes - code.device.core.reserved_bytes
    for instruction in step.instructions:
        for access in _accesses(instruction):
            low, high = _range(access, instruction.iterations)
            for tile in access.tiles:
                if low < 0 or high > limits[tile[0]]:
                    end = limits[tile[0]]
                    yield f"{_place(instruction)} reaches [{low:#x}, {high:#x}) of {tile}, which ends at {end:#x}"


def _regions(code: Code, step: Step) -> Iterator[str]:
    """Every access of a core or memory tile lies inside one buffer or allocation that is held at that time."""
    cores = [(address, address + size) for _, address, size in step.buffers]
    held = [
        (a.address, a.address + a.bytes) for a in code.allocations if a.first <= step.stage <= a.last
    ]  # fmt: skip
    for instruction in step.instructions:
        for access in _accesses(instruction):
            low, high = _range(access, instruction.iterations)
            regions = {"c": cores, "m": held}.get(access.tiles[0][0])
            if regions is not None and high > low and not any(a <= low and high <= b for a, b in regions):
                yield f"{_place(instruction)} reaches [{low:#x}, {high:#x}) of {access.tiles[0]}, held by no buffer"


def _locks(code: Code, step: Step) -> Iterator[str]:
    """All instructions finish, and cores' and chunk slots' locks end as they began."""
    for instruction in step.instructions:
        for action in (*instruction.acquire, *instruction.release):
            if action.lock not in step.locks:
                yield f"{_place(instruction)} uses lock {action.lock}, which is not declared"
                return
    outcome = events.run(step.instructions, step.locks, lambda _: 1.0)
    if outcome.blocked:
        yield f"deadlock: {_place(step.instructions[outcome.blocked[0]])} never gets its locks"
        return
    for name, value in outcome.lock_values.items():
        if value != step.locks[name]:
            yield f"lock {name} ends at {value}, it began at {step.locks[name]}"


def _place(instruction: Instruction) -> str:
    return f"{instruction.kind} on {instruction.unit}"


def _accesses(instruction: Instruction) -> list[Access]:
    if isinstance(instruction, Compute):
        return [*instruction.inputs, instruction.parameters, instruction.output]
    return [access for move in instruction.moves for access in (move.source, move.target)]


def _range(access: Access, iterations: int) -> tuple[int, int]:
    """First byte and byte after the last, over all iterations."""
    slots = access.ring or iterations
    starts = [access.start(0), access.start(iterations - 1)]
    if access.ring:
        starts += [access.start(i) for i in range(min(slots, iterations))]
    return min(starts), max(starts) + access.extent
