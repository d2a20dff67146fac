"""Program: a compiled network with all that one does with it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from bstf_compiler.aie import report, simulate, text, timeline
from bstf_compiler.aie.bounds import layer_bounds
from bstf_compiler.aie.code import Code
from bstf_compiler.aie.estimate import Estimate, estimate
from bstf_compiler.aie.explain import Explanation, explain
from bstf_compiler.aie.listing import listing
from bstf_compiler.aie.mlir import package
from bstf_compiler.aie.sanity import insane
from bstf_compiler.aie.trace import write_chrome_trace
from bstf_compiler.aie.verify import verify
from bstf_compiler.files import make_folder, replacing
from bstf_compiler.graph import Graph
from bstf_compiler.integer import Images

_TEXT, _DATA, _DESCRIPTORS, _REPORT = "program.asm", "data.bin", "descriptors.txt", "report.html"
_READABLE = {
    _TEXT: "the program's instructions and memory map",
    _DATA: "its packed weights",
    _DESCRIPTORS: "its buffer descriptors",
    "layers.csv": "times of its layers",
    "trace.json": "the timelines, for ui.perfetto.dev",
    "timeline.png": "the timelines as a picture",
}
_OLDER = "timeline.html"  # what earlier versions wrote
_FILES = {*_READABLE, _REPORT, _OLDER}


def check_folder(folder: str | Path) -> Path:
    """The folder's full path, or a ValueError if a program can't be written there without losing something."""
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file; give a folder")
    above = next((parent for parent in folder.parents if parent.exists()), folder)
    if not above.is_dir():
        raise ValueError(f"'{folder}' can't be made: '{above}' is a file; give another folder")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    others = names - _FILES if _TEXT in names else names
    if others:
        raise ValueError(f"'{folder}' holds '{min(others)}', no part of a program; give an empty or new folder")
    return folder


class Program(Code):
    """A network compiled for a device: run it, time it, write it.

    Example:
        >>> program = bstf_compiler.compile(bstf_compiler.load("resnet"), device="aie2_4x4")
        >>> program.simulate(images)
        >>> program.estimate().total_seconds
        >>> program.write("build/resnet")
    """

    def simulate(self, x: Images, seed: int | None = None) -> np.ndarray | list[np.ndarray]:
        """Executes the program on byte-accurate memories.

        Args:
            x: float images (n, h, w, c); of several inputs a list in the order of `inputs`, or a dictionary by name.
            seed: of a random order of all that runs in parallel, one that the locks allow: a missing lock shows as a
                wrong answer. None: one fixed order.

        Returns:
            The network's outputs, float32, bit for bit those of `integer.run`; a list if there are several.

        Raises:
            ValueError: the images have another shape or hold NaN, or the program came from somewhere and its weights
                name blocks or channels that its tiles don't have.
        """
        return simulate.simulate(self, x, seed)

    def trace(self, x: Images) -> dict[str, np.ndarray]:
        """Every layer's output as int8 integers (n, h, w, c) by tensor name; arguments as for `simulate`."""
        return simulate.trace(self, x)

    def estimate(self, cost_model: str = "exact") -> Estimate:
        """Times of one image through the program under a cost model: `exact` (default), `calibrated` (at measured
        efficiencies, see calibrated.py) or `published` (see published.py).
        """
        return estimate(self, cost_model, self.unavoidable)

    @cached_property
    def unavoidable(self) -> dict[int, dict[str, float]]:
        """Seconds by stage and instruction kind that its work takes in any schedule (see bounds.py); counted once."""
        return layer_bounds(self)

    def explain(self, dense: Program | None = None) -> Explanation:
        """Per layer what bounds it, what zero blocks gain and which change of the device would help (see explain.py).

        Args:
            dense: the same network without zero blocks, compiled for the same device.

        Raises:
            ValueError: `dense` is for another device or of another network.

        Example:
            >>> rich.print(program.explain(dense).table())
        """
        if dense is not None and dense.device != self.device:
            raise ValueError(
                f"the dense program is for {dense.device.name}, this one for {self.device.name}; compile both for one"
            )
        return explain(self, self.estimate(), None if dense is None else dense.estimate())

    def verify(self) -> list[str]:
        """Violations of the static rules, as sentences; none for what `compile` returns."""
        return verify(self)

    @property
    def assembly(self) -> str:
        """The instructions as text (see text.py)."""
        return text.assembly(self)

    def write(
        self,
        folder: str | Path,
        times: Estimate | None = None,
        dense: Program | None = None,
        graph: Graph | None = None,
    ) -> Path:
        """Writes program.asm, data.bin, report.html, layers.csv, trace.json (opens in Perfetto) and timeline.png, and
        for a device with buffer descriptors descriptors.txt (see listing.py).

        The folder appears whole or not at all; a folder of an earlier program is replaced.

        Args:
            folder: where to; missing parents are made.
            times: what report.html and the files after it show; default: `self.estimate()`.
            dense: the program of the same network without zero blocks, which report.html, trace.json and timeline.png
                show beside, under the same cost model.
            graph: what the program was compiled from: the report has pictures of its blocks then.

        Raises:
            ValueError: if something else than a program is there.
        """
        folder = check_folder(folder)
        times = times or self.estimate()
        panels = [report.Panel("" if dense is None else "sparse", self, times)]
        if dense is not None:
            panels.insert(0, report.Panel("dense", dense, dense.estimate(times.cost_model)))
        shown, titles = [panel.estimate for panel in panels], [panel.title for panel in panels]
        gammas = None if graph is None else report.gammas_of(graph, [layer.name for layer in times.layers])
        make_folder(folder.parent)
        with replacing(folder) as made:
            made.mkdir()
            (made / _TEXT).write_text(self.assembly, encoding="utf-8")
            (made / _DATA).write_bytes(self.data)
            if self.device.descriptors is not None:
                (made / _DESCRIPTORS).write_text("\n".join(listing(self)) + "\n", encoding="utf-8")
            timeline.layers_csv(times, made / "layers.csv")
            write_chrome_trace(shown, made / "trace.json", titles)
            timeline.timeline_png(shown, made / "timeline.png", titles)
            others = {name: what for name, what in _READABLE.items() if (made / name).exists()}
            report.write_report(made / _REPORT, panels, gammas, files=others)
        return folder

    def emit_mlir(self, folder: str | Path, version: str = "1.4") -> Path:
        """Writes an mlir-aie design with kernels, packed weights, a test vector and a README of what was verified; it
        is read back, checked and executed before (see mlir/package.py).

        Args:
            folder: where to: new, empty, or of an earlier design; missing parents are made.
            version: of mlir-aie's syntax, `1.4` or `2025`.

        Raises:
            ValueError: the device isn't npu1, npu2, ve2302, ve2802 or a region of one, a layer has an operation without
                a kernel, the streams need more packet ids than there are, or the folder isn't free.
            RuntimeError: the design is unsound, an error of the compiler.

        Example:
            >>> bstf_compiler.compile(graph, "npu1").emit_mlir("build/design")
        """
        return package.write(self, folder, version)

    @classmethod
    def load(cls, folder: str | Path) -> Program:
        """The program that `write` wrote.

        Raises:
            FileNotFoundError: if the folder holds no program.
            ValueError: if the program is damaged.
        """
        folder = Path(folder)
        for name in (_TEXT, _DATA):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"'{folder}' holds no {name}; give a folder that Program.write wrote")
            if (folder / name).resolve().parent != folder.resolve():
                raise ValueError(f"'{folder / name}' leads out of the folder; give one that Program.write wrote")
        return cls.parse((folder / _TEXT).read_bytes(), (folder / _DATA).read_bytes())

    @classmethod
    def parse(cls, content: bytes, data: bytes) -> Program:
        """The program of a text form (see text.py) and a data image, as they are in `program.asm` and `data.bin`.

        They may come from anybody: a program that is returned is sound as far as its instructions say. What chunks of
        weights hold is looked at when it is simulated (see chunks.py).

        Raises:
            ValueError: they are damaged, or the program is unsound.
        """
        try:
            code = text.parse(content.decode("utf-8"), data)
        except UnicodeDecodeError as error:
            raise ValueError("program text is damaged: it is not text; compile again") from error
        program = cls(**vars(code))
        try:
            violation = next(insane(code), None) or next(iter(program.verify()), None)
        except (ArithmeticError, LookupError, TypeError) as error:  # a rule met what no rule before it refuses
            violation = f"its instructions don't fit together ({type(error).__name__})"
        if violation is not None:
            raise ValueError(f"program text holds an unsound program: {violation}; compile again")
        return program
