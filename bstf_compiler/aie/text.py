"""The text form of a program: one line an instruction, readable and parsed back without loss.

    LOADFM loadfm.0 x28 m0@0x1f00+1792[2x14x64/896,64] > c0.0,c0.1@0x0+4096%2#0[2x14x64/896,64] wait ... give ...

An access is `tiles@address`, `+advance` a iteration (`%slots#first`: around a ring), then the box `[rows x pixels x
bytes / row stride, pixel stride]`. `blocks=0:2,5:6` are the output blocks of a tile, in runs [start, stop). `wait` and
`give` list locks: `c0.0:in_free`, `*2` for a count, `!first` or `!last` if not in each iteration. `ahead`: for the
layer of the next step. Lines that begin with a dot describe the rest in JSON: `.host_affine` and the `host` of an
`.output` are what the host computes before and after the array.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from bstf_compiler.aie import entries
from bstf_compiler.aie.code import Code, HostAffine, Port, Step
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import EACH, Access, Compute, Instruction, LockAction, Move, Transfer
from bstf_compiler.aie.memory import Allocation, Place

VERSION = 6


class _Unreadable(ValueError):
    """A sentence of its own: the text is of another version, or the device is none."""


@dataclass(frozen=True)
class _Head:
    version: int
    name: str


@dataclass(frozen=True)
class _Tensor:
    name: str
    place: Place
    channels: int
    position: int


@dataclass(frozen=True)
class _Data:
    address: int
    bytes: int
    sha256: str


def assembly(code: Code) -> str:
    """The program as text; the data image is kept apart, its checksum is in the text."""
    lines = [
        _meta("program", {"version": VERSION, "name": code.name}),
        _meta("device", asdict(code.device)),
        *(_meta("input", asdict(port)) for port in code.inputs),
        *(_meta("host_affine", asdict(affine)) for affine in code.affines),
        *(_meta("output", asdict(port)) for port in code.outputs),
        *(
            _meta("tensor", {"name": name, "place": asdict(place), "channels": channels, "position": position})
            for name, (place, channels, position) in code.tensors.items()
        ),
        *(_meta("allocation", asdict(allocation)) for allocation in code.allocations),
        _meta("data", {"address": code.data_address, "bytes": len(code.data), "sha256": _digest(code.data)}),
    ]
    for step in code.steps:
        head = {name: value for name, value in vars(step).items() if name != "instructions"}
        lines.append(_meta("step", head))
        lines += [_format(instruction) for instruction in step.instructions]
    body = "\n".join(lines) + "\n"
    return body + _meta("end", {"sha256": _digest(body.encode())}) + "\n"


def parse(text: str, data: bytes) -> Code:
    """The program back from its text and data image.

    Raises:
        ValueError: if either is damaged or of another version.
    """
    body, mark, tail = text.rpartition(".end ")
    if not mark:
        raise ValueError("program text is cut short: it has no .end line; compile again")
    if tail.strip() != _meta("end", {"sha256": _digest(body.encode())}).removeprefix(".end "):
        raise ValueError("program text is damaged: its checksum differs; compile again")
    found: dict[str, list] = {key: [] for key in _ENTRIES}
    for number, line in enumerate(body.removesuffix("\n").split("\n"), start=1):
        try:
            if not line.startswith("."):
                found["step"][-1].instructions.append(_parse(line))
                continue
            key, value = line[1:].split(" ", 1)
            found[key].append(_ENTRIES[key](json.loads(value)))
        except _Unreadable:
            raise
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            start = line[:60] if line[:60].isprintable() else ascii(line[:60])
            raise ValueError(f"program text, line {number}: cannot read '{start}'; compile again") from error
    for key in ("program", "device", "data"):
        if len(found[key]) != 1:
            raise ValueError(f"program text has {len(found[key])} lines .{key}; compile again")
    (program,), (known,), (device,) = found["program"], found["data"], found["device"]
    if len(data) != known.bytes or _digest(data) != known.sha256:
        raise ValueError("the program's data image is damaged: size or checksum differ; compile again")
    tensors = {one.name: (one.place, one.channels, one.position) for one in found["tensor"]}
    return Code(
        program.name,
        device,
        found["input"],
        found["host_affine"],
        found["output"],
        tensors,
        found["allocation"],
        found["step"],
        known.address,
        data,
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _meta(key: str, value: dict) -> str:
    return f".{key} {json.dumps(value, separators=(',', ':'))}"


def _head(entry: dict) -> _Head:
    if entry["version"] != VERSION:
        version = ascii(entry["version"])[:10]
        raise _Unreadable(f"program text has version {version}, this compiler reads {VERSION}; compile again")
    return entries.read(_Head, entry)


def _device(entry: dict) -> DeviceSpec:
    try:
        return DeviceSpec.from_dict(entry, "program text")
    except ValueError as error:
        raise _Unreadable(str(error)) from error


_ENTRIES: dict[str, Callable[[dict], Any]] = {
    "program": _head,
    "device": _device,
    "input": partial(entries.read, Port),
    "host_affine": partial(entries.read, HostAffine),
    "output": partial(entries.read, Port),
    "tensor": partial(entries.read, _Tensor),
    "allocation": partial(entries.read, Allocation),
    "data": partial(entries.read, _Data),
    "step": partial(entries.read, Step, without="instructions"),
}
"""What makes the objects of each line that begins with a dot."""


# --- one instruction a line ---


def _format(instruction: Instruction) -> str:
    words = [instruction.kind, instruction.unit, f"x{instruction.iterations}"]
    if isinstance(instruction, Transfer):
        words += ["ahead"] * instruction.ahead
        moves = [f"{_access(move.source)} > {_access(move.target)}" for move in instruction.moves]
        words.append(" | ".join(moves))
    else:
        words += [
            instruction.op,
            "in=" + ";".join(_access(access) for access in instruction.inputs),
            "chunk=" + _access(instruction.parameters),
            "out=" + _access(instruction.output),
            f"blocks={_runs(instruction.blocks)}",
            f"kernel={_sizes(instruction.kernel)}",
            f"strides={_sizes(instruction.strides)}",
            f"dilation={_sizes(instruction.dilation)}",
            "before={},{}".format(*instruction.padding),
            f"work={instruction.work}+{instruction.added}",
            f"macs={instruction.macs}",
            f"sums={instruction.scratch:#x}:{'b' * instruction.begin}{'f' * instruction.finish}",
        ]
    if instruction.acquire:
        words.append("wait " + " ".join(_lock(action) for action in instruction.acquire))
    if instruction.release:
        words.append("give " + " ".join(_lock(action) for action in instruction.release))
    return " ".join(words)


def _sizes(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _runs(runs: tuple[tuple[int, int], ...]) -> str:
    return ",".join(f"{start}:{stop}" for start, stop in runs)


def _access(access: Access) -> str:
    move = f"+{access.advance}" if access.advance else ""
    ring = f"%{access.ring}#{access.first}" if access.ring else ""
    strides = "/{},{}".format(*access.strides)
    return f"{','.join(access.tiles)}@{access.address:#x}{move}{ring}[{_sizes(access.sizes)}{strides}]"


def _lock(action: LockAction) -> str:
    count = f"*{action.count}" if action.count != 1 else ""
    when = f"!{action.when}" if action.when != EACH else ""
    return action.lock + count + when


def _pattern(text: str) -> re.Pattern:
    """A regular expression where N stands for a number that fits 64 bits, and X for one in hexadecimal digits."""
    return re.compile(text.replace("N", r"(\d{1,15})").replace("X", "0x([0-9a-f]{1,13})"), re.ASCII)


_HEAD = _pattern(r"(\w+) ([\w.]+) xN(?: (.*))?")
_ACCESS = _pattern(r"([\w.,]+)@X(?:\+N)?(?:%N#N)?\[NxNxN/N,N\]")
_LOCK = _pattern(r"([\w.]+:\w+)(?:\*N)?(?:!(first|last))?")
_PAIR, _RUN = _pattern("NxN"), _pattern("N:N")
_COMPUTE = _pattern(
    r"(\w+) in=(\S+) chunk=(\S+) out=(\S+) blocks=(\S+) kernel=(\S+) strides=(\S+) dilation=(\S+) "
    r"before=(-?)N,(-?)N work=N\+N macs=N sums=X:(b?)(f?)"
)


def _parse(line: str) -> Instruction:
    rest, _, give = line.partition(" give ")
    rest, _, wait = rest.partition(" wait ")
    kind, unit, times, body = _HEAD.fullmatch(rest).groups()
    locks = {
        "acquire": tuple(_parse_lock(word) for word in wait.split()),
        "release": tuple(_parse_lock(word) for word in give.split()),
    }
    content, iterations = body or "", int(times)
    if kind != "COMP":
        ahead, moves = content.startswith("ahead"), []
        content = content.removeprefix("ahead").lstrip()
        for move in filter(None, content.split(" | ")):
            source, target = move.split(" > ")
            moves.append(Move(_parse_access(source), _parse_access(target)))
        return Transfer(kind, unit, tuple(moves), iterations, **locks, ahead=ahead)
    op, images, chunk, out, blocks, *found = _COMPUTE.fullmatch(content).groups()
    kernel, strides, dilation, up, top, west, left, work, added, macs, sums, begin, finish = found
    return Compute(
        unit, op, tuple(_parse_access(image) for image in images.split(";")), _parse_access(chunk),
        _parse_access(out), tuple(_parse_pair(_RUN, run) for run in blocks.split(",")), _parse_pair(_PAIR, kernel),
        _parse_pair(_PAIR, strides), _parse_pair(_PAIR, dilation), (int(up + top), int(west + left)), int(work),
        int(added), int(macs), int(sums, 16), bool(begin), bool(finish), iterations, **locks,
    )  # fmt: skip


def _parse_pair(pattern: re.Pattern, text: str) -> tuple[int, int]:
    one, two = pattern.fullmatch(text).groups()
    return int(one), int(two)


def _parse_access(text: str) -> Access:
    tiles, address, advance, ring, first, *box = _ACCESS.fullmatch(text).groups()
    rows, pixels, length, row_stride, pixel_stride = map(int, box)
    return Access(
        tuple(tiles.split(",")), int(address, 16), (rows, pixels, length), (row_stride, pixel_stride),
        int(advance or 0), int(ring or 0), int(first or 0),
    )  # fmt: skip


def _parse_lock(text: str) -> LockAction:
    lock, count, when = _LOCK.fullmatch(text).groups()
    return LockAction(lock, int(count or 1), when or EACH)
