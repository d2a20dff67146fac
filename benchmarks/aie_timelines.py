"""Timelines of a network on an array, dense above sparse: Figures 3 and 4 of the paper, on one time axis.

    python -m benchmarks.aie_timelines --output=benchmarks/results/aie_timelines

ResNet50 on aie2_4x4, with all blocks of 8x8 and with half of them zero, unless told otherwise; random weights (seed 0),
for times depend on shapes and zero blocks only. Draws the seven lanes, what a memory tile holds and what DDR carries,
under the `exact` cost model: a .png, the report page (.html), and a .trace.json for ui.perfetto.dev. What the two
programs take is printed, a JSON line each, and CSV.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console

import bstf_compiler
from benchmarks import harness
from benchmarks.aie_sweep import NETWORKS, lowered
from bstf_compiler import DeviceSpec, Graph, Program, console
from bstf_compiler.aie.estimate import Estimate
from bstf_compiler.aie.report import Panel, gammas_of, write_report
from bstf_compiler.aie.timeline import timeline_png
from bstf_compiler.aie.trace import write_chrome_trace
from bstf_compiler.aie.usage import curves

FLAGS = flags.FLAGS
_CONSOLE = Console(width=140)
_BLOCK = 8


def draw(graphs: dict[str, Graph], device: DeviceSpec, folder: Path, name: str) -> list[dict[str, Any]]:
    """Compiles networks for a device and draws their timelines one above the other, by title.

    Args:
        graphs: the networks by title, in the order to draw them.
        device: the array.
        folder: for the files; there already.
        name: of the files.

    Returns:
        A record a network: what its program takes.
    """
    programs = [bstf_compiler.compile(graph, device) for graph in graphs.values()]
    times, titles = [program.estimate() for program in programs], list(graphs)
    timeline_png(times, folder / f"{name}.png", titles)
    panels = [Panel(*one) for one in zip(titles, programs, times)]
    gammas = gammas_of(list(graphs.values())[-1], [layer.name for layer in times[-1].layers])
    write_report(folder / f"{name}.html", panels, gammas, title=name.removesuffix(f"_{device.name}"))
    write_chrome_trace(times, folder / f"{name}.trace.json", titles)
    return [{"blocks": title, **record(program, one)} for title, program, one in zip(titles, programs, times)]


def record(program: Program, times: Estimate) -> dict[str, Any]:
    """What a program takes, in seconds, bytes and bytes/s, and how good its memory plan is."""
    packing, (tile, ddr) = program.packing, curves(times)
    return {
        "seconds": times.total_seconds,
        "lower_bound_seconds": times.lower_bound_seconds,
        "macs": sum(layer.macs for layer in times.layers),
        "weight_bytes": program.weight_bytes,
        "memtile_bytes": tile.limit,
        "memtile_peak": packing.peak,
        "memtile_least": packing.least,
        "optimality_gap": packing.gap,
        "spilled_bytes": packing.spilled,
        "ddr_rate": ddr.limit,
        "ddr_peak": ddr.peak,
        "ddr_mean": float((ddr.total * np.diff(ddr.times)).sum() / times.total_seconds),
    }


def _columns(records: Sequence[dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    dense = records[0]["seconds"]
    return {
        "blocks": lambda one: one["blocks"],
        "ms an image": lambda one: f"{one['seconds'] * 1e3:.3f}",
        "dense / this": lambda one: f"{dense / one['seconds']:.2f}",
        "/ lower bound": lambda one: f"{one['seconds'] / one['lower_bound_seconds']:.2f}",
        "MemTile, KiB": lambda one: f"{one['memtile_peak'] / 2**10:.1f} of {one['memtile_bytes'] / 2**10:.0f}",
        "gap": lambda one: f"{one['optimality_gap']:.1%}",
        "spilled, KiB": lambda one: f"{one['spilled_bytes'] / 2**10:.0f}",
        "DDR mean (peak), GB/s": lambda one: (
            f"{one['ddr_mean'] / 1e9:.1f} ({one['ddr_peak'] / 1e9:.1f}) of {one['ddr_rate'] / 1e9:.1f}"
        ),
    }


def main(argv: Sequence[str]) -> None:
    """Draws, writes and prints."""
    harness.check_networks([FLAGS.network], NETWORKS)
    try:
        device = DeviceSpec.load(FLAGS.device)
    except ValueError as error:
        sys.exit(f"error: {error}")
    folder, name = Path(FLAGS.output), f"{FLAGS.network}_{device.name}"
    log = harness.Log(folder, name)
    log.header({"machine": harness.machine()})
    side = NETWORKS[FLAGS.network][0]
    titles = {0.0: "dense", FLAGS.ratio: f"{FLAGS.ratio:.0%} zero blocks"}
    try:
        graphs = {title: lowered(FLAGS.network, ratio, _BLOCK, side) for ratio, title in titles.items()}
        for one in draw(graphs, device, folder, name):
            log.add({"network": FLAGS.network, "device": device.name, **one})
    except ValueError as error:
        sys.exit(f"error: {error}")
    log.write_csv()
    _CONSOLE.print(harness.table(f"{FLAGS.network} on {device.name}", log.records, _columns(log.records)))


def define_flags() -> None:
    """Defines the flags of the program."""
    flags.DEFINE_string("network", "ResNet50", f"One of {', '.join(NETWORKS)}.")
    flags.DEFINE_string("device", "aie2_4x4", "Name or file of a device.")
    ratio = "Fraction of zero blocks of the sparse network."
    flags.DEFINE_float("ratio", 0.5, ratio, lower_bound=0.01, upper_bound=0.99)
    flags.DEFINE_string("output", None, "Folder for the results.", required=True)


if __name__ == "__main__":
    console.run("aie_timelines", __doc__, main, define_flags)
