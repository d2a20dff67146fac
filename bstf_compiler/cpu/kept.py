"""Compiled kernels that later processes find again.

Numba keeps a function for later processes (`cache=True`) under its byte code and what it encloses. The kernels here
enclose other compiled functions, which are new ones in every process, so none would ever be found. But all that they
enclose follows from a kernel's options and the sources of this package, and so does the name that it is kept under.

The folder is the one that Numba chooses: `NUMBA_CACHE_DIR`, else `__pycache__` beside the source, else one of the user.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numba
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

from bstf_compiler.files import replacing


def kernel(*options: object) -> Callable[[Callable], Callable]:
    """Compiles the decorated function for several threads, or finds that an earlier process did.

    Args:
        options: all that decides what the function encloses; their `repr` says what they are.

    Example:
        >>> @kernel(dtype, isa)
        ... def multiply(x, y, workers, members): ...
    """

    def compile(function: Callable) -> Callable:
        compiled = numba.njit(nogil=True, error_model="numpy", parallel=True)(function)
        with suppress(RuntimeError):  # there is no folder to write to
            compiled._cache = _Kernels(function, options)
        return compiled

    return compile


def _digest_of_sources() -> bytes:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _number_functions() -> None:
    """Numba counts functions from 1 in every process, and that number alone tells two of one name and type apart.

    Kernels that two processes kept would bring different functions with the same symbol, and a third process, which
    loads both, would call one for the other. So counting begins anywhere.
    """
    FunctionIdentity._unique_ids = itertools.count(secrets.randbits(62))


_number_functions()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_number_functions)
# Taken while they are imported: they may be edited before a kernel is compiled.
_SOURCES = _digest_of_sources()
_DIGEST = len(_SOURCES)


class _Kernels(FunctionCache):
    """The kernels of one function with the same options, one for each type of arguments."""

    def __init__(self, function: Callable, options: tuple) -> None:
        super().__init__(function)
        self._options = options
        name = f"{Path(function.__code__.co_filename).stem}.{function.__qualname__}"  # without the line, which moves
        self._cache_file = _Files(Path(self.cache_path) / re.sub(r"[^\w.]", "", name))

    def _index_key(self, signature: object, codegen: object) -> str:
        how = codegen.magic_tuple(), int(numba.config.OPT), numba.__version__
        return repr((self._options, signature, how))

    def save_overload(self, signature: object, compiled: object) -> None:
        with suppress(OSError):  # a full disk: it will be compiled again
            super().save_overload(signature, compiled)


class _Files:
    """A file for each key: processes that compile different kernels at once don't meet."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def _path(self, key: str) -> Path:
        return self._base.with_name(f"{self._base.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.nbc")

    def load(self, key: str) -> object | None:
        """What was saved, if it is whole and was made of the same sources."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        head, data = content[: 2 * _DIGEST], content[2 * _DIGEST :]
        return pickle.loads(data) if head == _SOURCES + hashlib.sha256(data).digest() else None

    def save(self, key: str, data: object) -> None:
        """Writes over what other sources made."""
        content = dumps(data)
        with replacing(self._path(key)) as temporary:
            temporary.write_bytes(_SOURCES + hashlib.sha256(content).digest() + content)

    def flush(self) -> None:
        """Forgets them all."""
        for path in self._base.parent.glob(f"{self._base.name}-*.nbc"):
            path.unlink(missing_ok=True)
