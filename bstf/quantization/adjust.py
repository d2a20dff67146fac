"""Adjustment of positions, so that every shift of the fixed-point model is one that the hardware has.

The rules are those of the Vitis AI quantiser's position adjustment. Here they only ever lower a position -
a tensor becomes coarser but never clips what it held - and they are repeated until nothing changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bstf.quantization.fixed_point import MAX_CUT
from bstf.quantization.network import Add, Concat, Multiply, Network, Operation, Weights

MAX_BIAS_SHIFT = 16
MAX_ADD_DIFFERENCE = 15  # positions of the two inputs of an add
MAX_ADD_GAIN = 15  # how much finer the result of an add may be than its finer input
MAX_CONCAT_GAIN = 15  # how much finer a concatenation may be than a part of it
_LOWEST_POSITION = -96  # float32 ends near; only rules that no positions satisfy lead here


@dataclass
class Positions:
    """Positions of a network.

    Attributes:
        activation: by the operation that owns the grid (`Network.grids`).
        kernel: by convolution or dense layer.
        bias: by convolution or dense layer.
    """

    activation: dict[str, int]
    kernel: dict[str, int]
    bias: dict[str, int]


@dataclass(frozen=True)
class Shift:
    """A shift of one operation and the range it must be in."""

    operation: str
    kind: str
    value: int
    low: int
    high: int


def adjust(network: Network, positions: Positions) -> Positions:
    """Lowers positions until every shift is in its range.

    With i, k, b, o the positions of input, kernel, bias and output: 0 <= k + i - b <= 16 and
    0 <= k + i - o <= 16 for convolution and dense; |i0 - i1| <= 15 and -15 <= max(i0, i1) - o <= 16 for add;
    0 <= i0 + i1 - o <= 16 for multiply; -15 <= i - o <= 16 for every part of a concatenation. Too small a cut
    lowers the output, too large a cut the kernel, of an add or a multiply the finer of its inputs, of a
    concatenation that part. No position is lowered further than the limits ask for. A bias of zeros follows its
    sum.

    Args:
        network: the folded network.
        positions: as found by calibration and by the weights' squared error; unchanged.

    Returns:
        The adjusted positions.

    Raises:
        ValueError: no positions exist, because weights are too large; names the layer.
    """
    positions = Positions(dict(positions.activation), dict(positions.kernel), dict(positions.bias))
    grids = network.grids()
    changed = True
    while changed:
        changed = False
        for op in network.operations.values():
            for bound in _bounds(op, grids, positions):
                changed |= bound.apply(op.name)
    for op in network.operations.values():
        if isinstance(op, Weights):
            _lower_kernel(op, positions.activation[grids[op.inputs[0]]], positions)
    check(network, positions)
    return positions


def check(network: Network, positions: Positions) -> None:
    """Asserts that every shift is in its range.

    Raises:
        ValueError: one isn't.
    """
    for shift in shifts(network, positions):
        if not shift.low <= shift.value <= shift.high:
            raise ValueError(
                f"layer {shift.operation!r} needs a {shift.kind} of {shift.value}; "
                f"possible are {shift.low} to {shift.high}."
            )


def shifts(network: Network, positions: Positions) -> Iterator[Shift]:
    """All shifts of a network whose ranges are limited."""
    grids = network.grids()
    for op in network.operations.values():
        if not isinstance(op, (Weights, Add, Multiply, Concat)):
            continue
        inputs = [positions.activation[grids[name]] for name in op.inputs]
        if isinstance(op, Weights):
            total = positions.kernel[op.name] + inputs[0]
            yield Shift(op.name, "shift of the bias", total - positions.bias[op.name], 0, MAX_BIAS_SHIFT)
            yield Shift(op.name, "shift of the sum", total - positions.activation[op.name], 0, MAX_CUT)
        elif isinstance(op, Multiply):
            yield Shift(op.name, "shift of the product", sum(inputs) - positions.activation[op.name], 0, MAX_CUT)
        elif isinstance(op, Concat):
            for part in inputs:
                yield Shift(op.name, "shift of a part", part - positions.activation[op.name], -MAX_CONCAT_GAIN, MAX_CUT)
        else:
            difference = max(inputs) - min(inputs)
            gain = max(inputs) - positions.activation[op.name]
            yield Shift(op.name, "difference of the inputs' positions", difference, 0, MAX_ADD_DIFFERENCE)
            yield Shift(op.name, "shift of the sum", gain, -MAX_ADD_GAIN, MAX_CUT)


@dataclass(frozen=True)
class _Bound:
    """The highest position that a tensor may have, given those of its neighbours."""

    table: dict[str, int]
    name: str
    most: int

    def apply(self, operation: str) -> bool:
        """Lowers the position if it is higher; tells whether it was."""
        if self.table[self.name] <= self.most:
            return False
        if self.most < _LOWEST_POSITION:
            raise ValueError(
                f"layer {operation!r} can't be quantised: no positions keep its shifts in range, because "
                "weights are too large; scale them down or put a batch normalisation after the layer."
            )
        self.table[self.name] = self.most
        return True


def _bounds(op: Operation, grids: dict[str, str], positions: Positions) -> Iterator[_Bound]:
    """Bounds on activations and biases, with kernels as they came: those are lowered at the end, if at all.

    A kernel lowered to k + i = min(o, b) + 16 keeps its lower limits where o <= b + 16 and b <= o + 16.
    """
    activation, bias = positions.activation, positions.bias
    if isinstance(op, Weights):
        total = positions.kernel[op.name] + activation[grids[op.inputs[0]]]
        yield _Bound(activation, op.name, total)
        if op.bias.any():
            yield _Bound(bias, op.name, min(total, activation[op.name] + MAX_CUT))
            yield _Bound(activation, op.name, bias[op.name] + MAX_BIAS_SHIFT)
    elif isinstance(op, Add):
        owners = [grids[name] for name in op.inputs]
        coarser = min(activation[owner] for owner in owners)
        for owner in owners:
            yield _Bound(activation, owner, min(coarser + MAX_ADD_DIFFERENCE, activation[op.name] + MAX_CUT))
        yield _Bound(activation, op.name, max(activation[owner] for owner in owners) + MAX_ADD_GAIN)
    elif isinstance(op, Multiply):
        first, second = sorted((grids[name] for name in op.inputs), key=lambda owner: -activation[owner])
        yield _Bound(activation, op.name, activation[first] + activation[second])
        most = activation[op.name] + MAX_CUT  # the finer one loses the bits that are too many
        yield _Bound(activation, first, most // 2 if first == second else most - activation[second])
    elif isinstance(op, Concat):
        for owner in [grids[name] for name in op.inputs]:
            yield _Bound(activation, op.name, activation[owner] + MAX_CONCAT_GAIN)
            yield _Bound(activation, owner, activation[op.name] + MAX_CUT)


def _lower_kernel(op: Weights, input_position: int, positions: Positions) -> None:
    most = positions.activation[op.name] + MAX_CUT
    if op.bias.any():
        most = min(most, positions.bias[op.name] + MAX_BIAS_SHIFT)
    positions.kernel[op.name] = min(positions.kernel[op.name], most - input_position)
    if not op.bias.any():
        positions.bias[op.name] = positions.kernel[op.name] + input_position
