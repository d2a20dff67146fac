"""What networks cost on arrays: networks x devices x zero blocks, on all cores, resumable.

    python -m benchmarks.aie_sweep --output=benchmarks/results/aie_sweep --published=paper_tables/totals.csv

Networks have random weights (seed 0), whose zero blocks are chosen layer by layer: times depend on shapes and zero
blocks only. Every cell is compiled and verified, and timed under the `exact` cost model; with --simulate one random
image also goes through the simulation, every layer compared with the integer reference. Writes a JSON line a cell, CSV,
and a plot of time against cores with the best of each marked; beside the published totals where they are given. Those
count another compute term than multiply-adds: compare shapes, not sizes. `over_bound` is a time over that of the
program's unavoidable work (bstf_compiler/aie/bounds.py). A second run goes on where the first one stopped. Cells run
as joblib tasks, so its back ends for several machines serve too.
"""

from __future__ import annotations

import csv
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import joblib
import keras
import numpy as np
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from rich.console import Console

import bstf
import bstf_compiler
from benchmarks import harness
from benchmarks.records import Records
from bstf import applications
from bstf_compiler import Graph, console
from bstf_compiler.files import replacing
from bstf_compiler.main import first_difference

FLAGS = flags.FLAGS
_CONSOLE = Console(width=140)


def _of_keras(name: str, size: int, **options: Any) -> tuple[int, Callable[[int], keras.Model]]:
    network = getattr(keras.applications, name)
    return size, lambda side: network(weights=None, include_top=False, input_shape=(side, side, 3), **options)


NETWORKS: dict[str, tuple[int, Callable[[int], keras.Model]]] = {
    "ResNet50": _of_keras("ResNet50", 224, pooling="avg"),
    "InceptionV3": _of_keras("InceptionV3", 299, pooling="avg"),
    "VGG16": _of_keras("VGG16", 224),
    "small_resnet": (32, lambda side: applications.small_resnet((side, side, 3), widths=(16, 32), depth=1)),
}
"""Side of the images and what builds the network; without dense layers, as in the published tables."""

_PUBLISHED_NAMES = {"ResNet50": "Resnet", "InceptionV3": "IncV3", "VGG16": "VGG16"}


def lowered(network: str, ratio: float, block: int, side: int, **options: Any) -> Graph:
    """A quantised network as the compiler takes it; `options` are for `bstf.sparsify`."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    model = NETWORKS[network][1](side)
    if ratio:
        model = bstf.sparsify(model, block=block, ratio=ratio, **options)
    images = np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        bstf.export(bstf.quantize(model, images, compensate=False, correct_bias=False), Path(folder) / "model")
        return bstf_compiler.load(Path(folder) / "model")


def cell(graph: Graph, device: str, simulate: bool) -> dict[str, Any]:
    """Compiles, times and perhaps simulates a network; the refusing sentence if it can't be compiled."""
    began = time.perf_counter()
    try:
        program = bstf_compiler.compile(graph, device)  # verifies it too
    except ValueError as error:
        return {"result": str(error)}
    compiled = time.perf_counter()
    times = program.estimate()
    record: dict[str, Any] = {
        "result": "ok",
        "cores": program.device.columns * program.device.rows,
        "seconds": times.total_seconds,
        "lower_bound_seconds": times.lower_bound_seconds,
        "weight_bytes": program.weight_bytes,
        "macs": sum(layer.macs for layer in times.layers),
        "bound_by": {
            kind: sum(layer.seconds for layer in times.layers if layer.bound == kind)
            for kind in sorted({layer.bound for layer in times.layers})
        },
        "compile_seconds": round(compiled - began, 2),
        "estimate_seconds": round(time.perf_counter() - compiled, 2),
    }
    if simulate:
        began = time.perf_counter()
        image = np.random.default_rng(1).uniform(-1, 1, (1, *next(iter(graph.inputs.values())))).astype(np.float32)
        record["simulated"] = first_difference(program, graph, image) or "equal"
        record["simulate_seconds"] = round(time.perf_counter() - began, 2)
    return record


class Sweep:
    """The cells of a sweep and what is known of them, in a folder."""

    def __init__(self, folder: Path, side_divisor: int, simulate: bool) -> None:
        self.folder, self._divisor, self._simulate = folder, side_divisor, simulate
        self.records = Records(folder / "sweep.jsonl")

    def run(self, networks: Sequence[str], devices: Sequence[str], ratios: Sequence[float], block: int) -> None:
        """Fills the cells that are still empty; every result is kept as soon as it is there."""
        done = {self._key(record) for record in self.records}
        for network, ratio in itertools.product(networks, ratios):
            side = -(-NETWORKS[network][0] // self._divisor)
            about = {"network": network, "side": side, "ratio": ratio, "block": block}
            missing = [device for device in devices if self._key(about | {"device": device}) not in done]
            if not missing:
                continue
            graph = lowered(network, ratio, block, side)
            tasks = (joblib.delayed(cell)(graph, device, self._simulate) for device in missing)
            results = joblib.Parallel(n_jobs=FLAGS.jobs, return_as="generator")(tasks)
            for device, result in zip(missing, results):
                self._add(about | {"device": device} | result)

    @staticmethod
    def _key(record: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(record[name] for name in ("network", "side", "ratio", "block", "device"))

    def _add(self, record: dict[str, Any]) -> None:
        self.records.add(record)
        said = f"{record['seconds'] * 1e3:.3f} ms" if record["result"] == "ok" else record["result"]
        _CONSOLE.print(f"{record['network']} {record['ratio']:.0%} on {record['device']}: {said}", highlight=False)

    def rows(self, published: dict[tuple[str, str, bool], str]) -> list[dict[str, Any]]:
        """A row a network and device: dense, sparse, speed-up; the published ones where known."""
        cells = {self._key(record): record for record in self.records}
        rows = []
        for key, dense in cells.items():
            network, side, ratio, block, device = key
            if ratio or dense["result"] != "ok":
                continue
            row = {"network": network, "side": side, "device": device, "dense_ms": dense["seconds"] * 1e3}
            row["dense_over_bound"] = dense["seconds"] / dense["lower_bound_seconds"]
            for other, sparse in cells.items():
                if other[2] and (*other[:2], *other[3:]) == (network, side, block, device) and "seconds" in sparse:
                    row |= {
                        f"sparse_{other[2]:.0%}_ms": sparse["seconds"] * 1e3,
                        f"speedup_{other[2]:.0%}": dense["seconds"] / sparse["seconds"],
                        f"sparse_{other[2]:.0%}_over_bound": sparse["seconds"] / sparse["lower_bound_seconds"],
                    }
            mesh = device.removeprefix("aie2_")
            for name, is_sparse in (("published_dense_ms", False), ("published_sparse_ms", True)):
                if total := published.get((network, mesh, is_sparse)):
                    row[name] = float(total) * 1e3 if total != "failed" else total
            rows.append(row)
        return rows

    def write(self, published: dict[tuple[str, str, bool], str]) -> list[dict[str, Any]]:
        """Writes CSV and the plot."""
        rows = self.rows(published)
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = self.folder / "sweep.csv"
        with replacing(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
                for row in rows
            )
        _plot([record for record in self.records if record["result"] == "ok"], self.folder / "sweep.png")
        return rows


def read_published(path: str | None) -> dict[tuple[str, str, bool], str]:
    """Published totals in seconds by (network, mesh, sparse), or "failed"; columns mesh, model, dense_s, sparse_s."""
    if path is None:
        return {}
    if not Path(path).is_file():
        raise ValueError(f"there is no file '{path}'; give the CSV of the published totals, or leave --published out")
    ours = {theirs: name for name, theirs in _PUBLISHED_NAMES.items()}
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        (ours[row["model"]], row["mesh"], sparse): row["sparse_s" if sparse else "dense_s"]
        for row in rows
        for sparse in (False, True)
        if row.get("model") in ours
    }


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ValueError(f"--ratios holds '{text}'; give fractions of zero blocks from 0 to below 1")
    return value


def pareto(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that no other one beats in both cores and time, by cores."""
    best: list[dict[str, Any]] = []
    for record in sorted(records, key=lambda one: (one["cores"], one["seconds"])):
        if not best or record["seconds"] < best[-1]["seconds"]:
            best.append(record)
    return best


def _plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    networks = list(dict.fromkeys(record["network"] for record in records))
    if not networks:
        return
    figure = Figure(figsize=(4.5 * len(networks), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks):
        ratios = sorted({record["ratio"] for record in records if record["network"] == network})
        for ratio in ratios:
            own = [one for one in records if (one["network"], one["ratio"]) == (network, ratio)]
            (line,) = axes.plot([one["cores"] for one in own], [one["seconds"] * 1e3 for one in own], "o", alpha=0.5)
            front = pareto(own)
            axes.plot(
                [one["cores"] for one in front], [one["seconds"] * 1e3 for one in front], "-", color=line.get_color(),
                label=f"{ratio:.0%} zero blocks",
            )  # fmt: skip
        axes.set(title=network, xlabel="cores", ylabel="ms an image", xscale="log", yscale="log")
        axes.set_xticks(sorted({one["cores"] for one in records}))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(ScalarFormatter() if axis is axes.yaxis else NullFormatter())
        axes.legend()
        axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def main(argv: Sequence[str]) -> None:
    """Runs the sweep and prints its table."""
    harness.check_networks(FLAGS.networks, NETWORKS)
    try:
        published = read_published(FLAGS.published)
        for device in FLAGS.devices:
            bstf_compiler.DeviceSpec.load(device)
        ratios = [_ratio(text) for text in FLAGS.ratios]
    except ValueError as error:
        sys.exit(f"error: {error}")
    sweep = Sweep(Path(FLAGS.output), FLAGS.side_divisor, FLAGS.simulate)
    sweep.run(FLAGS.networks, FLAGS.devices, ratios, FLAGS.block)
    rows = sweep.write(published)
    names = list(dict.fromkeys(name for row in rows for name in row))

    def show(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row[name]:.2f}" if isinstance(row.get(name), float) else str(row.get(name, ""))

    _CONSOLE.print(harness.table("times of an image", rows, {name: show(name) for name in names}))
    refused = [record for record in sweep.records if record["result"] != "ok"]
    wrong = [record for record in sweep.records if record.get("simulated", "equal") != "equal"]
    for record in (*refused, *wrong):
        what = record["result"] if record in refused else record["simulated"]
        _CONSOLE.print(f"{record['network']} {record['ratio']:.0%} on {record['device']}: {what}", highlight=False)
    if wrong:
        sys.exit("error: a simulation differs from the integer reference")


def define_flags() -> None:
    """Defines the flags of the program."""
    flags.DEFINE_list("networks", ["ResNet50", "InceptionV3", "VGG16"], f"Of {', '.join(NETWORKS)}.")
    flags.DEFINE_list("devices", [f"aie2_{n}x{n}" for n in range(2, 9)], "Names or files of devices.")
    flags.DEFINE_list("ratios", ["0", "0.5"], "Fractions of zero blocks; 0 is dense.")
    flags.DEFINE_integer("block", 8, "Side of a block.", lower_bound=1)
    flags.DEFINE_integer("side_divisor", 1, "Divides the side of the images: 2 for half-size ones.", lower_bound=1)
    flags.DEFINE_bool("simulate", False, "Also simulate an image and compare every layer.")
    flags.DEFINE_integer("jobs", -1, "Cells at a time; -1: one a core.")
    flags.DEFINE_string("published", None, "CSV of the published totals to show beside.")
    flags.DEFINE_string("output", None, "Folder for the results.", required=True)


if __name__ == "__main__":
    console.run("aie_sweep", __doc__, main, define_flags)
