"""A design in MLIR's generic form: what reader.py reads back and other tools can parse and verify without mlir-aie.

Attributes stand in braces after the operands, not as properties, so that a dialect defined by IRDL takes them. A packet
id is `#aie.packet_info<type, id>` here, with its numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from bstf_compiler.aie.mlir.model import (
    ACQUIRE,
    CORE,
    MM2S,
    PARTS,
    SHIM,
    Await,
    Call,
    Chain,
    Configuration,
    Core,
    Descriptor,
    Design,
    Flow,
    Loop,
    Port,
    Slot,
    Task,
    Tile,
    UseLock,
)

DMA = 1
"""mlir-aie's number of the bundle of DMA ports (WireBundle)."""
DIRECTIONS = {"S2MM": 0, MM2S: 1}
ACTIONS = {"Release": 1, ACQUIRE: 2}
"""mlir-aie's numbers (DMAChannelDir, LockAction)."""


def generic(design: Design, header: str) -> Iterator[str]:
    """The lines of a design, after comments with the lines of `header`.

    Example:
        >>> text = "\\n".join(generic(design(program), "made by hand"))
    """
    yield from (f"// {line}" for line in header.splitlines())
    yield '"builtin.module"() ({'
    for configuration in design.configurations:
        yield from _Writer(design, configuration).lines()
    yield from _main(design)
    yield f'}}) {{sym_name = "{design.name}"}} : () -> ()'


def _main(design: Design) -> Iterator[str]:
    """The device that runs all configurations in order."""
    kind = f"memref<{design.host_words}xi32>"
    yield '  "aie.device"() ({'
    yield '    "aie.runtime_sequence"() ({'
    yield f"    ^bb0(%host: {kind}):"
    for one in design.configurations:
        yield '      "aiex.configure"() ({'
        yield f'        "aiex.run"(%host) {{runtime_sequence_symbol = @sequence}} : ({kind}) -> ()'
        yield f"      }}) {{symbol = @{one.name}}} : () -> ()"
    yield '    }) {sym_name = "main_sequence"} : () -> ()'
    yield '    "aie.end"() : () -> ()'
    yield f'  }}) {{device = {_device(design)} : i32, sym_name = "main"}} : () -> ()'


def _device(design: Design) -> int:
    part = PARTS[design.part]
    return part.number + (design.columns if design.columns < part.columns else 0)


def tile_name(tile: Tile) -> str:
    """The value that stands for a tile."""
    return f"%t_{tile.column}_{tile.row}"


class _Writer:
    """Writes one configuration."""

    def __init__(self, design: Design, configuration: Configuration) -> None:
        self._design, self._made = design, configuration
        self._host = f"memref<{design.host_words}xi32>"
        self._types = {one.name: f"memref<{one.words}xi32>" for one in configuration.buffers}

    def lines(self) -> Iterator[str]:
        made = self._made
        yield '  "aie.device"() ({'
        for tile in made.tiles:
            place = f"col = {tile.column} : i32, row = {tile.row} : i32"
            yield f'    {tile_name(tile)} = "aie.tile"() {{{place}}} : () -> index'
        for one in made.buffers:
            bank = "" if one.bank is None else f", mem_bank = {one.bank} : i32"
            attributes = f'address = {one.address} : i32{bank}, sym_name = "{one.name}"'
            kind = self._types[one.name]
            yield f'    %{one.name} = "aie.buffer"({tile_name(one.tile)}) {{{attributes}}} : (index) -> {kind}'
        for one in made.locks:
            attributes = f'init = {one.init} : i32, lockID = {one.number} : i32, sym_name = "{one.name}"'
            yield f'    %{one.name} = "aie.lock"({tile_name(one.tile)}) {{{attributes}}} : (index) -> index'
        for flow in made.flows:
            yield from _flow(flow)
        for name, (words, numbers) in made.kernels.items():
            kinds = ", ".join([f"memref<{n}xi32>, i32" for n in words] + ["i32"] * numbers)
            attributes = f'function_type = ({kinds}) -> (), sym_name = "{name}", sym_visibility = "private"'
            yield f'    "func.func"() ({{}}) {{{attributes}}} : () -> ()'
        yield from self._dmas()
        for core in made.cores:
            yield from self._core(core)
        yield from self._sequence()
        yield '    "aie.end"() : () -> ()'
        yield f'  }}) {{device = {_device(self._design)} : i32, sym_name = "{made.name}"}} : () -> ()'

    # --- descriptors ---

    def _dmas(self) -> Iterator[str]:
        """The chains that channels run from the configuration on, tile by tile."""
        tiles: dict[Tile, list] = {}
        for start in self._made.starts:
            tiles.setdefault(start.port.tile, []).append(start)
        for tile, starts in tiles.items():
            name = {CORE: "mem", SHIM: "shim_dma"}.get(self._design.kind(tile), "memtile_dma")
            yield f'    "aie.{name}"({tile_name(tile)}) ({{'
            for number, start in enumerate(starts):
                if number:
                    yield f"    ^start{number}:"
                following = f"^start{number + 1}" if number + 1 < len(starts) else "^end"
                blocks = f"[^bd{number}_0, {following}]"
                yield f'      %s{number} = "aie.dma_start"(){blocks} {{{_channel(start.port)}}} : () -> i1'
                yield from self._blocks(start.chain, number)
            yield "    ^end:"
            yield '      "aie.end"() : () -> ()'
            yield "    }) : (index) -> index"

    def _blocks(self, chain: Chain, number: int) -> Iterator[str]:
        for place, descriptor in enumerate(chain):
            yield f"    ^bd{number}_{place}:"
            yield from self._descriptor(descriptor, "      ")
            following = f"^bd{number}_{place + 1}" if place + 1 < len(chain) else "^end"
            yield f'      "aie.next_bd"()[{following}] : () -> ()'

    def _descriptor(self, one: Descriptor, indent: str) -> Iterator[str]:
        if one.acquire:
            yield indent + _use(one.acquire)
        name, kind = ("host", self._host) if one.buffer is None else (one.buffer, self._types[one.buffer])
        attributes = f"bd_id = {one.number} : i32"
        if one.packet is not None:
            attributes += f", packet = #aie.packet_info<0 : i32, {one.packet} : i32>"
        attributes += f", static_len = {one.length} : i32, static_offset = {one.offset} : i32"
        if one.sizes:
            attributes += f", static_sizes = {_array(one.sizes)}, static_strides = {_array(one.strides)}"
        yield f'{indent}"aie.dma_bd"(%{name}) {{{attributes}}} : ({kind}) -> ()'
        if one.release:
            yield indent + _use(one.release)

    # --- cores ---

    def _core(self, core: Core) -> Iterator[str]:
        numbers = constants(core)
        yield f'    "aie.core"({tile_name(core.tile)}) ({{'
        for number in sorted(numbers):
            yield f'      %{number_name(number)} = "arith.constant"() {{value = {number} : i32}} : () -> i32'
        for number in sorted({0, 1, *(loop.count for loop in core.loops)}):
            yield f'      %n{number} = "arith.constant"() {{value = {number} : index}} : () -> index'
        for place, loop in enumerate(core.loops):
            yield f'      "scf.for"(%n0, %n{loop.count}, %n1) ({{'
            yield f"      ^bb0(%i{place}: index):"
            yield from self._body(loop, place, "        ")
            yield '        "scf.yield"() : () -> ()'
            yield "      }) : (index, index, index) -> ()"
        yield '      "aie.end"() : () -> ()'
        yield '    }) {link_with = "kernels.o"} : (index) -> index'

    def _body(self, loop: Loop, place: int, indent: str) -> Iterator[str]:
        for one in loop.body:
            if isinstance(one, UseLock):
                yield indent + _use(one)
            else:
                yield from self._call(one, place, indent)

    def _call(self, call: Call, place: int, indent: str) -> Iterator[str]:
        values, kinds = [], []
        for number, (name, offset) in enumerate(call.buffers):
            value = f"%{number_name(offset)}" if isinstance(offset, int) else f"%o{place}_{number}"
            if isinstance(offset, Slot):
                yield from _offset(offset, f"{place}_{number}", place, indent)
            values += [f"%{name}", value]
            kinds += [self._types[name], "i32"]
        values += [f"%{number_name(number)}" for number in call.numbers]
        kinds += ["i32"] * len(call.numbers)
        yield f'{indent}"func.call"({", ".join(values)}) {{callee = @{call.kernel}}} : ({", ".join(kinds)}) -> ()'

    # --- sequence ---

    def _sequence(self) -> Iterator[str]:
        yield '    "aie.runtime_sequence"() ({'
        yield f"    ^bb0(%host: {self._host}):"
        for one in self._made.sequence:
            if isinstance(one, Await):
                yield f'      "aiex.dma_await_task"(%{one.task}) : (index) -> ()'
            else:
                yield from self._task(one)
        yield '    }) {sym_name = "sequence"} : () -> ()'

    def _task(self, task: Task) -> Iterator[str]:
        yield f'      %{task.name} = "aiex.dma_configure_task"({tile_name(task.port.tile)}) ({{'
        for place, descriptor in enumerate(task.chain):
            if place:
                yield f"      ^bd{place}:"
            yield from self._descriptor(descriptor, "        ")
            if place + 1 < len(task.chain):
                yield f'        "aie.next_bd"()[^bd{place + 1}] : () -> ()'
        yield '        "aie.end"() : () -> ()'
        direction = f"channel = {task.port.channel} : i32, direction = {DIRECTIONS[task.port.direction]} : i32"
        yield f"      }}) {{{direction}, issue_token = {str(task.token).lower()}}} : (index) -> index"
        yield f'      "aiex.dma_start_task"(%{task.name}) : (index) -> ()'


def _flow(flow: Flow) -> Iterator[str]:
    source = flow.source
    if flow.packet is None:
        for target in flow.targets:
            attributes = f"dest_bundle = {DMA} : i32, dest_channel = {target.channel} : i32"
            attributes += f", source_bundle = {DMA} : i32, source_channel = {source.channel} : i32"
            tiles = f"{tile_name(source.tile)}, {tile_name(target.tile)}"
            yield f'    "aie.flow"({tiles}) {{{attributes}}} : (index, index) -> ()'
        return
    yield '    "aie.packet_flow"() ({'
    for name, port in (("source", source), *(("dest", target) for target in flow.targets)):
        attributes = f"bundle = {DMA} : i32, channel = {port.channel} : i32"
        yield f'      "aie.packet_{name}"({tile_name(port.tile)}) {{{attributes}}} : (index) -> ()'
    yield '      "aie.end"() : () -> ()'
    yield f"    }}) {{ID = {flow.packet} : i8}} : () -> ()"


def _channel(port: Port) -> str:
    return f"channel_dir = {DIRECTIONS[port.direction]} : i32, channel_index = {port.channel} : i32"


def _use(one: UseLock) -> str:
    attributes = f"action = {ACTIONS[one.action]} : i32, value = {one.value} : i32"
    return f'"aie.use_lock"(%{one.lock}) {{{attributes}}} : (index) -> ()'


def _array(numbers: tuple[int, ...]) -> str:
    return f"array<i64: {', '.join(map(str, numbers))}>"


def number_name(number: int) -> str:
    """The value that stands for a number of a core."""
    return f"c{number}" if number >= 0 else f"cm{-number}"


def constants(core: Core) -> set[int]:
    """All numbers that a core's calls need."""
    found: set[int] = set()
    for loop in core.loops:
        for call in (one for one in loop.body if isinstance(one, Call)):
            found.update(call.numbers)
            for _, offset in call.buffers:
                if isinstance(offset, Slot):
                    found |= {offset.base, offset.advance, offset.ring, offset.first}
                else:
                    found.add(offset)
    return found


def _offset(slot: Slot, name: str, place: int, indent: str) -> Iterator[str]:
    """`base + (first + i) % ring * advance` as operations; the last value is %o{name}."""
    binary = ": (i32, i32) -> i32"
    yield f'{indent}%i{name} = "arith.index_cast"(%i{place}) : (index) -> i32'
    yield f'{indent}%f{name} = "arith.addi"(%i{name}, %{number_name(slot.first)}) {binary}'
    yield f'{indent}%r{name} = "arith.remui"(%f{name}, %{number_name(slot.ring)}) {binary}'
    yield f'{indent}%a{name} = "arith.muli"(%r{name}, %{number_name(slot.advance)}) {binary}'
    yield f'{indent}%o{name} = "arith.addi"(%a{name}, %{number_name(slot.base)}) {binary}'
