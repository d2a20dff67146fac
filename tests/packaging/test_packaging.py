"""The wheel: what is in it, what it can do without the clone, and what importing it costs."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bstf
import bstf_compiler

ROOT = Path(__file__).parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
PACKAGES = ("bstf", "bstf_compiler")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `python -m build` makes of the sdist that it makes of the clone."""
    clone, dist = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, clone / package, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "build", "--outdir", dist, clone], check=True, capture_output=True)
    (source,) = dist.glob("*.tar.gz")
    assert source.name == f"bstf-{bstf.__version__}.tar.gz"
    (made,) = dist.glob("*.whl")
    return made


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    assert held == {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_works_without_the_clone(wheel, tmp_path):
    """Names and programs, beside the dependencies of this environment; `make build-check` does all in a clean one."""
    place = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, wheel]
    subprocess.run(pip, check=True)
    environment = os.environ | {"PYTHONPATH": str(place)}
    command = [sys.executable, SMOKE, place / "bin"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"of {place / 'bstf'}: " in done.stdout


def test_one_version():
    assert bstf.__version__ == bstf_compiler.__version__
    assert re.search(rf"^## \[{re.escape(bstf.__version__)}\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)


HEAVY = {"tensorflow", "keras", "jax", "torch", "numpy", "numba", "scipy.special", "networkx", "matplotlib", "rich"}
# What the first use of a name may import of them.
ALLOWED = {
    "__version__": set(),
    "load": set(),  # its call imports TensorFlow
    "Graph": {"numpy"},
    "BlockSparseMatrix": {"numpy", "numba"},
    "Engine": {"numpy", "numba", "networkx", "rich", "scipy.special"},
    "compile": {"numpy", "numba", "rich"},
    "Program": {"numpy", "numba", "rich"},
}


@pytest.mark.parametrize("name", ALLOWED)
def test_first_use_imports_no_more_than_it_needs(name):
    program = f"import sys, bstf_compiler; bstf_compiler.{name}; print(*({HEAVY} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(done.stdout.split()) <= ALLOWED[name]
