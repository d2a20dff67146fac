"""What zero blocks in uneven places cost on arrays: the same networks with three kinds of Γ of one ratio.

    python -m benchmarks.aie_dealing --output=build/aie_dealing

* `column`: every output block keeps as many blocks (`scope="column"`), so that equal shares are equal work;
* `layer`: the blocks of largest magnitude of random weights (seed 0), which columns keep by chance;
* `uneven`: the same after output blocks were made larger or smaller by a random factor of log-normal distribution
  (sigma 0.1). The numbers that columns keep then vary up to four times as much as by chance. At a ratio of one half the
  published weights of EfficientNet-Lite0 make that 1.5 times in the median of its layers and 3.5 times in the worst.

`over_column` is a time over that of the first kind: what is left of the difference after output blocks were dealt to
cores by what they keep (bstf_compiler/aie/dealing.py). Writes a JSON line a cell, and CSV.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from absl import flags
from rich.console import Console

import bstf_compiler
from benchmarks import aie_sweep, harness
from bstf import importance
from bstf.blocks import BlockShape
from bstf_compiler import console

FLAGS = flags.FLAGS
_CONSOLE = Console(width=140)
_SIGMA = 0.1


def uneven(kernel: np.ndarray, block: BlockShape) -> np.ndarray:
    """Scores of blocks whose output channels were made larger or smaller by chance."""
    scores = np.asarray(importance.get("l2")(kernel, block))
    return scores * np.random.default_rng(scores.shape).lognormal(0.0, _SIGMA, scores.shape[1])


MASKS: dict[str, dict[str, Any]] = {"column": {"scope": "column"}, "layer": {}, "uneven": {"importance": uneven}}
"""Arguments of `bstf.sparsify` by kind of Γ."""


def measure(network: str, devices: Sequence[str], ratio: float, side: int, jobs: int, log: harness.Log) -> None:
    """Compiles and times a network with every kind of Γ on every device; a record each."""
    graphs = {mask: aie_sweep.lowered(network, ratio, 8, side, **options) for mask, options in MASKS.items()}
    cells = list(itertools.product(devices, MASKS))
    tasks = (joblib.delayed(aie_sweep.cell)(graphs[mask], device, False) for device, mask in cells)
    even: dict[str, float] = {}
    for (device, mask), result in zip(cells, joblib.Parallel(n_jobs=jobs, return_as="generator")(tasks)):
        record = {"network": network, "side": side, "ratio": ratio, "device": device, "mask": mask}
        record["result"] = result["result"]
        if "seconds" in result:
            record |= {"seconds": result["seconds"], "lower_bound_seconds": result["lower_bound_seconds"]}
            even.setdefault(device, result["seconds"])
            record["over_column"] = result["seconds"] / even[device]
        log.add(record)
        said = f"{result['seconds'] * 1e3:.3f} ms" if "seconds" in result else result["result"]
        _CONSOLE.print(f"{network}, {mask}, on {device}: {said}", highlight=False)


def main(argv: Sequence[str]) -> None:
    """Runs the cells and prints their table."""
    harness.check_networks(FLAGS.networks, aie_sweep.NETWORKS)
    try:
        for device in FLAGS.devices:
            bstf_compiler.DeviceSpec.load(device)
    except ValueError as error:
        sys.exit(f"error: {error}")
    log = harness.Log(Path(FLAGS.output), "dealing")
    for network in FLAGS.networks:
        side = -(-aie_sweep.NETWORKS[network][0] // FLAGS.side_divisor)
        measure(network, FLAGS.devices, FLAGS.ratio, side, FLAGS.jobs, log)
    log.write_csv()
    done = [record for record in log.records if "seconds" in record]
    columns = {name: lambda one, name=name: str(one[name]) for name in ("network", "device", "mask")}
    columns |= {
        "ms": lambda one: f"{one['seconds'] * 1e3:.3f}",
        "over bound": lambda one: f"{one['seconds'] / one['lower_bound_seconds']:.3f}",
        "over column": lambda one: f"{one['over_column']:.3f}",
    }
    _CONSOLE.print(harness.table("times of an image", done, columns))


def define_flags() -> None:
    """Defines the flags of the program."""
    networks = ["ResNet50", "InceptionV3", "VGG16"]
    flags.DEFINE_list("networks", networks, f"Of {', '.join(aie_sweep.NETWORKS)}.")
    flags.DEFINE_list("devices", ["aie2_4x4", "aie2_6x6"], "Names or files of devices.")
    flags.DEFINE_float("ratio", 0.5, "Fraction of zero blocks.", lower_bound=0.0, upper_bound=0.99)
    flags.DEFINE_integer("side_divisor", 1, "Divides the side of the images: 2 for half-size ones.", lower_bound=1)
    flags.DEFINE_integer("jobs", -1, "Cells at a time; -1: one a core.")
    flags.DEFINE_string("output", None, "Folder for the results.", required=True)


if __name__ == "__main__":
    console.run("aie_dealing", __doc__, main, define_flags)
