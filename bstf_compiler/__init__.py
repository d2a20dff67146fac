"""Compiler of block-sparse networks: AIE2 programs with bit-exact simulation and time estimates, and CPU kernels.

The names are imported when they are first used, so that the engine waits for no AIE back end and `load` alone imports
TensorFlow.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bstf_compiler import integer
    from bstf_compiler.aie import compile
    from bstf_compiler.aie.device import DeviceSpec
    from bstf_compiler.aie.program import Program
    from bstf_compiler.cpu.engine import Engine
    from bstf_compiler.cpu.matrix import BlockSparseMatrix
    from bstf_compiler.drawing import draw
    from bstf_compiler.graph import Graph

__version__ = "0.1.0"
__all__ = ["BlockSparseMatrix", "DeviceSpec", "Engine", "Graph", "Program", "compile", "draw", "integer", "load"]

_HOMES = {
    "BlockSparseMatrix": "cpu.matrix",
    "DeviceSpec": "aie.device",
    "Engine": "cpu.engine",
    "Graph": "graph",
    "Program": "aie.program",
    "compile": "aie",
    "draw": "drawing",
}


def __getattr__(name: str) -> Any:
    if name == "integer":
        return import_module("bstf_compiler.integer")
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(path: str | Path) -> Graph:
    """A SavedModel folder as a lowered graph, ready to compile.

    Args:
        path: what `bstf.export` wrote, or any SavedModel of the supported operations.

    Returns:
        The graph: int8 with positions if the network is fixed-point, else float.

    Raises:
        FileNotFoundError: there is no SavedModel at `path`.
        ValueError: the SavedModel is damaged or holds something that is not supported; the sentence names the layer.

    Example:
        >>> graph = bstf_compiler.load("resnet")
        >>> print(graph)
    """
    from bstf_compiler import frontend, passes  # TensorFlow takes seconds to import and only reading needs it

    return passes.lower(frontend.read(path))
