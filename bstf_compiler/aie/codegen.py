"""Schedule to instructions: every byte moved and every tile computed, with addresses, iterations and locks.

Locks of a step, by tile: a core's `in_free`/`in_full`, `out_free`/`out_full` and `w_free`/`w_full` count ring slots; a
memory tile's `w_free`/`w_full` count chunk slots, `ready` tells the columns that read it that LOAD is done, `done`
tells WRITE that the column's results are there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bstf_compiler.aie import tiling
from bstf_compiler.aie.code import Code, Port, Step
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import FIRST, LAST, Access, Compute, LockAction, Move, Transfer
from bstf_compiler.aie.layer import BLOCK, Layer, share
from bstf_compiler.aie.memory import Place, Stage
from bstf_compiler.aie.schedule import Schedule
from bstf_compiler.aie.tiling import Piece, Ring, Tiling
from bstf_compiler.aie.weights import Packer
from bstf_compiler.graph import Graph, Softmax

_ALIGN = 64


def generate(graph: Graph, device: DeviceSpec, schedule: Schedule) -> Code:
    """The code of a scheduled network."""
    placement = schedule.placement
    data = bytearray()
    data_address = placement.ddr_bytes
    steps = []
    for index, (stage, tiles) in enumerate(zip(placement.stages, schedule.tilings)):
        chunks = _pack(graph, device, stage.layer, tiles, schedule, data, data_address)
        for band in stage.bands:
            writer = _StepWriter(device, schedule, stage, tiles, chunks, band)
            steps.append(writer.step(index, keeps=band == stage.bands[-1]))
    end = data_address + len(data)
    if end > device.ddr.memory_bytes:
        raise ValueError(
            f"network '{graph.name}' takes {end} bytes of DDR, of which {device.name} has {device.ddr.memory_bytes}; "
            "use a device with more"
        )
    tensors = {
        name: (place, graph.tensors[name].shape[-1], graph.tensors[name].position)
        for name, place in placement.places.items()
    }
    ports = []
    for name, array_name, shape in zip(graph.outputs, schedule.outputs, graph.output_shapes):
        node = graph.producer(name)
        host = "softmax" if node is not None and isinstance(node.op, Softmax) else "none"
        ports.append(_port(graph, array_name, shape, host))
    return Code(
        graph.name, device, _port(graph, graph.input, graph.input_shape), ports, tensors,
        placement.allocations, steps, data_address, bytes(data),
    )  # fmt: skip


def _port(graph: Graph, tensor: str, user_shape: tuple[int, ...], host: str = "none") -> Port:
    found = graph.tensors[tensor]
    return Port(tensor, found.shape[1:], found.position, tuple(user_shape), host)


@dataclass(frozen=True)
class _Chunk:
    """A packed chunk in DDR."""

    address: int
    bytes: int


def _pack(
    graph: Graph,
    device: DeviceSpec,
    layer: Layer,
    tiles: Tiling,
    schedule: Schedule,
    data: bytearray,
    start: int,
) -> dict[tuple[int, int, int], _Chunk]:
    """Appends a layer's chunks to the data image; returns them by (round, row of cores, input chunk)."""
    chunks = {}

    def append(content: bytes) -> _Chunk:
        made = _Chunk(start + len(data), len(content))
        data.extend(content)
        return made

    if layer.channelwise:
        shared = append(schedule.parameters[layer.name])
        return {(0, row, 0): shared for row in range(device.rows)}
    packer = Packer(graph, layer)
    inputs = share(layer.input_shape[2], tiles.input_chunks)
    dealt = tiling.pieces(layer, device, tiles.rounds)
    for row in range(device.rows):
        for k, pieces in enumerate(dealt):
            for j, span in enumerate(inputs):
                if pieces[row].blocks:
                    content = packer.chunk((pieces[row].start, pieces[row].stop), span)
                    chunks[k, row, j] = append(content)
    return chunks


@dataclass(frozen=True)
class _Run:
    """`count` tiles in a row of equal shape: output rows start at `rows[0]` and advance by their number."""

    count: int
    rows: tuple[int, int]
    columns: tuple[int, int]


class _StepWriter:
    """Writes the instructions of one band of one layer."""

    def __init__(
        self, device: DeviceSpec, schedule: Schedule, stage: Stage, tiles: Tiling,
        chunks: dict[tuple[int, int, int], _Chunk], band: tuple[int, int],
    ) -> None:  # fmt: skip
        self._device, self._schedule, self._stage, self._tiles = device, schedule, stage, tiles
        self._chunks, self._band, self._layer = chunks, band, stage.layer
        self._pieces = tiling.pieces(stage.layer, device, tiles.rounds)
        self._spans = share(stage.layer.output_shape[1], device.columns)
        self._input_spans = share(stage.layer.input_shape[1], device.columns)
        self._columns = [c for c, (start, stop) in enumerate(self._spans) if stop > start]
        self._rows = [r for r in range(device.rows) if self._pieces[0][r].blocks]
        self._step: Step

    def step(self, stage_index: int, keeps: bool) -> Step:
        """All instructions of the band."""
        layer = self._layer
        self._step = Step(layer.name, layer.op, layer.output, self._band, stage_index, keeps)
        self._step.buffers = self._buffers()
        self._declare_locks()
        self._load()
        self._weights()
        for column in self._columns:
            self._column(column)
        self._write()
        return self._step

    # --- locks and buffers ---

    def _buffers(self) -> list[tuple[str, int, int]]:
        tiles = self._tiles
        rings = [("weights", tiles.weights), ("output", tiles.output), ("sums", tiles.sums)]
        rings += [(f"input {i}", ring) for i, ring in enumerate(tiles.inputs)]
        return [(name, ring.address, ring.stop - ring.address) for name, ring in rings if ring.bytes]

    def _declare_locks(self) -> None:
        locks, tiles = self._step.locks, self._tiles
        for column in self._columns:
            for row in self._rows:
                core = _core(column, row)
                locks |= {f"{core}:in_free": tiles.inputs[0].slots, f"{core}:in_full": 0}
                locks |= {f"{core}:out_free": tiles.output.slots, f"{core}:out_full": 0}
                locks |= {f"{core}:w_free": tiles.weights.slots, f"{core}:w_full": 0}
        for row in self._rows:
            locks |= {f"m{row}:w_free": tiles.weights.slots, f"m{row}:w_full": 0}
        for tile in range(self._device.columns):
            locks |= {f"m{tile}:ready": 0, f"m{tile}:done": 0}

    # --- DDR <-> memory tiles ---

    def _staged(self) -> list[str]:
        """Inputs of which the band reads rows from DDR."""
        start, stop, _ = self._layer.input_rows(*self._band)
        names = dict.fromkeys(self._layer.inputs) if stop > start else ()
        return [name for name in names if self._place(name).memory == "ddr"]

    def _place(self, name: str) -> Place:
        return self._schedule.placement.places[name]

    def _load(self) -> None:
        """LOAD: the band's rows of every input that lives in DDR, to its staging buffer."""
        start, stop, _ = self._layer.input_rows(*self._band)
        readers = self._readers()
        for tile, span in enumerate(self._input_spans):
            moves = []
            for name in self._staged():
                box = self._ddr_box(self._place(name), (start, stop), span)
                moves.append(Move(box, self._staging_box(name, f"m{tile}", stop - start, span)))
            if moves and readers[tile]:
                give = LockAction(f"m{tile}:ready", readers[tile])
                self._emit(Transfer("LOAD", f"load.{tile}", tuple(moves), release=(give,)))

    def _write(self) -> None:
        """WRITE: the band's rows of an output that lives in DDR, from its staging buffer."""
        place = self._place(self._layer.output)
        if place.memory != "ddr":
            return
        rows = self._band[1] - self._band[0]
        for column in self._columns:
            source = self._staging_box(self._layer.output, f"m{column}", rows, self._spans[column])
            move = Move(source, self._ddr_box(place, self._band, self._spans[column]))
            take = LockAction(f"m{column}:done")
            self._emit(Transfer("WRITE", f"write.{column}", (move,), acquire=(take,)))

    def _ddr_box(self, place: Place, rows: tuple[int, int], columns: tuple[int, int]) -> Access:
        pitch = place.shape[1] * place.pixel
        address = place.address + rows[0] * pitch + columns[0] * place.pixel
        sizes = (rows[1] - rows[0], columns[1] - columns[0], place.pixel)
        return Access(("ddr",), address, sizes, (pitch, place.pixel))

    def _staging_box(self, name: str, tile: str, rows: int, columns: tuple[int, int]) -> Access:
        pixel = self._place(name).pixel
        width = columns[1] - columns[0]
        return Access((tile,), self._stage.staging[name], (rows, width, pixel), (width * pixel, pixel))

    # --- weights ---

    def _weights(self) -> None:
        """LOADW and LOADWM: the chunks of each row of cores, in the order in which they are used."""
        ring = self._tiles.weights
        memtile_ring = replace(ring, address=self._stage.chunks)
        for row in self._rows:
            for use, chunk in enumerate(self._chunk_order(row)):
                slot = _slot((f"m{row}",), memtile_ring, chunk.bytes, use)
                ddr = Access(("ddr",), chunk.address, (1, 1, chunk.bytes))
                self._emit(
                    Transfer(
                        "LOADW", f"loadw.{row}", (Move(ddr, slot),),
                        acquire=(LockAction(f"m{row}:w_free"),), release=(LockAction(f"m{row}:w_full"),),
                    )
                )  # fmt: skip
                cores = tuple(_core(column, row) for column in self._columns)
                target = _slot(cores, ring, chunk.bytes, use)
                self._emit(
                    Transfer(
                        "LOADWM", f"loadwm.{row}", (Move(slot, target),),
                        acquire=(LockAction(f"m{row}:w_full"), *(LockAction(f"{core}:w_free") for core in cores)),
                        release=(LockAction(f"m{row}:w_free"), *(LockAction(f"{core}:w_full") for core in cores)),
                    )
                )  # fmt: skip

    def _chunk_order(self, row: int) -> list[_Chunk]:
        """The chunks of a row: one a round, or, summing in pieces, all pieces again for every tile."""
        tiles, order = self._tiles, []
        walks = len(self._runs(self._columns[0], split=True)) if tiles.input_chunks > 1 else 1
        for k in range(tiles.rounds):
            for _ in range(walks):
                order += [self._chunks.get((k, row, j)) for j in range(tiles.input_chunks)]
        return [chunk for chunk in order if chunk is not None]

    # --- one column of cores ---

    def _runs(self, column: int, split: bool) -> list[_Run]:
        """The column's tiles in order, equal neighbours joined unless `split`.

        Every column has as many tiles as the widest one, for all share the weights; where the pieces of a narrow column
        run out, its tiles are empty.
        """
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
        height = run.rows[1] - run.rows[0]
        expected = (run.rows[0] + run.count * height, run.rows[1] + run.count * height)
        if columns != run.columns or rows != expected:
            return False
        start, stop, above = self._layer.input_rows(*run.rows)
        start2, stop2, above2 = self._layer.input_rows(*rows)
        advance = run.count * height * self._layer.window.strides[0]
        return above == above2 and start2 - start == advance and stop2 - stop == advance

    def _column(self, column: int) -> None:
        split = self._tiles.input_chunks > 1
        runs = self._runs(column, split)
        plan = [(k, run) for k in range(self._tiles.rounds) for run in runs]
        tile = 0  # how many tiles came before: where the rings stand
        for position, (k, run) in enumerate(plan):
            active = [row for row in self._rows if self._pieces[k][row].blocks]
            final = position == len(plan) - 1
            for j in range(self._tiles.input_chunks):
                load = tile * self._tiles.input_chunks + j
                self._loadfm(column, k, run, j, load, active, first=position == 0 and j == 0)
                for row in active:
                    self._comp(column, row, k, run, j, load, tile, position, plan)
            self._writefm(column, k, run, tile, active, final)
            tile += run.count

    def _loadfm(self, column: int, k: int, run: _Run, j: int, load: int, active: list[int], first: bool) -> None:
        """LOADFM: input tiles, from the memory tiles that hold them to the cores that need them."""
        layer, moves = self._layer, []
        if layer.channelwise:
            for row in active:
                piece = self._pieces[k][row]
                for index, name in enumerate(layer.inputs):
                    moves += self._gather(name, index, (_core(column, row),), run, piece, load)
        else:
            blocks = Piece(*share(layer.input_shape[2], self._tiles.input_chunks)[j])
            cores = tuple(_core(column, row) for row in active)
            moves = self._gather(layer.inputs[0], 0, cores, run, blocks, load)
        acquire = [LockAction(f"{_core(column, row)}:in_free") for row in active]
        if first and self._staged():
            acquire += [LockAction(f"m{tile}:ready", 1, FIRST) for tile in self._sources(column)]
        release = [LockAction(f"{_core(column, row)}:in_full") for row in active]
        self._emit(Transfer("LOADFM", f"loadfm.{column}", tuple(moves), run.count, tuple(acquire), tuple(release)))

    def _gather(self, name: str, index: int, cores: tuple[str, ...], run: _Run, blocks: Piece, load: int) -> list[Move]:
        """The moves that bring one input tile together from the memory tiles that hold its columns."""
        layer, place = self._layer, self._place(name)
        top, bottom, _ = layer.input_rows(*run.rows)
        left, right, _ = self._reach(run)
        base, origin = place.address, 0
        if place.memory == "ddr":
            base, origin = self._stage.staging[name], layer.input_rows(*self._band)[0]
        length = blocks.blocks * BLOCK
        ring = self._tiles.inputs[index]
        advance = (run.rows[1] - run.rows[0]) * layer.window.strides[0]
        moves = []
        for tile, (start, stop) in enumerate(self._input_spans):
            first, last = max(left, start), min(right, stop)
            if first >= last or top >= bottom:
                continue
            pitch = (stop - start) * place.pixel
            source = Access(
                (f"m{tile}",),
                base + (top - origin) * pitch + (first - start) * place.pixel + blocks.start * BLOCK,
                (bottom - top, last - first, length),
                (pitch, place.pixel),
                advance=advance * pitch if run.count > 1 else 0,
            )
            target = Access(
                cores,
                ring.address + (first - left) * length,
                source.sizes,
                ((right - left) * length, length),
                advance=ring.bytes, ring=ring.slots, first=load % ring.slots,
            )  # fmt: skip
            moves.append(Move(source, target))
        return moves

    def _comp(
        self, column: int, row: int, k: int, run: _Run, j: int, load: int, tile: int, position: int,
        plan: list[tuple[int, _Run]],
    ) -> None:  # fmt: skip
        """COMP: one core computes the run's tiles."""
        layer, tiles, core = self._layer, self._tiles, _core(column, row)
        piece = self._pieces[k][row]
        top, bottom, above = layer.input_rows(*run.rows)
        left, right, before = self._reach(run)
        split = tiles.input_chunks > 1
        begin, finish = j == 0, j == tiles.input_chunks - 1
        if layer.channelwise:
            blocks, chunk, use = piece, self._chunks[0, row, 0], 0
            takes_weights, gives_weights = (
                position == 0,
                position == len(plan) - 1 or self._ends(row, position, plan),
            )
            kept = piece.blocks
        else:
            blocks = Piece(*share(layer.input_shape[2], tiles.input_chunks)[j])
            chunk, use = self._chunks[k, row, j], load if split else k
            takes_weights = split or position == 0 or plan[position - 1][0] != k
            gives_weights = split or position == len(plan) - 1 or plan[position + 1][0] != k
            kept = int(layer.kept[blocks.start : blocks.stop, piece.start : piece.stop].sum())
        rows, columns = run.rows[1] - run.rows[0], run.columns[1] - run.columns[0]
        in_shape = (bottom - top, right - left, blocks.blocks * BLOCK)
        out_shape = (rows, columns, piece.blocks * BLOCK)
        acquire = [LockAction(f"{core}:in_full")]
        release = [LockAction(f"{core}:in_free")]
        if takes_weights:
            acquire.append(LockAction(f"{core}:w_full", 1, FIRST))
        if gives_weights:
            release.append(LockAction(f"{core}:w_free", 1, LAST))
        if finish:
            acquire.append(LockAction(f"{core}:out_free"))
            release.append(LockAction(f"{core}:out_full"))
        self._emit(
            Compute(
                unit=f"core.{column}.{row}",
                op=layer.op,
                inputs=tuple(_box((core,), ring, in_shape, load) for ring in tiles.inputs),
                parameters=_slot((core,), tiles.weights, chunk.bytes, use, moves_on=False),
                output=_box((core,), tiles.output, out_shape, tile),
                input_shape=in_shape,
                output_shape=out_shape,
                kernel=layer.window.kernel,
                strides=layer.window.strides,
                padding=(above, before),
                work=layer.work(rows * columns, kept),
                macs=layer.macs(rows * columns, (blocks.start, blocks.stop), (piece.start, piece.stop)),
                scratch=tiles.sums.address,
                begin=begin,
                finish=finish,
                iterations=run.count,
                acquire=tuple(acquire),
                release=tuple(release),
            )
        )

    def _ends(self, row: int, position: int, plan: list[tuple[int, _Run]]) -> bool:
        """Whether a core has nothing more to do after a position of the plan."""
        return all(not self._pieces[k][row].blocks for k, _ in plan[position + 1 :])

    def _writefm(self, column: int, k: int, run: _Run, tile: int, active: list[int], final: bool) -> None:
        """WRITEFM: output tiles of a column's cores to the memory tile of that column."""
        layer, place, ring = self._layer, self._place(self._layer.output), self._tiles.output
        start, stop = self._spans[column]
        base, origin = place.address, 0
        if place.memory == "ddr":
            base, origin = self._stage.staging[layer.output], self._band[0]
        pitch = (stop - start) * place.pixel
        rows, columns = run.rows[1] - run.rows[0], run.columns[1] - run.columns[0]
        moves = []
        for row in active:
            piece = self._pieces[k][row]
            shape = (rows, columns, piece.blocks * BLOCK)
            target = Access(
                (f"m{column}",),
                base + (run.rows[0] - origin) * pitch + (run.columns[0] - start) * place.pixel + piece.start * BLOCK,
                shape,
                (pitch, place.pixel),
                advance=rows * pitch if run.count > 1 else 0,
            )
            if target.bytes:
                moves.append(Move(_box((_core(column, row),), ring, shape, tile), target))
        acquire = tuple(LockAction(f"{_core(column, row)}:out_full") for row in active)
        release = [LockAction(f"{_core(column, row)}:out_free") for row in active]
        if final and place.memory == "ddr":
            release.append(LockAction(f"m{column}:done", 1, LAST))
        self._emit(Transfer("WRITEFM", f"writefm.{column}", tuple(moves), run.count, acquire, tuple(release)))

    # --- helpers ---

    def _reach(self, run: _Run) -> tuple[int, int, int]:
        """Input columns under a run; none under a run without columns."""
        if run.columns[0] == run.columns[1]:
            return 0, 0, 0
        return self._layer.input_columns(*run.columns)

    def _sources(self, column: int) -> list[int]:
        """The memory tiles that hold input columns of a column of cores."""
        left, right, _ = self._layer.input_columns(*self._spans[column])
        return [t for t, (start, stop) in enumerate(self._input_spans) if max(left, start) < min(right, stop)]

    def _readers(self) -> list[int]:
        """For each memory tile, how many columns read from it."""
        counts = [0] * self._device.columns
        for column in self._columns:
            for tile in self._sources(column):
                counts[tile] += 1
        return counts

    def _emit(self, instruction: Transfer | Compute) -> None:
        self._step.instructions.append(instruction)


def _core(column: int, row: int) -> str:
    return f"c{column}.{row}"


def _slot(tiles: tuple[str, ...], ring: Ring, size: int, use: int, moves_on: bool = True) -> Access:
    """A ring's slot for the `use`-th chunk; `moves_on`: iterations walk the ring."""
    if not moves_on or ring.slots == 1:
        return Access(tiles, ring.address + use % ring.slots * ring.bytes, (1, 1, size))
    return Access(tiles, ring.address, (1, 1, size), advance=ring.bytes, ring=ring.slots, first=use % ring.slots)


def _box(tiles: tuple[str, ...], ring: Ring, shape: tuple[int, int, int], use: int) -> Access:
    """A ring's slots from the `use`-th on, each holding a tile of `shape`."""
    _, columns, length = shape
    return Access(
        tiles, ring.address, shape, (columns * length, length), ring.bytes, ring.slots, use % ring.slots
    )  # fmt: skip
