"""Block-sparse constants: which blocks of a kernel hold anything, and the kernel without the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BlockColumns:
    """A kernel by block columns (compressed sparse column order over blocks).

    `starts` (columns + 1): where each output block's entries begin; `rows` (kept): input block of each entry;
    `blocks` (kept, kh, kw, bi, bo): its values. Ragged edges are filled with zeros.
    """

    shape: tuple[int, int, int, int]
    starts: np.ndarray
    rows: np.ndarray
    blocks: np.ndarray


def blocked(kernel: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """A kernel (kh, kw, cin, cout) as blocks (rows, columns, kh, kw, bi, bo), ragged edges filled with zeros."""
    kh, kw, cin, cout = kernel.shape
    bi, bo = block
    rows, columns = -(-cin // bi), -(-cout // bo)
    full = np.zeros((kh, kw, rows * bi, columns * bo), kernel.dtype)
    full[:, :, :cin, :cout] = kernel
    return full.reshape(kh, kw, rows, bi, columns, bo).transpose(2, 4, 0, 1, 3, 5)


def nonzero_blocks(kernel: np.ndarray, block: tuple[int, int] = (8, 8)) -> np.ndarray:
    """Γ as found in the values: bool (ceil(cin/bi), ceil(cout/bo)), True where a block holds a nonzero."""
    return blocked(kernel, block).any(axis=(2, 3, 4, 5))


def ungrouped(kernel: np.ndarray, groups: int) -> np.ndarray:
    """A kernel (kh, kw, cin / groups, cout) with groups as one (kh, kw, cin, cout) without: blocks along a diagonal."""
    if groups == 1:
        return kernel
    kh, kw, cin, cout = kernel.shape
    whole = np.zeros((kh, kw, groups, cin, groups, cout // groups), kernel.dtype)
    parts = kernel.reshape(kh, kw, cin, groups, cout // groups)
    for group in range(groups):
        whole[:, :, group, :, group] = parts[:, :, :, group]
    return whole.reshape(kh, kw, groups * cin, cout)


def pack(kernel: np.ndarray, block: tuple[int, int] = (8, 8)) -> BlockColumns:
    """A kernel (kh, kw, cin, cout) without its zero blocks."""
    blocks = blocked(kernel, block)
    kept = nonzero_blocks(kernel, block)
    columns, rows = np.nonzero(kept.T)
    starts = np.concatenate([[0], np.cumsum(kept.sum(axis=0))])
    return BlockColumns(kernel.shape, starts.astype(np.int64), rows, np.ascontiguousarray(blocks[rows, columns]))


def unpack(packed: BlockColumns) -> np.ndarray:
    """The kernel back, zero blocks in place."""
    kh, kw, cin, cout = packed.shape
    bi, bo = packed.blocks.shape[-2:]
    columns = len(packed.starts) - 1
    full = np.zeros((kh, kw, -(-cin // bi) * bi, columns * bo), packed.blocks.dtype)
    for column in range(columns):
        for entry in range(packed.starts[column], packed.starts[column + 1]):
            row = packed.rows[entry]
            full[:, :, row * bi : (row + 1) * bi, column * bo : (column + 1) * bo] = packed.blocks[entry]
    return full[:, :, :cin, :cout]


def from_coordinates(
    shape: tuple[int, int], rows: np.ndarray, columns: np.ndarray, values: np.ndarray, block: tuple[int, int] = (8, 8)
) -> BlockColumns:
    """A matrix (K, N), given by the places and values of its entries (no place twice), as a 1x1 kernel's blocks."""
    bi, bo = block
    block_rows = -(-shape[0] // bi)
    numbers = columns // bo * block_rows + rows // bi
    kept, entry = np.unique(numbers, return_inverse=True)
    blocks = np.zeros((len(kept), 1, 1, bi, bo), values.dtype)
    blocks[entry, 0, 0, rows % bi, columns % bo] = values
    starts = np.searchsorted(kept // block_rows if block_rows else kept, np.arange(-(-shape[1] // bo) + 1))
    return BlockColumns((1, 1, *shape), starts.astype(np.int64), kept % max(1, block_rows), blocks)
