"""What quantisation does to each layer: positions, clipped values, noise, and the network's sensitivity to it."""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from typing import Any

import keras
import numpy as np
from keras import ops
from rich import box
from rich.console import Console
from rich.table import Table

from bstf.batches import image_batches
from bstf.files import replacing
from bstf.quantization.calibrate import run
from bstf.quantization.equalize import equalize
from bstf.quantization.fixed_point import FixedPoint
from bstf.quantization.fold import flatten
from bstf.quantization.network import Network, Softmax, Weights
from bstf.quantization.positions import HIGHEST, LOWEST
from bstf.quantization.walk import walk

_IMAGES_AT_A_TIME = 8  # tensors of two models are held


@dataclass(frozen=True)
class LayerNoise:
    """A tensor on a grid, and the layer that yields it.

    Attributes:
        layer: the layer's name; of a convolution or dense layer with a relu, the convolution's.
        position: of the tensor.
        kernel_position: of the kernel; None for a layer without weights.
        bias_position: of the bias; None for a layer without weights.
        saturation: fraction of the values that the grid's ends clip.
        sqnr: signal to quantisation noise of the tensor against the float model's, in dB:
            10 log10(sum of squares / sum of squared differences). Infinite where they are equal.
        sensitivity: the same of the network's output if only this layer is quantised - its kernel, bias and
            output - and all else is computed in float; None if it wasn't asked for.
    """

    layer: str
    position: int
    kernel_position: int | None
    bias_position: int | None
    saturation: float
    sqnr: float
    sensitivity: float | None = None


@dataclass(frozen=True)
class QuantizationReport:
    """The tensors on grids of a fixed-point model; prints as a table.

    Attributes:
        model: the model's name.
        images: number of images it was measured on.
        sqnr: of the network's outputs, before a softmax, in dB.
        layers: one entry a tensor, in order of computation.
    """

    model: str
    images: int
    sqnr: float
    layers: tuple[LayerNoise, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists and numbers, ready for `json.dumps`; what is infinite becomes None."""
        layers = [_finite(asdict(row)) for row in self.layers]
        return _finite(asdict(self)) | {"layers": layers}

    def to_csv(self, path: str | PathLike | None = None) -> str:
        """Returns one line a tensor; writes them to `path` if there is one."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(LayerNoise)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.layers)
        if path is not None:
            with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                file.write(text.getvalue())
        return text.getvalue()

    def __str__(self) -> str:
        title = f"Quantisation of {self.model} on {self.images} images"
        table = Table(title=title, box=box.SIMPLE_HEAD, show_footer=True)
        table.add_column("layer", footer="outputs", overflow="fold")
        for name in ("position", "kernel", "bias", "clipped"):
            table.add_column(name, justify="right")
        table.add_column("SQNR, dB", footer=_decibels(self.sqnr), justify="right")
        if any(row.sensitivity is not None for row in self.layers):
            table.add_column("alone: outputs' SQNR, dB", justify="right")
        for row in self.layers:
            positions = (row.position, row.kernel_position, row.bias_position)
            cells = ["-" if position is None else str(position) for position in positions]
            cells += [f"{row.saturation:.3%}", _decibels(row.sqnr)]
            if row.sensitivity is not None:
                cells.append(_decibels(row.sensitivity))
            table.add_row(row.layer, *cells)
        console = Console(file=io.StringIO(), width=140, color_system=None)
        console.print(table)
        return console.file.getvalue().rstrip() + "\n"

    __repr__ = __str__


def report(model: keras.Model, quantised: keras.Model, data: Any, *, sensitivity: bool = False) -> QuantizationReport:
    """Compares a fixed-point model with the float model that it came from, tensor by tensor.

    Where the channels were equalised the float model's are too, so that both have the same scales.

    Args:
        model: the float model.
        quantised: what `bstf.quantize` or `bstf.quantization.convert` made of it.
        data: images, as the calibration of `bstf.quantize`. A few dozen suffice.
        sensitivity: whether to measure, too, what each layer alone does to the network's output, in one more
            run of the float model for each layer.

    Returns:
        A QuantizationReport: `print` it, or take its `layers`, `to_dict()` or `to_csv()`.

    Raises:
        TypeError: `data` isn't what is described above.
        ValueError: no images, or `quantised` isn't a fixed-point model of `model`.

    Example:
        >>> print(bstf.quantization.report(model, bstf.quantize(model, images), images, sensitivity=True))
    """
    network, grids = _reference(model, quantised), _grids(quantised)
    comparison = _Comparison(network, quantised, {name: grids[name] for name in grids if name in network.operations})
    count = 0
    for images in _batches(network, data):
        comparison.add(images, sensitivity)
        count += len(images[0])
    if not count:
        raise ValueError("data holds no images; a report needs at least one.")
    rows = tuple(comparison.row(name, sensitivity) for name in comparison.grids)
    return QuantizationReport(quantised.name, count, comparison.total.decibels, rows)


class _Comparison:
    """Noise and clipped values of every tensor on a grid, over batches."""

    def __init__(self, network: Network, quantised: keras.Model, grids: dict[str, FixedPoint]):
        self.network, self.quantised, self.grids = network, quantised, grids
        self.outputs = _outputs(network)
        self.noise, self.alone = ({name: _Noise() for name in grids} for _ in range(2))
        self.clipped = {name: _Mean() for name in grids}
        self.total = _Noise()

    def add(self, images: list[np.ndarray], sensitivity: bool) -> None:
        exact, outputs = dict(run(self.network, images)), {}
        for step in walk(self.quantised, images):
            on_grid = isinstance(step.layer, FixedPoint)
            name = step.producers[0] if on_grid else step.layer.name
            if name in self.outputs:
                outputs[name] = ops.convert_to_numpy(step.output)  # the grid's comes last
            if on_grid and name in self.grids:
                self.noise[name].add(exact[name], ops.convert_to_numpy(step.output))
                self.clipped[name].add(_clips(ops.convert_to_numpy(step.inputs[0]), step.layer.position))
        for name, values in outputs.items():
            self.total.add(exact[name], values)
        for name, grid in self.grids.items() if sensitivity else ():
            for tensor, values in _run_alone(self.network, self.quantised, name, grid, images):
                if tensor in self.outputs:
                    self.alone[name].add(exact[tensor], values)

    def row(self, name: str, sensitivity: bool) -> LayerNoise:
        layer = _layer_of(self.network, name)
        weights = self.quantised.get_layer(layer) if isinstance(self.network.operations[layer], Weights) else None
        return LayerNoise(
            layer=layer,
            position=self.grids[name].position,
            kernel_position=getattr(weights, "kernel_position", None),
            bias_position=getattr(weights, "bias_position", None),
            saturation=self.clipped[name].mean,
            sqnr=self.noise[name].decibels,
            sensitivity=self.alone[name].decibels if sensitivity else None,
        )


@dataclass
class _Mean:
    """Mean over all elements of all batches."""

    sum: int = 0
    count: int = 0

    def add(self, values: np.ndarray) -> None:
        self.sum += int(values.sum())
        self.count += values.size

    @property
    def mean(self) -> float:
        return self.sum / self.count


@dataclass
class _Noise:
    """Sums over batches."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, exact: np.ndarray, found: np.ndarray) -> None:
        exact, found = (values.reshape(-1).astype(np.float64) for values in (exact, found))
        self.signal += float(exact @ exact)
        self.noise += float((exact - found) @ (exact - found))

    @property
    def decibels(self) -> float:
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def _reference(model: keras.Model, quantised: keras.Model) -> Network:
    """The folded float network, equalised if the fixed-point model's kernels say so."""
    candidates = flatten(model), equalize(flatten(model))
    names = {layer.name for layer in quantised.layers}
    for op in candidates[0].operations.values():
        if isinstance(op, Weights) and op.name not in names:
            raise ValueError(
                f"layer {op.name!r} of {model.name!r} isn't in {quantised.name!r}: give the float model that the "
                "fixed-point model was made of."
            )
    return min(candidates, key=lambda network: _kernel_noise(network, quantised))


def _kernel_noise(network: Network, quantised: keras.Model) -> float:
    weights = [op for op in network.operations.values() if isinstance(op, Weights)]
    return sum(np.square(op.kernel - _kernel(op, quantised)).sum(dtype=np.float64) for op in weights)


def _kernel(op: Weights, quantised: keras.Model) -> np.ndarray:
    layer = quantised.get_layer(op.name)
    kernel = ops.convert_to_numpy(layer.kernel) if hasattr(layer, "kernel") else np.zeros(0)
    if kernel.size != op.kernel.size:
        raise ValueError(
            f"layer {op.name!r} has a kernel of shape {op.kernel.shape} in the float model and {kernel.shape} in "
            "the fixed-point model: give the float model that the fixed-point model was made of."
        )
    return op.keras_order(kernel).reshape(op.kernel.shape)


def _grids(quantised: keras.Model) -> dict[str, FixedPoint]:
    """The grids of a fixed-point model by the layers that they follow, in order of computation."""
    if not any(isinstance(layer, FixedPoint) for layer in quantised.layers):
        raise ValueError(f"model {quantised.name!r} isn't a fixed-point model: give what bstf.quantize returns.")
    found = {}
    for layer in quantised.layers:
        if isinstance(layer, FixedPoint):
            (tensor,) = layer._inbound_nodes[0].input_tensors
            found[tensor._keras_history.operation.name] = layer
    return found


def _outputs(network: Network) -> set[str]:
    """The network's outputs, without a softmax."""
    last = [network.operations[name] for name in network.outputs]
    return {op.inputs[0] if isinstance(op, Softmax) else op.name for op in last}


def _layer_of(network: Network, name: str) -> str:
    """The layer that yields a tensor, before a relu that shares its grid."""
    return {relu: producer for producer, relu in network.fused().items()}.get(name, name)


def _batches(network: Network, data: Any) -> Iterator[list[np.ndarray]]:
    for batch in image_batches(data, network.inputs):
        for start in range(0, len(batch[0]), _IMAGES_AT_A_TIME):
            yield [images[start : start + _IMAGES_AT_A_TIME] for images in batch]


def _clips(values: np.ndarray, position: int) -> np.ndarray:
    """Which values don't round to an integer of the grid."""
    integers = np.floor(np.ldexp(values.astype(np.float64), position) + 0.5)
    return (integers < LOWEST) | (integers > HIGHEST)


def _run_alone(
    network: Network, quantised: keras.Model, name: str, grid: FixedPoint, images: list[np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Computes the float network with one layer and its output on their grids."""
    op = network.operations[_layer_of(network, name)]
    if isinstance(op, Weights):
        bias = ops.convert_to_numpy(quantised.get_layer(op.name).bias)
        changed = network.operations | {op.name: replace(op, kernel=_kernel(op, quantised), bias=bias)}
        network = replace(network, operations=changed)
    return run(network, images, lambda tensor, values: grid(values) if tensor == name else values)


def _finite(entries: dict[str, Any]) -> dict[str, Any]:
    infinite = (math.inf, -math.inf)  # JSON has no such numbers
    return {key: None if value in infinite else value for key, value in entries.items()}


def _decibels(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"
