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
from dataclasses import asdict

from bstf_compiler.aie.code import Code, HostAffine, Port, Step
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.isa import EACH, Access, Compute, Instruction, LockAction, Move, Transfer
from bstf_compiler.aie.memory import Allocation, Place

VERSION = 6


class _OtherVersion(ValueError):
    """The text is of a version that this compiler does not read."""


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
    meta: dict[str, list] = {}
    steps: list[Step] = []
    for number, line in enumerate(body.splitlines(), start=1):
        try:
            if not line.startswith("."):
                steps[-1].instructions.append(_parse(line))
                continue
            key, value = line[1:].split(" ", 1)
            entry = json.loads(value)
            if key == "program" and entry["version"] != VERSION:
                raise _OtherVersion(
                    f"program text has version {entry['version']}, this compiler reads {VERSION}; compile again"
                )
            if key == "step":
                steps.append(_step(entry))
            else:
                meta.setdefault(key, []).append(entry)
        except _OtherVersion:
            raise
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"program text, line {number}: cannot read '{line[:60]}'; compile again") from error
    known = meta["data"][0]
    if len(data) != known["bytes"] or _digest(data) != known["sha256"]:
        raise ValueError("the program's data image is damaged: size or checksum differ; compile again")
    return Code(
        meta["program"][0]["name"],
        DeviceSpec.from_dict(meta["device"][0], "program text"),
        [_port(entry) for entry in meta["input"]],
        [_affine(entry) for entry in meta.get("host_affine", [])],
        [_port(entry) for entry in meta["output"]],
        {e["name"]: (_place(e["place"]), e["channels"], e["position"]) for e in meta["tensor"]},
        [Allocation(**entry) for entry in meta.get("allocation", [])],
        steps,
        known["address"],
        data,
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _meta(key: str, value: dict) -> str:
    return f".{key} {json.dumps(value, separators=(',', ':'))}"


def _port(entry: dict) -> Port:
    shapes = {"shape": tuple(entry["shape"]), "user_shape": tuple(entry["user_shape"])}
    return Port(**{**entry, **shapes})


def _affine(entry: dict) -> HostAffine:
    return HostAffine(**{**entry, "scale": tuple(entry["scale"]), "offset": tuple(entry["offset"])})


def _place(entry: dict) -> Place:
    return Place(**{**entry, "shape": tuple(entry["shape"])})


def _step(entry: dict) -> Step:
    buffers = [tuple(buffer) for buffer in entry["buffers"]]
    return Step(**{**entry, "rows": tuple(entry["rows"]), "buffers": buffers})


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


_ACCESS = re.compile(
    r"([\w.,]+)@0x([0-9a-f]+)(?:\+(\d+))?(?:%(\d+)#(\d+))?\[(\d+)x(\d+)x(\d+)/(\d+),(\d+)\]"
)  # fmt: skip
_LOCK = re.compile(r"([\w.]+:\w+)(?:\*(\d+))?(?:!(first|last))?$")
_COMPUTE = re.compile(
    r"(\w+) in=(\S+) chunk=(\S+) out=(\S+) blocks=([\d:,]+) kernel=(\S+) strides=(\S+) dilation=(\S+) "
    r"before=(-?\d+),(-?\d+) work=(\d+)\+(\d+) macs=(\d+) sums=0x([0-9a-f]+):(b?)(f?)$"
)  # fmt: skip


def _parse(line: str) -> Instruction:
    rest, _, give = line.partition(" give ")
    rest, _, wait = rest.partition(" wait ")
    kind, unit, times, *body = rest.split(" ", 3)
    locks = {
        "acquire": tuple(_parse_lock(word) for word in wait.split()),
        "release": tuple(_parse_lock(word) for word in give.split()),
    }
    content, iterations = (body[0] if body else ""), int(times.removeprefix("x"))
    if kind != "COMP":
        ahead, moves = content.startswith("ahead"), []
        content = content.removeprefix("ahead").lstrip()
        for move in filter(None, content.split(" | ")):
            source, target = move.split(" > ")
            moves.append(Move(_parse_access(source), _parse_access(target)))
        return Transfer(kind, unit, tuple(moves), iterations, **locks, ahead=ahead)
    found = _COMPUTE.match(content).groups()
    op, images, chunk, out, blocks, kernel, strides, dilation, top, left, work, added, macs, sums, begin, finish = found
    return Compute(
        unit, op, tuple(_parse_access(image) for image in images.split(";")), _parse_access(chunk),
        _parse_access(out), _parse_runs(blocks), _parse_sizes(kernel), _parse_sizes(strides), _parse_sizes(dilation),
        (int(top), int(left)), int(work), int(added), int(macs), int(sums, 16), bool(begin), bool(finish),
        iterations, **locks,
    )  # fmt: skip


def _parse_sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))


def _parse_runs(text: str) -> tuple[tuple[int, int], ...]:
    pairs = (run.split(":") for run in text.split(","))
    return tuple((int(start), int(stop)) for start, stop in pairs)


def _parse_access(text: str) -> Access:
    tiles, address, advance, ring, first, *box = _ACCESS.fullmatch(text).groups()
    rows, pixels, length, row_stride, pixel_stride = map(int, box)
    return Access(
        tuple(tiles.split(",")), int(address, 16), (rows, pixels, length), (row_stride, pixel_stride),
        int(advance or 0), int(ring or 0), int(first or 0),
    )  # fmt: skip


def _parse_lock(text: str) -> LockAction:
    lock, count, when = _LOCK.match(text).groups()
    return LockAction(lock, int(count or 1), when or EACH)
