"""Products with block-sparse matrices: this package, and what else there is, on the same matrices.

    python -m benchmarks.block_matmul --preset=square --preset=resnet50 --output=benchmarks/results/block_matmul

Effective operations are 2 x multiply-adds on kept blocks. `bstf` packs the dense operand inside of the time, and
`bstf_packed` apart; both write into an array that exists, as NumPy does. A dense peer multiplies the zeros, too.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import harness
from benchmarks.harness import Peer, Work
from bstf_compiler import BlockSparseMatrix

FLAGS = flags.FLAGS
_CONSOLE = Console(width=130)

PRESETS = {
    "square": ["1024x1024x1024", "2048x2048x2048"],
    # The 1x1 convolutions of ResNet-50 on 224 x 224 pixels: pixels x input channels x output channels.
    "resnet50": ["3136x64x256", "3136x256x64", "784x512x128", "784x512x512", "196x1024x256", "49x2048x512"],
}
TOLERANCES = {"float32": 1e-4, "float64": 1e-12, "int8": 0.0}


@dataclass(frozen=True)
class Case:
    """y (M, N) = x (M, K) @ w (K, N)."""

    m: int
    k: int
    n: int
    block: tuple[int, int]
    dtype: str
    density: float
    threads: int

    def operands(self) -> tuple[np.ndarray, np.ndarray]:
        """The same x and w in every process. Every row and column of blocks keeps its share, to rounding."""
        rng = np.random.default_rng(0)
        rows, columns = -(-self.k // self.block[0]), -(-self.n // self.block[1])
        kept = rng.permutation(rows * columns) < round(self.density * rows * columns)
        gamma = np.repeat(np.repeat(kept.reshape(rows, columns), self.block[0], 0), self.block[1], 1)
        if self.dtype == "int8":
            x, w = (rng.integers(-128, 128, shape, np.int8) for shape in ((self.m, self.k), (self.k, self.n)))
            w[w == 0] = 1
        else:
            x, w = (rng.standard_normal(shape, self.dtype) for shape in ((self.m, self.k), (self.k, self.n)))
        w[~gamma[: self.k, : self.n]] = 0
        return x, w

    @property
    def operations(self) -> int:
        """Effective operations."""
        rows, columns = -(-self.k // self.block[0]), -(-self.n // self.block[1])
        return round(2 * self.m * self.k * self.n * round(self.density * rows * columns) / (rows * columns))


def error(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> float:
    """The largest difference from the product in float64, over the largest value. Exact for int8."""
    right = x.astype(np.float64) @ w.astype(np.float64)
    return float(np.abs(y - right).max() / max(1e-300, np.abs(right).max()))


def bstf(case: Case) -> Work:
    """BlockSparseMatrix, packing x in every product."""
    x, w = case.operands()
    matrix = BlockSparseMatrix.from_dense(w, case.block)
    out = matrix.multiply(x, threads=case.threads)
    return Work(lambda: matrix.multiply(x, threads=case.threads, out=out), error(out, x, w))


def bstf_packed(case: Case) -> Work:
    """BlockSparseMatrix, x packed before."""
    x, w = case.operands()
    matrix = BlockSparseMatrix.from_dense(w, case.block)
    panels = matrix.pack(x)
    out = matrix.multiply(panels, threads=case.threads)
    return Work(lambda: matrix.multiply(panels, threads=case.threads, out=out), error(out, x, w))


def dense(case: Case) -> Work:
    """NumPy, which multiplies the zeros as well."""
    if case.dtype == "int8":
        raise ImportError("NumPy multiplies int8 without a library, in a plain loop")
    x, w = case.operands()
    out = x @ w
    return Work(lambda: np.matmul(x, w, out=out), error(out, x, w))


def _scipy(case: Case, block: tuple[int, int] | None) -> Work:
    import scipy.sparse

    x, w = case.operands()
    if case.dtype == "int8":
        raise ImportError("SciPy sums int8 in int8")
    # SciPy's kernels multiply a sparse matrix from the left, so the product is transposed. Each side has its layout.
    sparse = scipy.sparse.csr_array(w.T) if block is None else scipy.sparse.bsr_array(w.T, blocksize=block)
    dense_side = np.ascontiguousarray(x.T)
    return Work(lambda: sparse @ dense_side, error((sparse @ dense_side).T, x, w))


def scipy_bsr(case: Case) -> Work:
    """SciPy's BSR; one thread whatever is asked for."""
    return _scipy(case, case.block[::-1])


def scipy_csr(case: Case) -> Work:
    """SciPy's CSR; one thread whatever is asked for."""
    return _scipy(case, None)


def _load_mkl() -> Any:
    """sparse_dot_mkl, told where the `mkl` package has put its library."""
    try:
        files = importlib.metadata.files("mkl") or []
    except importlib.metadata.PackageNotFoundError as reason:
        raise ImportError("package mkl is not installed") from reason
    libraries = [file for file in files if file.name.startswith(("libmkl_rt.", "mkl_rt."))]
    candidates = [Path(file.locate()) for file in libraries] + [
        folder / file.name for file in libraries for folder in (Path(sys.prefix) / "lib", _packages(files) / "lib")
    ]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise ImportError("package mkl holds no mkl_rt library")
    threads = found[0].parent / "libiomp5.so"
    if threads.is_file():  # MKL looks for it on the system's path only
        ctypes.CDLL(str(threads), mode=ctypes.RTLD_GLOBAL)
    os.environ["MKL_RT"] = str(found[0])
    import sparse_dot_mkl

    return sparse_dot_mkl


def _packages(files: Sequence[Any]) -> Path:
    """The folder into which a package was installed."""
    return Path(next(file for file in files if file.name == "METADATA").locate()).parents[1]


def _mkl(case: Case, block: tuple[int, int] | None) -> Work:
    if case.dtype == "int8":
        raise ImportError("MKL has no int8 sparse product")
    import scipy.sparse

    mkl = _load_mkl()
    x, w = case.operands()
    sparse = scipy.sparse.csr_matrix(w.T) if block is None else scipy.sparse.bsr_matrix(w.T, blocksize=block)
    dense_side = np.ascontiguousarray(x.T)
    out = np.zeros((case.n, case.m), w.dtype)
    mkl.dot_product_mkl(sparse, dense_side, out=out)
    return Work(lambda: mkl.dot_product_mkl(sparse, dense_side, out=out), error(out.T, x, w))


def mkl_bsr(case: Case) -> Work:
    """MKL's BSR, which takes square blocks only."""
    if case.block[0] != case.block[1]:
        raise ImportError("MKL takes square blocks")
    return _mkl(case, case.block)


def mkl_csr(case: Case) -> Work:
    """MKL's CSR."""
    return _mkl(case, None)


PEERS: dict[str, Callable[[Case], Work]] = {
    one.__name__: one for one in (bstf, bstf_packed, dense, mkl_bsr, mkl_csr, scipy_bsr, scipy_csr)
}


def measure(cases: Sequence[Case], names: Sequence[str], rounds: int, log: harness.Log) -> None:
    """Times every case on every peer; a record each."""
    for threads in dict.fromkeys(case.threads for case in cases):
        peers = [Peer(name, PEERS[name], threads) for name in names]
        try:
            for case in (one for one in cases if one.threads == threads):
                results = harness.compare(peers, case, rounds, TOLERANCES[case.dtype])
                for name, result in results.items():
                    log.add(record(case, name, result, results))
                _CONSOLE.print(line(case, results), highlight=False)
        finally:
            for peer in peers:
                peer.close()


def record(case: Case, name: str, result: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A measurement as it is written."""
    made = {"op": "spmm", **asdict(case), "block": "x".join(map(str, case.block)), "peer": name, **result}
    if "seconds" in result:
        made["effective_gflops"] = case.operations / result["seconds"] / 1e9
        if "seconds" in results.get("dense", {}):
            made["speedup_over_dense"] = results["dense"]["seconds"] / result["seconds"]
    return made


def line(case: Case, results: dict[str, dict[str, Any]]) -> str:
    """A case in one line, as it is done."""
    times = ", ".join(f"{name} {one['seconds'] * 1e3:.3f} ms" for name, one in results.items() if "seconds" in one)
    kind = f"{case.dtype} {'x'.join(map(str, case.block))}"
    return f"{case.m}x{case.k}x{case.n} {kind} density {case.density:g}, {case.threads} threads: {times}"


def show(log: harness.Log, ceilings: dict[int, dict[str, float]]) -> None:
    """Prints the table."""

    def percent(one: dict[str, Any]) -> str:
        ceiling = ceilings.get(one["threads"], {}).get(one["dtype"])
        return f"{one['effective_gflops'] / ceiling * 1e11:.0f} %" if ceiling and "seconds" in one else ""

    columns = {
        "shape": lambda one: f"{one['m']}x{one['k']}x{one['n']}",
        "type": lambda one: one["dtype"],
        "block": lambda one: one["block"],
        "density": lambda one: f"{one['density']:g}",
        "threads": lambda one: str(one["threads"]),
        "peer": lambda one: one["peer"],
        "ms": lambda one: f"{one['seconds'] * 1e3:.3f}" if "seconds" in one else "",
        "± %": lambda one: f"{one['mad'] / one['seconds'] * 100:.0f}" if "seconds" in one else "",
        "eff. GFLOPS": lambda one: f"{one['effective_gflops']:.1f}" if "seconds" in one else "",
        "of FMA peak": percent,
        "over dense": lambda one: f"{one['speedup_over_dense']:.2f}" if "speedup_over_dense" in one else "",
    }
    done = [one for one in log.records if "seconds" in one]
    _CONSOLE.print(harness.table("Dense times block sparse", done, columns))
    for name, reason in {one["peer"]: one["missing"] for one in log.records if "missing" in one}.items():
        _CONSOLE.print(f"{name}: not measured in some case, {reason}")


def plot_speedup(log: harness.Log, path: Path) -> None:
    """Speed-up over dense against density, one line a shape, type and number of threads."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in log.records:
        if one["peer"] == "bstf" and "speedup_over_dense" in one:
            name = f"{one['m']}x{one['k']}x{one['n']} {one['dtype']} {one['block']}, {one['threads']} threads"
            lines.setdefault(name, []).append((one["density"], one["speedup_over_dense"]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points)), "o-", label=name, markersize=3, linewidth=1)
    densities = np.linspace(0.1, 1, 50)
    axes.plot(densities, 1 / densities, "k--", label="1 / density", linewidth=1)
    axes.set(xlabel="density", ylabel="speed-up over dense, packing inside", yscale="log")
    axes.legend(fontsize=5)
    figure.savefig(path, dpi=150)


def plot_roofline(log: harness.Log, ceilings: dict[int, dict[str, float]], path: Path) -> None:
    """Effective operations per byte, counting each operand once, against effective GFLOPS, under the measured roofs."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    intensity = np.logspace(-1, 3.5, 100)
    for threads, one in ceilings.items():
        for dtype in (name for name in one if name != "bandwidth"):
            roof = np.minimum(one[dtype], intensity * one["bandwidth"]) / 1e9
            axes.plot(intensity, roof, "k-", linewidth=0.8)
            axes.annotate(f"{dtype}, {threads} threads", (intensity[-1], roof[-1]), ha="right", va="bottom", fontsize=7)
    for peer, mark in zip(PEERS, "osv^<>x"):
        points = []
        for one in log.records:
            if one["peer"] == peer and "seconds" in one:
                size = np.dtype(one["dtype"]).itemsize
                elements = one["m"] * one["k"] + one["k"] * one["n"] * one["density"] + one["m"] * one["n"]
                points.append(
                    (one["effective_gflops"] * 1e9 * one["seconds"] / size / elements, one["effective_gflops"])
                )
        if points:
            axes.plot(*zip(*points), mark, label=peer, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="effective operations per byte", ylabel="effective GFLOPS")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def define_flags() -> None:
    """The flags of the program."""
    flags.DEFINE_enum("op", "spmm", ["spmm"], "the product: dense times block sparse")
    flags.DEFINE_multi_enum("preset", [], sorted(PRESETS), "named lists of shapes")
    flags.DEFINE_list("shapes", [], "more shapes, MxKxN")
    flags.DEFINE_multi_string("block", ["8"], "block shapes: 8, or 16x4")
    flags.DEFINE_multi_enum("dtype", ["float32"], sorted(TOLERANCES), "types")
    flags.DEFINE_multi_integer("threads", [2], "numbers of threads", lower_bound=1)
    flags.DEFINE_multi_float("density", [0.5], "fractions of the blocks that are kept", 0.0, 1.0)
    flags.DEFINE_multi_enum("algorithm", list(PEERS), list(PEERS), "who multiplies")
    flags.DEFINE_integer("rounds", 7, "samples of every peer", lower_bound=3)
    flags.DEFINE_string("output", None, "folder for spmm.jsonl, spmm.csv and the plots", required=True)


def main(_: Sequence[str]) -> None:
    """Runs the cases."""
    shapes = [shape for preset in FLAGS.preset for shape in PRESETS[preset]] + FLAGS.shapes
    blocks = [tuple(map(int, block.split("x"))) * (1 if "x" in block else 2) for block in FLAGS.block]
    cases = [
        Case(*map(int, shape.split("x")), block, dtype, density, threads)
        for threads in FLAGS.threads
        for dtype in FLAGS.dtype
        for block in blocks
        for density in FLAGS.density
        for shape in shapes
    ]
    folder = Path(FLAGS.output)
    log = harness.Log(folder, "spmm")
    floats = [dtype for dtype in FLAGS.dtype if dtype != "int8"]
    ceilings = {threads: harness.roofs(floats, threads) for threads in FLAGS.threads}
    log.header({"machine": harness.machine(), "roofs": ceilings})
    measure(cases, FLAGS.algorithm, FLAGS.rounds, log)
    for threads, ceiling in ceilings.items():  # again, in case something else ran at the start
        for name, value in harness.roofs(floats, threads).items():
            ceiling[name] = max(ceiling[name], value)
    log.header({"roofs": ceilings})
    log.write_csv()
    show(log, ceilings)
    plot_speedup(log, folder / "speedup.png")
    plot_roofline(log, ceilings, folder / "roofline.png")


if __name__ == "__main__":
    define_flags()
    app.run(main)
