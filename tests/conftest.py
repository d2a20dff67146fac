"""Options and fixtures for the whole suite."""

import gc
import os
import subprocess
from pathlib import Path

import pytest

# The workers of the suite share the cores: pools of threads in each would wait for the others', spinning.
for pool in ("OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(pool, "1")
# Optimising takes most of a kernel's compilation, and tests compile more than they compute. What is compiled so lies
# apart, or Numba would find it when speed counts.
os.environ.setdefault("NUMBA_OPT", "1")
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "numba-of-tests"))


def pytest_addoption(parser):
    parser.addoption(
        "--paper-tables",
        default=None,
        metavar="DIR",
        help="folder with the published per-layer tables (CSV); without it their tests are skipped",
    )
    parser.addoption(
        "--mlir-opt",
        default=None,
        metavar="PATH",
        help="upstream's mlir-opt, version 19; without it one on the path is taken, or its tests are skipped",
    )


def pytest_collection_finish():
    """What was imported stays, and a graph is many objects: the collector would look through them again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture(scope="session")
def paper_tables(request) -> Path:
    """The folder of the published tables; skips the test without one."""
    folder = request.config.getoption("--paper-tables")
    if folder is None:
        pytest.skip("needs --paper-tables=DIR")
    path = Path(folder)
    if not (path / "totals.csv").is_file():
        pytest.fail(f"--paper-tables: {path} holds no totals.csv.")
    return path


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of so many KiB; the fixture gives a function that mounts it."""
    mounted = []

    def mount(kib, options="rw"):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k,{options}", "none", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no program mount")
        if done.returncode:
            pytest.skip("only a superuser may mount a small disk")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)
