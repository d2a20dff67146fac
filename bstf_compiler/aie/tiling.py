"""Sub-volumes: what one core computes at a time, chosen by the time of the layer's pipeline.

The output is cut evenly by width, a part a column of cores. Its channel blocks are dealt in rounds, each round a piece
to every row of cores (dealing.py). A core walks its part in tiles of `tile_rows` x `tile_columns` pixels, rows first.
A convolution whose weights don't fit sums its input channels in `input_chunks` pieces, the sums kept in the core.

Where cores reach all memory tiles, the output may be split in other ways (splitting.py).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numba as nb
import numpy as np

from bstf_compiler.aie import weights
from bstf_compiler.aie.cutting import Cut, Cuts, divisions
from bstf_compiler.aie.dealing import Piece, Pieces, balanced, by_parts, contiguous, refined
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.layer import DoesNotFit, Layer, share
from bstf_compiler.aie.pipeline import BUSY, Ahead, Idle, ahead, pipeline
from bstf_compiler.aie.reach import BLOCK, Source
from bstf_compiler.aie.splitting import Split, splits

_ALIGN = 32
_CALL_CYCLES = 64
"""What a call of a kernel and its locks take on a core, about. Times don't count it; it tells apart tilings that would
otherwise be alike, and keeps programs short.
"""
_MOVE_CYCLES = 8
"""What a move more for each tile takes, about: blocks that aren't neighbours have to save as much."""


@dataclass(frozen=True)
class Ring:
    """A buffer in a core, `slots` of `bytes` each, used in turn from the `first` on."""

    address: int
    slots: int
    bytes: int
    first: int = 0

    @property
    def total(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.bytes

    @property
    def stop(self) -> int:
        """First byte after the buffer."""
        return self.address + self.total

    def room(self, free: int) -> int:
        """How many slots fit into so many bytes."""
        return min(self.slots, free // self.bytes) if self.bytes else self.slots

    def first_slots(self, count: int) -> tuple[int, int]:
        """Address and bytes of the slots that are used first, of two at most."""
        return self.address + (self.slots - count if self.first else 0) * self.bytes, count * self.bytes


_TWO_SLOTS = Ring(0, 2, 0)
"""What no buffer of weights has more of: room for all slots."""


@dataclass(frozen=True)
class Tiling:
    """How a layer is cut, and the buffers in each core: weights, one ring an input image, output, partial sums.

    `split`: between columns of cores; `pieces`: by round and row of cores, or where columns of cores have parts of the
    channels by round, part and row; `seconds`: of its pipeline; `idle`: how long the links of weights have nothing to
    do for it at its end.
    """

    pieces: Pieces
    tile_rows: int
    tile_columns: int
    input_chunks: int
    weights: Ring
    inputs: tuple[Ring, ...]
    output: Ring
    sums: Ring
    split: Split
    seconds: float = 0.0
    idle: Idle = BUSY

    @property
    def rounds(self) -> int:
        """How many pieces a core computes one after the other, at the most."""
        return len(self.pieces)

    @property
    def input_slots(self) -> int:
        """How many input tiles a core holds: the first input is never one pixel for all."""
        return self.inputs[0].slots

    @property
    def stop(self) -> int:
        """Bytes of core memory in use."""
        return self.sums.stop

    def mirrored(self, memory: int) -> Tiling:
        """The same buffers at the other end of `memory` bytes, so that the weights' first slot is the last of all."""

        def moved(ring: Ring) -> Ring:
            return replace(ring, address=memory - ring.stop)

        return replace(
            self,
            weights=replace(moved(self.weights), first=self.weights.slots - 1),
            inputs=tuple(map(moved, self.inputs)),
            output=moved(self.output),
            sums=moved(self.sums),
        )


class Spare(NamedTuple):
    """What the layer before leaves: time of the links of weights, and bytes of a core."""

    idle: Idle
    bytes: int


NOTHING = Spare(BUSY, 0)


def choose(layer: Layer, device: DeviceSpec, parameter_bytes: int, rows: int, spare: Spare = NOTHING) -> Tiling:
    """The legal tiling with the shortest pipeline.

    Args:
        layer: the layer.
        device: the array.
        parameter_bytes: size of the chunk of a layer without weights.
        rows: output rows that are computed at once (fewer than the image's if it comes from DDR in bands).
        spare: what the layer before leaves: the first chunks come then, into its bytes.

    Raises:
        DoesNotFit: if even the smallest sub-volume is too large for a core.
    """
    budget, cuts = buffer_bytes(device), Cuts(layer, device, rows)
    best, shortest, smallest = None, (True, math.inf), None
    for least, dealt, cut in _candidates(layer, device, parameter_bytes, cuts, spare):
        if (False, least) >= shortest:
            break
        tiling = _lay_out(layer, dealt, cut)
        smallest, crowds = min(smallest or tiling.stop, tiling.stop), _crowds(tiling, device)
        calls = dealt.call_seconds * cut.tiles + dealt.ahead(tiling.weights, spare).late
        if tiling.stop > budget or (crowds, least) >= shortest:
            continue
        seconds, left = _seconds(layer, device, dealt, cuts, cut, tiling, spare)
        if (crowds, seconds + calls) < shortest:
            best, shortest = replace(tiling, seconds=seconds, idle=left), (crowds, seconds + calls)
    if best is None:
        raise DoesNotFit(
            layer,
            f"its smallest sub-volume takes {smallest} bytes of a core, of which {device.name} "
            f"has {budget} for buffers; use a smaller window, fewer channels or a device with larger cores",
        )
    return _dealt_well(layer, device, parameter_bytes, cuts, spare, best)


def _crowds(tiling: Tiling, device: DeviceSpec) -> bool:
    """Whether the chunks of weights leave tensors no room in a memory tile."""
    return tiling.weights.total > device.memtile.memory_bytes // 2


def _dealt_well(
    layer: Layer, device: DeviceSpec, parameter_bytes: int, cuts: Cuts, spare: Spare, best: Tiling
) -> Tiling:
    """The tiling with its blocks dealt as well as can be; in shares of neighbours unless others save time."""
    costs = _costs(layer, device, best.input_chunks)
    if not np.ptp(costs, axis=0).any():
        return best
    cut, found = cuts.cut(best.split, best.tile_rows, best.tile_columns), []
    for pieces in (contiguous(layer.blocks, best.rounds, device.rows), refined(best.pieces, costs), best.pieces):
        dealt = _Dealt(layer, device, parameter_bytes, pieces, best.input_chunks)
        tiling = _lay_out(layer, dealt, cut)
        if tiling.stop <= buffer_bytes(device) and _crowds(tiling, device) <= _crowds(best, device):
            moves = cut.tiles * sum(len(piece.runs) for row in pieces for piece in row)
            seconds, left = _seconds(layer, device, dealt, cuts, cut, tiling, spare)
            tiling = replace(tiling, seconds=seconds, idle=left)
            found.append((tiling.seconds + moves * _MOVE_CYCLES / device.clock_hz, tiling))
    return min(found, key=lambda one: one[0])[1]


def _costs(layer: Layer, device: DeviceSpec, input_chunks: int) -> np.ndarray:
    """What each output block costs a core by input chunk, in integers that are proportional to cycles."""
    if not layer.sums_channels:
        return np.ones((layer.blocks, 1), np.int64)
    before, (macs, elements) = layer.kept_from[0], (device.core.macs_per_cycle, device.core.elementwise_per_cycle)
    kept = np.diff(before[_edges(len(layer.kept), input_chunks)], axis=0).T
    costs = layer.work(1, 1) * kept * elements
    costs[:, -1] += layer.added(1, 1) * macs
    return costs


def _edges(total: int, parts: int) -> np.ndarray:
    """Where the even parts of `total` blocks begin, and where the last one ends."""
    return np.array([0, *(stop for _, stop in share(total, parts))])


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


def _candidates(
    layer: Layer, device: DeviceSpec, parameter_bytes: int, cuts: Cuts, spare: Spare
) -> list[tuple[float, _Dealt, Cut]]:
    """Ways to deal and to cut a layer with the least time of each, the most promising first."""
    found: list[tuple[float, _Dealt, Cut]] = []
    every = list(_splits(layer, device, cuts))
    by_pixels = [cut for split in every if split.parts == device.columns for cut in cuts.of(split)]
    channel_parts = -(-layer.blocks // device.rows)
    for input_chunks in _input_chunk_counts(layer):
        costs = _costs(layer, device, input_chunks)
        for rounds in sorted({-(-channel_parts // size) for size in divisions(channel_parts)}):
            for dealt in _deals(layer, device, parameter_bytes, rounds, costs):
                found += dealt.with_bounds(by_pixels, spare)
    for split in every:
        if split.parts < device.columns:
            by_channels = list(cuts.of(split))
            for dealt in _dealt_to_parts(layer, device, parameter_bytes, device.columns // split.parts):
                found += dealt.with_bounds(by_channels, spare)
    return sorted(found, key=lambda one: one[0])


def _splits(layer: Layer, device: DeviceSpec, cuts: Cuts) -> Iterator[Split]:
    """The ways to split a layer's output, but for those that are worse than one before in all respects."""
    if layer.grain > 1 or device.descriptors:  # DMAs with limits reach neighbours' memory only
        yield Split(device.columns)
        return
    found: list[tuple[int, tuple[float, ...]]] = []
    channels = not (layer.has_weights or layer.sums_channels)
    for split in splits(cuts.rows, layer.output_shape[1], device.columns, channels):
        whole = cuts.whole(split)
        work = (whole.pixels, whole.written, *whole.read)
        if not any(parts == split.parts and all(map(operator.le, less, work)) for parts, less in found):
            found.append((split.parts, work))
            yield split


def _dealt_to_parts(layer: Layer, device: DeviceSpec, parameter_bytes: int, parts: int) -> Iterator[_Dealt]:
    """Ways to deal channel blocks to the cores of several columns."""
    most = -(-layer.blocks // (device.rows * parts))
    for rounds in sorted({-(-most // size) for size in divisions(most)}):
        yield _Dealt(layer, device, parameter_bytes, by_parts(layer.blocks, rounds, parts, device.rows), 1)


def _deals(layer: Layer, device: DeviceSpec, parameter_bytes: int, rounds: int, costs: np.ndarray) -> list[_Dealt]:
    """Shares of neighbours, even ones where they cost less, or both where each has its advantage: where groups read
    different channels, rows that share a group load more.
    """
    input_chunks = costs.shape[1]
    neighbours = contiguous(layer.blocks, rounds, device.rows)
    first = _Dealt(layer, device, parameter_bytes, neighbours, input_chunks)
    if not np.ptp(costs, axis=0).any():
        return [first]
    even = balanced(costs, rounds, device.rows)
    second = _Dealt(layer, device, parameter_bytes, even, input_chunks)
    if second.total_cycles >= first.total_cycles:
        return [first]
    return [second] if second.total_loads <= first.total_loads else [first, second]


class _Dealt:
    """Chunk sizes, kept blocks and blocks to load of a way to deal the output blocks.

    `chunks`, `kept` by (round, row, input chunk); `loads` by source, blocks that a column of cores loads of each pixel
    by (round, input chunk); `most`: blocks of a pixel in a core, by source.
    """

    def __init__(
        self, layer: Layer, device: DeviceSpec, parameter_bytes: int, pieces: Pieces, input_chunks: int
    ) -> None:
        self.pieces, self.rounds, self.input_chunks = pieces, len(pieces), input_chunks
        self._layer, self._device = layer, device
        self._ahead: dict[tuple[int, int], Ahead] = {}
        blocks = np.array([[piece.blocks for piece in row] for row in self.pieces])
        self.outputs = int(blocks.max())
        # Blocks of each pixel by round, of the column of cores that has most.
        self.written = blocks.reshape(self.rounds, -1, device.rows).sum(axis=2).max(axis=1)
        if layer.sums_channels:
            self._sum_channels()
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
        # Of all rounds and input chunks together.
        self.total_cycles, self.total_weight_bytes = float(self.cycles.sum()), int(self.weight_bytes.sum())
        self.total_loads, self.total_written = [int(loads.sum()) for loads in self.loads], int(self.written.sum())

    def _channel_by_channel(self, parameter_bytes: int) -> None:
        layer = self._layer
        self.kept = np.array([[[piece.blocks] for piece in row] for row in self.pieces])
        self.chunks = np.zeros_like(self.kept)
        self.chunks[0] = parameter_bytes
        self.loads = np.zeros((len(layer.sources), self.rounds, 1), np.int64)
        self.most = [0] * len(layer.sources)
        for place, source in enumerate(layer.sources):
            for k, cores in enumerate(self.pieces):
                for first in range(0, len(cores), self._device.rows):
                    column = cores[first : first + self._device.rows]
                    sizes = [needs.blocks for needs in {*input_blocks(layer, source, column, (0, 0))}]
                    self.loads[place, k] = max(self.loads[place, k, 0], sum(sizes))
                    self.most[place] = max(self.most[place], *sizes)

    def _sum_channels(self) -> None:
        """As `input_blocks` and `Layer.weight_blocks` have it, for all pieces and chunks at once."""
        parts = [piece for row in self.pieces for piece in row]
        order = np.array([block for piece in parts for block in piece.numbers])
        starts = np.cumsum([0, *(piece.blocks for piece in parts)])
        edges = _edges(len(self._layer.kept), self.input_chunks)
        self.kept, loads, most = _sum_blocks(*self._layer.kept_from, order, starts, self._device.rows, edges)
        self.chunks, self.loads, self.most = np.zeros_like(self.kept), loads[None], [most]
        if self._layer.residual is not None:  # comes with the last chunk
            added = np.zeros_like(loads)
            added[:, -1] = self.written
            self.loads = np.stack([loads, added])
            self.most.append(self.outputs)

    def ahead(self, ring: Ring, spare: Spare) -> Ahead:
        """Chunks that the step before loads."""
        slots, room = ring.slots, ring.room(spare.bytes)
        if (slots, room) not in self._ahead:  # asked again for every tiling
            first = np.resize(self.weight_bytes[0], 2 * slots)
            chunks = first if self.input_chunks > 1 else self.weight_bytes[:, 0]
            self._ahead[slots, room] = ahead(chunks, self._device, slots, room, spare.idle)
        return self._ahead[slots, room]

    def with_bounds(self, cuts: list[Cut], spare: Spare) -> Iterator[tuple[float, _Dealt, Cut]]:
        """Each cut with the time of the busiest unit and of all calls: no pipeline of such tiles is shorter."""
        rate = self._device.rate
        tiles, pixels, read, written = (np.array([cut[n] for cut in cuts]) for n in (3, 4, 6, 7))
        weight_bytes = self.total_weight_bytes * (tiles if self.input_chunks > 1 else np.ones_like(tiles))
        least = np.maximum.reduce(
            (
                read @ np.array(self.total_loads) * (BLOCK / rate("LOADFM")),
                pixels * (self.total_cycles / self._device.clock_hz),
                written * (self.total_written * BLOCK / rate("WRITEFM")),
                (weight_bytes - self.ahead(_TWO_SLOTS, spare).bytes) / min(rate("LOADW"), rate("LOADWM")),
            )
        )
        least += tiles * self.call_seconds
        return ((seconds, self, cut) for seconds, cut in zip(least.tolist(), cuts))

    @property
    def call_seconds(self) -> float:
        """What the calls of kernels for a tile take."""
        return self.rounds * self.input_chunks * _CALL_CYCLES / self._device.clock_hz


@nb.njit(cache=True)
def _sum_blocks(before, first, last, order, starts, rows, edges):  # noqa: ANN001
    """What pieces keep and read of a convolution (see `Layer.kept_from`).

    Args:
        before: kept blocks of each output block before an input block.
        first: the first kept one from there on.
        last: the last kept one before.
        order: the output blocks of all pieces.
        starts: where each piece begins in `order`; one more entry for the end.
        rows: pieces of a round.
        edges: where each input chunk begins; one more entry for the end.

    Returns:
        Kept blocks by (round, row, input chunk), blocks of each pixel that a column of cores loads by (round, input
        chunk), and the most of them in a core.
    """
    rounds, chunks = (len(starts) - 1) // rows, len(edges) - 1
    kept, loads, most = np.zeros((rounds, rows, chunks), np.int64), np.zeros((rounds, chunks), np.int64), 0
    low, high = np.empty(rows, np.int64), np.empty(rows, np.int64)
    for k in range(rounds):
        for j in range(chunks):
            start, stop, apart, widest = edges[j], edges[j + 1], 0, 0
            for r in range(rows):
                low[r], high[r] = len(before), 0
                for block in order[starts[k * rows + r] : starts[k * rows + r + 1]]:
                    kept[k, r, j] += before[stop, block] - before[start, block]
                    low[r], high[r] = min(low[r], first[start, block]), max(high[r], last[stop, block] + 1)
                if not kept[k, r, j]:
                    low[r], high[r] = len(before), 0
                elif not ((low[:r] == low[r]) & (high[:r] == high[r])).any():
                    apart += high[r] - low[r]
                    widest = max(widest, high[r] - low[r])
            together = max(high.max() - low.min(), 0)
            loads[k, j] = min(apart, together)
            most = max(most, widest if apart <= together else together)
    return kept, loads, most


def input_blocks(layer: Layer, source: Source, row_pieces: Sequence[Piece], chunk: tuple[int, int]) -> list[Piece]:
    """The blocks of an input that each row of cores needs for its piece and a chunk of input channels [start, stop).

    Of a convolution, all rows get what any of them needs, from the first to the last, at once, or, where that is no
    more, each row its own: groups read different channels.
    """
    if not layer.sums_channels or source is layer.residual:
        spans = [[source.blocks(*run) for run in piece.runs] for piece in row_pieces]
        return [Piece(tuple(span for span in own if span[0] < span[1])) for own in spans]
    own = [_one_run(layer.needed(chunk, piece.numbers)) for piece in row_pieces]
    used = {piece.span for piece in own if piece.runs}
    if not used:
        return own
    together = min(start for start, _ in used), max(stop for _, stop in used)
    apart = sum(stop - start for start, stop in used) <= together[1] - together[0]
    return own if apart else [_one_run(together)] * len(own)


def _one_run(span: tuple[int, int]) -> Piece:
    return Piece((span,) if span[0] < span[1] else ())


def _lay_out(layer: Layer, dealt: _Dealt, cut: Cut) -> Tiling:
    """Buffers of a core for tiles of a size."""
    tiles, height, columns = cut.tiles * dealt.rounds, cut.rows, cut.columns
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
        pieces=dealt.pieces,
        tile_rows=height,
        tile_columns=columns,
        input_chunks=dealt.input_chunks,
        weights=ring(min(2, chunks), int(dealt.chunks.max())),
        inputs=tuple(input_ring(source, blocks) for source, blocks in zip(layer.sources, dealt.most)),
        output=ring(min(2, tiles), height * columns * dealt.outputs * BLOCK),
        sums=ring(1, 4 * height * columns * dealt.outputs * BLOCK if dealt.input_chunks > 1 else 0),
        split=cut.split,
    )


def _seconds(
    layer: Layer, device: DeviceSpec, dealt: _Dealt, cuts: Cuts, cut: Cut, tiling: Tiling, spare: Spare
) -> tuple[float, Idle]:
    """Time of the tiling's pipeline: the widest column, in each step the slowest row of cores; and how long links of
    weights have nothing to do at its end.
    """
    sizes = cuts.sizes(cut.split, cut.rows, cut.columns)
    pixels = np.concatenate([np.outer(wide, high).ravel() for high, wide in sizes])
    load = np.zeros((dealt.rounds, pixels.size, dealt.input_chunks))
    for place, (source, blocks) in enumerate(zip(layer.sources, dealt.loads)):
        if not source.broadcast:
            under = [
                [list(map(axis.most, cut)) for axis, cut in zip((source.rows, source.columns), one)] for one in sizes
            ]
            in_pixels = np.concatenate([np.outer(wide, high).ravel() for high, wide in under])
            in_pixels = in_pixels * (cut.read[place] / cut.under[place])
            load += in_pixels[None, :, None] * blocks[:, None, :] * (BLOCK / device.rate("LOADFM"))
    compute = np.ceil(pixels[None, :, None] * dealt.cycles[:, None, :]) / device.clock_hz
    through = pixels * (cut.written / cut.pixels)
    write = through[None, :] * dealt.written[:, None] * (BLOCK / device.rate("WRITEFM"))
    there = dealt.ahead(tiling.weights, spare)
    seconds, loaded, sent = pipeline(
        load, compute, write, dealt.weight_bytes / device.rate("LOADW"), dealt.weight_bytes / device.rate("LOADWM"),
        tiling.weights.slots, tiling.input_slots, tiling.output.slots, there.loaded, there.sent,
    )  # fmt: skip
    return seconds, Idle(seconds - loaded, seconds - sent)
