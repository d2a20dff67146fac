"""Reads a design back from its generic form."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bstf_compiler.aie.mlir.generic import ACTIONS, DIRECTIONS
from bstf_compiler.aie.mlir.model import (
    PARTS,
    RELEASE,
    Await,
    Buffer,
    Call,
    Chain,
    Configuration,
    Core,
    Descriptor,
    Design,
    Flow,
    Lock,
    Loop,
    Port,
    Slot,
    Start,
    Task,
    Tile,
    UseLock,
)
from bstf_compiler.aie.mlir.syntax import Block, MalformedText, Operation, parse

_DIRECTIONS = {number: name for name, number in DIRECTIONS.items()}
_ACTIONS = {number: name for name, number in ACTIONS.items()}


def read(text: str) -> Design:
    """The design that a text in generic form says, nothing else known.

    Raises:
        MalformedText: it is not in generic form, or holds what generic.py doesn't write; the sentence names the line.

    Example:
        >>> read("\\n".join(generic(made, ""))) == made
        True
    """
    module = parse(text)
    devices = {one.attributes.get("sym_name"): one for one in _inside(module) if one.name == "aie.device"}
    if "main" not in devices:
        raise MalformedText("line 1: the module has no device 'main' that runs the others")
    main = devices["main"]
    part, columns = _part(main)
    sequence = next(one for one in _inside(main) if one.name == "aie.runtime_sequence")
    host = _words(sequence.regions[0][0].arguments[0][1])
    order = [one.attributes["symbol"][1:] for one in _inside(sequence) if one.name == "aiex.configure"]
    design = Design(module.attributes.get("sym_name", ""), part, columns, host)
    for name in order:
        if name not in devices:
            raise MalformedText(f"line {main.line}: it configures '{name}', which the module doesn't have")
        if devices[name].attributes["device"] != main.attributes["device"]:
            raise MalformedText(f"line {devices[name].line}: device '{name}' is of another kind than the main one")
        design.configurations.append(_Reader(devices[name]).configuration())
    return design


def _part(device: Operation) -> tuple[str, int]:
    number = device.attributes["device"]
    for name, part in PARTS.items():
        if number == part.number:
            return name, part.columns
        if part.narrower and part.number < number < part.number + part.columns:
            return name, number - part.number
    raise MalformedText(f"line {device.line}: no device has the number {number}")


def _inside(operation: Operation) -> Iterator[Operation]:
    for region in operation.regions:
        for block in region:
            yield from block.operations


def _words(kind: str) -> int:
    found = re.fullmatch(r"memref<(\d+)xi32>", kind)
    if not found:
        raise MalformedText(f"a buffer of type {kind}; all are memrefs of i32")
    return int(found[1])


class _Reader:
    """Reads one device."""

    def __init__(self, device: Operation) -> None:
        self._device = device
        self._made = Configuration(device.attributes["sym_name"])
        self._tiles: dict[str, Tile] = {}
        self._names: dict[str, str | None] = {}  # buffers, locks and tasks by value; the host's memory is None

    def configuration(self) -> Configuration:
        """All of the device, in the order of the text."""
        handlers = {
            "aie.tile": self._tile, "aie.buffer": self._buffer, "aie.lock": self._lock, "aie.flow": self._flow,
            "aie.packet_flow": self._packet_flow, "func.func": lambda op: None, "aie.mem": self._dma,
            "aie.memtile_dma": self._dma, "aie.shim_dma": self._dma, "aie.core": self._core,
            "aie.runtime_sequence": self._sequence, "aie.end": lambda op: None,
        }  # fmt: skip
        for operation in _inside(self._device):
            if operation.name not in handlers:
                raise MalformedText(f"line {operation.line}: '{operation.name}' has no place in a device")
            try:
                handlers[operation.name](operation)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                if isinstance(error, MalformedText):
                    raise
                raise MalformedText(
                    f"line {operation.line}: '{operation.name}' lacks {error}, or has it in another form"
                ) from error
        return self._made

    def _tile(self, op: Operation) -> None:
        self._tiles[op.results[0]] = Tile(op.attributes["col"], op.attributes["row"])

    def _buffer(self, op: Operation) -> None:
        name, a = op.attributes["sym_name"], op.attributes
        words = _words(op.types[1][0])
        self._made.buffers.append(Buffer(name, self._tiles[op.operands[0]], a["address"], words, a.get("mem_bank")))
        self._names[op.results[0]] = name

    def _lock(self, op: Operation) -> None:
        a = op.attributes
        self._made.locks.append(Lock(a["sym_name"], self._tiles[op.operands[0]], a["lockID"], a["init"]))
        self._names[op.results[0]] = a["sym_name"]

    # --- streams ---

    def _flow(self, op: Operation) -> None:
        a, (source, target) = op.attributes, (self._tiles[name] for name in op.operands)
        start, end = Port(source, "MM2S", a["source_channel"]), Port(target, "S2MM", a["dest_channel"])
        flows = self._made.flows
        if flows and flows[-1].source == start and flows[-1].packet is None:
            flows[-1] = Flow(start, (*flows[-1].targets, end))
        else:
            flows.append(Flow(start, (end,)))

    def _packet_flow(self, op: Operation) -> None:
        ends = {"aie.packet_source": [], "aie.packet_dest": []}
        for one in _inside(op):
            if one.name in ends:
                ends[one.name].append((self._tiles[one.operands[0]], one.attributes["channel"]))
        source, targets = ends.values()
        self._made.flows.append(
            Flow(Port(source[0][0], "MM2S", source[0][1]),
                 tuple(Port(tile, "S2MM", channel) for tile, channel in targets), op.attributes["ID"])
        )  # fmt: skip

    # --- descriptors ---

    def _dma(self, op: Operation) -> None:
        tile, blocks = self._tiles[op.operands[0]], {block.label: block for block in op.regions[0]}
        block = op.regions[0][0]
        while block.operations[-1].name == "aie.dma_start":
            start = block.operations[-1]
            a = start.attributes
            port = Port(tile, _DIRECTIONS[a["channel_dir"]], a["channel_index"])
            self._made.starts.append(Start(port, self._chain(blocks, blocks[start.successors[0]])))
            block = blocks[start.successors[1]]

    def _chain(self, blocks: dict[str, Block], block: Block) -> Chain:
        """The descriptors from a block on, to the one without a next."""
        chain, seen = [], set()
        while any(one.name == "aie.dma_bd" for one in block.operations):
            if block.label in seen:
                raise MalformedText(f"line {block.operations[0].line}: a chain that never ends")
            seen.add(block.label)
            chain.append(self._descriptor(block))
            last = block.operations[-1]
            if last.name != "aie.next_bd":
                break
            block = blocks[last.successors[0]]
        return tuple(chain)

    def _descriptor(self, block: Block) -> Descriptor:
        uses: dict[bool, UseLock | None] = {True: None, False: None}
        found = None
        for one in block.operations:
            if one.name == "aie.use_lock":
                use = self._use(one)
                uses[use.action == RELEASE] = use
            elif one.name == "aie.dma_bd":
                found = one
        a = found.attributes
        packet = a["packet"][1] if "packet" in a else None
        return Descriptor(
            a["bd_id"], self._names[found.operands[0]], a["static_offset"], a["static_len"], a.get("static_sizes", ()),
            a.get("static_strides", ()), packet, uses[False], uses[True],
        )  # fmt: skip

    def _use(self, op: Operation) -> UseLock:
        a = op.attributes
        return UseLock(self._names[op.operands[0]], _ACTIONS[a["action"]], a["value"])

    # --- cores ---

    def _core(self, op: Operation) -> None:
        values: dict[str, object] = {}
        loops: list[Loop] = []
        for one in _inside(op):
            if one.name == "scf.for":
                low, high, step = (values[name] for name in one.operands)
                if (low, step) != (0, 1):
                    raise MalformedText(f"line {one.line}: a loop of a core counts from 0 by 1")
                block = one.regions[0][0]
                values[block.arguments[0][0]] = ("iteration",)
                loops.append(Loop(high, tuple(self._items(block.operations, values))))
            elif list(self._items([one], values)):
                raise MalformedText(f"line {one.line}: '{one.name}' stands outside of a core's loops")
        self._made.cores.append(Core(self._tiles[op.operands[0]], tuple(loops)))

    def _items(self, operations: list[Operation], values: dict[str, object]) -> Iterator[UseLock | Call]:
        """Locks and calls; arithmetic goes into `values`."""
        for one in operations:
            if one.name == "aie.use_lock":
                yield self._use(one)
            elif one.name == "func.call":
                yield self._call(one, values)
            elif one.name == "arith.constant":
                values[one.results[0]] = one.attributes["value"]
            elif one.name.startswith("arith."):
                values[one.results[0]] = _fold(one.name[6:], [values[name] for name in one.operands])
            elif one.name not in ("scf.yield", "aie.end"):
                raise MalformedText(f"line {one.line}: '{one.name}' has no place in a core")

    def _call(self, op: Operation, values: dict[str, object]) -> Call:
        buffers, numbers, operands = [], [], list(op.operands)
        while operands:
            name = operands.pop(0)
            if name in self._names:
                buffers.append((self._names[name], _placed(values[operands.pop(0)], op.line)))
            else:
                numbers.append(values[name])
        return Call(op.attributes["callee"][1:], tuple(buffers), tuple(numbers))

    # --- sequence ---

    def _sequence(self, op: Operation) -> None:
        self._names[op.regions[0][0].arguments[0][0]] = None
        waiting: dict[str, Task] = {}
        for one in _inside(op):
            if one.name == "aiex.dma_configure_task":
                a, name = one.attributes, one.results[0][1:]
                port = Port(self._tiles[one.operands[0]], _DIRECTIONS[a["direction"]], a["channel"])
                blocks = {block.label: block for block in one.regions[0]}
                waiting[name] = Task(name, port, self._chain(blocks, one.regions[0][0]), a["issue_token"])
            elif one.name == "aiex.dma_start_task":
                self._made.sequence.append(waiting.pop(one.operands[0][1:]))
            elif one.name == "aiex.dma_await_task":
                self._made.sequence.append(Await(one.operands[0][1:]))
            else:
                raise MalformedText(f"line {one.line}: '{one.name}' has no place in a sequence")


def _fold(name: str, values: list) -> object:
    """A constant, or an expression of the iteration as (operation, values)."""
    if name == "index_cast":
        return values[0]
    if all(isinstance(value, int) for value in values):
        one, two = values
        return {"addi": one + two, "muli": one * two, "remui": one % two if two else 0}[name]
    return (name, *values)


def _placed(value: object, line: int) -> int | Slot:
    """An offset of a buffer: a number, or `base + (first + iteration) % ring * advance`."""
    match value:
        case int():
            return value
        case ("addi", ("muli", ("remui", ("addi", ("iteration",), int(first)), int(ring)), int(advance)), int(base)):
            return Slot(base, advance, ring, first)
    raise MalformedText(f"line {line}: an offset that is no slot of a ring")
