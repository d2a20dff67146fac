"""BlockSparseMatrix: a matrix without its zero blocks, and products with it that take no time for them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from bstf_compiler import bsr
from bstf_compiler.cpu import tiles
from bstf_compiler.cpu.kernels import spgemm, spmm, spmm_rows
from bstf_compiler.cpu.simd import ISAS, Isa, host_isa

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int8))
# An int8 sum of so many products of bytes fits an int32.
_LONGEST_INT8 = 2**16 - 1


class BlockSparseMatrix:
    """A matrix (K, N) of float32, float64 or int8 that stores only blocks with a nonzero.

    `x @ m` is the product with a NumPy array x (M, K); `multiply` is the same with options. `m @ n` is the product of
    two block-sparse matrices; `product` is the same with options. Products may run in several Python threads at once,
    and give the same bits for any number of threads. The first product of a type and block shape compiles its kernel,
    which takes seconds.

    Args:
        columns: the blocks, as of a 1x1 kernel: `shape` is (1, 1, K, N).
        isa: name of the instruction set to use, one of `bstf_compiler.cpu.simd.ISAS`; None: the best of this machine.

    Attributes:
        shape: (K, N).
        dtype: of the values.
        block: (bi, bo), rows and columns of a block; those at the edges may be cut.

    Raises:
        TypeError: the values are of another type.
        ValueError: the blocks contradict each other (see `validate`), or there is no such instruction set.

    Example:
        >>> m = BlockSparseMatrix.from_dense(w, block=8)
        >>> y = x @ m
    """

    __array_ufunc__ = None  # NumPy arrays leave `x @ m` to this class

    def __init__(self, columns: bsr.BlockColumns, isa: str | None = None) -> None:
        self._columns = columns
        self._isa = host_isa() if isa is None else _isa(isa)
        self.shape = tuple(columns.shape[2:])
        self.dtype = columns.blocks.dtype
        self.block = tuple(columns.blocks.shape[-2:])
        self.validate()

    @classmethod
    def from_dense(cls, w: np.ndarray, block: int | tuple[int, int] = 8, isa: str | None = None) -> BlockSparseMatrix:
        """The matrix of a dense array.

        Args:
            w: (K, N).
            block: rows and columns of a block, or one number for both.
            isa: as for the class.
        """
        w = np.asarray(w)
        if w.ndim != 2:
            raise ValueError(f"A block-sparse matrix has 2 axes, and this array has {w.ndim}: reshape it to (K, N).")
        return cls(bsr.pack(w[None, None], _block(block)), isa)

    @classmethod
    def from_scipy(
        cls, matrix: Any, block: int | tuple[int, int] | None = None, isa: str | None = None
    ) -> BlockSparseMatrix:
        """The matrix of a SciPy sparse matrix or array.

        Args:
            matrix: (K, N), of any format.
            block: as for `from_dense`; None: that of a BSR matrix, else 8.
            isa: as for the class.
        """
        if block is None:
            block = matrix.blocksize if matrix.format == "bsr" else 8
        entries = matrix.tocoo(copy=True)
        entries.sum_duplicates()
        entries.eliminate_zeros()
        rows, columns = (np.asarray(places, np.int64) for places in (entries.row, entries.col))
        return cls(bsr.from_coordinates(matrix.shape, rows, columns, entries.data, _block(block)), isa)

    @property
    def gamma(self) -> np.ndarray:
        """Γ: bool (ceil(K / bi), ceil(N / bo)), True where a block is stored."""
        kept = np.zeros((-(-self.shape[0] // self.block[0]), len(self._columns.starts) - 1), bool)
        kept[self._columns.rows, np.repeat(np.arange(kept.shape[1]), np.diff(self._columns.starts))] = True
        return kept

    @property
    def density(self) -> float:
        """The fraction of blocks that are stored; 0 for a matrix without blocks."""
        gamma = self.gamma
        return float(gamma.mean()) if gamma.size else 0.0

    def to_dense(self) -> np.ndarray:
        """The array (K, N)."""
        return bsr.unpack(self._columns)[0, 0]

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        """`multiply`: x (M, K) times this matrix."""
        return self.multiply(x)

    def pack(self, x: np.ndarray, threads: int | None = None) -> spmm.Panels:
        """X (M, K) in the order the kernels read it, for several products with this matrix or one of its kind.

        Args:
            x: as for `multiply`.
            threads: as for `multiply`.
        """
        return spmm.pack(self._operand(x), self._tiled, _threads(threads))

    def multiply(
        self,
        x: np.ndarray | spmm.Panels,
        threads: int | None = None,
        out: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        shift: int | None = None,
    ) -> np.ndarray:
        """The product x @ m.

        Args:
            x: (M, K), of this matrix's type, or uint8 or int8 for an int8 matrix; or what `pack` made of it.
            threads: how many to use, at most as many as Numba has; None: as many as the product is worth.
            out: (M, N), C-contiguous, where to write the result.
            bias: (N,) integers to add to the sums of an int8 matrix.
            shift: for an int8 matrix, requantises: the result is int8, clamp(floor((x @ m + bias) * 2**-shift + 1/2)).

        Returns:
            (M, N): of this matrix's type; int32 for an int8 matrix without `shift`.

        Raises:
            TypeError: x or out has the wrong type.
            ValueError: a shape, `threads` or `shift` is out of range.
        """
        if not isinstance(x, spmm.Panels):
            x = self._operand(x)
        elif (x.depth, x.tile) != (self._tiled.depth, self._tiled.tile):
            raise ValueError("These panels were packed for a matrix of another kind: pack x with this one.")
        rows = x.rows if isinstance(x, spmm.Panels) else len(x)
        out = self._result(rows, out, shift)
        if bias is not None or shift is not None:
            self._check_epilogue(bias, shift)
        if not self.shape[0]:
            out[:] = self._product_of_nothing(bias, shift)
        elif isinstance(x, np.ndarray) and self._narrow and rows >= spmm_rows.rows_of_tile(self._narrow.tile):
            spmm_rows.multiply(x, self._narrow, out, _threads(threads))
        elif out.size:
            spmm.multiply(x, self._tiled, out, bias=bias, shift=shift or 0, threads=_threads(threads))
        return out

    def __matmul__(self, other: BlockSparseMatrix) -> BlockSparseMatrix:
        """`product`: this matrix times another block-sparse one."""
        if not isinstance(other, BlockSparseMatrix):
            raise TypeError("A block-sparse matrix multiplies from the right: use x @ m, or m @ n with two of them.")
        return self.product(other)

    def product(
        self,
        other: BlockSparseMatrix,
        threads: int | None = None,
        algorithm: str = "gustavson",
        out: BlockSparseMatrix | None = None,
    ) -> BlockSparseMatrix:
        """The product m @ n of two block-sparse float matrices, block sparse again.

        Args:
            other: n (K, N), of this matrix's type, with as many rows in a block as this one has columns in a block.
            threads: as for `multiply`.
            algorithm: "gustavson", or "coo_merge", the slow one of the published study; see `cpu.kernels.spgemm`.
            out: a product that isn't needed any more. The result takes its memory if it fits, which saves the time of
                getting pages from the system: for results beyond the cache, more than that of the product.

        Returns:
            (M, N), with a block wherever two blocks meet, be their product zero or not.

        Raises:
            TypeError: the types differ, or are int8.
            ValueError: shapes or blocks don't fit, or there is no such algorithm.
        """
        if self.dtype != other.dtype or self.dtype == np.int8:
            raise TypeError(
                f"The matrices are {self.dtype} and {other.dtype}; a sparse product takes two of float32 or float64."
            )
        if self.shape[1] != other.shape[0] or self.block[1] != other.block[0]:
            raise ValueError(
                f"A {self.shape} matrix in blocks of {self.block} can't be multiplied by a {other.shape} one in blocks "
                f"of {other.block}: columns, and columns of a block, have to be the rows of the other."
            )
        if algorithm == "gustavson":
            room = None if out is None or out.dtype != self.dtype else out._columns.blocks.reshape(-1)
            columns = spgemm.gustavson(self._columns, other._columns, self._isa, _threads(threads), room)
        elif algorithm == "coo_merge":
            left = spgemm.coordinates(self._columns).sorted_by("row", _threads(threads))
            right = spgemm.coordinates(other._columns)  # in column order
            made = spgemm.coo_merge(left, right, self._isa, _threads(threads)).sorted_by("column", threads)
            columns = spgemm.block_columns(made, (self.shape[0], other.shape[1]))
        else:
            raise ValueError(f"There is no algorithm {algorithm!r}: use gustavson or coo_merge.")
        return BlockSparseMatrix(columns, self._isa.name)

    def validate(self) -> None:
        """Checks the matrix.

        Raises:
            TypeError: the values are not float32, float64 or int8.
            ValueError: the arrays contradict each other, or the matrix is too tall for int8.
        """
        starts, rows, blocks = self._columns.starts, self._columns.rows, self._columns.blocks
        (bi, bo), (height, width) = self.block, self.shape
        if self.dtype not in _DTYPES:
            raise TypeError(f"The values are {self.dtype}, and the kernels take float32, float64 and int8: use astype.")
        if self.dtype == np.int8 and height > _LONGEST_INT8:
            raise ValueError(f"int8 sums over {height} rows may overflow: split the matrix at {_LONGEST_INT8} rows.")
        grid = -(-height // bi), -(-width // bo)
        if blocks.shape != (len(rows), 1, 1, bi, bo):
            raise ValueError(f"There are {len(rows)} row numbers for blocks of shape {blocks.shape}.")
        if len(starts) != grid[1] + 1 or starts[0] != 0 or starts[-1] != len(rows) or (np.diff(starts) < 0).any():
            raise ValueError(f"`starts` has to rise from 0 to {len(rows)} in {grid[1] + 1} values.")
        if len(rows) and not (rows.min() >= 0 and rows.max() < grid[0]):
            raise ValueError(f"A block is in row {rows.max()} of {grid[0]} rows of blocks.")
        follows = np.ones(max(0, len(rows) - 1), bool)
        follows[starts[1:-1][(starts[1:-1] > 0) & (starts[1:-1] < len(rows))] - 1] = False
        if (np.diff(rows)[follows] <= 0).any():
            raise ValueError("The blocks of a column have to be sorted by row, none twice.")
        if blocks[rows == grid[0] - 1, :, :, height - (grid[0] - 1) * bi :].any() or (
            grid[1] and blocks[starts[-2] :, :, :, :, width - (grid[1] - 1) * bo :].any()
        ):
            raise ValueError(f"A block holds values outside of the {height} x {width} matrix.")

    @cached_property
    def _tiled(self) -> tiles.TiledWeights:
        return tiles.cut(self._columns, self._isa)

    @cached_property
    def _narrow(self) -> tiles.TiledWeights | None:
        """Cut for products that take x as it is; None if these take longer."""
        tile = spmm_rows.tile_of(self.block, self.dtype, self._isa)
        pays = tile is not None and spmm_rows.pays(self.shape, self._columns.blocks.size, tile)
        return tiles.cut(self._columns, self._isa, tile) if pays else None

    def _operand(self, x: np.ndarray) -> np.ndarray:
        """x, checked, C-contiguous."""
        x = np.asarray(x)
        if x.ndim != 2 or x.shape[1] != self.shape[0]:
            raise ValueError(f"x has shape {x.shape}; the product with this matrix takes (M, {self.shape[0]}).")
        allowed = (np.uint8, np.int8) if self.dtype == np.int8 else (self.dtype,)
        if x.dtype not in allowed:
            names = " or ".join(np.dtype(one).name for one in allowed)
            raise TypeError(f"x is {x.dtype}; the product with this {self.dtype} matrix takes {names}: use x.astype.")
        return np.require(x, requirements=["C", "A"])

    def _result(self, rows: int, out: np.ndarray | None, shift: int | None) -> np.ndarray:
        dtype = self.dtype if self.dtype != np.int8 or shift is not None else np.dtype(np.int32)
        shape = (rows, self.shape[1])
        if out is None:
            return np.empty(shape, dtype)
        if out.dtype != dtype:
            raise TypeError(f"out is {out.dtype}; the result is {dtype}.")
        if out.shape != shape or not (out.flags.c_contiguous and out.flags.aligned and out.flags.writeable):
            raise ValueError(f"out has shape {out.shape}; it has to be {shape}, C-contiguous, aligned and writable.")
        return out

    def _check_epilogue(self, bias: np.ndarray | None, shift: int | None) -> None:
        if self.dtype != np.int8:
            raise TypeError(f"bias and shift are for int8 matrices, and this one is {self.dtype}.")
        if shift is not None and not 0 <= shift < 31:
            raise ValueError(f"shift is {shift}; an int32 can lose 0 to 30 bits.")
        if bias is not None and np.shape(bias) != self.shape[1:]:
            raise ValueError(f"bias has shape {np.shape(bias)}; this matrix takes {self.shape[1:]}.")

        bias_most = int(np.abs(np.asarray(bias, np.int64)).max(initial=0)) if bias is not None else 0
        most = self._largest_sum + bias_most + (1 << (shift or 0) >> 1)
        if most >= 2**31:
            raise ValueError(f"The sums may reach {most}, and an int32 ends at {2**31 - 1}: use a smaller bias.")

    @cached_property
    def _largest_sum(self) -> int:
        """What no sum of an int8 matrix exceeds, for any x."""
        columns = np.abs(self.to_dense().astype(np.int32)).sum(axis=0, dtype=np.int64)
        return 255 * int(columns.max(initial=0))

    def _product_of_nothing(self, bias: np.ndarray | None, shift: int | None) -> np.ndarray:
        """The result for K = 0, a row of it."""
        sums = np.zeros(self.shape[1], np.int64) if bias is None else np.asarray(bias, np.int64)
        return sums if shift is None else np.clip((sums + (1 << shift >> 1)) >> shift, -128, 127)


def _isa(name: str) -> Isa:
    if name not in ISAS:
        raise ValueError(f"There is no instruction set {name!r}: use one of {', '.join(ISAS)}.")
    return ISAS[name]


def _block(block: int | tuple[int, int]) -> tuple[int, int]:
    bi, bo = (block, block) if isinstance(block, int) else block
    if bi < 1 or bo < 1:
        raise ValueError(f"A block of {bi} x {bo} holds nothing: use sides of at least 1.")
    return int(bi), int(bo)


def _threads(threads: int | None) -> int | None:
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; a product takes at least 1.")
    return threads
