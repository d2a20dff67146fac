"""A design in mlir-aie's own syntax, of which there are two living generations: `1.4` and `2025`.

`1.4` (2026): devices have names, lock counts are values, descriptors say `offset = len = sizes = strides =`; one file
holds all configurations, and a main device that runs them. `2025` (releases of late 2024 and 2025): lock counts are
numbers, descriptors have a list of sizes and strides, a file holds one device; so there is a file a configuration.
Older tools drop what they don't know without a word: each file says first for which one it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from bstf_compiler.aie.mlir.generic import constants, number_name, tile_name
from bstf_compiler.aie.mlir.model import (
    CORE,
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
    Slot,
    Start,
    Task,
    Tile,
    UseLock,
)

VERSIONS = {"1.4": "mlir-aie 1.4 (2026)", "2025": "mlir-aie of late 2024 to 2025"}
"""The generations that can be written, and what the files call them."""


def require_version(version: str) -> None:
    """Raises ValueError unless there is such a generation."""
    if version not in VERSIONS:
        raise ValueError(f"there is no mlir-aie syntax '{version}'; known: {', '.join(VERSIONS)}")


def pretty(design: Design, version: str, header: str) -> dict[str, Iterator[str]]:
    """The lines of each file of a design, by its name.

    Args:
        design: what to write.
        version: one of VERSIONS.
        header: lines for the head of each file.

    Raises:
        ValueError: no such version.

    Example:
        >>> files = pretty(design(program), "1.4", "made by hand")
    """
    require_version(version)
    head = f"For {VERSIONS[version]}; other versions have another syntax.\n{header}"
    if version == "2025":
        return {
            f"{one.name}.mlir": _file(head, _Writer(design, one, new=False).device()) for one in design.configurations
        }
    return {"design.mlir": _file(head, _whole(design))}


def _file(header: str, lines: Iterator[str]) -> Iterator[str]:
    yield from (f"// {line}" for line in header.splitlines())
    yield "module {"
    yield from lines
    yield "}"


def _whole(design: Design) -> Iterator[str]:
    """All devices, and the one that runs them."""
    for one in design.configurations:
        yield from _Writer(design, one, new=True).device()
    kind = f"memref<{design.host_words}xi32>"
    yield f"  aie.device({design.device}) @main {{"
    yield f"    aie.runtime_sequence @main_sequence(%host: {kind}) {{"
    for one in design.configurations:
        yield f"      aiex.configure @{one.name} {{"
        yield f"        aiex.run @sequence(%host) : ({kind})"
        yield "      }"
    yield "    }"
    yield "  }"


class _Writer:
    """Writes one configuration; `new`: in the syntax of 1.4."""

    def __init__(self, design: Design, made: Configuration, new: bool) -> None:
        self._design, self._made, self._new = design, made, new
        self._host = f"memref<{design.host_words}xi32>"
        self._types = {one.name: f"memref<{one.words}xi32>" for one in made.buffers}

    def device(self) -> Iterator[str]:
        made, design = self._made, self._design
        name = design.device
        if not self._new and design.part == "npu1" and design.columns == PARTS["npu1"].columns:
            name = "npu1_4col"
        yield f"  aie.device({name}) {f'@{made.name} ' if self._new else ''}{{"
        for tile in made.tiles:
            yield f"    {tile_name(tile)} = aie.tile({tile.column}, {tile.row})"
        for one in made.buffers:
            bank = "" if one.bank is None else f", mem_bank = {one.bank} : i32"
            attributes = f'address = {one.address} : i32{bank}, sym_name = "{one.name}"'
            yield f"    %{one.name} = aie.buffer({tile_name(one.tile)}) {{{attributes}}} : {self._types[one.name]}"
        for one in made.locks:
            attributes = f'init = {one.init} : i32, sym_name = "{one.name}"'
            yield f"    %{one.name} = aie.lock({tile_name(one.tile)}, {one.number}) {{{attributes}}}"
        for flow in made.flows:
            yield from _flow(flow)
        for name, (words, numbers) in made.kernels.items():
            kinds = ", ".join([f"memref<{n}xi32>, i32" for n in words] + ["i32"] * numbers)
            yield f"    func.func private @{name}({kinds})"
        yield from self._dmas()
        for core in made.cores:
            yield from self._core(core)
        yield from self._sequence()
        yield "  }"

    # --- descriptors ---

    def _dmas(self) -> Iterator[str]:
        tiles: dict[Tile, list[Start]] = {}
        for start in self._made.starts:
            tiles.setdefault(start.port.tile, []).append(start)
        for tile, starts in tiles.items():
            name = {CORE: "mem", SHIM: "shim_dma"}.get(self._design.kind(tile), "memtile_dma")
            yield f"    %{name}_{tile.column}_{tile.row} = aie.{name}({tile_name(tile)}) {{"
            yield from self._counts([start.chain for start in starts], "      ")
            for number, start in enumerate(starts):
                if number:
                    yield f"    ^start{number}:"
                following = f"^start{number + 1}" if number + 1 < len(starts) else "^end"
                port = start.port
                yield f"      %s{number} = aie.dma_start({port.direction}, {port.channel}, ^bd{number}_0, {following})"
                for place, one in enumerate(start.chain):
                    yield f"    ^bd{number}_{place}:"
                    yield from self._descriptor(one, "      ")
                    last = place + 1 == len(start.chain)
                    yield f"      aie.next_bd {'^end' if last else f'^bd{number}_{place + 1}'}"
            yield "    ^end:"
            yield "      aie.end"
            yield "    }"

    def _counts(self, chains: list[Chain], indent: str) -> Iterator[str]:
        """The values that lock counts are in the new syntax."""
        uses = [use for chain in chains for one in chain for use in (one.acquire, one.release) if use]
        for number in sorted({use.value for use in uses}) if self._new else ():
            yield f"{indent}%{number_name(number)} = arith.constant {number} : i32"

    def _use(self, one: UseLock) -> str:
        value = f"%{number_name(one.value)}" if self._new else one.value
        return f"aie.use_lock(%{one.lock}, {one.action}, {value})"

    def _descriptor(self, one: Descriptor, indent: str) -> Iterator[str]:
        if one.acquire:
            yield indent + self._use(one.acquire)
        name, kind = ("host", self._host) if one.buffer is None else (one.buffer, self._types[one.buffer])
        if self._new:
            walk = f" offset = {one.offset} len = {one.length}"
            if one.sizes:
                walk += f" sizes = {list(one.sizes)} strides = {list(one.strides)}"
        else:
            walk = f", {one.offset}, {one.length}"
            if one.sizes:
                pairs = (f"<size = {n}, stride = {step}>" for n, step in zip(one.sizes, one.strides))
                walk += f", [{', '.join(pairs)}]"
        packet = "" if one.packet is None else f", packet = #aie.packet_info<pkt_type = 0, pkt_id = {one.packet}>"
        yield f"{indent}aie.dma_bd(%{name} : {kind}{walk}) {{bd_id = {one.number} : i32{packet}}}"
        if one.release:
            yield indent + self._use(one.release)

    # --- cores ---

    def _core(self, core: Core) -> Iterator[str]:
        yield f"    %core_{core.tile.column}_{core.tile.row} = aie.core({tile_name(core.tile)}) {{"
        numbers = constants(core)
        if self._new:
            numbers |= {use.value for loop in core.loops for use in loop.body if isinstance(use, UseLock)}
        for number in sorted(numbers):
            yield f"      %{number_name(number)} = arith.constant {number} : i32"
        for number in sorted({0, 1, *(loop.count for loop in core.loops)}):
            yield f"      %n{number} = arith.constant {number} : index"
        for place, loop in enumerate(core.loops):
            yield f"      scf.for %i{place} = %n0 to %n{loop.count} step %n1 {{"
            yield from self._body(loop, place)
            yield "      }"
        yield "      aie.end"
        yield '    } {link_with = "kernels.o"}'

    def _body(self, loop: Loop, place: int) -> Iterator[str]:
        for one in loop.body:
            if isinstance(one, UseLock):
                yield "        " + self._use(one)
            else:
                yield from self._call(one, place)

    def _call(self, call: Call, place: int) -> Iterator[str]:
        values, kinds = [], []
        for number, (name, offset) in enumerate(call.buffers):
            value = f"%o{place}_{number}"
            if isinstance(offset, Slot):
                yield from _offset(offset, f"{place}_{number}", place)
            else:
                value = f"%{number_name(offset)}"
            values += [f"%{name}", value]
            kinds += [self._types[name], "i32"]
        values += [f"%{number_name(number)}" for number in call.numbers]
        kinds += ["i32"] * len(call.numbers)
        yield f"        func.call @{call.kernel}({', '.join(values)}) : ({', '.join(kinds)}) -> ()"

    # --- sequence ---

    def _sequence(self) -> Iterator[str]:
        yield f"    {'aie' if self._new else 'aiex'}.runtime_sequence @sequence(%host: {self._host}) {{"
        tasks = [one for one in self._made.sequence if isinstance(one, Task)]
        yield from self._counts([task.chain for task in tasks], "      ")
        for one in self._made.sequence:
            if isinstance(one, Await):
                yield f"      aiex.dma_await_task(%{one.task})"
            else:
                yield from self._task(one)
        yield "    }"

    def _task(self, task: Task) -> Iterator[str]:
        port = task.port
        channel = f"{tile_name(port.tile)}, {port.direction}, {port.channel}"
        yield f"      %{task.name} = aiex.dma_configure_task({channel}) {{"
        for place, one in enumerate(task.chain):
            if place:
                yield f"      ^bd{place}:"
            yield from self._descriptor(one, "        ")
            if place + 1 < len(task.chain):
                yield f"        aie.next_bd ^bd{place + 1}"
        yield "        aie.end"
        yield "      } {issue_token = true}" if task.token else "      }"
        yield f"      aiex.dma_start_task(%{task.name})"


def _flow(flow: Flow) -> Iterator[str]:
    source = flow.source
    if flow.packet is None:
        for target in flow.targets:
            ends = f"{tile_name(source.tile)}, DMA : {source.channel}, {tile_name(target.tile)}, DMA : {target.channel}"
            yield f"    aie.flow({ends})"
        return
    yield f"    aie.packet_flow({flow.packet}) {{"
    for name, port in (("source", source), *(("dest", target) for target in flow.targets)):
        yield f"      aie.packet_{name}<{tile_name(port.tile)}, DMA : {port.channel}>"
    yield "    }"


def _offset(slot: Slot, name: str, place: int) -> Iterator[str]:
    """`base + (first + i) % ring * advance`; the last value is %o{name}."""
    yield f"        %i{name} = arith.index_cast %i{place} : index to i32"
    yield f"        %f{name} = arith.addi %i{name}, %{number_name(slot.first)} : i32"
    yield f"        %r{name} = arith.remui %f{name}, %{number_name(slot.ring)} : i32"
    yield f"        %a{name} = arith.muli %r{name}, %{number_name(slot.advance)} : i32"
    yield f"        %o{name} = arith.addi %a{name}, %{number_name(slot.base)} : i32"
