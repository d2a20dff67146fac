"""What an installed bstf must be able to do; imports nothing of the clone.

    python smoke.py [PROGRAMS]

from any folder. With the folder that holds bstf-train and bstf-compile, if it isn't the interpreter's, only names,
devices and programs are checked and no kernel is compiled, which takes a minute in a new place.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

import bstf
import bstf_compiler
from bstf_compiler.aie import device


def names() -> int:
    """Every public name can be had; returns how many there are."""
    for package in (bstf, bstf_compiler):
        for name in package.__all__:
            assert getattr(package, name) is not None, name
    return len(bstf.__all__) + len(bstf_compiler.__all__)


def road(folder: Path) -> None:
    """Keras to a program and an engine, with every data file of the package that this takes."""
    model = keras.Sequential([keras.Input((8, 8, 8)), keras.layers.Conv2D(16, 3, activation="relu")])
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 8)).astype(np.float32)
    bstf.export(bstf.quantize(bstf.sparsify(model), images), folder / "model")
    graph = bstf_compiler.load(folder / "model")
    program = bstf_compiler.compile(graph, device="npu1_1x1")
    simulated = program.simulate(images)
    assert np.array_equal(simulated, bstf_compiler.integer.run(graph, images))
    assert np.array_equal(simulated, bstf_compiler.Engine(graph)(images))
    assert (program.write(folder / "program") / "report.html").is_file()


def main() -> None:
    for name in device.available():
        bstf_compiler.DeviceSpec.load(name)
    programs = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(sys.executable).parent
    for program in ("bstf-train", "bstf-compile"):
        helped = subprocess.run([programs / program, "--help"], capture_output=True, text=True)
        assert "--output" in helped.stdout, helped  # absl's --help ends with 1
    print(f"bstf {bstf.__version__} of {Path(bstf.__file__).parent}: {names()} public names")
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder:
            road(Path(folder))
        print("from Keras to a simulated program and an engine: equal")


if __name__ == "__main__":
    main()
