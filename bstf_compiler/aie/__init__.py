"""The back end for arrays of AIE2 cores: tile, schedule, allocate, generate."""

from __future__ import annotations

from pathlib import Path

from bstf_compiler import integer
from bstf_compiler.aie import codegen, schedule
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.program import Program
from bstf_compiler.graph import Graph

__all__ = ["compile"]


def compile(graph: Graph, device: str | Path | DeviceSpec = "aie2_4x4") -> Program:
    """Compiles a fixed-point network for a device.

    Args:
        graph: what `bstf_compiler.load` returned.
        device: name of a device of the package, path of a device file, or a DeviceSpec.

    Returns:
        The program: `program.simulate(x)`, `program.estimate()`, `program.write(folder)`.

    Raises:
        ValueError: unknown device, network that isn't fixed-point, layer that doesn't fit; the sentence names it.
        RuntimeError: the program breaks a rule of verify.py, an error of the compiler.

    Example:
        >>> program = bstf_compiler.compile(bstf_compiler.load("resnet"), device="aie2_4x4")
        >>> program.estimate().total_seconds
    """
    spec = DeviceSpec.load(device)
    integer.require_fixed_point(graph)
    code = codegen.generate(graph, spec, schedule.plan(graph, spec))
    program = Program(**vars(code))
    if violations := program.verify():
        raise RuntimeError(f"the compiler made an unsound program: {violations[0]}; please report it")
    return program
