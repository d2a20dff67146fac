"""The instructions of a step: one band of one layer, every byte moved and every tile computed.

Locks, by tile: a core's `in_free`/`in_full` and `out_free`/`out_full` count ring slots; a memory tile's `ready` tells
the columns that read it that LOAD is done, its `done` tells WRITE that the column's results are there. Those of weights
are told in weight_stream.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bstf_compiler.aie import tiling
from bstf_compiler.aie.boxes import ddr_box, part, slot, slot_of_round, tile_box
from bstf_compiler.aie.code import WEIGHTS, WEIGHTS_AHEAD, Step
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import FIRST, LAST, Access, Compute, LockAction, Move, Transfer
from bstf_compiler.aie.layer import cut_runs, share
from bstf_compiler.aie.memory import Place, Stage, tile_spans
from bstf_compiler.aie.reach import BLOCK, Scaled, Sliding, Source
from bstf_compiler.aie.tiling import Piece, Ring, Tiling
from bstf_compiler.aie.weight_stream import Chunk, WeightStream


@dataclass(frozen=True)
class _Run:
    """`count` tiles in a row of equal shape: output rows start at `rows[0]` and advance by their number."""

    count: int
    rows: tuple[int, int]
    columns: tuple[int, int]

    def after(self, tiles: int) -> tuple[int, int]:
        """Output rows of the tile that many tiles after the first."""
        height = self.rows[1] - self.rows[0]
        return self.rows[0] + tiles * height, self.rows[1] + tiles * height


class StepWriter:
    """Writes the instructions of one band of one layer.

    Args:
        device: the array.
        places: where tensors live.
        stage: the layer and its memory.
        tiles: how it is cut.
        chunks: its packed chunks by (round, row of cores, input chunk).
        number: which of the stage's bands.
    """

    def __init__(
        self, device: DeviceSpec, places: dict[str, Place], stage: Stage, tiles: Tiling,
        chunks: dict[tuple[int, int, int], Chunk], number: int,
    ) -> None:  # fmt: skip
        self._device, self._places, self._stage, self._tiles = device, places, stage, tiles
        self._chunks, self._number, self._layer = chunks, number, stage.layer
        self._band, self._last = stage.bands[number], number == len(stage.bands) - 1
        self._pieces = tiling.pieces(stage.layer, device, tiles.rounds)
        self._needs = self._input_spans_of_cores()
        self._spans = share(stage.layer.output_shape[1], device.columns)
        self._columns = [c for c, (start, stop) in enumerate(self._spans) if stop > start]
        self._rows = [r for r in range(device.rows) if self._pieces[0][r].blocks]
        self._holders: dict[tuple[Sliding | Scaled, tuple[int, int]], list[tuple[int, int, int]]] = {}
        cores = {row: tuple(_core(column, row) for column in self._columns) for row in self._rows}
        orders = {row: self._chunk_order(row) for row in self._rows}
        self.weights = WeightStream(device, tiles.weights, stage.chunks, orders, cores)
        self.following: WeightStream | None = None
        self._step: Step

    def step(self, stage_index: int) -> Step:
        """All instructions of the band, with the LOAD of the next one, the WRITE of the one before, and the first
        weights of the layer that is `following`.
        """
        layer = self._layer
        self._step = Step(layer.name, layer.op, layer.output, self._band, stage_index, keeps=self._last)
        self._step.buffers = self._buffers()
        self._declare_locks()
        self._load()
        self._step.instructions += self.weights.transfers()
        if self.following is not None:
            self._load_ahead(self.following)
        for column in self._columns:
            self._column(column)
        self._write()
        return self._step

    def _load_ahead(self, following: WeightStream) -> None:
        """The first weights of the next layer, in this step's queues."""
        self._step.locks |= following.locks_ahead()
        self._step.instructions += following.transfers_ahead()
        if following.sent:
            self._step.buffers.append((WEIGHTS_AHEAD, following.ring.address, following.ring.total))

    def _input_spans_of_cores(self) -> dict[tuple[int, int], list[list[Piece]]]:
        """The input blocks that cores need by (round, input chunk): of each source, by row of cores."""
        layer = self._layer
        chunks = share(layer.sources[0].shape[2], self._tiles.input_chunks)
        return {
            (k, j): [
                [Piece(*span) for span in tiling.input_spans(layer, source, pieces, chunk)] for source in layer.sources
            ]
            for k, pieces in enumerate(self._pieces)
            for j, chunk in enumerate(chunks)
        }

    # --- locks and buffers ---

    def _buffers(self) -> list[tuple[str, int, int]]:
        tiles = self._tiles
        rings = [(WEIGHTS, tiles.weights), ("output", tiles.output), ("sums", tiles.sums)]
        rings += [(f"input {i}", ring) for i, ring in enumerate(tiles.inputs)]
        return [(name, ring.address, ring.stop - ring.address) for name, ring in rings if ring.bytes]

    def _declare_locks(self) -> None:
        locks, tiles = self._step.locks, self._tiles
        for column in self._columns:
            for row in self._rows:
                core = _core(column, row)
                locks |= {f"{core}:in_free": tiles.input_slots, f"{core}:in_full": 0}
                locks |= {f"{core}:out_free": tiles.output.slots, f"{core}:out_full": 0}
        locks |= self.weights.locks()
        for tile in self._device.activation_tiles:
            locks |= {f"m{tile}:ready": 0, f"m{tile}:done": 0}

    # --- DDR <-> memory tiles ---

    def _staged_sources(self, number: int) -> list[Source]:
        """The inputs in DDR of which a band reads rows, one a tensor."""
        found: dict[str, Source] = {}
        for source in self._layer.sources:
            start, stop, _ = source.rows.reach(*self._stage.bands[number])
            if stop > start and self._places[source.tensor].memory == "ddr":
                found.setdefault(source.tensor, source)
        return list(found.values())

    def _load(self) -> None:
        """LOAD: what the next band reads, while this one is computed; of the first band, what it reads itself."""
        if self._number == 0:
            self._load_band(0)
        if not self._last:
            self._load_band(self._number + 1)

    def _load_band(self, number: int) -> None:
        """The rows that a band reads of every input that lives in DDR, to its staging buffer."""
        readers = [tile for column in self._columns for tile in self._staged_tiles(column, number)]
        for tile in sorted(set(readers)):
            moves = []
            for source in self._staged_sources(number):
                start, stop, _ = source.rows.reach(*self._stage.bands[number])
                span = self._input_spans(source)[self._device.activation_tiles.index(tile)]
                if span[1] > span[0]:
                    box = ddr_box(self._places[source.tensor], (start, stop), span)
                    target = self._staging_box(source.tensor, number, f"m{tile}", stop - start, span, box.sizes[2])
                    moves.append(Move(box, target))
            give = (LockAction(f"m{tile}:ready", readers.count(tile)),) if number == self._number else ()
            self._emit(Transfer("LOAD", f"load.{tile}", tuple(moves), release=give))

    def _staged_tiles(self, column: int, number: int) -> list[int]:
        """The memory tiles with staged input columns of a column of cores."""
        sources = self._staged_sources(number)
        return sorted({tile for source in sources for tile, _, _ in self._held(source, self._spans[column])})

    def _held(self, source: Source, columns: tuple[int, int]) -> list[tuple[int, int, int]]:
        """The memory tiles that hold input columns under output columns, and these columns: (tile, start, stop)."""
        key = source.columns, columns  # asked again for every tile of a column
        if key not in self._holders:
            left, right, _ = _columns_under(source, columns)
            spans = zip(self._device.activation_tiles, self._input_spans(source))
            held = [(tile, max(left, start), min(right, stop)) for tile, (start, stop) in spans]
            self._holders[key] = [(tile, start, stop) for tile, start, stop in held if start < stop]
        return self._holders[key]

    def _input_spans(self, source: Source) -> list[tuple[int, int]]:
        """Columns of an input in each memory tile."""
        return tile_spans(source.shape[1], self._device)

    def _write(self) -> None:
        """WRITE: what the band before has made of an output that lives in DDR; of the last band, its own too."""
        if self._places[self._layer.output].memory == "ddr":
            if self._number:
                self._write_band(self._number - 1)
            if self._last:
                self._write_band(self._number)

    def _write_band(self, number: int) -> None:
        """A band's rows of the output, from its staging buffer."""
        place, band = self._places[self._layer.output], self._stage.bands[number]
        rows, length = band[1] - band[0], self._layer.blocks * BLOCK
        for tile, span in zip(self._device.activation_tiles, tile_spans(self._layer.output_shape[1], self._device)):
            writers = [column for column in self._columns if self._tile_of(column)[0] == tile]
            if not writers:
                continue
            staged = self._staging_box(self._layer.output, number, f"m{tile}", rows, span, length)
            whole = ddr_box(place, band, span)
            moves = []
            for before, first, blocks in cut_runs(self._layer.runs, 0, self._layer.blocks):
                moves.append(Move(part(staged, before, blocks), part(whole, first, blocks)))
            take = (LockAction(f"m{tile}:done", len(writers)),) if number == self._number else ()
            self._emit(Transfer("WRITE", f"write.{tile}", tuple(moves), acquire=take))

    def _tile_of(self, column: int) -> tuple[int, tuple[int, int]]:
        """The memory tile that a column of cores writes, and the output columns that it holds."""
        place = self._device.activation_tile(column)
        return self._device.activation_tiles[place], tile_spans(self._layer.output_shape[1], self._device)[place]

    def _staging_box(
        self, name: str, number: int, tile: str, rows: int, columns: tuple[int, int], length: int
    ) -> Access:
        width = columns[1] - columns[0]
        return Access((tile,), self._stage.staging_of(name, number), (rows, width, length), (width * length, length))

    # --- weights ---

    def _chunk_order(self, row: int) -> list[Chunk]:
        """The chunks of a row: one a round, or, summing in pieces, all pieces again for every tile."""
        tiles, order = self._tiles, []
        walks = len(self._runs(self._columns[0])) if tiles.input_chunks > 1 else 1
        for k in range(tiles.rounds):
            for _ in range(walks):
                order += [self._chunks.get((k, row, j)) for j in range(tiles.input_chunks)]
        return [chunk for chunk in order if chunk is not None]

    # --- one column of cores ---

    def _runs(self, column: int) -> list[_Run]:
        """The column's tiles in order, equal neighbours joined unless input channels come in chunks.

        Every column has as many tiles as the widest one, for all share the weights; where the pieces of a narrow column
        run out, its tiles are empty.
        """
        split = self._tiles.input_chunks > 1
        widest = max(stop - start for start, stop in self._spans)
        start, stop = self._spans[column]
        runs: list[_Run] = []
        for left, right in tiling.cuts(widest, self._tiles.tile_columns):
            columns = (min(start + left, stop), min(start + right, stop))
            for top, bottom in tiling.cuts(self._band[1] - self._band[0], self._tiles.tile_rows):
                rows = (self._band[0] + top, self._band[0] + bottom)
                if not split and runs and self._continues(runs[-1], rows, columns):
                    runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
                else:
                    runs.append(_Run(1, rows, columns))
        return runs

    def _continues(self, run: _Run, rows: tuple[int, int], columns: tuple[int, int]) -> bool:
        """Whether a tile has the shape of a run's tiles, at the place where the next one would be."""
        if columns != run.columns or rows != run.after(run.count):
            return False
        for source in self._layer.sources:
            start, stop, above = source.rows.reach(*run.rows)
            start2, stop2, above2 = source.rows.reach(*rows)
            if above != above2 or stop2 - stop != start2 - start or start2 - start != run.count * _advance(source, run):
                return False
        return True

    def _column(self, column: int) -> None:
        runs = self._runs(column)
        plan = [(k, run) for k in range(self._tiles.rounds) for run in runs]
        waits = self._staged_tiles(column, 0) if self._number == 0 else []  # later bands were loaded before
        ready = tuple(LockAction(f"m{tile}:ready", 1, FIRST) for tile in waits)
        if moves := self._broadcasts(column):
            self._emit(Transfer("LOADFM", f"loadfm.{column}", tuple(moves), acquire=ready))
            ready = ()
        tile = 0  # how many tiles came before: where the rings stand
        for position, (k, run) in enumerate(plan):
            active = [row for row in self._rows if self._pieces[k][row].blocks]
            for j in range(self._tiles.input_chunks):
                load = tile * self._tiles.input_chunks + j
                self._loadfm(column, k, run, j, load, active, ready)
                ready = ()
                for row in active:
                    self._comp(column, row, j, load, tile, position, plan)
            self._writefm(column, k, run, tile, active, final=position == len(plan) - 1)
            tile += run.count

    def _broadcasts(self, column: int) -> list[Move]:
        """The moves of what is one pixel for a whole image: once, for all rounds."""
        moves = []
        for place, (source, ring) in enumerate(zip(self._layer.sources, self._tiles.inputs)):
            if not source.broadcast:
                continue
            base, _, pixel = self._origin(source)
            for (k, _), needs in self._needs.items():
                for row, blocks in enumerate(needs[place]):
                    sizes = (1, 1, blocks.blocks * BLOCK)
                    if blocks.blocks:
                        box = Access(
                            (f"m{self._device.activation_tiles[0]}",),
                            base + blocks.start * BLOCK,
                            sizes,
                            (pixel, pixel),
                        )
                        moves.append(Move(box, replace(slot_of_round(ring, k, sizes), tiles=(_core(column, row),))))
        return moves

    def _loadfm(
        self, column: int, k: int, run: _Run, j: int, load: int, active: list[int], ready: tuple[LockAction, ...]
    ) -> None:
        """LOADFM: input tiles, from the memory tiles that hold them to the cores that need them."""
        moves = []
        for source, ring, needs, use in self._inputs(k, j, load):
            if source.broadcast:
                continue
            wanted: dict[Piece, list[str]] = {}  # cores that need the same channels get them at once
            for row in active:
                wanted.setdefault(needs[row], []).append(_core(column, row))
            for blocks, cores in wanted.items():
                moves += self._gather(source, ring, tuple(cores), run, blocks, use)
        acquire = [LockAction(f"{_core(column, row)}:in_free") for row in active]
        release = [LockAction(f"{_core(column, row)}:in_full") for row in active]
        self._emit(
            Transfer("LOADFM", f"loadfm.{column}", tuple(moves), run.count, (*acquire, *ready), tuple(release))
        )  # fmt: skip

    def _inputs(self, k: int, j: int, load: int) -> Iterator[tuple[Source, Ring, list[Piece], int]]:
        """What cores read in a load: source, buffer, blocks by row of cores, how many tiles used the buffer before. A
        residual comes once a tile, with the last chunk of input channels.
        """
        chunks = self._tiles.input_chunks
        for source, ring, needs in zip(self._layer.sources, self._tiles.inputs, self._needs[k, j]):
            if source is not self._layer.residual:
                yield source, ring, needs, load
            elif j == chunks - 1:
                yield source, ring, needs, load // chunks

    def _origin(self, source: Source) -> tuple[int, int, int]:
        """Where a source lies in the memory tiles: address, the image row there, bytes from pixel to pixel."""
        place = self._places[source.tensor]
        if place.memory == "ddr":
            return self._stage.staging_of(source.tensor, self._number), source.rows.reach(*self._band)[0], place.length
        return place.address, 0, place.pixel

    def _gather(
        self, source: Source, ring: Ring, cores: tuple[str, ...], run: _Run, blocks: Piece, load: int
    ) -> list[Move]:
        """The moves that bring one input tile together from the memory tiles that hold its columns."""
        base, origin, pixel = self._origin(source)
        top, bottom, _ = source.rows.reach(*run.rows)
        length = blocks.blocks * BLOCK
        if top >= bottom or not length:
            return []
        left, right, _ = _columns_under(source, run.columns)
        spans = self._input_spans(source)
        moves = []
        for tile, first, last in self._held(source, run.columns):
            start, stop = spans[self._device.activation_tiles.index(tile)]
            pitch = (stop - start) * pixel
            box = Access(
                (f"m{tile}",),
                base + (top - origin) * pitch + (first - start) * pixel + blocks.start * BLOCK,
                (bottom - top, last - first, length),
                (pitch, pixel),
                advance=_advance(source, run) * pitch if run.count > 1 else 0,
            )
            target = Access(
                cores,
                ring.address + (first - left) * length,
                box.sizes,
                ((right - left) * length, length),
                advance=ring.bytes, ring=ring.slots, first=load % ring.slots,
            )  # fmt: skip
            moves.append(Move(box, target))
        return moves

    def _input_box(self, source: Source, ring: Ring, core: str, k: int, run: _Run, blocks: Piece, load: int) -> Access:
        """A core's input tile."""
        if source.broadcast:
            return replace(slot_of_round(ring, k, (1, 1, blocks.blocks * BLOCK)), tiles=(core,))
        top, bottom, _ = source.rows.reach(*run.rows)
        left, right, _ = _columns_under(source, run.columns)
        return tile_box((core,), ring, (bottom - top, right - left, blocks.blocks * BLOCK), load)

    def _comp(
        self, column: int, row: int, j: int, load: int, tile: int, position: int, plan: list[tuple[int, _Run]]
    ) -> None:
        """COMP: one core computes the run's tiles."""
        layer, tiles, core, (k, run) = self._layer, self._tiles, _core(column, row), plan[position]
        piece, needs = self._pieces[k][row], self._needs[k, j][0][row]
        span = needs.start, needs.stop
        begin, finish = j == 0, j == tiles.input_chunks - 1
        chunk, use = self._chunks[k if layer.has_weights else 0, row, j], 0
        if layer.has_weights:
            use = load if tiles.input_chunks > 1 else k
        acquire, release = [LockAction(f"{core}:in_full")], [LockAction(f"{core}:in_free")]
        takes, gives = self._weight_changes(row, position, plan)
        if takes and self.weights.waits(row, use):
            acquire.append(LockAction(f"{core}:w_full", 1, FIRST))
        if gives and self.weights.frees(row, use):
            release.append(LockAction(f"{core}:w_free", 1, LAST))
        if finish:
            acquire.append(LockAction(f"{core}:out_free"))
            release.append(LockAction(f"{core}:out_full"))
        inputs = [
            self._input_box(source, ring, core, k, run, blocks[row], use)
            for source, ring, blocks, use in self._inputs(k, j, load)
        ]
        rows, columns = run.rows[1] - run.rows[0], run.columns[1] - run.columns[0]
        first = layer.sources[0]
        blocks = layer.weight_blocks(span, (piece.start, piece.stop))
        self._emit(
            Compute(
                unit=f"core.{column}.{row}",
                op=layer.op,
                inputs=tuple(inputs),
                parameters=slot((core,), tiles.weights, chunk.bytes, use, moves_on=False),
                output=tile_box((core,), tiles.output, (rows, columns, piece.blocks * BLOCK), tile),
                block=piece.start,
                kernel=layer.window.kernel,
                strides=layer.window.strides,
                dilation=layer.window.dilation,
                padding=(first.rows.reach(*run.rows)[2], _columns_under(first, run.columns)[2]),
                work=layer.work(rows * columns, blocks),
                added=layer.added(rows * columns, piece.blocks) if finish else 0,
                macs=layer.macs(rows * columns, span, (piece.start, piece.stop)),
                scratch=tiles.sums.address,
                begin=begin,
                finish=finish,
                iterations=run.count,
                acquire=tuple(acquire),
                release=tuple(release),
            )
        )

    def _weight_changes(self, row: int, position: int, plan: list[tuple[int, _Run]]) -> tuple[bool, bool]:
        """Whether a core takes a new chunk at a position of the plan, and whether it is done with it there."""
        if self._tiles.input_chunks > 1:
            return True, True
        if self._layer.has_weights:
            before, now, after = (plan[i][0] if 0 <= i < len(plan) else None for i in range(position - 1, position + 2))
            return before != now, after != now
        return position == 0, all(not self._pieces[k][row].blocks for k, _ in plan[position + 1 :])

    def _writefm(self, column: int, k: int, run: _Run, tile: int, active: list[int], final: bool) -> None:
        """WRITEFM: output tiles of a column's cores to the memory tile of that column."""
        layer, place, ring = self._layer, self._places[self._layer.output], self._tiles.output
        memtile, (start, stop) = self._tile_of(column)
        base, origin, pixel, runs = place.address, 0, place.pixel, layer.runs
        if place.memory == "ddr":  # the staging buffer has no gaps between runs
            base, origin = self._stage.staging_of(layer.output, self._number), self._band[0]
            pixel = layer.blocks * BLOCK
            runs = ((0, layer.blocks),)
        pitch = (stop - start) * pixel
        rows, columns = run.rows[1] - run.rows[0], run.columns[1] - run.columns[0]
        moves = []
        for row in active:
            piece = self._pieces[k][row]
            made = tile_box((_core(column, row),), ring, (rows, columns, piece.blocks * BLOCK), tile)
            for before, first, blocks in cut_runs(runs, piece.start, piece.stop):
                source = part(made, before, blocks)
                target = Access(
                    (f"m{memtile}",),
                    base + (run.rows[0] - origin) * pitch + (run.columns[0] - start) * pixel + first * BLOCK,
                    source.sizes,
                    (pitch, pixel),
                    advance=rows * pitch if run.count > 1 else 0,
                )
                if target.bytes:
                    moves.append(Move(source, target))
        acquire = tuple(LockAction(f"{_core(column, row)}:out_full") for row in active)
        release = [LockAction(f"{_core(column, row)}:out_free") for row in active]
        if final and self._last and place.memory == "ddr":
            release.append(LockAction(f"m{memtile}:done", 1, LAST))
        self._emit(Transfer("WRITEFM", f"writefm.{column}", tuple(moves), run.count, acquire, tuple(release)))

    def _emit(self, instruction: Transfer | Compute) -> None:
        self._step.instructions.append(instruction)


def _core(column: int, row: int) -> str:
    return f"c{column}.{row}"


def _advance(source: Source, run: _Run) -> int:
    """Input rows from a run's first tile to its second."""
    return source.rows.reach(*run.after(1))[0] - source.rows.reach(*run.rows)[0]


def _columns_under(source: Source, columns: tuple[int, int]) -> tuple[int, int, int]:
    """Input columns under output columns; none under none."""
    return source.columns.reach(*columns) if columns[1] > columns[0] else (0, 0, 0)
