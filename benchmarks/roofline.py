"""What bounds each layer of a network on the CPU: its multiply-adds, its weights or its activations.

    python -m benchmarks.roofline --network=ResNet50 --density=0.5 --output=DIR

A layer takes no less time than its operations at the measured peak, than its weights at the bandwidth of DRAM (of the
caches, if those of the whole network fit the last one), and than its activations at the bandwidth of the caches; the
longest of these is its bound. Operations are effective ones: a layer by Winograd's method needs fewer multiplications
and may take less than its bound.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import harness, network
from bstf_compiler import console
from bstf_compiler.files import replacing

if TYPE_CHECKING:
    from bstf_compiler.cpu.engine import LayerTime, Profile

FLAGS = flags.FLAGS
# Weights that are read once an inference come from DRAM, if all together don't stay in a cache of this size.
_LAST_CACHE_BYTES = 2**25


def bounds(layer: LayerTime, roofs: dict[str, float], weights: str) -> dict[str, float]:
    """The least seconds of a layer for each thing that may bound it.

    Args:
        layer: as a profile has it.
        roofs: operations/s as "operations", bytes/s as "bandwidth" (of DRAM) and "cache bandwidth".
        weights: which of the two bandwidths weights are read with.
    """
    return {
        "multiply-adds": layer.operations / roofs["operations"],
        "weights": layer.weight_bytes / roofs[weights],
        "activations": (layer.input_bytes + layer.output_bytes) / roofs["cache bandwidth"],
    }


def rows(layers: Profile, roofs: dict[str, float]) -> list[dict[str, Any]]:
    """A row a layer: times in seconds, what bounds it, and how near to this bound it is."""
    together = sum(layer.weight_bytes for layer in layers.layers)
    weights = "bandwidth" if together > _LAST_CACHE_BYTES else "cache bandwidth"
    found = []
    for layer in layers.layers:
        least = bounds(layer, roofs, weights)
        bound = max(least, key=least.get)
        found.append(
            {
                "layer": layer.name,
                "does": layer.kind,
                "seconds": layer.seconds,
                "gflops": layer.operations / layer.seconds / 1e9,
                "bytes": layer.bytes,
                "operations_a_byte": layer.operations / max(1, layer.bytes),
                "bound": bound,
                "least_seconds": least[bound],
                "reached": least[bound] / layer.seconds,
            }
        )
    return found


def table(found: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows for people, and a sum for each kind of bound."""
    made = Table(title=title)
    for name in ("layer", "does", "ms", "eff. GFLOPS", "KiB", "op/byte", "bound by", "bound ms", "reached"):
        made.add_column(name, justify="left" if name in ("layer", "does", "bound by") else "right")
    for one in found:
        made.add_row(
            one["layer"],
            one["does"],
            f"{one['seconds'] * 1e3:.3f}",
            f"{one['gflops']:.0f}",
            f"{one['bytes'] / 1024:.0f}",
            f"{one['operations_a_byte']:.1f}",
            one["bound"],
            f"{one['least_seconds'] * 1e3:.3f}",
            f"{one['reached']:.0%}",
        )
    made.add_section()
    for bound in dict.fromkeys(one["bound"] for one in found):
        of_it = [one for one in found if one["bound"] == bound]
        seconds, least = (sum(one[name] for one in of_it) for name in ("seconds", "least_seconds"))
        made.add_row(
            f"{len(of_it)} layers", "", f"{seconds * 1e3:.3f}", "", "", "", bound, f"{least * 1e3:.3f}",
            f"{least / seconds:.0%}",
        )  # fmt: skip
    return made


def profile(name: str, density: float, dtype: str, batch: int, threads: int, repeats: int) -> Profile:
    """Times the layers of a network; arguments as the flags'."""
    from bstf_compiler import Engine

    with tempfile.TemporaryDirectory() as folder:
        network.prepare(Path(folder), name, density, dtype)
        with np.load(Path(folder) / "images.npz") as arrays:
            x = arrays["x"][:batch]
        return Engine(Path(folder) / "model", threads=threads).profile(x, repeats)


def define_flags() -> None:
    """The flags of the program."""
    flags.DEFINE_enum("network", "ResNet50", network.NETWORKS, "the network")
    flags.DEFINE_float("density", 0.5, "fraction of the 8x8 blocks that is kept", 0.01, 1.0)
    flags.DEFINE_enum("dtype", "float32", ["float32", "int8"], "what to compute in")
    flags.DEFINE_integer("batch", 1, "images of an inference, at most 8", 1, 8)
    flags.DEFINE_integer("threads", 2, "number of threads", lower_bound=1)
    flags.DEFINE_integer("repeats", 30, "inferences, of which medians are told", lower_bound=1)
    flags.DEFINE_string("output", None, "folder for roofline.csv", required=True)


def main(_: Sequence[str]) -> None:
    """Measures the roofs, then the layers."""
    measured = harness.roofs([FLAGS.dtype], FLAGS.threads)
    roofs = {
        "operations": measured[FLAGS.dtype],
        "bandwidth": measured["bandwidth"],
        "cache bandwidth": harness.bandwidth(harness.CACHED_BYTES, FLAGS.threads),
    }
    layers = profile(FLAGS.network, FLAGS.density, FLAGS.dtype, FLAGS.batch, FLAGS.threads, FLAGS.repeats)
    found = rows(layers, roofs)
    output = Path(FLAGS.output)
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / "roofline.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, found[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    what = f"{FLAGS.network}, {FLAGS.dtype}, density {FLAGS.density:g}, batch {layers.images}"
    screen = Console(width=140)
    screen.print(table(found, f"{what}: {layers.seconds * 1e3:.1f} ms"))
    for name, value in roofs.items():
        screen.print(f"{name}: {value / 1e9:.1f} {'G operations/s' if name == 'operations' else 'GB/s'}")
    memory, live = (size / 2**20 for size in (layers.memory_bytes, layers.live_bytes))
    screen.print(f"activations: {memory:.2f} MiB, of which {live:.2f} MiB are needed at a time")


if __name__ == "__main__":
    console.run("roofline", __doc__, main, define_flags)
