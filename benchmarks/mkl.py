"""Finds MKL where pip has put it, without an environment variable."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def load() -> Any:
    """sparse_dot_mkl, told where the `mkl` package has put its library."""
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError as reason:
        raise ImportError("package mkl is not installed") from reason
    libraries = [file for file in files if file.name.startswith(("libmkl_rt.", "mkl_rt."))]
    candidates = [Path(file.locate()) for file in libraries] + [
        folder / file.name for file in libraries for folder in (Path(sys.prefix) / "lib", _packages(files) / "lib")
    ]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise ImportError("package mkl holds no mkl_rt library")
    threads = found[0].parent / "libiomp5.so"
    if threads.is_file():  # MKL looks for it on the system's path only
        ctypes.CDLL(str(threads), mode=ctypes.RTLD_GLOBAL)
    os.environ["MKL_RT"] = str(found[0])
    import sparse_dot_mkl

    return sparse_dot_mkl


def _packages(files: Sequence[Any]) -> Path:
    """The folder into which a package was installed."""
    return Path(next(file for file in files if file.name == "METADATA").locate()).parents[1]
