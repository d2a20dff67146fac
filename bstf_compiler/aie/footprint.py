"""Which bytes of a device's memories instructions reach: all memories in one array, a flag or a few bits a byte."""

from __future__ import annotations

import numba as nb
import numpy as np

from bstf_compiler.aie.code import Code
from bstf_compiler.aie.isa import Access


class AddressSpace:
    """Numbers the bytes of all memories of a program's device, one memory after the other.

    `starts`: number of each memory's first byte, by tile name; `bytes`: of all memories together.
    """

    def __init__(self, code: Code) -> None:
        device = code.device
        sizes = {"ddr": code.data_address + len(code.data)}
        sizes |= {f"m{tile}": device.memtile.memory_bytes for tile in range(device.memtiles)}
        cores = [(column, row) for column in range(device.columns) for row in range(device.rows)]
        sizes |= {f"c{column}.{row}": device.core.memory_bytes for column, row in cores}
        ends = np.cumsum(list(sizes.values()))
        self.starts = {name: int(end) - size for (name, size), end in zip(sizes.items(), ends)}
        self.bytes = int(ends[-1])

    def boxes(self, access: Access) -> list[tuple[int, ...]]:
        """A row for each tile of an access, as `start_of` and the functions below take them: first byte, sizes (3),
        strides (2), advance, ring, first.
        """
        tail = *access.sizes, *access.strides, access.advance, access.ring, access.first
        return [(self.starts[tile] + access.address, *tail) for tile in access.tiles]


@nb.njit(cache=True)
def start_of(box, iteration):  # noqa: ANN001, ANN201
    """Number of a box's first byte in an iteration."""
    slot = (box[8] + iteration) % box[7] if box[7] else iteration
    return box[0] + slot * box[6]


@nb.njit(cache=True)
def mark(flags, boxes, iterations, bits):  # noqa: ANN001, ANN201
    """Sets bits in the flags of all bytes that boxes (n, 9) reach in so many iterations each; ors them in."""
    for n in range(len(boxes)):
        for iteration in range(iterations[n]):
            start = start_of(boxes[n], iteration)
            for row in range(boxes[n, 1]):
                for pixel in range(boxes[n, 2]):
                    at = start + row * boxes[n, 4] + pixel * boxes[n, 5]
                    flags[at : at + boxes[n, 3]] |= bits[n]


@nb.njit(cache=True)
def first_unwritten(written, boxes, writes, starts, instructions, iterations):  # noqa: ANN001, ANN201
    """Walks events in order; marks the bytes that they write.

    Args:
        written: flag of every byte.
        boxes: of all instructions, in the order in which each reads and writes (n, 9).
        writes: whether a box is written.
        starts: an instruction's first box; one more entry for the end.
        instructions: index of each event.
        iterations: of each event.

    Returns:
        The first box with a byte that nothing wrote before it is read, and that byte's number; (-1, -1) if none.
    """
    for event in range(len(instructions)):
        i = instructions[event]
        for n in range(starts[i], starts[i + 1]):
            start, length = start_of(boxes[n], iterations[event]), boxes[n, 3]
            for row in range(boxes[n, 1]):
                for pixel in range(boxes[n, 2]):
                    at = start + row * boxes[n, 4] + pixel * boxes[n, 5]
                    if writes[n]:
                        written[at : at + length] = 1
                    elif not written[at : at + length].all():
                        for byte in range(at, at + length):
                            if not written[byte]:
                                return n, byte
    return -1, -1
