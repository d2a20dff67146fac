"""Rules of a real part's DMAs: what no splitting into descriptors can bring into their fields (see descriptors.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from bstf_compiler.aie.addressing import WORD
from bstf_compiler.aie.code import Step
from bstf_compiler.aie.descriptors import Performed, limits_of, lock_actions, performed, tile_of
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import LockAction

LOCK_VALUE = 63
"""The most that a lock can hold: 6 bits (AM020, AIE-ML array interface)."""


def dma_violations(device: DeviceSpec, step: Step) -> Iterator[str]:
    """What a step asks of a device's DMAs and locks that they can't do, as sentences that name tile, limit and value;
    nothing if the device has no descriptors.
    """
    if device.descriptors is None:
        return
    transfers = performed(device, step)
    for one in transfers:
        yield from _unaligned(one)
    yield from _declared(device, step.locks)
    yield from _together(transfers, step.locks)


def _unaligned(one: Performed) -> Iterator[str]:
    """Addresses, lengths and steps are whole words."""
    do = one.transfer
    for (tile, _, unit), part in one.ports.items():
        for memory, access in part:
            rows, pixels, length = access.sizes
            used = {
                "address": access.address,
                "length": length,
                "row stride": access.strides[0] if rows > 1 else 0,
                "pixel stride": access.strides[1] if pixels > 1 else 0,
                "advance": access.advance if do.iterations > 1 else 0,
            }
            for name, value in used.items():
                if value % WORD:
                    yield (
                        f"{do.kind} on {unit}: {name} = {value} in {memory}; the DMA of {tile} moves words of {WORD} "
                        "bytes"
                    )


def _declared(device: DeviceSpec, locks: dict[str, int]) -> Iterator[str]:
    """A tile has so many locks, of so many values."""
    for tile, count in Counter(map(tile_of, locks)).items():
        if count > (most := limits_of(device, tile).locks):
            yield f"{tile} needs {count} locks, of which it has {most}"
    for lock, value in locks.items():
        if not 0 <= value <= LOCK_VALUE:
            yield f"lock {lock} begins at {value}, outside 0 to {LOCK_VALUE}"


def _together(transfers: list[Performed], locks: dict[str, int]) -> Iterator[str]:
    """In an iteration a DMA takes one lock of a memory and gives one, of a memory that it moves bytes of."""
    actions = lock_actions(transfers, locks)
    moved = {(one.transfer.unit, memory) for one in transfers for part in one.ports.values() for memory, _ in part}
    for one in transfers:
        do = one.transfer
        for action in do.release:
            tile = tile_of(action.lock)
            if tile[0] == "m" and (do.unit, tile) not in moved:
                yield f"{do.kind} on {do.unit} gives lock {action.lock}, but its unit moves nothing of {tile}"
        for memory in dict.fromkeys(memory for part in one.ports.values() for memory, _ in part):
            for verb, side in zip(("takes", "gives"), actions[one.index, memory]):
                yield from (f"{do.kind} on {do.unit} {verb} {what}" for what in _too_many(side, memory, do.iterations))


def _too_many(actions: list[LockAction], memory: str, iterations: int) -> Iterator[str]:
    """What is too much for a descriptor, in the first, any other or the last iteration."""
    for iteration in sorted({0, iterations // 2, iterations - 1}) if actions else ():
        acting = [action for action in actions if action.applies(iteration, iterations)]
        names, count = sorted({action.lock for action in acting}), sum(action.count for action in acting)
        if len(names) > 1:
            yield f"{len(names)} locks of {memory} at once, {', '.join(names)}; a descriptor has 1 of each kind"
            return
        if count > LOCK_VALUE:
            yield f"lock {names[0]} {count} times at once; a lock holds {LOCK_VALUE} at most"
            return
