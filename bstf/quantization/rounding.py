"""Rounding that makes good for itself: each weight takes over the errors of those that were rounded before.

Source: Frantar et al. 2022, GPTQ (arXiv 2210.17323), sections 3.1 to 3.3, which is the Optimal Brain Surgeon of
Hassibi & Stork 1993 for rounding instead of removing. For a layer with inputs X (rows, inputs) and an output's
weights w, the rounding q that keeps |X q - X w|^2 small is found one input after another: with H = X' X, the error
of input i, divided by its place in the Cholesky factor of H^-1, goes to all inputs after it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from keras import ops
from scipy.linalg.lapack import dtrtri

from bstf.blocks import expand, nonzero_blocks
from bstf.patches import windows
from bstf.quantization.adjust import Positions
from bstf.quantization.calibrate import run
from bstf.quantization.network import Convolution, Dense, Network, Weights
from bstf.quantization.positions import half_even, half_up, to_grid

_DAMPING = 0.01  # of the mean diagonal of H
_BATCH = 128  # inputs whose errors go to all later ones at once
_FEWEST_ROWS, _MOST_ROWS = 2048, 8192  # of X, if there are so many; four an input in between
_FEWEST_ROWS_AN_INPUT = 0.25  # with fewer, they say too little about the inputs' sums


def compensated_kernels(network: Network, positions: Positions, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Finds kernels on their grids with which the quantised network's layers give what the float network's give.

    Layers are taken in order. Each one is fitted to the float outputs on the inputs that it will have, from layers
    rounded before and on their grids, then rounded. Zero blocks stay exactly zero. Transposed convolutions are
    rounded to the nearest, and so are layers of which the images show too little.

    Args:
        network: the folded float network.
        positions: of all tensors.
        images: of every input, float32 (n, *shape of the input), at least one; computed in one batch.

    Returns:
        The kernels, float32, by layer.

    Example:
        >>> kernels = compensated_kernels(network, positions, images)
    """
    rounded = Network({name: replace(op) for name, op in network.operations.items()}, network.outputs)
    readers, grids, fused = network.consumers(), network.grids(), network.fused()

    def on_grid(name: str, values: Any) -> Any:
        if name not in grids or name in fused:
            return values
        numbers = ops.convert_to_numpy(values)
        return ops.convert_to_tensor(to_grid(numbers, positions.activation[grids[name]], half_up))

    for (name, x), (_, own) in zip(run(network, images), run(rounded, images, on_grid)):
        for op in readers[name]:
            if isinstance(op, Weights):
                rounded.operations[op.name].kernel = _rounded(op, positions.kernel[op.name], x, own)
    return {op.name: op.kernel for op in rounded.operations.values() if isinstance(op, Weights)}


def _rounded(op: Weights, position: int, x: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The kernel on its grid that makes of its `own` inputs what the float kernel makes of x."""
    if not isinstance(op, (Convolution, Dense)):
        return to_grid(op.kernel, position, half_even)
    groups = getattr(op, "groups", 1)
    *taps, cin, cout = op.kernel.shape
    inputs = int(np.prod(taps)) * cin

    def by_group(values: np.ndarray) -> np.ndarray:
        rows = _rows(op, values, inputs).reshape(-1, inputs // cin, groups, cin)
        return rows.transpose(2, 0, 1, 3).reshape(groups, -1, inputs).astype(np.float64)

    wanted, rows = by_group(x), by_group(own)
    if _FEWEST_ROWS_AN_INPUT * inputs > rows.shape[1]:
        return to_grid(op.kernel, position, half_even)
    weights = op.kernel.reshape(-1, groups, cout // groups).swapaxes(0, 1).astype(np.float64)
    kept = np.ones(op.kernel.shape, bool)
    if groups == 1:
        kernel = op.kernel if op.kernel.ndim == 4 else op.kernel[None, None]
        kept = np.broadcast_to(expand(nonzero_blocks(kernel, op.block), kernel.shape, op.block) != 0, kernel.shape)
    kept = kept.reshape(-1, groups, cout // groups).swapaxes(0, 1)
    gram = np.stack([part.T @ part for part in rows])  # each is known to be symmetric, which halves the work
    found = _compensated(gram, rows.swapaxes(1, 2) @ wanted, weights, kept, position)
    return found.swapaxes(0, 1).reshape(op.kernel.shape).astype(np.float32)


def _rows(op: Weights, x: np.ndarray, inputs: int) -> np.ndarray:
    """Some of what the kernel is multiplied with, (rows, kernel positions * channels); always the same ones."""
    rng, most = np.random.default_rng(0), int(np.clip(4 * inputs, _FEWEST_ROWS, _MOST_ROWS))
    if isinstance(op, Dense):
        return x[rng.permutation(len(x))[:most]]
    found = windows(x, op.kernel.shape[:2], op.strides, op.dilation, op.padding)
    places = rng.choice(int(np.prod(found.shape[:3])), min(most, int(np.prod(found.shape[:3]))), replace=False)
    return found[np.unravel_index(places, found.shape[:3])].reshape(len(places), -1)


def _compensated(
    gram: np.ndarray, cross: np.ndarray, weights: np.ndarray, kept: np.ndarray, position: int
) -> np.ndarray:
    """Rounded weights of several layers at once.

    Args:
        gram: H = X' X of the layers' own inputs, (layers, inputs, inputs).
        cross: X' Z with the inputs Z of the float network, of the same shape.
        weights: (layers, inputs, outputs), float64, for Z.
        kept: whether a weight may differ from zero, of the same shape.
        position: of the grid.

    Returns:
        (layers, inputs, outputs) on the grid.
    """
    inputs = weights.shape[1]
    diagonal = np.diagonal(gram, axis1=1, axis2=2)
    damping = (_DAMPING * diagonal.mean(axis=1) + (diagonal.max(axis=1) == 0))[:, None, None] * np.eye(inputs)
    order = np.argsort(-diagonal, axis=1, kind="stable")  # the loudest first: the most is left to make good for them
    turned = np.take_along_axis(np.take_along_axis(gram, order[:, :, None], 1), order[:, None, :], 2)
    wanted, kept = (np.take_along_axis(one, order[:, :, None], 1) for one in ((cross + damping) @ weights, kept))
    factor = _factor_of_inverse(turned + damping)  # row i: what input i passes on
    weights = factor.swapaxes(1, 2) @ (factor @ wanted)  # the fit, before any rounding
    rounded = np.empty_like(weights)
    for start in range(0, inputs, _BATCH):
        stop = min(start + _BATCH, inputs)
        errors = np.empty((len(weights), stop - start, weights.shape[2]))
        for i in range(start, stop):
            rounded[:, i] = np.where(kept[:, i], to_grid(weights[:, i], position, half_even), 0.0)
            error = (weights[:, i] - rounded[:, i]) / factor[:, i, i, None]
            weights[:, i + 1 : stop] -= factor[:, i, i + 1 : stop, None] * error[:, None]
            errors[:, i - start] = error
        weights[:, stop:] -= factor[:, start:stop, stop:].swapaxes(1, 2) @ errors
    return np.take_along_axis(rounded, np.argsort(order, axis=1)[:, :, None], 1)


def _factor_of_inverse(matrices: np.ndarray) -> np.ndarray:
    """U, upper triangular, with U' U = H^-1 of each H, (n, inputs, inputs), symmetric and positive definite.

    H with its rows and columns reversed is L L'. Reversed again, L^-1 is U. That takes a third of the operations of
    inverting H and factoring the inverse, and loses no digits in between.
    """
    lower = np.linalg.cholesky(matrices[:, ::-1, ::-1])
    return np.ascontiguousarray(np.stack([dtrtri(one, lower=1)[0] for one in lower])[:, ::-1, ::-1])
