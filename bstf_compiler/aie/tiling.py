"""Sub-volumes: what one core computes at a time, chosen by the time of the layer's pipeline.

The output is cut evenly by width, a piece a column of cores. Its channel blocks are dealt in `rounds`, each round an
even share to every row of cores. A core walks its piece in tiles of `tile_rows` x `tile_columns` pixels, rows first.
A convolution whose weights don't fit sums its input channels in `input_chunks` pieces, the sums kept in the core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numba as nb
import numpy as np

from bstf_compiler.aie import weights
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.layer import DoesNotFit, Layer, share
from bstf_compiler.aie.reach import BLOCK, Source

_ALIGN = 32
_CALL_CYCLES = 64
"""What a call of a kernel and its locks take on a core, about. Times don't count it; it tells apart tilings that would
otherwise be alike, and keeps programs short.
"""


@dataclass(frozen=True)
class Ring:
    """A buffer in a core, `slots` of `bytes` each."""

    address: int
    slots: int
    bytes: int

    @property
    def total(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.bytes

    @property
    def stop(self) -> int:
        """First byte after the buffer."""
        return self.address + self.total


@dataclass(frozen=True)
class Tiling:
    """How a layer is cut, and the buffers in each core: weights, one ring an input image, output, partial sums.

    `seconds`: of its pipeline; `idle`: for how many of the last of them LOADW has nothing to load for it.
    """

    rounds: int
    tile_rows: int
    tile_columns: int
    input_chunks: int
    weights: Ring
    inputs: tuple[Ring, ...]
    output: Ring
    sums: Ring
    seconds: float = 0.0
    idle: float = 0.0

    @property
    def input_slots(self) -> int:
        """How many input tiles a core holds: the first input is never one pixel for all."""
        return self.inputs[0].slots

    @property
    def stop(self) -> int:
        """Bytes of core memory in use."""
        return self.sums.stop

    def mirrored(self, memory: int) -> Tiling:
        """The same buffers at the other end of `memory` bytes, so that the weights are the last of them."""

        def moved(ring: Ring) -> Ring:
            return replace(ring, address=memory - ring.stop)

        return replace(
            self, weights=moved(self.weights), inputs=tuple(map(moved, self.inputs)), output=moved(self.output),
            sums=moved(self.sums),
        )  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """The channel blocks of one core in one round: outputs [start, stop); empty if the core has none."""

    start: int
    stop: int

    @property
    def blocks(self) -> int:
        """Number of output blocks."""
        return self.stop - self.start


def pieces(layer: Layer, device: DeviceSpec, rounds: int) -> list[list[Piece]]:
    """Output blocks by round and row of cores."""
    parts = share(layer.blocks, rounds * device.rows)
    rows = device.rows
    return [[Piece(*part) for part in parts[k * rows : (k + 1) * rows]] for k in range(rounds)]


def cuts(size: int, length: int) -> list[tuple[int, int]]:
    """[0, size) in runs of `length`, the last one shorter: [(start, stop), ...]."""
    return [(start, min(start + length, size)) for start in range(0, size, length)]


def choose(layer: Layer, device: DeviceSpec, parameter_bytes: int, rows: int, idle: float = 0.0) -> Tiling:
    """The legal tiling with the shortest pipeline.

    Args:
        layer: the layer.
        device: the array.
        parameter_bytes: size of the chunk of a layer without weights.
        rows: output rows that are computed at once (fewer than the image's if it comes from DDR in bands).
        idle: seconds in which LOADW has nothing to load for the layer before: the first chunks come then.

    Raises:
        DoesNotFit: if even the smallest sub-volume is too large for a core.
    """
    budget = buffer_bytes(device)
    best, shortest, smallest = None, (True, math.inf), None
    for dealt, tiling in _candidates(layer, device, parameter_bytes, rows):
        smallest = min(smallest or tiling.stop, tiling.stop)
        tiles = -(-rows // tiling.tile_rows) * -(-_widest(layer, device) // tiling.tile_columns)
        calls = tiles * tiling.rounds * tiling.input_chunks * _CALL_CYCLES / device.clock_hz
        crowds = tiling.weights.total > device.memtile.memory_bytes // 2  # its chunks leave tensors no room there
        calls += dealt.ahead(tiling.weights.slots, idle).late
        if tiling.stop > budget or (crowds, dealt.bound(tiling, rows, idle) + calls) >= shortest:
            continue
        seconds, idle_seconds = _seconds(layer, device, dealt, tiling, rows, idle)
        if (crowds, seconds + calls) < shortest:
            best, shortest = replace(tiling, seconds=seconds, idle=idle_seconds), (crowds, seconds + calls)
    if best is None:
        raise DoesNotFit(
            layer,
            f"its smallest sub-volume takes {smallest} bytes of a core, of which {device.name} "
            f"has {budget} for buffers; use a smaller window, fewer channels or a device with larger cores",
        )
    return best


def buffer_bytes(device: DeviceSpec) -> int:
    """Bytes of a core that buffers may take."""
    return (device.core.memory_bytes - device.core.reserved_bytes) // _ALIGN * _ALIGN


def _input_chunk_counts(layer: Layer) -> Iterator[int]:
    """How many pieces the input channels may come in: more than one only for what sums over them."""
    blocks = layer.sources[0].shape[2] if layer.sums_channels else 1
    count = 1
    while count < blocks:
        yield count
        count *= 2
    yield blocks


def _divisions(total: int) -> list[int]:
    """The sizes ceil(total / n) for n >= 1, each once, largest first."""
    return sorted({-(-total // n) for n in range(1, total + 1)}, reverse=True)


def _candidates(layer: Layer, device: DeviceSpec, parameter_bytes: int, rows: int) -> Iterator[tuple[_Dealt, Tiling]]:
    width = _widest(layer, device)
    heights = {min(-(-height // layer.grain) * layer.grain, rows) for height in _divisions(rows)}
    channel_parts = -(-layer.blocks // device.rows)
    for input_chunks in _input_chunk_counts(layer):
        for rounds in sorted({-(-channel_parts // size) for size in _divisions(channel_parts)}):
            dealt = _Dealt(layer, device, parameter_bytes, rounds, input_chunks)
            for columns in _tile_widths(width):
                for height in sorted(heights, reverse=True):
                    yield dealt, _lay_out(layer, dealt, rows, height, columns, width)


def _tile_widths(width: int) -> list[int]:
    """Widths worth a try: the whole, a third, and halves of halves, widest first."""
    return sorted({-(-width // 3)} | {-(-width // 2**k) for k in range(width.bit_length() + 1)}, reverse=True)


def _widest(layer: Layer, device: DeviceSpec) -> int:
    """Output columns of the widest column of cores."""
    return max(stop - start for start, stop in share(layer.output_shape[1], device.columns))


class _Dealt:
    """Chunk sizes, kept blocks and blocks to load of a way to deal the output blocks.

    `chunks`, `kept` by (round, row, input chunk); `loads` by source, blocks that a column of cores loads of each pixel
    by (round, input chunk); `most`: blocks of a pixel in a core, by source.
    """

    def __init__(self, layer: Layer, device: DeviceSpec, parameter_bytes: int, rounds: int, input_chunks: int) -> None:
        self.rounds, self.input_chunks = rounds, input_chunks
        self._layer, self._device = layer, device
        self.pieces = pieces(layer, device, rounds)
        self._ahead: dict[tuple[int, float], Ahead] = {}
        blocks = np.array([[piece.blocks for piece in row] for row in self.pieces])
        self.outputs = int(blocks.max())
        self.written = blocks.sum(axis=1)  # blocks of each pixel, by round
        if layer.sums_channels:
            self._sum_channels(blocks)
        else:
            self._channel_by_channel(parameter_bytes)
        used = np.broadcast_to(blocks[..., None] > 0, self.chunks.shape)
        if layer.has_weights:
            self.chunks = np.where(used, weights.chunk_bytes(layer, blocks[..., None], self.kept), 0)
        rate = device.core.macs_per_cycle if layer.sums_channels else device.core.elementwise_per_cycle
        # Cycles of a pixel on the slowest core, bytes through the links: by (round, input chunk).
        self.cycles = layer.work(1, 1) * self.kept.max(axis=1) / rate
        self.cycles[:, -1] += layer.added(1, 1) * blocks.max(axis=1) / device.core.elementwise_per_cycle
        self.weight_bytes = self.chunks.max(axis=1)

    def _channel_by_channel(self, parameter_bytes: int) -> None:
        layer = self._layer
        self.kept = np.array([[[piece.blocks] for piece in row] for row in self.pieces])
        self.chunks = np.zeros_like(self.kept)
        self.chunks[0] = parameter_bytes
        self.loads = np.zeros((len(layer.sources), self.rounds, 1), np.int64)
        self.most = [0] * len(layer.sources)
        for place, source in enumerate(layer.sources):
            for k, row in enumerate(self.pieces):
                sizes = [stop - start for start, stop in {*input_spans(layer, source, row, (0, 0))}]
                self.loads[place, k] = sum(sizes)
                self.most[place] = max(self.most[place], *sizes)

    def _sum_channels(self, blocks: np.ndarray) -> None:
        """As `input_spans` and `Layer.weight_blocks` have it, for all pieces and chunks at once."""
        kept, (depth, _) = self._layer.kept, self._layer.kept.shape
        edges = np.array([0, *(stop for _, stop in share(depth, self.input_chunks))])
        first = np.array([[piece.start for piece in row] for row in self.pieces])
        before = np.pad(np.cumsum(kept, axis=1), ((0, 0), (1, 0)))  # kept blocks of an input block before an output
        own = before[:, first + blocks] - before[:, first]  # by (input block, round, row)
        total = np.concatenate([np.zeros_like(own[:1]), np.cumsum(own, axis=0)])
        self.kept = np.moveaxis(total[edges[1:]] - total[edges[:-1]], 0, -1)
        self.chunks = np.zeros_like(self.kept)
        index = np.arange(depth).reshape(-1, 1, 1)
        none = np.full_like(own[:1], depth)
        following = np.minimum.accumulate(np.concatenate([np.where(own, index, depth), none])[::-1])[::-1]
        previous = np.maximum.accumulate(np.concatenate([none - depth - 1, np.where(own, index, -1)]))
        some = self.kept > 0
        start = np.where(some, np.moveaxis(following[edges[:-1]], 0, -1), depth)
        stop = np.where(some, np.moveaxis(previous[edges[1:]], 0, -1) + 1, 0)
        sizes = np.where(some, stop - start, 0)
        together = np.maximum(stop.max(axis=1) - start.min(axis=1), 0)  # by (round, input chunk)
        apart = np.zeros_like(together)
        for r in range(sizes.shape[1]):
            earlier = (start[:, :r] == start[:, r : r + 1]) & (stop[:, :r] == stop[:, r : r + 1])
            apart += np.where(earlier.any(axis=1), 0, sizes[:, r])
        self.loads = np.minimum(apart, together)[None]
        self.most = [int(np.where(apart <= together, sizes.max(axis=1), together).max())]
        if self._layer.residual is not None:  # comes with the last chunk
            added = np.zeros_like(self.loads[0])
            added[:, -1] = self.written
            self.loads = np.stack([self.loads[0], added])
            self.most.append(self.outputs)

    def ahead(self, slots: int, idle: float) -> Ahead:
        """Chunks that the step before loads."""
        if (slots, idle) not in self._ahead:  # asked again for every tiling
            first = np.resize(self.weight_bytes[0], 2 * slots)
            chunks = first if self.input_chunks > 1 else self.weight_bytes[:, 0]
            self._ahead[slots, idle] = ahead(chunks, self._device, slots, idle)
        return self._ahead[slots, idle]

    def bound(self, tiling: Tiling, rows: int, idle: float) -> float:
        """Seconds that the busiest unit works, at the least: no pipeline of this tiling is shorter."""
        layer, rate = self._layer, self._device.rate
        heights = [stop - start for start, stop in cuts(rows, tiling.tile_rows)]
        widths = [stop - start for start, stop in cuts(_widest(layer, self._device), tiling.tile_columns)]
        pixels, tiles = sum(heights) * sum(widths), len(heights) * len(widths)
        loaded = 0
        for source, loads in zip(layer.sources, self.loads):
            if not source.broadcast:
                area = sum(map(source.rows.most, heights)) * sum(map(source.columns.most, widths))
                loaded += area * int(loads.sum()) * BLOCK
        weight_bytes = int(self.weight_bytes.sum()) * (tiles if self.input_chunks > 1 else 1)
        weight_bytes -= self.ahead(tiling.weights.slots, idle).bytes
        return max(
            loaded / rate("LOADFM"),
            pixels * float(self.cycles.sum()) / self._device.clock_hz,
            pixels * int(self.written.sum()) * BLOCK / rate("WRITEFM"),
            weight_bytes / min(rate("LOADW"), rate("LOADWM")),
        )


@dataclass(frozen=True)
class Ahead:
    """Chunks that come before their layer begins: how many are in the memory tile or the core, how many of them in the
    core, the bytes of all, and how many seconds longer than it was idle LOADW takes for them.
    """

    loaded: int
    sent: int
    bytes: int
    late: float


def ahead(chunks: np.ndarray, device: DeviceSpec, slots: int, idle: float) -> Ahead:
    """What LOADW and LOADWM can do of a layer while the one before is computed.

    Args:
        chunks: bytes, in the order of their use.
        device: the array.
        slots: of a core, and of a memory tile.
        idle: seconds in which LOADW has nothing else to do. A chunk for which they don't suffice comes if it is the
            first: better late than later.
    """
    ends = np.cumsum(chunks[: 2 * slots]) / device.rate("LOADW")
    sent = int(np.count_nonzero(ends[:slots] + chunks[:slots] / device.rate("LOADWM") <= idle))
    loaded = max(int(np.count_nonzero(ends[: sent + slots] <= idle)), int(idle > 0))
    return Ahead(loaded, sent, int(chunks[:loaded].sum()), max(0.0, ends[loaded - 1] - idle) if loaded else 0.0)


def input_spans(layer: Layer, source: Source, row_pieces: list[Piece], chunk: tuple[int, int]) -> list[tuple[int, int]]:
    """The blocks [start, stop) of an input that each row of cores needs for its piece and a chunk of input channels.

    Of a convolution, all rows get what any of them needs, at once, or, where that is no more, each row its own: groups
    read different channels.
    """
    if not layer.sums_channels or source is layer.residual:
        return [source.blocks(piece.start, piece.stop) if piece.blocks else (0, 0) for piece in row_pieces]
    own = [layer.needed(chunk, (piece.start, piece.stop)) for piece in row_pieces]
    used = {(start, stop) for start, stop in own if stop > start}
    if not used:
        return own
    together = min(start for start, _ in used), max(stop for _, stop in used)
    apart = sum(stop - start for start, stop in used) <= together[1] - together[0]
    return own if apart else [together] * len(own)


def _lay_out(layer: Layer, dealt: _Dealt, rows: int, height: int, columns: int, width: int) -> Tiling:
    """Buffers of a core for tiles of `height` x `columns` output pixels."""
    tiles = -(-rows // height) * -(-width // columns) * dealt.rounds
    loads = tiles * dealt.input_chunks
    chunks = loads if dealt.input_chunks > 1 else dealt.rounds if layer.has_weights else 1
    address = 0

    def ring(slots: int, size: int) -> Ring:
        nonlocal address
        made = Ring(address, slots, -(-size // _ALIGN) * _ALIGN)
        address = made.stop
        return made

    def input_ring(source: Source, blocks: int) -> Ring:
        if source.broadcast:  # one slot a round: loaded once, before the round's tiles
            return ring(dealt.rounds, blocks * BLOCK)
        slots = min(2, tiles if source is layer.residual else loads)
        return ring(slots, source.rows.most(height) * source.columns.most(columns) * blocks * BLOCK)

    return Tiling(
        rounds=dealt.rounds,
        tile_rows=height,
        tile_columns=columns,
        input_chunks=dealt.input_chunks,
        weights=ring(min(2, chunks), int(dealt.chunks.max())),
        inputs=tuple(input_ring(source, blocks) for source, blocks in zip(layer.sources, dealt.most)),
        output=ring(min(2, tiles), height * columns * dealt.outputs * BLOCK),
        sums=ring(1, 4 * height * columns * dealt.outputs * BLOCK if dealt.input_chunks > 1 else 0),
    )


def _seconds(
    layer: Layer, device: DeviceSpec, dealt: _Dealt, tiling: Tiling, rows: int, idle: float
) -> tuple[float, float]:
    """Time of the tiling's pipeline: the widest column, in each step the slowest row of cores; and how long LOADW has
    nothing to do at its end.
    """
    heights = [stop - start for start, stop in cuts(rows, tiling.tile_rows)]
    widths = [stop - start for start, stop in cuts(_widest(layer, device), tiling.tile_columns)]
    pixels = np.outer(widths, heights).ravel()
    load = np.zeros((dealt.rounds, pixels.size, dealt.input_chunks))
    for source, blocks in zip(layer.sources, dealt.loads):
        if not source.broadcast:
            in_heights, in_widths = map(source.rows.most, heights), map(source.columns.most, widths)
            in_pixels = np.outer(list(in_widths), list(in_heights)).ravel()
            load += in_pixels[None, :, None] * blocks[:, None, :] * (BLOCK / device.rate("LOADFM"))
    compute = np.ceil(pixels[None, :, None] * dealt.cycles[:, None, :]) / device.clock_hz
    write = pixels[None, :] * dealt.written[:, None] * (BLOCK / device.rate("WRITEFM"))
    there = dealt.ahead(tiling.weights.slots, idle)
    seconds, loaded = _pipeline(
        load, compute, write, dealt.weight_bytes / device.rate("LOADW"), dealt.weight_bytes / device.rate("LOADWM"),
        tiling.weights.slots, tiling.input_slots, tiling.output.slots, there.loaded, there.sent,
    )  # fmt: skip
    return seconds, seconds - loaded


@nb.njit(cache=True)
def _pipeline(load, compute, write, loadw, loadwm, weight_slots, input_slots, output_slots, ahead, sent):  # noqa: ANN001
    """When the last tile is written, and when the last chunk has left DDR: five units in a row, each one waiting for
    data and for free slots. The first chunks are there already: `ahead` of them in the memory tile, `sent` in the core.

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
    return t_write, t_loadw
