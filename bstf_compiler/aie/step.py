"""The instructions of a step: one band of one layer, every byte moved and every tile computed.

Locks, by tile: a core's `in_free`/`in_full` and `out_free`/`out_full` count ring slots; a memory tile's `ready` tells
the columns that read it that LOAD is done, its `done` tells WRITE that the column's results are there. Those of weights
are told in weight_stream.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bstf_compiler.aie import layout, tiling
from bstf_compiler.aie.boxes import ddr_box, slot, slot_of_round, tile_box, within
from bstf_compiler.aie.code import WEIGHTS, WEIGHTS_AHEAD, Step
from bstf_compiler.aie.cutting import runs
from bstf_compiler.aie.dealing import Piece
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import FIRST, LAST, Access, Compute, LockAction, Move, Transfer
from bstf_compiler.aie.layer import cut_runs, share
from bstf_compiler.aie.layout import Layout
from bstf_compiler.aie.memory import Place, Stage, layout_of
from bstf_compiler.aie.reach import BLOCK, Scaled, Sliding, Source
from bstf_compiler.aie.splitting import Region
from bstf_compiler.aie.tiling import Ring, Tiling
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
        self._pieces = self._pieces_of_columns()
        self._needs = self._input_blocks_of_cores()
        self._regions = tiles.split.regions(self._band[1] - self._band[0], stage.layer.output_shape[1], device.columns)
        busy = [[column[0][row].blocks > 0 for row in range(device.rows)] for column in self._pieces]
        self._columns = [c for c, own in enumerate(self._regions) if any(map(_area, own)) and any(busy[c])]
        self._rows = [r for r in range(device.rows) if any(column[r] for column in busy)]
        cores = {row: tuple(_core(column, row) for column in self._columns if busy[column][row]) for row in self._rows}
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
            self._step.buffers.append((WEIGHTS_AHEAD, *following.ring.first_slots(following.sent)))

    def _pieces_of_columns(self) -> list[list[tuple[Piece, ...]]]:
        """The output blocks of each core by column, round and row."""
        columns, rows = self._device.columns, self._device.rows
        parts = [self._tiles.split.channel_part(column, columns) for column in range(columns)]
        return [[pieces[part * rows : (part + 1) * rows] for pieces in self._tiles.pieces] for part in parts]

    def _input_blocks_of_cores(self) -> list[dict[tuple[int, int], list[list[Piece]]]]:
        """The input blocks that cores need by column, and (round, input chunk): of each source, by row of cores."""
        layer = self._layer
        chunks = share(layer.sources[0].shape[2], self._tiles.input_chunks)
        found: dict[tuple[tuple[Piece, ...], ...], dict[tuple[int, int], list[list[Piece]]]] = {}
        for column in map(tuple, self._pieces):
            if column not in found:
                found[column] = {
                    (k, j): [tiling.input_blocks(layer, source, pieces, chunk) for source in layer.sources]
                    for k, pieces in enumerate(column)
                    for j, chunk in enumerate(chunks)
                }
        return [found[tuple(column)] for column in self._pieces]

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
        moves: dict[int, list[Move]] = {tile: [] for tile in sorted(set(readers))}
        for source in self._staged_sources(number):
            (start, stop, _), (_, width, blocks) = source.rows.reach(*self._stage.bands[number]), source.shape
            whole = ddr_box(self._places[source.tensor], (start, stop), (0, width))
            boxes = self._staged_source(source, number).boxes((start, stop), (0, width), (0, blocks))
            for column, block, box in boxes:
                if (tile := int(box.tiles[0][1:])) in moves:
                    moves[tile].append(Move(within(whole, column, block, box.sizes), box))
        for tile, own in moves.items():
            give = (LockAction(f"m{tile}:ready", readers.count(tile)),) if number == self._number else ()
            self._emit(Transfer("LOAD", f"load.{tile}", tuple(own), release=give))

    def _staged_tiles(self, column: int, number: int) -> list[int]:
        """The memory tiles with staged input columns of a column of cores."""
        tiles: set[int] = set()
        for source in self._staged_sources(number):
            where = self._staged_source(source, number)
            for (top, bottom), columns in self._regions[column]:
                if bottom > top:
                    tiles.update(where.tiles(_reach(source.columns, columns)[:2]))
        return sorted(tiles)

    def _staged_source(self, source: Source, number: int) -> Layout:
        """Where a band's rows of an input that lives in DDR are staged."""
        first = source.rows.reach(*self._stage.bands[number])[0]
        return self._staged(source.tensor, number, first, *source.shape[1:])

    def _staged(self, tensor: str, number: int, row: int, width: int, blocks: int) -> Layout:
        own = layout.parts(width, blocks, self._device)
        return Layout(self._stage.staging_of(tensor, number), row, blocks * BLOCK, 0, own)

    def _source(self, source: Source) -> Layout:
        """Where a source lies in the memory tiles."""
        place = self._places[source.tensor]
        if place.memory == "ddr":
            return self._staged_source(source, self._number)
        return layout_of(place, self._device)

    def _output(self, number: int) -> Layout:
        """Where an output lies in the memory tiles; that of a band, if it lives in DDR, without gaps between runs."""
        place, layer = self._places[self._layer.output], self._layer
        if place.memory == "ddr":
            return self._staged(layer.output, number, self._stage.bands[number][0], place.shape[1], layer.blocks)
        return layout_of(place, self._device)

    def _turned(self, column: int, where: Layout, columns: tuple[int, int]) -> Layout:
        """What lies under some columns; columns of cores with the same ones begin in different places."""
        met = where.under(columns)
        _, one = self._tiles.split.place(column, self._device.columns)
        first = one * len(met.parts) * self._tiles.split.across // self._device.columns
        return replace(met, parts=met.parts[first:] + met.parts[:first])

    def _write(self) -> None:
        """WRITE: what the band before has made of an output that lives in DDR; of the last band, its own too."""
        if self._places[self._layer.output].memory == "ddr":
            if self._number:
                self._write_band(self._number - 1)
            if self._last:
                self._write_band(self._number)

    def _write_band(self, number: int) -> None:
        """A band's rows of the output, from its staging buffer."""
        place, band, layer = self._places[self._layer.output], self._stage.bands[number], self._layer
        width = layer.output_shape[1]
        writers = [tile for column in self._columns for tile in self._tiles_of(column)]
        moves: dict[int, list[Move]] = {tile: [] for tile in sorted(set(writers))}
        whole, staged = ddr_box(place, band, (0, width)), self._output(number)
        for before, first, count in cut_runs(layer.runs, 0, layer.blocks):
            for column, block, box in staged.boxes(band, (0, width), (before, before + count)):
                if (tile := int(box.tiles[0][1:])) in moves:
                    moves[tile].append(Move(box, within(whole, column, first + block - before, box.sizes)))
        for tile, own in moves.items():
            take = (LockAction(f"m{tile}:done", writers.count(tile)),) if number == self._number else ()
            self._emit(Transfer("WRITE", f"write.{tile}", tuple(own), acquire=take))

    def _tiles_of(self, column: int) -> list[int]:
        """The memory tiles that a column of cores writes."""
        where = self._output(self._number)
        spans = [columns for (top, bottom), columns in self._regions[column] if bottom > top]
        return list(dict.fromkeys(tile for columns in spans for tile in where.tiles(columns)))

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

        Every column has as many tiles as the largest one, for all share the weights; where the pixels of a smaller
        column run out, its tiles are empty.
        """
        split = self._tiles.input_chunks > 1
        runs: list[_Run] = []
        for rows, columns in self._tiles_of_regions(column):
            if not split and runs and self._continues(runs[-1], rows, columns):
                runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
            else:
                runs.append(_Run(1, rows, columns))
        return runs

    def _tiles_of_regions(self, column: int) -> Iterator[Region]:
        """The tiles of what a column computes, of which the first column has most."""
        for own, ((top, bottom), (left, right)) in zip(self._regions[column], self._regions[0]):
            for columns in runs(0, right - left, self._tiles.tile_columns):
                for rows in runs(0, bottom - top, self._tiles.tile_rows):
                    (first, last), span = (
                        [min(start + at, stop) for at in cut] for cut, (start, stop) in zip((rows, columns), own)
                    )
                    yield (self._band[0] + first, self._band[0] + last), (span[0], span[1])

    def _continues(self, run: _Run, rows: tuple[int, int], columns: tuple[int, int]) -> bool:
        """Whether a tile has the shape of a run's tiles, at the place where the next one would be."""
        if columns != run.columns or rows != run.after(run.count):
            return False
        for source in self._layer.sources:
            start, stop, above = _reach(source.rows, run.rows)
            start2, stop2, above2 = _reach(source.rows, rows)
            if above != above2 or stop2 - stop != start2 - start or start2 - start != run.count * _advance(source, run):
                return False
        return True

    def _column(self, column: int) -> None:
        runs = self._runs(column)
        plan = [(k, run) for k in range(self._tiles.rounds) for run in runs]
        pieces = self._pieces[column]
        waits = self._staged_tiles(column, 0) if self._number == 0 else []  # later bands were loaded before
        ready = tuple(LockAction(f"m{tile}:ready", 1, FIRST) for tile in waits)
        if moves := self._broadcasts(column):
            self._emit(Transfer("LOADFM", f"loadfm.{column}", tuple(moves), acquire=ready))
            ready = ()
        tile = 0  # how many tiles came before: where the rings stand
        for position, (k, run) in enumerate(plan):
            active = [row for row in self._rows if pieces[k][row].blocks]
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
            for (k, _), needs in self._needs[column].items():
                for row, blocks in enumerate(needs[place]):
                    there = slot_of_round(ring, k, (1, 1, blocks.blocks * BLOCK))
                    there = replace(there, tiles=(_core(column, row),))
                    for _, block, box in self._source(source).boxes((0, 1), (0, 1), blocks.span):
                        moves.append(Move(box, within(there, 0, block - blocks.span[0], box.sizes)))
        return moves

    def _loadfm(
        self, column: int, k: int, run: _Run, j: int, load: int, active: list[int], ready: tuple[LockAction, ...]
    ) -> None:
        """LOADFM: input tiles, from the memory tiles that hold them to the cores that need them."""
        moves = []
        for source, ring, needs, use in self._inputs(column, k, j, load):
            if source.broadcast:
                continue
            wanted: dict[Piece, list[str]] = {}  # cores that need the same channels get them at once
            for row in active:
                wanted.setdefault(needs[row], []).append(_core(column, row))
            for blocks, cores in wanted.items():
                moves += self._gather(column, source, ring, tuple(cores), run, blocks, use)
        acquire = [LockAction(f"{_core(column, row)}:in_free") for row in active]
        release = [LockAction(f"{_core(column, row)}:in_full") for row in active]
        self._emit(
            Transfer("LOADFM", f"loadfm.{column}", tuple(moves), run.count, (*acquire, *ready), tuple(release))
        )  # fmt: skip

    def _inputs(self, column: int, k: int, j: int, load: int) -> Iterator[tuple[Source, Ring, list[Piece], int]]:
        """What cores read in a load: source, buffer, blocks by row of cores, how many tiles used the buffer before. A
        residual comes once a tile, with the last chunk of input channels.
        """
        chunks = self._tiles.input_chunks
        for source, ring, needs in zip(self._layer.sources, self._tiles.inputs, self._needs[column][k, j]):
            if source is not self._layer.residual:
                yield source, ring, needs, load
            elif j == chunks - 1:
                yield source, ring, needs, load // chunks

    def _gather(
        self, column: int, source: Source, ring: Ring, cores: tuple[str, ...], run: _Run, blocks: Piece, load: int
    ) -> list[Move]:
        """The moves that bring one input tile together from the memory tiles that hold its columns."""
        (top, bottom, _), (left, right, _) = _reach(source.rows, run.rows), _reach(source.columns, run.columns)
        if top >= bottom:
            return []
        tile = tile_box(cores, ring, (bottom - top, right - left, blocks.blocks * BLOCK), load)
        where = self._turned(column, self._source(source), (left, right))
        moves, advance = [], _advance(source, run) if run.count > 1 else 0
        for before, first, count in blocks.places:
            for at, block, box in where.boxes((top, bottom), (left, right), (first, first + count), advance):
                moves.append(Move(box, within(tile, at - left, before + block - first, box.sizes)))
        return moves

    def _input_box(self, source: Source, ring: Ring, core: str, k: int, run: _Run, blocks: Piece, load: int) -> Access:
        """A core's input tile."""
        if source.broadcast:
            return replace(slot_of_round(ring, k, (1, 1, blocks.blocks * BLOCK)), tiles=(core,))
        top, bottom, _ = _reach(source.rows, run.rows)
        left, right, _ = _reach(source.columns, run.columns)
        return tile_box((core,), ring, (bottom - top, right - left, blocks.blocks * BLOCK), load)

    def _comp(
        self, column: int, row: int, j: int, load: int, tile: int, position: int, plan: list[tuple[int, _Run]]
    ) -> None:
        """COMP: one core computes the run's tiles."""
        layer, tiles, core, (k, run) = self._layer, self._tiles, _core(column, row), plan[position]
        piece, span = self._pieces[column][k][row], self._needs[column][k, j][0][row].span
        begin, finish = j == 0, j == tiles.input_chunks - 1
        chunk, use = self._chunks[k if layer.has_weights else 0, row, j], 0
        if layer.has_weights:
            use = load if tiles.input_chunks > 1 else k
        acquire, release = [LockAction(f"{core}:in_full")], [LockAction(f"{core}:in_free")]
        takes, gives = self._weight_changes(self._pieces[column], row, position, plan)
        if takes and self.weights.waits(row, use):
            acquire.append(LockAction(f"{core}:w_full", 1, FIRST))
        if gives and self.weights.frees(row, use):
            release.append(LockAction(f"{core}:w_free", 1, LAST))
        if finish:
            acquire.append(LockAction(f"{core}:out_free"))
            release.append(LockAction(f"{core}:out_full"))
        inputs = [
            self._input_box(source, ring, core, k, run, blocks[row], use)
            for source, ring, blocks, use in self._inputs(column, k, j, load)
        ]
        rows, columns = run.rows[1] - run.rows[0], run.columns[1] - run.columns[0]
        first = layer.sources[0]
        blocks = layer.weight_blocks(span, piece.numbers)
        self._emit(
            Compute(
                unit=f"core.{column}.{row}",
                op=layer.op,
                inputs=tuple(inputs),
                parameters=slot((core,), tiles.weights, chunk.bytes, use, moves_on=False),
                output=tile_box((core,), tiles.output, (rows, columns, piece.blocks * BLOCK), tile),
                blocks=piece.runs,
                kernel=layer.window.kernel,
                strides=layer.window.strides,
                dilation=layer.window.dilation,
                padding=(_reach(first.rows, run.rows)[2], _reach(first.columns, run.columns)[2]),
                work=layer.work(rows * columns, blocks),
                added=layer.added(rows * columns, piece.blocks) if finish else 0,
                macs=layer.macs(rows * columns, span, piece.numbers),
                scratch=tiles.sums.address,
                begin=begin,
                finish=finish,
                iterations=run.count,
                acquire=tuple(acquire),
                release=tuple(release),
            )
        )

    def _weight_changes(
        self, pieces: list[tuple[Piece, ...]], row: int, position: int, plan: list[tuple[int, _Run]]
    ) -> tuple[bool, bool]:
        """Whether a core takes a new chunk at a position of the plan, and whether it is done with it there."""
        if self._tiles.input_chunks > 1:
            return True, True
        if self._layer.has_weights:
            before, now, after = (plan[i][0] if 0 <= i < len(plan) else None for i in range(position - 1, position + 2))
            return before != now, after != now
        return position == 0, all(not pieces[k][row].blocks for k, _ in plan[position + 1 :])

    def _writefm(self, column: int, k: int, run: _Run, tile: int, active: list[int], final: bool) -> None:
        """WRITEFM: output tiles of a column's cores to the memory tiles that hold their columns."""
        layer, ring, staged = self._layer, self._tiles.output, self._places[self._layer.output].memory == "ddr"
        rows, columns = run.rows[1] - run.rows[0], run.columns[1] - run.columns[0]
        runs = ((0, layer.blocks),) if staged else layer.runs
        where = self._turned(column, self._output(self._number), run.columns)
        moves, advance = [], rows if run.count > 1 else 0
        for row in active if rows and columns else []:
            piece = self._pieces[column][k][row]
            made = tile_box((_core(column, row),), ring, (rows, columns, piece.blocks * BLOCK), tile)
            for before, number, count in piece.places:
                for after, first, blocks in cut_runs(runs, number, number + count):
                    for at, block, box in where.boxes(run.rows, run.columns, (first, first + blocks), advance):
                        own = within(made, at - run.columns[0], before + after + block - first, box.sizes)
                        moves.append(Move(own, box))
        acquire = tuple(LockAction(f"{_core(column, row)}:out_full") for row in active)
        release = [LockAction(f"{_core(column, row)}:out_free") for row in active]
        if final and self._last and staged:
            release += [LockAction(f"m{memtile}:done", 1, LAST) for memtile in self._tiles_of(column)]
        self._emit(Transfer("WRITEFM", f"writefm.{column}", tuple(moves), run.count, acquire, tuple(release)))

    def _emit(self, instruction: Transfer | Compute) -> None:
        self._step.instructions.append(instruction)


def _core(column: int, row: int) -> str:
    return f"c{column}.{row}"


def _advance(source: Source, run: _Run) -> int:
    """Input rows from a run's first tile to its second."""
    return _reach(source.rows, run.after(1))[0] - _reach(source.rows, run.rows)[0]


def _reach(axis: Sliding | Scaled, span: tuple[int, int]) -> tuple[int, int, int]:
    """Input rows or columns under those of the output, and how many of the reach lie before; none under none."""
    return axis.reach(*span) if span[1] > span[0] else (0, 0, 0)


def _area(region: Region) -> int:
    (top, bottom), (left, right) = region
    return (bottom - top) * (right - left)
