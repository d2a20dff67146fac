"""`bstf.json`, which `bstf.export` puts beside a SavedModel: Γ and positions by layer, repeated for readers without
TensorFlow. It may come from anybody; a network is read without it as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bstf_compiler import bsr
from bstf_compiler.graph import FakeQuant, Graph, Node

NAME = Path("assets.extra") / "bstf.json"
_MOST_BYTES = 2**26  # a block is a byte
_MOST_POSITION = 2**10


class _Mismatch(ValueError):
    """bstf.json and the graph disagree."""


def check(graph: Graph, folder: Path) -> None:
    """Compares a network with the `bstf.json` in its folder, if there is one.

    Raises:
        ValueError: it is damaged, or says other blocks or positions than the graph has.
    """
    path = folder / NAME
    if not path.is_file():
        return
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"'{path}' has more than {_MOST_BYTES:,} bytes; export the network again")
    compare(graph, content, str(path))


def compare(graph: Graph, content: bytes, where: str) -> None:
    """Γ and positions that a `bstf.json` repeats must be those found in the graph; unknown layers are skipped.

    Args:
        graph: as read from the SavedModel, not lowered.
        content: of the file.
        where: its name, for the sentence.

    Raises:
        ValueError: it is damaged, or says other blocks or positions.
    """
    try:
        recorded = json.loads(content.decode("utf-8"))
        for node in graph:
            _check_layer(graph, node, recorded)
    except _Mismatch:
        raise
    except RecursionError:
        raise ValueError(f"'{where}' is damaged (it holds lists in lists); export the network again") from None
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = str(error)
        reason = reason if reason.isprintable() and len(reason) < 200 else type(error).__name__
        raise ValueError(f"'{where}' is damaged ({reason}); export the network again") from error


def _check_layer(graph: Graph, node: Node, recorded: dict[str, Any]) -> None:
    """Compares one node with what is recorded of its layer; raises ValueError where they differ."""
    name = node.name.partition(":")[0]  # of a layer that is called twice, too
    grid = recorded.get("positions", {}).get(name)
    if isinstance(node.op, FakeQuant) and grid not in (None, node.op.position):
        raise _Mismatch(
            f"layer '{node.name}': bstf.json says position {_number(grid)}, the graph {node.op.position}; export it "
            "again"
        )
    layer = recorded["layers"].get(name)
    kernels = [tensor for tensor in graph.constants(node) if len(tensor.shape) in (2, 4)]
    if layer is None or not kernels:
        return
    kernel = kernels[0]
    values = kernel.data if kernel.data.ndim == 4 else kernel.data[None, None]
    found = bsr.nonzero_blocks(values, _block(layer["block"], values.shape[2:]))
    gamma = layer["gamma"]
    if [len(row) for row in gamma] != [found.shape[1]] * found.shape[0]:
        raise ValueError(f"Γ of '{name}' isn't {found.shape[0]} x {found.shape[1]}")
    told = np.array([[entry == "1" for entry in row] for row in gamma], bool)
    if (found & ~told.reshape(found.shape)).any():
        raise _Mismatch(f"layer '{node.name}': bstf.json says other zero blocks than the weights have; export it again")
    position = layer.get("kernel_position")
    if kernel.position is not None and position not in (None, kernel.position):
        raise _Mismatch(
            f"layer '{node.name}': bstf.json says position {_number(position)} for the kernel, the graph "
            f"{kernel.position}; export it again"
        )


def _block(sizes: Any, channels: tuple[int, int]) -> tuple[int, int]:
    """Channels of a block, input and output; one that is larger than the kernel is as large, lest zeros fill it up."""
    rows, columns = sizes
    if type(rows) is not int or type(columns) is not int or min(rows, columns) < 1:
        raise ValueError("a block has no size")
    return max(1, min(rows, channels[0])), max(1, min(columns, channels[1]))


def _number(position: Any) -> int:
    if type(position) is not int or abs(position) > _MOST_POSITION:
        raise ValueError("a position isn't a number")
    return position
