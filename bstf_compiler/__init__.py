"""Compiler of block-sparse networks: AIE2 programs with bit-exact simulation and time estimates, and CPU kernels."""

from __future__ import annotations

from pathlib import Path

from bstf_compiler import integer, passes
from bstf_compiler.aie import compile
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.program import Program
from bstf_compiler.cpu.engine import Engine
from bstf_compiler.cpu.matrix import BlockSparseMatrix
from bstf_compiler.drawing import draw
from bstf_compiler.graph import Graph

__all__ = ["BlockSparseMatrix", "DeviceSpec", "Engine", "Graph", "Program", "compile", "draw", "integer", "load"]


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
    from bstf_compiler import frontend  # TensorFlow takes seconds to import and only reading needs it

    return passes.lower(frontend.read(path))
