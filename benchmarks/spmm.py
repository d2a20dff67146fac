"""Cases and peers of dense times block sparse, and its plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import mkl
from benchmarks.harness import Suite, Work
from bstf_compiler import BlockSparseMatrix
from bstf_compiler.cpu import simd
from bstf_compiler.files import replacing

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
    def name(self) -> str:
        """The shape."""
        return f"{self.m}x{self.k}x{self.n}"

    def fields(self) -> dict[str, Any]:
        """What tells a record of this case from others."""
        return asdict(self) | {"block": "x".join(map(str, self.block))}

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


def bstf_avx2(case: Case) -> Work:
    """BlockSparseMatrix, compiled for AVX2 and FMA."""
    return _narrow(case, "avx2")


def bstf_portable(case: Case) -> Work:
    """BlockSparseMatrix, compiled for the 128 bits that every x86-64 has."""
    return _narrow(case, "portable")


def _narrow(case: Case, isa: str) -> Work:
    if simd.host_isa().name != isa:  # LLVM's names of features in _ENVIRONMENTS are those of x86
        raise ImportError(f"this machine can't stand in for one with {isa}")
    return bstf_packed(case)


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


def _mkl(case: Case, block: tuple[int, int] | None) -> Work:
    if case.dtype == "int8":
        raise ImportError("MKL has no int8 sparse product")
    import scipy.sparse

    library = mkl.load()
    x, w = case.operands()
    sparse = scipy.sparse.csr_matrix(w.T) if block is None else scipy.sparse.bsr_matrix(w.T, blocksize=block)
    dense_side = np.ascontiguousarray(x.T)
    out = np.zeros((case.n, case.m), w.dtype)
    library.dot_product_mkl(sparse, dense_side, out=out)
    return Work(lambda: library.dot_product_mkl(sparse, dense_side, out=out), error(out.T, x, w))


def mkl_bsr(case: Case) -> Work:
    """MKL's BSR, which takes square blocks only."""
    if case.block[0] != case.block[1]:
        raise ImportError("MKL takes square blocks")
    return _mkl(case, case.block)


def mkl_csr(case: Case) -> Work:
    """MKL's CSR."""
    return _mkl(case, None)


PEERS: dict[str, Callable[[Case], Work]] = {
    one.__name__: one
    for one in (bstf, bstf_packed, bstf_avx2, bstf_portable, dense, mkl_bsr, mkl_csr, scipy_bsr, scipy_csr)
}
_ENVIRONMENTS = {
    "bstf_avx2": {"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+sse4.2"},
    "bstf_portable": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse2"},
}
SUITE = Suite("spmm", PEERS, "dense", TOLERANCES, _ENVIRONMENTS)


def cases(
    presets: Sequence[str],
    shapes: Sequence[str],
    blocks: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    densities: Sequence[float],
    threads: int,
) -> list[Case]:
    """All combinations, for one number of threads."""
    shapes = [shape for preset in presets for shape in PRESETS[preset]] + list(shapes)
    return [
        Case(*map(int, shape.split("x")), block, dtype, density, threads)
        for dtype in dtypes
        for block in blocks
        for density in densities
        for shape in shapes
    ]


def plot(records: Sequence[dict[str, Any]], ceilings: dict[int, dict[str, float]], folder: Path) -> None:
    """Writes roofline.png, and speedup.png if there are several densities."""
    if len({one["density"] for one in records}) > 1:
        _plot_speedup(records, folder / "speedup.png")
    _plot_roofline(records, ceilings, folder / "roofline.png")


def _plot_speedup(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up over dense against density, one line a shape, type and number of threads."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in records:
        if one["peer"] == "bstf" and one["block"] == "8x8" and "speedup_over_dense" in one:
            name = f"{one['case']} {one['dtype']}, {one['threads']} threads"
            lines.setdefault(name, []).append((one["density"], one["speedup_over_dense"]))
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    colours = matplotlib.colormaps["tab20"]
    for place, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*sorted(points)), "o-", label=name, markersize=3, linewidth=1, color=colours(place % 20))
    lowest = min((density for points in lines.values() for density, _ in points), default=0.1)
    densities = np.linspace(lowest, 1, 50)
    axes.plot(densities, 1 / densities, "k--", label="1 / density", linewidth=1)
    axes.set(xlabel="density", ylabel="speed-up over dense BLAS, packing inside", title="8x8 blocks")
    axes.legend(fontsize=6, ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _plot_roofline(records: Sequence[dict[str, Any]], ceilings: dict[int, dict[str, float]], path: Path) -> None:
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
        for one in records:
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
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
