"""What is fuzzed: functions of bytes that end without an error, or in one of our sentences.

Everything is in memory, and an execution takes milliseconds at most. Checksums are made right before a program is read:
random bytes would never pass them, and an attacker does the same.
"""

import hashlib
import json
import re
from collections.abc import Callable
from math import prod

import numpy as np

from bstf_compiler import sidecar
from bstf_compiler.aie import text
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.program import Program
from bstf_compiler.graph import Conv, FakeQuant, Graph, Node, Tensor, Window

_LONGEST = 2000  # letters of a sentence
_MOST_EVENTS, _MOST_NUMBERS = 2000, 100_000  # of a program that is simulated, so that an execution stays short
_DATA = re.compile(rb"\.data \{[^\n]*")
_NEEDED = b"\n----\n"  # between a program's text and its data


def assembly(content: bytes) -> None:
    """The parser of the text form."""
    body, data = _parts(content)
    _in_a_sentence(lambda: text.parse(body.decode("utf-8", "replace"), data))


def program(content: bytes) -> None:
    """The loader of program folders: the parser, the rules that a program must keep, and a run of what keeps them."""
    body, data = _parts(content)

    def load() -> None:
        found = Program.parse(body, data)
        events = sum(do.iterations for step in found.steps for do in step.instructions)
        shapes = [port.user_shape for port in found.inputs]
        if events < _MOST_EVENTS and sum(map(prod, shapes)) < _MOST_NUMBERS:
            found.simulate([np.ones((1, *shape), np.float32) for shape in shapes])

    _in_a_sentence(load)


def device(content: bytes) -> None:
    """The loader of device files, and what is derived of a device that it returns."""

    def load() -> None:
        found = DeviceSpec.parse(content, "device file")
        _ = found.ddr_rate, found.rows_of_weight_tile, [found.activation_tile(one) for one in range(found.columns)]

    _in_a_sentence(load)


def blocks(content: bytes) -> None:
    """The reader of bstf.json."""
    _in_a_sentence(lambda: sidecar.compare(_NETWORK, content, "bstf.json"))


TARGETS = {"assembly": assembly, "program": program, "device": device, "bstf_json": blocks}


def _in_a_sentence(run: Callable[[], None]) -> None:
    try:
        run()
    except ValueError as error:
        sentence = str(error)
        if type(error) is not ValueError and not type(error).__module__.startswith("bstf_compiler"):
            raise
        assert sentence.isprintable() and len(sentence) < _LONGEST, f"no sentence: {sentence[:_LONGEST]!r}"


def joined(program: Program) -> bytes:
    """A program as the targets take it."""
    return program.assembly.encode().rpartition(b".end ")[0] + _NEEDED + program.data


def _parts(content: bytes) -> tuple[bytes, bytes]:
    """A program's text and data, with the checksums that they should have."""
    body, _, data = content.partition(_NEEDED)
    line = _DATA.search(body)
    if line:
        try:
            entry = json.loads(line[0][len(b".data ") :])
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            body = body[: line.start()] + b".data " + json.dumps(entry).encode() + body[line.end() :]
        except (ValueError, TypeError, RecursionError):
            pass
    end = json.dumps({"sha256": hashlib.sha256(body).hexdigest()}, separators=(",", ":"))
    return body + b".end " + end.encode() + b"\n", data


def _network() -> Graph:
    """A convolution with two of four blocks, between two grids."""
    kernel = np.zeros((3, 3, 16, 12), np.float32)
    kernel[1, 1, 3, 2] = kernel[0, 0, 12, 9] = 0.5
    tensors = [
        Tensor("image", (1, 4, 4, 16)),
        Tensor("kernel", kernel.shape, "float32", 7, kernel),
        Tensor("image:grid", (1, 4, 4, 16), "int8", 5),
        Tensor("conv", (1, 4, 4, 12)),
    ]
    nodes = [
        Node("image:grid", FakeQuant(5), ["image"]),
        Node("conv", Conv(Window((3, 3), padding=(1, 1, 1, 1))), ["image:grid", "kernel"]),
    ]
    return Graph("network", nodes, {one.name: one for one in tensors}, {"image": (4, 4, 16)}, ["conv"], [(4, 4, 12)])


_NETWORK = _network()
