"""Files and folders that are whole or not there, whatever happens while they are written.

`bstf` and `bstf_compiler` have this file each, as neither imports the other; a test keeps the two alike.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there nobody knows whether the writer of a leftover still lives
    fcntl = None

_SUFFIX = ".partial"
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
_FULL = 2**16  # bytes; a disk with fewer free is full
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CantWriteError(OSError):
    """Says in a sentence what can't be written, and why; `errno` is the system's number."""

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(number, os.strerror(number), str(path))

    def __str__(self) -> str:
        way = "make room there, or name another place" if self.errno in _NO_ROOM else "name another place"
        return f"Can't write {self.filename}: {self.strerror.lower()}; {way}."


def make_folder(path: str | os.PathLike) -> None:
    """Makes a folder, and those above it, where there is none.

    Raises:
        CantWriteError: it can't be made: nobody may write there, or one above it is a file.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CantWriteError(Path(path), error.errno) from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write a file or a folder to, which takes the place of another if the body succeeds.

    Until then it lies in a hidden folder beside it, which vanishes if the body fails. What was there before stays until
    one rename, after all is on the disk, puts the new one in its place. A killed process leaves the hidden folder; the
    next one that writes there removes it.

    Args:
        path: of the file or folder; a device or a pipe, such as /dev/stdout, is written to as it is.

    Yields:
        A path with the same name; nothing is there yet.

    Raises:
        FileNotFoundError: there is no folder for it.
        CantWriteError: it can't be written: the disk is full, or nobody may write there, or to what is there.

    Example:
        >>> with replacing("weights.bin") as temporary:
        ...     temporary.write_bytes(weights)
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Can't write {path.name}: create the folder {path.parent} first.")
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    if path.exists() and not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise CantWriteError(path, errno.EACCES)  # a rename would replace it all the same
    _remove_leftovers(path)
    try:
        scratch = Path(tempfile.mkdtemp(_SUFFIX, f".{path.name}.", path.parent))
    except OSError as error:
        raise CantWriteError(path, error.errno) from error
    lock = _lock(scratch)
    try:
        made = scratch / path.name
        yield made
        _flush(made)
        _put(made, path)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise CantWriteError(path, error.errno) from error
        if shutil.disk_usage(path.parent).free < _FULL:  # libraries have many words for it
            raise CantWriteError(path, errno.ENOSPC) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def is_leftover(path: Path) -> bool:
    """Whether a path is what a killed writer left, or what another is about to put in its place."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def _put(made: Path, path: Path) -> None:
    """Puts what was made in its place; what was there goes to the scratch folder, or is gone."""
    if made.is_dir() and path.is_dir() and any(path.iterdir()):
        if not _exchange(made, path):
            old = made.with_name("old")
            path.rename(old)
            try:
                made.rename(path)
            except BaseException:
                old.rename(path)
                raise
    else:
        os.replace(made, path)
    _sync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Gives two folders each other's names, at once; False where the system or the disk can't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _flush(path: Path) -> None:
    """Waits until a file, or a folder with all in it, is on the disk."""
    for folder, _, files in os.walk(path):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))
    if path.is_file():
        _sync(path)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():  # Windows opens no folders
        return
    if stat.S_ISLNK(path.lstat().st_mode):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """A descriptor with a lock that ends with this process; None where there are no such locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers(path: Path) -> None:
    """Removes the hidden folders of writers of the same path that are gone."""
    for found in path.parent.glob(f".{glob.escape(path.name)}.*{_SUFFIX}"):
        with suppress(OSError):  # it isn't there any more
            lock = _lock(found)
            if lock is not None:
                shutil.rmtree(found, ignore_errors=True)
                os.close(lock)
