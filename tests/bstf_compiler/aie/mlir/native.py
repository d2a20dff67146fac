"""The C++ kernels compiled by g++ with the emulation of the AIE API."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from bstf_compiler.aie.mlir.machine import KERNELS
from bstf_compiler.aie.mlir.package import KERNELS as SOURCES

_COUNTER = """
#include <aie_api/aie.hpp>
extern "C" int most_live() { return aie::emulation::most_live; }
"""


def build(folder: Path) -> ctypes.CDLL:
    """The library of all kernels; skips the test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    (folder / "counter.cc").write_text(_COUNTER)
    sources = [*sorted(SOURCES.glob("*.cc")), folder / "counter.cc"]
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += [f"-I{SOURCES / 'emulation'}", f"-I{SOURCES}", *map(str, sources), "-o", str(folder / "kernels.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def call(library: ctypes.CDLL, kernel: str, arrays: list[np.ndarray], *numbers: int) -> None:
    """A kernel on whole arrays."""
    arguments = []
    for array in arrays:
        assert array.flags.c_contiguous
        arguments += [ctypes.c_void_p(array.ctypes.data), 0]
    getattr(library, kernel)(*arguments, *numbers)


def machine_kernels(library: ctypes.CDLL) -> dict:
    """The kernels as machine.py wants them: on the memory of a core."""

    def made(name: str):
        def run(memory: np.ndarray, places: list[int], numbers: tuple[int, ...]) -> None:
            arguments = [argument for place in places for argument in (ctypes.c_void_p(memory.ctypes.data), place)]
            getattr(library, name)(*arguments, *numbers)

        return run

    return {name: made(name) for name in KERNELS}
