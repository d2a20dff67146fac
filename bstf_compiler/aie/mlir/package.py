"""The folder that a user hands to mlir-aie: design, kernels, packed weights, a test vector, and what is known of them.

Nothing is written before the text has been read back, has kept all rules, and has been executed with the test vector's
result: what the folder's README says of the design is what happened while it was made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from bstf_compiler.aie.code import Code
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.mlir import host
from bstf_compiler.aie.mlir.design import CORE_SHIFT, design, part_of
from bstf_compiler.aie.mlir.generic import generic
from bstf_compiler.aie.mlir.machine import Machine, Stuck
from bstf_compiler.aie.mlir.model import Call, Configuration, Design
from bstf_compiler.aie.mlir.pretty import VERSIONS, pretty, require_version
from bstf_compiler.aie.mlir.reader import read
from bstf_compiler.aie.mlir.rules import RULES, check
from bstf_compiler.aie.mlir.upstream import IRDL, upstream
from bstf_compiler.files import make_folder, replacing

KERNELS = Path(__file__).with_name("kernels")
_GENERIC, _UPSTREAM = "design.generic.mlir", "design.upstream.mlir"
_TEMPLATES = Path(__file__).with_name("templates")


def require_target(device: DeviceSpec, folder: str | Path, version: str) -> Path:
    """The folder's full path, if a design for a device can be written there.

    Raises:
        ValueError: mlir-aie knows no such part or has no such syntax, or the folder holds something else.
    """
    require_version(version)
    part_of(device)
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file; give a folder for the mlir-aie design")
    if folder.exists() and any(folder.iterdir()) and not (folder / _GENERIC).is_file():
        raise ValueError(f"'{folder}' holds something else than an mlir-aie design; give an empty or new folder")
    return folder


def write(code: Code, folder: str | Path, version: str = "1.4", seed: int = 0) -> Path:
    """Writes the folder of a program; an earlier design there is replaced, and nothing is written in halves.

    Args:
        code: the program.
        folder: where to; missing parents are made.
        version: of mlir-aie's syntax, one of pretty.VERSIONS.
        seed: of the test vector.

    Raises:
        ValueError: mlir-aie doesn't know the part or the version, a layer has no kernel, or the folder isn't free.
        RuntimeError: the design breaks a rule or computes something else, an error of the compiler.
    """
    folder = require_target(code.device, folder, version)
    made = design(code)
    header = f"{made.name} on {code.device.name}: {len(made.configurations)} configurations. See README.md."
    text = "\n".join(generic(made, f"In MLIR's generic form. {header}")) + "\n"
    images = host.random_images(code, seed)
    before, after = host.host_image(code, images), _proven(code, made, text, images)
    make_folder(folder.parent)
    with replacing(folder) as new:
        shutil.copytree(KERNELS, new / "kernels")
        shutil.copy(IRDL, new)
        files = dict(pretty(made, version, header))
        for name, lines in files.items():
            (new / name).write_text("\n".join(chain(lines, [""])), encoding="utf-8")
        (new / _GENERIC).write_text(text, encoding="utf-8")
        (new / _UPSTREAM).write_text(upstream(text), encoding="utf-8")
        (new / "host.bin").write_bytes(before.tobytes())
        (new / "expected.bin").write_bytes(after.tobytes())
        (new / "host.json").write_text(json.dumps(host.layout(code), indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(_readme(code, made, version, sorted(files)), encoding="utf-8")
        (new / "Makefile").write_text(_makefile(made, sorted(files)), encoding="utf-8")
    return folder


def _proven(code: Code, made: Design, text: str, images: list[np.ndarray]) -> np.ndarray:
    """The host's buffer after the design that the text says has run."""
    again = read(text)
    if again != made:
        raise RuntimeError("the mlir-aie design isn't what its text says; please report it")
    if violations := check(again):
        raise RuntimeError(f"the mlir-aie design breaks a rule, {violations[0]}; please report it")
    expected, after = host.expected(code, images), host.host_image(code, images)  # what it reads is looked at here
    try:
        Machine(again, after).run()
    except Stuck as error:
        raise RuntimeError(f"the mlir-aie design doesn't run: {error}; please report it") from error
    pairs = zip(host.outputs(code, after), expected)
    if not all(np.array_equal(found, wanted) for found, wanted in pairs):
        raise RuntimeError("the mlir-aie design computes something else than the program; please report it")
    return after


def _makefile(made: Design, files: list[str]) -> str:
    text = (_TEMPLATES / "Makefile").read_text(encoding="utf-8")
    target = "aie2p-none-unknown-elf" if made.part == "npu2" else "aie2-none-unknown-elf"
    return text.replace("@TARGET@", target).replace("@DESIGNS@", " ".join(files))


def _readme(code: Code, made: Design, version: str, files: list[str]) -> str:
    text = (_TEMPLATES / "README.md").read_text(encoding="utf-8")
    names = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    values = {
        "NAME": made.name,
        "DEVICE": code.device.name,
        "VERSION": VERSIONS[version],
        "FILES": names,
        "COUNTS": "\n".join(_counts(made)),
        "RULES": ", ".join(f"`{name}`" for name in RULES),
        "RULE_COUNT": str(len(RULES)),
        "BANKS": _banks(made),
        "SHIFT": str(CORE_SHIFT),
        "PART": "\n".join(_part_notes(made, version)),
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _counts(made: Design) -> Iterator[str]:
    chains = [one for made_one in made.configurations for _, one in made_one.chains()]
    tiles = {tile for one in made.configurations for tile in one.tiles}
    yield f"* configurations: {len(made.configurations)}, one a step of the program"
    yield f"* tiles: {len(tiles)}; the largest configuration has {max(len(one.tiles) for one in made.configurations)}"
    yield f"* descriptors: {sum(map(len, chains))} in {len(chains)} chains"
    shared = sum(flow.packet is not None for one in made.configurations for flow in one.flows)
    calls = [
        sum(isinstance(use, Call) for loop in core.loops for use in loop.body)
        for one in made.configurations
        for core in one.cores
    ]
    yield f"* calls of kernels in the program of a core: {max(calls)} at most"
    yield f"* streams: {sum(len(one.flows) for one in made.configurations)}, {shared} of them with packets"


def _banks(made: Design) -> str:
    """Of how many configurations weights and inputs of each core lie in different banks."""
    apart = sum(_apart(one) for one in made.configurations)
    return f"{apart} of {len(made.configurations)}"


def _apart(one: Configuration) -> bool:
    banks: dict[tuple, set[int]] = {}
    for buffer in (buffer for buffer in one.buffers if buffer.address >= CORE_SHIFT):
        what = "weights" if buffer.name.startswith("weights_") and not buffer.name.startswith("weights_ahead") else None
        what = "input" if buffer.name.startswith("input_") else what
        if what:
            first, last = buffer.address // 16384, (buffer.address + 4 * buffer.words - 1) // 16384
            banks.setdefault((buffer.tile, what), set()).update(range(first, last + 1))
    cores = {tile for tile, _ in banks}
    return all(not banks.get((tile, "weights"), set()) & banks.get((tile, "input"), set()) for tile in cores)


def _part_notes(made: Design, version: str) -> Iterator[str]:
    """What holds only for some parts or versions."""
    if not made.part.startswith("npu"):
        yield (
            "* Runtime sequences are made for NPUs: mlir-aie has no firmware that runs one on a Versal part. There\n"
            "  the host must do what each line of a sequence says, by aie-rt: write descriptors, push tasks, wait."
        )
    if made.part == "npu2":
        yield ("* AIE2p multiplies 8x8x8 natively; the kernels use 4x8x8 there too, as `aie::mmul` offers it.")
    if version == "2025":
        yield (
            "* Of these releases those before the lowering of locks in tasks refuse descriptors with locks in a\n"
            "  sequence (`aiex.dma_configure_task`); their syntax is right all the same."
        )
        yield "* They run one device a module: the host loads the files in the order of their numbers."
