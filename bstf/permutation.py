"""permute: another order of channels, in which blocks of channels matter more or less. The function stays the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops
from scipy.optimize import linear_sum_assignment

from bstf import layouts
from bstf.batches import Progress
from bstf.blocks import BlockShape
from bstf.channels import ChannelGroups, Channels, Part
from bstf.conversion import check_model, clone, same, transfer_weights
from bstf.places import Selection, effective_kernel, eligible, is_masked, places
from bstf.selection import check_ratio, kept_blocks, layer_ratios, select

_MAX_SWEEPS = 20
_LEAST_GAIN = 1e-4  # of a layer's energy, summed over layers: a sweep that gains less is the last


def permute(
    model: keras.Model,
    block: int | Sequence[int] = 8,
    ratio: float | Mapping[str, float] = 0.5,
    *,
    min_per_line: int = 1,
    layers: Selection = None,
) -> keras.Model:
    """Copies a model with its channels in an order that suits blocks; it computes the same.

    The output channels of a layer change their places, and so does what reads them: kernels of the layers after it,
    biases, batch normalisations, depthwise kernels, all through concatenations, flattening and nested models. Channels
    that are added keep one order between them. Inputs and outputs of the model, grouped convolutions and whatever isn't
    known keep theirs. Call it before `sparsify`, with the same block and ratio.

    It maximises the sum over layers of `kept_energy`, group by group of channels that share an order: Γ is chosen for
    the present order, then channels are assigned to places so that this Γ keeps most (a linear assignment problem),
    and so on in turn while it helps, as Tetris does (Ji et al. 2018, NeurIPS). No step makes it smaller.
    There is no chance in it: the same model gives the same order.

    Args:
        model: a built Sequential or functional model, not masked yet.
        block: an int, or (input channels, output channels) of a block.
        ratio: the fraction of blocks that will become zero, in [0, 1), or ratios by names as in `sparsify`.
        min_per_line: kept blocks that every row and column of Γ will need at least.
        layers: which layers will be made sparse, as in `sparsify`; the others follow.

    Returns:
        The copy, dense and not compiled. Its outputs differ by rounding only: sums run in another order.

    Raises:
        ValueError: an argument is out of range, the model isn't built or can't be cloned, or has masked layers.
        TypeError: `model` isn't a Keras model.

    Example:
        >>> model = bstf.permute(model, block=8, ratio=0.5)
        >>> sparse = bstf.sparsify(model, block=8, ratio=0.5)
    """
    shape = BlockShape.of(block)
    check_model(model, "permute")
    masked = [path for path, layer in places(model) if is_masked(layer)]
    if masked:
        raise ValueError(
            f"permute would mix the blocks of layer '{masked[0]}', which is masked: call it before sparsify, or on "
            "what densify returns."
        )
    groups = ChannelGroups(model)
    kernels = _kernels(model, groups, shape, ratio, min_per_line, layers)
    orders = _best_orders(groups, kernels)
    copy, copies = clone(model, same)
    parts: dict[int, list[Part]] = {}
    for part in groups.parts:
        parts.setdefault(id(part.layer), []).append(part)
    for layer, new in copies:
        transfer_weights(layer, new)
        for part in parts.get(id(layer), ()):
            _reorder(new, part, groups.resolved(part.channels), orders)
    return copy


def kept_energy(
    model: keras.Model,
    block: int | Sequence[int] = 8,
    ratio: float | Mapping[str, float] = 0.5,
    *,
    min_per_line: int = 1,
    layers: Selection = None,
) -> dict[str, float]:
    """The part of each kernel's squared norm that would be left, if the blocks of the largest norms were kept.

    Args:
        model: a built Sequential or functional model.
        block: as for `permute`.
        ratio: as for `permute`.
        min_per_line: as for `permute`.
        layers: as for `permute`.

    Returns:
        sum of w^2 over kept blocks / sum of w^2, in (0, 1], for each layer that can be sparse, by its path.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> before, after = (np.mean(list(kept_energy(one).values())) for one in (model, bstf.permute(model)))
    """
    shape = BlockShape.of(block)
    places_ = eligible(model, shape, layers)
    ratios = _ratios([path for path, _ in places_], ratio)
    found = {}
    for path, layer in places_:
        kernel = _Kernel(_energy(effective_kernel(layer)), None, None, shape, ratios[path], min_per_line)
        found[path] = kernel.kept()
    return found


@dataclass
class _Kernel:
    """A kernel that will lose blocks, in the present order of its channels.

    Attributes:
        energy: (cin, cout), sum of w^2 over the kernel's positions, divided by that of the kernel.
        ins: the channels along its rows.
        outs: those along its columns.
    """

    energy: np.ndarray
    ins: Channels | None
    outs: Channels | None
    block: BlockShape
    ratio: float
    min_per_line: int

    def blocks(self) -> np.ndarray:
        """(rows, cols): the energy of each block."""
        return _banded(_banded(self.energy, self.block.bi, 0), self.block.bo, 1)

    def gamma(self) -> np.ndarray:
        """The Γ that keeps the most energy."""
        return select(self.blocks(), self.ratio, self.min_per_line)

    def kept(self) -> float:
        """The part of the energy in kept blocks."""
        blocks = self.blocks()
        return float((blocks * select(blocks, self.ratio, self.min_per_line)).sum())

    def benefit(self, group: int, size: int) -> np.ndarray:
        """(channels, places): what Γ as it is would keep of each channel of a group in each of its places."""
        gamma = self.gamma().astype(np.float64)
        total = np.zeros((size, size))
        for channels, energy, side, kept, other in (
            (self.ins, self.energy, self.block.bi, gamma, self.block.bo),
            (self.outs, self.energy.T, self.block.bo, gamma.T, self.block.bi),
        ):
            sums = _banded(energy, other, 1)
            for elements in _occurrences(channels, group, size):
                total += sums[elements] @ kept[elements // side].T
        return total

    def reordered(self, group: int, order: np.ndarray) -> "_Kernel":
        """The kernel with the channels of a group in another order."""
        rows, columns = (_taken(channels, {group: order}) for channels in (self.ins, self.outs))
        energy = self.energy[np.ix_(rows, columns)]
        return _Kernel(energy, self.ins, self.outs, self.block, self.ratio, self.min_per_line)


def _banded(energy: np.ndarray, size: int, axis: int) -> np.ndarray:
    return np.add.reduceat(energy, np.arange(0, energy.shape[axis], size), axis=axis)


def _energy(kernel: np.ndarray) -> np.ndarray:
    """(..., cin, cout) -> (cin, cout), of sum 1; a kernel of zeros counts all alike."""
    energy = np.square(kernel.astype(np.float64)).reshape(-1, *kernel.shape[-2:]).sum(axis=0)
    return energy / energy.sum() if energy.any() else np.full(energy.shape, 1 / energy.size)


def _occurrences(channels: Channels, group: int, size: int) -> np.ndarray:
    """(occurrences, size): the elements of an axis where the channels of a group stand."""
    mine = np.flatnonzero(channels.group == group)
    return mine[np.lexsort((channels.index[mine], channels.copy[mine]))].reshape(-1, size)


def _taken(channels: Channels, orders: Mapping[int, np.ndarray]) -> np.ndarray:
    """For each element of an axis the element that stands there when the groups have new orders."""
    taken = np.arange(len(channels))
    for group, order in orders.items():
        elements = _occurrences(channels, group, len(order))
        taken[elements] = elements[:, order]
    return taken


def _ratios(paths: Sequence[str], ratio: float | Mapping[str, float]) -> dict[str, float]:
    if isinstance(ratio, Mapping):
        return layer_ratios(paths, ratio)
    return dict.fromkeys(paths, check_ratio(ratio))


def _kernels(
    model: keras.Model,
    groups: ChannelGroups,
    block: BlockShape,
    ratio: float | Mapping[str, float],
    min_per_line: int,
    layers: Selection,
) -> list[_Kernel]:
    """The kernels that will be sparse and of which an axis may be permuted."""
    chosen = eligible(model, block, layers)
    ratios = _ratios([path for path, _ in chosen], ratio)
    kept_blocks(1, 1, 0.0, min_per_line)  # checks it
    axes: dict[int, dict[bool, Channels]] = {}  # whether along the outputs
    for part in groups.parts:
        facts = layouts.layout(part.layer)
        if facts is not None and part.variable == facts.kernel:
            axes.setdefault(id(part.layer), {})[part.axis in facts.outputs] = groups.resolved(part.channels)
    kernels = []
    for path, layer in chosen:
        known = axes.get(id(layer), {})
        if len(known) == 2:
            energy = _energy(effective_kernel(layer))
            kernels.append(_Kernel(energy, known[False], known[True], block, ratios[path], min_per_line))
    return kernels


def _best_orders(groups: ChannelGroups, kernels: list[_Kernel]) -> dict[int, np.ndarray]:
    """For each group that isn't best as it is: which channel comes to each place. Reorders the kernels, too."""
    orders = {group: np.arange(groups.sizes[group]) for group in groups.free()}
    concerned = {
        group: [i for i, one in enumerate(kernels) if (one.ins.group == group).any() or (one.outs.group == group).any()]
        for group in orders
    }
    progress = Progress(None, "group")
    for _ in range(_MAX_SWEEPS):
        gained = 0.0
        for group, order in orders.items():
            if concerned[group]:
                mine = [kernels[i] for i in concerned[group]]
                better, new, gain = _improved(mine, group, order)
                orders[group], gained = new, gained + gain
                for i, kernel in zip(concerned[group], better):
                    kernels[i] = kernel
            progress.step()
        if gained < _LEAST_GAIN:
            break
    progress.finish()
    return {group: order for group, order in orders.items() if (order != np.arange(len(order))).any()}


def _improved(kernels: list[_Kernel], group: int, order: np.ndarray) -> tuple[list[_Kernel], np.ndarray, float]:
    """Assigns the channels of one group to places until that gains nothing: kernels, order and gain."""
    first = best = sum(kernel.kept() for kernel in kernels)
    while True:
        benefit = sum(kernel.benefit(group, len(order)) for kernel in kernels)
        channel, place = linear_sum_assignment(benefit, maximize=True)
        step = np.empty(len(order), int)
        step[place] = channel
        changed = [kernel.reordered(group, step) for kernel in kernels]
        kept = sum(kernel.kept() for kernel in changed)
        # The assignment can lose where a group is on both axes of a kernel: its benefit takes one at a time.
        if kept <= best + 1e-9:
            return kernels, order, best - first
        kernels, order, best = changed, order[step], kept


def _reorder(layer: keras.Layer, part: Part, channels: Channels, orders: Mapping[int, np.ndarray]) -> None:
    """Brings one axis of a variable into the new order."""
    present = {group: order for group, order in orders.items() if (channels.group == group).any()}
    if present:
        variable = getattr(layer, f"_{part.variable}", None)  # Keras' `kernel` may be a property
        variable = getattr(layer, part.variable) if variable is None else variable
        value = ops.convert_to_numpy(variable)
        variable.assign(np.take(value, _taken(channels, present), axis=part.axis))
