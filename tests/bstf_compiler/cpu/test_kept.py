import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from numba import prange
from numba.core.caching import CompileResultCacheImpl

from bstf_compiler.cpu import kept


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """An empty folder for compiled functions."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def adder(number, *options):
    """A kernel that adds a number by a function that it encloses; it is compiled or found in its first call."""
    add = numba.njit(lambda x: x + number)

    def kernel(x):
        for place in prange(len(x)):
            x[place] = add(x[place])

    return kept.kernel(number, *options)(kernel)


def found(kernel, expected, dtype=np.float64):
    """Whether the first call was of code that was kept; it must give what is expected."""
    x = np.zeros(3, dtype)
    kernel(x)
    assert np.array_equal(x, np.full(3, expected, dtype))
    return bool(sum(kernel.stats.cache_hits.values()))


def test_kernels_are_found_again_by_options_and_types(folder):
    assert not found(adder(1), 1)
    assert found(adder(1), 1)
    assert not found(adder(2), 2)
    assert not found(adder(1), 1, np.int64)
    assert found(adder(1), 1) and found(adder(2), 2) and found(adder(1), 1, np.int64)
    assert len(list(folder.rglob("*.nbc"))) == 3


def test_kernels_of_another_optimisation_are_others(folder, monkeypatch):
    assert not found(adder(1), 1)
    monkeypatch.setattr(numba.config, "OPT", type(numba.config.OPT)(1 if numba.config.OPT != 1 else 3))
    assert not found(adder(1), 1)
    assert found(adder(1), 1)


def test_other_sources_take_the_place_of_what_was_compiled(folder, monkeypatch):
    assert not found(adder(1), 1)
    monkeypatch.setattr(kept, "_SOURCES", bytes(32))
    assert not found(adder(1), 1)
    assert found(adder(1), 1)
    assert len(list(folder.rglob("*.nbc"))) == 1


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-1] + b"x", lambda _: b""])
def test_damaged_files_are_compiled_again(folder, damage):
    assert not found(adder(1), 1)
    (path,) = folder.rglob("*.nbc")
    path.write_bytes(damage(path.read_bytes()))
    assert not found(adder(1), 1)
    assert found(adder(1), 1)


def test_recompiled_kernels_are_kept_anew(folder):
    kernel = adder(1)
    assert not found(kernel, 1)
    kernel.recompile()
    assert found(adder(1), 1)


def test_without_a_folder_kernels_are_compiled_each_time(folder, monkeypatch):
    kernel = adder(1)
    (inner,) = folder.iterdir()
    inner.rmdir()
    inner.touch()  # nothing can be written there
    assert not found(kernel, 1)
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    assert not found(adder(1), 1)


PROGRAM = """
import sys
import numba, numpy as np
from bstf_compiler.cpu import kept

def kernel_of(factor):
    @numba.njit(no_cpython_wrapper=True)
    def inner(x):
        return factor * np.sort(x).sum()  # long, and called twice: a call that stays one

    @kept.kernel(factor)
    def multiply(x, y):
        for i in numba.prange(len(y)):
            y[i] = inner(x) - inner(-x)

    return multiply

for factor in map(int, sys.argv[1:]):
    y = np.zeros(2)
    kernel_of(factor)(np.ones(3), y)
    assert (y == 6 * factor).all(), (factor, y)
"""


def test_kernels_of_two_processes_serve_a_third(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    (tmp_path / "program.py").write_text(PROGRAM)
    for factors in (["2"], ["5"], ["2", "5"], ["5", "2"]):
        command = [sys.executable, str(tmp_path / "program.py"), *factors]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
