"""How the parts of a kernel are compiled, which only compiled code calls."""

from __future__ import annotations

from collections.abc import Callable

import numba


def inner(function: Callable) -> Callable:
    """Compiles a function that a kernel calls."""
    return numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def inlined(function: Callable) -> Callable:
    """Compiles a function that becomes part of whoever calls it; tuples of vectors stay in registers."""
    return numba.njit(forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
