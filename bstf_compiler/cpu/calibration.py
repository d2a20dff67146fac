"""What convolutions cost on the machine at hand, measured once and kept in the user's cache folder."""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
from scipy.optimize import nnls

from bstf_compiler.cpu import team
from bstf_compiler.cpu.inference import memory_of, run
from bstf_compiler.cpu.kernels import winograd
from bstf_compiler.cpu.kernels.winograd import Costs
from bstf_compiler.cpu.layout import FLOATS
from bstf_compiler.cpu.operations import Operation, operations
from bstf_compiler.cpu.plan import Weights, make_plan
from bstf_compiler.cpu.simd import Isa
from bstf_compiler.files import replacing
from bstf_compiler.graph import Conv, Graph, Node, Tensor, Window

# Layers that are measured: rows and columns, channels in and out, part of the 8x8 blocks that is kept.
_LAYERS = ((56, 64, 0.5), (28, 128, 0.5), (14, 256, 0.5), (7, 512, 0.5), (28, 64, 1.0), (14, 128, 1.0))
_REPEATS = 5
# Bytes that fill the caches.
_OTHERS = 2**25
# Where others use the machine, times may fit no costs; then they are taken again, so often at most.
_TRIES = 3
_known: dict[tuple[str, ...], Costs] = {}
_measuring = threading.Lock()


def costs(isa: Isa, recalibrate: bool = False) -> Costs:
    """What convolutions cost on this machine, with all of Numba's threads.

    Measured where nobody did before (it takes a second or two, and the kernels are compiled if they aren't yet), then
    kept in `cache_file()` by CPU, instruction set, threads and version.

    Args:
        isa: what the kernels are compiled for.
        recalibrate: whether to measure again in any case.
    """
    threads = team.size(numba.config.NUMBA_NUM_THREADS, 0)
    key = (llvm.get_host_cpu_name(), isa.name, str(threads), _version())
    with _measuring:
        if recalibrate or key not in _known:
            found = None if recalibrate else _read().get("/".join(key))
            _known[key] = found or measure(isa, threads)
            if found is None:
                _write("/".join(key), _known[key])
        return _known[key]


def cache_file() -> Path:
    """Where measurements are kept: in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "bstf" / "convolutions.json"


def measure(isa: Isa, threads: int) -> Costs:
    """Times some layers both ways, and fits the costs (least squares of relative errors, none negative)."""
    for _ in range(_TRIES):
        found = _measure(isa, threads)
        if found.are_positive:
            break
    return found


def _measure(isa: Isa, threads: int) -> Costs:
    direct, tiled, transforms = [], [], []
    for side, channels, density in _LAYERS:
        graph = _layer(side, channels, density)
        one = operations(graph, isa, lambda weights, output: False)
        three = operations(graph, isa, lambda weights, output: True)
        kept = sum(operation.kept_macs for operation in one) // (9 * side**2)
        work, (*tiled_work, transform) = winograd.work(kept, 2 * channels, (side, side), isa)
        before, products, after = _seconds(three, graph, threads, isa)
        direct.append((work, _seconds(one, graph, threads, isa).sum()))
        tiled.append((tiled_work, products))
        transforms.append(([transform], before + after))
    return Costs(*_fit(direct), *_fit(tiled), *_fit(transforms))


def _fit(measured: list[tuple[tuple[float, ...], float]]) -> list[float]:
    """Seconds of a unit of each kind of work."""
    work, seconds = (np.array(column) for column in zip(*measured))
    scale = work.max(axis=0)
    found, _ = nnls(work / scale / seconds[:, None], np.ones(len(seconds)))
    return (found / scale).tolist()


def _layer(side: int, channels: int, density: float) -> Graph:
    """A 3x3 convolution of zeros around an image, on its own."""
    rng = np.random.default_rng(0)
    blocks = channels // 8
    kept = np.zeros(blocks**2, bool)
    kept[rng.permutation(blocks**2)[: round(density * blocks**2)]] = True
    kernel = rng.normal(size=(3, 3, channels, channels)).astype(np.float32)
    kernel *= np.kron(kept.reshape(blocks, blocks), np.ones((8, 8), bool))
    shape = (1, side, side, channels)
    graph = Graph("calibration", inputs={"x": shape[1:]}, outputs=["y"], output_shapes=[shape[1:]])
    graph.tensors = {name: Tensor(name, shape) for name in ("x", "y")}
    constants = [graph.add_constant("kernel", kernel), graph.add_constant("bias", np.zeros(channels, np.float32))]
    graph.nodes = [Node("y", Conv(Window((3, 3), padding=(1, 1, 1, 1))), ["x", *constants])]
    return graph


def _seconds(made: list[Operation], graph: Graph, threads: int, isa: Isa) -> np.ndarray:
    """What each operation after the load takes, the shortest of some times: others may use the machine, too.

    Networks find their weights in DRAM, so before each time other things take their places in the caches.
    """
    weights = Weights.of(made, FLOATS)
    (shape,) = graph.inputs.values()
    plan = make_plan(made, {"x": shape, "y": shape}, ["y"], weights, 1, threads, FLOATS, isa)
    memory, images = memory_of(plan, FLOATS), np.ones(math.prod(shape), np.float32)
    others, times = np.zeros(_OTHERS // 8), []
    for _ in range(_REPEATS):
        others += 1
        times.append(run(plan, weights, images, memory, threads, FLOATS, isa)[1:])
    return np.min(times, axis=0) * 1e-9


def _version() -> str:
    try:
        return version("bstf")
    except PackageNotFoundError:  # a source tree that isn't installed
        return "0"


def _read() -> dict[str, Costs]:
    """The measurements that are kept; none if the file is missing, damaged or from another version."""
    try:
        entries = json.loads(cache_file().read_text(encoding="utf-8"))
        found = {name: Costs(**{key: float(value) for key, value in entry.items()}) for name, entry in entries.items()}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError):
        return {}
    return {name: one for name, one in found.items() if one.are_positive}


def _write(name: str, found: Costs) -> None:
    """Keeps a measurement; where there is no room or right to, the next process measures again."""
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = {key: asdict(one) for key, one in (_read() | {name: found}).items()}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return
