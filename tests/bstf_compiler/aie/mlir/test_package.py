"""The folder that a user hands to mlir-aie."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import bstf_compiler
from bstf_compiler.aie.mlir import host, package
from bstf_compiler.aie.mlir.machine import Machine
from bstf_compiler.aie.mlir.reader import read
from bstf_compiler.aie.mlir.rules import RULES
from tests.bstf_compiler.aie.mlir.networks import small


@pytest.fixture(scope="module")
def program():
    return bstf_compiler.compile(small(), "npu1_2x2")


@pytest.fixture(scope="module")
def folder(program, tmp_path_factory) -> Path:
    return program.emit_mlir(tmp_path_factory.mktemp("made") / "deep" / "design")


def test_what_is_in_the_folder(folder):
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "Makefile", "README.md", "aie.irdl.mlir", "design.generic.mlir", "design.mlir", "design.upstream.mlir",
        "expected.bin", "host.bin", "host.json", "kernels/add.cc", "kernels/conv.cc", "kernels/pool.cc",
        "kernels/requantize.cc", "kernels/tile.h", "kernels/emulation/aie_api/aie.hpp",
    }  # fmt: skip
    assert (folder / "design.mlir").read_text().startswith("// For mlir-aie 1.4 (2026); other versions")
    assert [path.name for path in folder.parent.iterdir()] == ["design"]


def test_the_folder_alone_gives_the_outputs(program, folder):
    """Text and bytes of the folder, and what host.json says of them."""
    buffer = np.fromfile(folder / "host.bin", np.int8)
    expected = np.fromfile(folder / "expected.bin", np.int8)
    places = json.loads((folder / "host.json").read_text())
    assert places["bytes"] == buffer.size == expected.size
    weights = places["weights"]
    assert buffer[weights["address"] : weights["address"] + weights["bytes"]].tobytes() == program.data
    (image,) = places["inputs"]
    assert image["shape"] == [13, 11, 3] and image["position"] == 4
    Machine(read((folder / "design.generic.mlir").read_text()), buffer).run()
    assert np.array_equal(buffer, expected)
    (output,) = places["outputs"]
    rows, columns, channels = output["shape"]
    pixels = expected[output["address"] :][: rows * columns * output["pixel_bytes"]].reshape(rows, columns, -1)
    wanted = host.expected(program, host.random_images(program))[0]
    assert np.array_equal(pixels[..., :channels], wanted) and len(np.unique(wanted)) > 1


def test_the_readme_says_what_was_verified_and_what_not(folder):
    text = (folder / "README.md").read_text()
    assert not re.search(r"@[A-Z_]+@", text + (folder / "Makefile").read_text())
    assert "mlir-aie 1.4 (2026)" in text and "`design.mlir`" in text and "small on npu1_2x2" in text
    assert all(f"`{rule}`" in text for rule in RULES) and f"these {len(RULES)} rules" in text
    assert "## What was not" in text and "Nothing here ran through mlir-aie's own tools" in text
    assert "calls of kernels" in text


def test_its_makefile_compiles_the_kernels(folder, tmp_path):
    if not (shutil.which("g++") and shutil.which("make")):
        pytest.skip("needs g++ and make")
    copy = shutil.copytree(folder, tmp_path / "copy")
    subprocess.run(["make", "-s", "emulated"], cwd=copy, check=True)
    assert (copy / "libkernels.so").is_file()


def test_an_earlier_design_is_replaced(program, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "design")
    program.emit_mlir(copy, version="2025")
    names = {path.name for path in copy.iterdir()}
    assert "design.mlir" not in names and {"step0.mlir", "step8.mlir", "design.generic.mlir"} <= names
    text = (copy / "README.md").read_text()
    assert "mlir-aie of late 2024 to 2025" in text and "step0.mlir and 8 more" in text


def test_a_full_disk_is_a_sentence_and_leaves_nothing(program, disk):
    place = disk(32)
    with pytest.raises(OSError, match="Can't write .*design: no space left on device; make room there"):
        program.emit_mlir(place / "design")
    assert list(place.iterdir()) == []


def test_a_part_that_is_no_npu_says_so(tmp_path):
    made = bstf_compiler.compile(small(), "ve2302_3x1").emit_mlir(tmp_path / "design")
    assert "no firmware that runs one on a Versal part" in (made / "README.md").read_text()
    assert "aie.device(xcve2302) @step0" in (made / "design.mlir").read_text()
    other = bstf_compiler.compile(small(), "npu2_1x2").emit_mlir(tmp_path / "other")
    assert "aie2p-none-unknown-elf" in (other / "Makefile").read_text()


@pytest.mark.parametrize(
    "name, version, sentence",
    [
        ("file", "1.4", "is a file; give a folder"),
        ("other", "1.4", "holds something else than an mlir-aie design"),
        ("new", "1.3", "there is no mlir-aie syntax '1.3'"),
    ],
)
def test_refusals_leave_everything(program, tmp_path, name, version, sentence):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("mine")
    with pytest.raises(ValueError, match=sentence):
        program.emit_mlir(tmp_path / name, version=version)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"file", "other", "other/mine"}


def test_an_unsound_design_is_never_written(program, tmp_path, monkeypatch):
    """A broken rule, a core that is missing and a wrong byte are found before anything is written."""
    real = package.design

    def broken(code):
        made = real(code)
        made.configurations[0].cores.pop()
        return made

    monkeypatch.setattr(package, "design", broken)
    with pytest.raises(RuntimeError, match="breaks a rule, lock-balance: step0, lock"):
        program.emit_mlir(tmp_path / "design")
    monkeypatch.setattr(package, "design", real)
    monkeypatch.setattr(package, "check", lambda made: [])
    monkeypatch.setattr(package, "design", broken)
    with pytest.raises(RuntimeError, match="doesn't run: configuration 'step0' never ends"):
        program.emit_mlir(tmp_path / "design")
    monkeypatch.setattr(package, "design", real)
    monkeypatch.setattr(package.host, "expected", lambda code, images: [np.zeros((1, 1, 10), np.int8)])
    with pytest.raises(RuntimeError, match="computes something else than the program"):
        program.emit_mlir(tmp_path / "design")
    assert not list(tmp_path.iterdir())
