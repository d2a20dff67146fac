"""Cases and peers of block sparse times block sparse: the grid of the published study, and its scatter plots.

The study (SparseFastMM, and Figure 1 of "Weight Block Sparsity") squares a matrix of N rows of blocks, D in each row:
the diagonal and further ones at random distances. Sorting is not part of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import mkl
from benchmarks.harness import Suite, Work
from bstf_compiler import BlockSparseMatrix
from bstf_compiler.cpu import simd
from bstf_compiler.cpu.kernels import spgemm
from bstf_compiler.cpu.kernels.sort import sort
from bstf_compiler.files import replacing

# Of each block side: rows of blocks and blocks a row.
_GRID = {1: ((2000, 4000, 6000), (16, 32, 64)), 2: ((1000, 2000, 3000), (8, 16, 32)),
         4: ((500, 1000, 2000), (1, 8, 16)), 8: ((250, 500, 1000), (8, 16))}  # fmt: skip
PRESETS = {"fig1": _GRID}
# What the study's plots show, from the lowest to the highest point, in GFLOPS.
PUBLISHED = {(1, "float32"): (0.003, 0.077), (1, "float64"): (0.003, 0.077),
             (8, "float32"): (0.5, 3.05), (8, "float64"): (0.5, 2.0)}  # fmt: skip
TOLERANCES = {"float32": 0.0, "float64": 0.0}


@dataclass(frozen=True)
class Case:
    """C = A @ A, where A has `rows` rows of blocks and `degree` blocks in each."""

    rows: int
    degree: int
    block: tuple[int, int]
    dtype: str
    threads: int

    def __post_init__(self) -> None:
        if self.block[0] != self.block[1]:
            raise ValueError(f"A matrix in blocks of {self.block} has no square: use square blocks.")

    @property
    def name(self) -> str:
        """The shape."""
        return f"{self.rows}x{self.degree}"

    @property
    def operations(self) -> int:
        """Effective operations: every block of A meets `degree` others."""
        return 2 * self.block[0] ** 3 * self.rows * self.degree**2

    def fields(self) -> dict[str, Any]:
        """What tells a record of this case from others."""
        return asdict(self) | {"block": "x".join(map(str, self.block))}

    def operand(self) -> spgemm.Coordinates:
        """A in row order, the same in every process; small integers, so that sums are exact.

        Raises:
            ValueError: the blocks that meet are not as many as `operations` says.
        """
        rng = np.random.default_rng(0)
        steps = 1 + rng.integers(0, self.rows - 1, (self.rows, self.degree - 1)) // self.degree
        first = np.arange(self.rows)[:, None]
        columns = np.sort(np.cumsum(np.concatenate([first, steps], axis=1), axis=1) % self.rows).ravel()
        rows = np.repeat(first, self.degree)
        pairs = int(np.bincount(rows, minlength=self.rows)[columns].sum())
        if 2 * self.block[0] ** 3 * pairs != self.operations:
            raise ValueError(f"{pairs} pairs of blocks meet, and not {self.rows * self.degree**2}.")
        blocks = rng.integers(1, 5, (len(columns), *self.block)).astype(self.dtype)
        return spgemm.Coordinates((self.rows, self.rows), rows, columns, blocks)


def _matrix(case: Case) -> BlockSparseMatrix:
    ordered = case.operand().sorted_by("column")
    side = case.rows * case.block[0]
    return BlockSparseMatrix(spgemm.block_columns(ordered, (side, side)))


def _scipy(case: Case) -> Any:
    """A as SciPy's BSR, or as its CSR for 1x1 blocks."""
    import scipy.sparse

    a = case.operand()
    starts, side = np.arange(case.rows + 1) * case.degree, case.rows * case.block[0]
    if case.block[0] == 1:
        return scipy.sparse.csr_matrix((a.blocks.ravel(), a.columns, starts), shape=(side, side))
    return scipy.sparse.bsr_matrix((a.blocks, a.columns, starts), shape=(side, side))


def _error(case: Case, sums: np.ndarray) -> float:
    """How wrong the sums of the product's rows are: those of A times those of A, exact for small integers."""
    a = _scipy(case).astype(np.float64)
    right = a @ (a @ np.ones(a.shape[1]))
    return float(np.abs(sums - right).max() / np.abs(right).max())


def _row_sums(product: BlockSparseMatrix | spgemm.Coordinates, side: int) -> np.ndarray:
    if isinstance(product, BlockSparseMatrix):
        product = spgemm.coordinates(product._columns)
    sums = np.zeros((side // product.blocks.shape[1], product.blocks.shape[1]))
    np.add.at(sums, product.rows, product.blocks.sum(axis=2, dtype=np.float64))
    return sums.ravel()


def gustavson(case: Case) -> Work:
    """Gustavson's algorithm; every product gets new memory, as SciPy's and MKL's do."""
    matrix = _matrix(case)
    made = matrix.product(matrix, case.threads)
    return Work(lambda: matrix.product(matrix, case.threads), _error(case, _row_sums(made, matrix.shape[0])))


def gustavson_reused(case: Case) -> Work:
    """Gustavson's algorithm; a product gets the memory of the one before."""
    matrix = _matrix(case)
    out = matrix.product(matrix, case.threads)
    again = matrix.product(matrix, case.threads, out=out)
    return Work(lambda: matrix.product(matrix, case.threads, out=out), _error(case, _row_sums(again, matrix.shape[0])))


def coo_merge(case: Case) -> Work:
    """The study's algorithm: merges rows and columns that have been sorted before."""
    a, isa = case.operand(), simd.host_isa()
    b = a.sorted_by("column")
    made = spgemm.coo_merge(a, b, isa, case.threads)
    error = _error(case, _row_sums(made, case.rows * case.block[0]))
    return Work(lambda: spgemm.coo_merge(a, b, isa, case.threads), error)


def _sort(case: Case, order: str) -> Work:
    a = case.operand()
    keys = a.rows.ravel() * case.rows + a.columns
    if order == "reversed":
        keys = keys[::-1].copy()
    elif order == "shuffled":
        keys = np.random.default_rng(0).permutation(keys)
    wrong = not np.array_equal(sort(keys, case.threads), np.argsort(keys, kind="stable"))
    return Work(lambda: sort(keys, case.threads), float(wrong))


def sort_sorted(case: Case) -> Work:
    """The sort to row order of what is in row order."""
    return _sort(case, "sorted")


def sort_reversed(case: Case) -> Work:
    """The sort to row order of what is in the opposite order."""
    return _sort(case, "reversed")


def sort_shuffled(case: Case) -> Work:
    """The sort to row order of what is in any order."""
    return _sort(case, "shuffled")


def scipy(case: Case) -> Work:
    """SciPy's BSR, CSR for 1x1 blocks; one thread whatever is asked for."""
    a = _scipy(case)
    return Work(lambda: a @ a, _error(case, np.asarray((a @ a).sum(axis=1, dtype=np.float64)).ravel()))


def mkl_sparse(case: Case) -> Work:
    """MKL's BSR, CSR for 1x1 blocks."""
    library = mkl.load()
    a = _scipy(case)
    made = library.dot_product_mkl(a, a)
    error = _error(case, np.asarray(made.sum(axis=1, dtype=np.float64)).ravel())
    return Work(lambda: library.dot_product_mkl(a, a), error)


PEERS: dict[str, Callable[[Case], Work]] = {
    one.__name__: one
    for one in (
        gustavson, gustavson_reused, coo_merge, sort_sorted, sort_reversed, sort_shuffled, scipy, mkl_sparse
    )
}  # fmt: skip
SUITE = Suite("spgemm", PEERS, "scipy", TOLERANCES)


def cases(
    presets: Sequence[str],
    shapes: Sequence[str],
    blocks: Sequence[tuple[int, int]],
    dtypes: Sequence[str],
    threads: int,
) -> list[Case]:
    """All combinations, for one number of threads; `shapes` are rows of blocks x blocks a row, as 1000x16."""
    own = [tuple(map(int, shape.split("x"))) for shape in shapes]
    made = []
    for dtype in dtypes:
        for block in blocks:
            if presets and block[0] not in _GRID:
                raise ValueError(f"The study has no blocks of {block[0]}: use {', '.join(map(str, _GRID))}.")
            grids = [PRESETS[preset][block[0]] for preset in presets]
            pairs = [(rows, degree) for grid in grids for rows in grid[0] for degree in grid[1]]
            made += [Case(rows, degree, block, dtype, threads) for rows, degree in pairs + own]
    return made


def plot(records: Sequence[dict[str, Any]], ceilings: dict[int, dict[str, float]], folder: Path) -> None:
    """Writes a scatter plot for every block size, as those of Figure 1: operations against GFLOPS."""
    for block in dict.fromkeys(one["block"] for one in records):
        _plot_scatter([one for one in records if one["block"] == block], block, folder / f"fig1_{block}.png")


def _plot_scatter(records: Sequence[dict[str, Any]], block: str, path: Path) -> None:
    dtypes = list(dict.fromkeys(one["dtype"] for one in records))
    figure = Figure(figsize=(1.5 + 5 * len(dtypes), 4.5), layout="constrained")
    panels = FigureCanvasAgg(figure).figure.subplots(1, len(dtypes), squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes):
        band = PUBLISHED.get((int(block.split("x")[0]), dtype))
        if band:
            axes.axhspan(*band, color="lightgrey", label=f"published, {band[0]:g} to {band[1]:g}")
        drawn = [one for one in records if one["dtype"] == dtype and "effective_gflops" in one]
        for place, peer in enumerate(dict.fromkeys(one["peer"] for one in drawn)):
            for threads, mark in zip(sorted({one["threads"] for one in drawn}), "osv^<>x+"):
                points = [
                    (one["operations"], one["effective_gflops"])
                    for one in drawn
                    if (one["peer"], one["threads"]) == (peer, threads)
                ]
                label = f"{peer}, {threads} thread{'s' if threads > 1 else ''}"
                axes.plot(*zip(*points), mark, color=f"C{place}", label=label, markersize=4, fillstyle="none")
        axes.set(xscale="log", xlabel="effective operations", ylabel="effective GFLOPS", title=f"{block} {dtype}")
        axes.set_ylim(bottom=0)
    panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
