"""How long a layer's pipeline takes, and what the layer before loads of its weights: what tilings are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numba as nb
import numpy as np

from bstf_compiler.aie.device import DeviceSpec


class Idle(NamedTuple):
    """For how many seconds at a layer's end LOADW has nothing to load for it, and LOADWM nothing to send."""

    loadw: float
    loadwm: float


BUSY = Idle(0.0, 0.0)


@dataclass(frozen=True)
class Ahead:
    """Chunks that come before their layer begins: how many are in the memory tile or the core, how many of them in the
    core, the bytes of all, and how many seconds longer than it was idle LOADW takes for them.
    """

    loaded: int
    sent: int
    bytes: int
    late: float


def ahead(chunks: np.ndarray, device: DeviceSpec, slots: int, room: int, idle: Idle) -> Ahead:
    """What LOADW and LOADWM can do of a layer while the one before is computed.

    Args:
        chunks: bytes, in the order of their use.
        device: the array.
        slots: of a core, and of a memory tile.
        room: how many of the core's are free then.
        idle: what is left of the time of the layer before. The first chunk is loaded even if it isn't there in time:
            better late than later.
    """
    loadw, loadwm = -idle.loadw, -idle.loadwm  # when the links are free; the layer begins at 0
    loaded, moved, late, sent = 0, 0, 0.0, []
    for use, size in enumerate(chunks[: 2 * slots].tolist()):
        if use >= slots + len(sent):  # the memory tile has no slot left
            break
        begin = max(loadw, sent[use - slots]) if use >= slots else loadw
        loadw = begin + size / device.rate("LOADW")
        if (loadw if use else begin) >= 0:
            break
        loaded, moved, late = use + 1, moved + size, max(late, loadw)
        loadwm = max(loadw, loadwm) + size / device.rate("LOADWM")
        if use == len(sent) < room and loadwm <= 0:
            sent.append(loadwm)
    return Ahead(loaded, len(sent), moved, late)


@nb.njit(cache=True)
def pipeline(load, compute, write, loadw, loadwm, weight_slots, input_slots, output_slots, ahead, sent):  # noqa: ANN001, ANN201
    """When the last tile is written, when the last chunk has left DDR, and when it has left the memory tile: five units
    in a row, each one waiting for data and for free slots. The first chunks are there already: `ahead` of them in the
    memory tile, `sent` in the core.

    `load`, `compute`: seconds by (round, tile, input chunk); `write` by (round, tile); `loadw`, `loadwm` by (round,
    input chunk), zero where there is no chunk.
    """
    rounds, tiles, inputs = load.shape
    stream = inputs > 1  # a chunk a computation; else a chunk a round
    chunk_in = np.zeros(2)  # when the memory tile's slots are free again
    weight_free = np.zeros(2)  # when the core's are
    input_free = np.zeros(2)
    output_free = np.zeros(2)
    t_loadw = t_loadwm = t_load = t_comp = t_write = 0.0
    chunk = item = tile = 0
    weights_at = 0.0
    for k in range(rounds):
        for t in range(tiles):
            for j in range(inputs):
                if loadw[k, j] > 0 and (stream or t == 0):
                    slot = chunk % weight_slots
                    if chunk >= ahead:
                        t_loadw = max(t_loadw, chunk_in[slot]) + loadw[k, j]
                    if chunk >= sent:
                        t_loadwm = max(t_loadwm, t_loadw, weight_free[slot]) + loadwm[k, j]
                    chunk_in[slot] = t_loadwm
                    weights_at = t_loadwm
                    chunk += 1
                t_load = max(t_load, input_free[item % input_slots]) + load[k, t, j]
                start = max(t_comp, t_load, weights_at)
                if j == inputs - 1:
                    start = max(start, output_free[tile % output_slots])
                t_comp = start + compute[k, t, j]
                input_free[item % input_slots] = t_comp
                item += 1
                if stream or t == tiles - 1:
                    weight_free[(chunk - 1) % weight_slots] = t_comp
            t_write = max(t_write, t_comp) + write[k, t]
            output_free[tile % output_slots] = t_write
            tile += 1
    return t_write, t_loadw, t_loadwm
