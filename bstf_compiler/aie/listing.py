"""The descriptors of a program as text, to read and to program DMAs from.

    .step conv2 rows 0-28; most of one tile: shim 2, memtile 23, core 12
    m0 MM2S 0 bd 0-2
      0 bd 0 m0@0x1f00+448%28#0[16/1,14/16,2/224] wait m0:ready next 1
      0 bd 1 m1@0x1f00+448%28#0[32/1,2/224]
      run 0 x28 LOADFM loadfm.0 from 0

Below a channel (tile, direction, number, the descriptors that are its own) come its chains, a line a descriptor: number
of the chain, the descriptor that holds it, memory, address in bytes, `+step%slots#first` of the iteration, `size/step`
of each dimension, innermost first, all in words, locks (`*2` for a count), and the next one; then its tasks in order:
chain, runs, for which instruction, and from which of its iterations on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from bstf_compiler.aie.code import Code, Step
from bstf_compiler.aie.descriptors import Channel, Descriptor, lower

_KINDS = {"s": "shim", "m": "memtile", "c": "core"}


def listing(code: Code) -> Iterator[str]:
    """The lines of a program's descriptors.

    Raises:
        ValueError: the device has no descriptors.

    Example:
        >>> print("\\n".join(listing(program)))
    """
    for step, channels in zip(code.steps, lower(code)):
        rows, most = "{}-{}".format(*step.rows), fullest(channels)
        found = ", ".join(f"{kind} {most[kind]}" for kind in _KINDS.values() if kind in most)
        yield f".step {step.layer} rows {rows}; most of one tile: {found or 'none'}"
        for channel in channels:
            yield f"{channel.name} bd {channel.ids.start}-{channel.ids.stop - 1}"
            yield from _chains(channel)
            yield from _tasks(channel, step)


def fullest(channels: list[Channel]) -> dict[str, int]:
    """Different descriptors that a step needs of one tile, by its kind: shim, memtile, core; of the tile with most."""
    tiles = Counter()
    for channel in channels:
        tiles[channel.tile] += channel.descriptors
    most: dict[str, int] = {}
    for tile, count in tiles.items():
        most[_KINDS[tile[0]]] = max(count, most.get(_KINDS[tile[0]], 0))
    return most


def _chains(channel: Channel) -> Iterator[str]:
    for number, (chain, ids) in enumerate(zip(channel.chains, channel.chain_ids)):
        for place, descriptor in enumerate(chain):
            following = f" next {ids[place + 1]}" if place + 1 < len(ids) else ""
            yield f"  {number} bd {ids[place]} {_descriptor(descriptor)}{following}"


def _tasks(channel: Channel, step: Step) -> Iterator[str]:
    for task in channel.tasks:
        do = step.instructions[task.instruction]
        yield f"  run {task.chain} x{task.runs} {do.kind} {do.unit} from {task.iteration}"


def _descriptor(one: Descriptor) -> str:
    slots, step = one.iteration
    moving = f"+{step}%{slots}#{one.first}" if slots > 1 else ""
    walk = ",".join(f"{size}/{step}" for size, step in one.dimensions)
    return f"{one.memory}@{one.address:#x}{moving}[{walk}]{_lock('wait', one.acquire)}{_lock('give', one.release)}"


def _lock(verb: str, lock: tuple[str, int] | None) -> str:
    if lock is None:
        return ""
    return f" {verb} {lock[0]}" + (f"*{lock[1]}" if lock[1] > 1 else "")
