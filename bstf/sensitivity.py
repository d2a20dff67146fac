"""How much a model's loss grows when one layer at a time is made sparse."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from bstf.batches import Batch, Progress, batches, number_of_batches
from bstf.blocks import BlockShape, expand
from bstf.files import replacing
from bstf.importance import Importance, model_scores
from bstf.layouts import from_planes
from bstf.objective import Loss, Objective
from bstf.places import Place, Selection, effective_kernel, eligible, gammas_of
from bstf.selection import check_ratio, select


@dataclass(frozen=True)
class Measurement:
    """The model with one layer sparse.

    Attributes:
        layer: the layer's path; empty for the model as it is.
        ratio: fraction of the layer's blocks that are zero.
        loss: mean over the data.
        accuracy: fraction of the examples whose class is found; None if the labels aren't classes.
    """

    layer: str
    ratio: float
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Sensitivity:
    """What sparsity in each layer costs; prints as a table.

    Attributes:
        model: the model's name.
        base: the model as it is.
        rows: one entry for each layer and ratio, in the model's order.
    """

    model: str
    base: Measurement
    rows: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """The measurements as plain dicts, lists and numbers, ready for `json.dumps`."""
        return {"model": self.model, "base": asdict(self.base), "rows": [asdict(row) for row in self.rows]}

    def plot(self, path: str | PathLike | None = None) -> Figure:
        """Draws loss, and accuracy if there is one, over the ratio, a line for each layer.

        Args:
            path: where to write the picture, its suffix says in which format; None writes nothing.

        Returns:
            A matplotlib figure.
        """
        kinds = ["loss"] if self.base.accuracy is None else ["loss", "accuracy"]
        figure = Figure(figsize=(7 * len(kinds), 5), layout="constrained")
        for kind, axes in zip(kinds, np.ravel(figure.subplots(1, len(kinds)))):
            for layer in dict.fromkeys(row.layer for row in self.rows):
                points = [self.base, *(row for row in self.rows if row.layer == layer)]
                axes.plot([row.ratio for row in points], [getattr(row, kind) for row in points], ".-", label=layer)
            axes.axhline(getattr(self.base, kind), color="grey", linestyle=":")
            axes.set(xlabel="ratio of zero blocks in one layer", ylabel=kind, title=self.model)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
        if path is not None:
            with replacing(path) as temporary:
                figure.savefig(temporary)
        return figure

    def __str__(self) -> str:
        table = Table(title=f"Sensitivity of {self.model}", box=box.SIMPLE_HEAD)
        table.add_column("layer", overflow="fold")
        for name in ("ratio", "loss", "loss grows by", "accuracy"):
            table.add_column(name, justify="right")
        for row in (self.base, *self.rows):
            accuracy = "-" if row.accuracy is None else f"{row.accuracy:.4f}"
            growth = "" if row is self.base else f"{row.loss - self.base.loss:+.4f}"
            table.add_row(row.layer or "(none)", f"{row.ratio:.3f}", f"{row.loss:.4f}", growth, accuracy)
        console = Console(file=io.StringIO(), width=140, color_system=None)
        console.print(table)
        return console.file.getvalue().rstrip() + "\n"

    __repr__ = __str__


def sensitivity(
    model: keras.Model,
    data: Any,
    *,
    block: int | Sequence[int] = 8,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
    importance: str | Importance = "l2",
    min_per_line: int = 1,
    layers: Selection = None,
    loss: Loss = None,
    seed: int = 0,
) -> Sensitivity:
    """Measures the model with ONE layer at a time sparse, at several ratios, without training it back.

    Args:
        model: a built Sequential or functional model; it stays as it is.
        data: a tuple `(x, y)` of arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or any iterable of
            batches `(x, y)`. It is read once, and once before by a criterion that needs data: an iterator
            that can't be read twice doesn't do for these.
        block: an int, or (input channels, output channels) of a block.
        ratios: fractions of zero blocks, each in [0, 1). Every ratio of every layer is an evaluation.
        importance: how blocks are compared, as in `sparsify`.
        min_per_line: kept blocks that every row and column of Γ needs at least.
        layers: which layers to look at, as in `sparsify`.
        loss: a Keras loss, its name, or a callable `(labels, outputs) -> loss`; None for the one the model is
            compiled with.
        seed: of the random vectors of "hessian".

    Returns:
        A Sensitivity: `print` it, `plot` it, or take its `rows` or `to_dict()`. Ratios are those met: a small
        layer, or `min_per_line`, may not allow the one that was asked for.

    Raises:
        ValueError: an argument is out of range, no layer can be sparse, or the loss can't be computed.
        TypeError: `data` is nothing that can be read.

    Example:
        >>> print(bstf.sensitivity(model, (x[:256], y[:256]), ratios=(0.5, 0.75)))
    """
    shape = BlockShape.of(block)
    targets = eligible(model, shape, layers)
    if not targets:
        raise ValueError(f"No layer of '{model.name}' that is selected can be sparse in {shape} blocks.")
    ratios = [check_ratio(ratio) for ratio in ratios]
    scores = model_scores(model, targets, shape, importance, data=data, loss=loss, seed=seed)
    alive = gammas_of(targets, shape)
    gammas = {
        path: [select(one, ratio, min_per_line, previous=alive.get(path)) for ratio in ratios]
        for path, one in scores.items()
    }
    return measure(model, targets, gammas, shape, data, loss)


def measure(
    model: keras.Model,
    layers: Sequence[Place],
    gammas: Mapping[str, Sequence[np.ndarray]],
    block: BlockShape,
    data: Any,
    loss: Loss = None,
) -> Sensitivity:
    """Measures the model with one Γ of one layer at a time; reads the data once.

    Args:
        model: a built model; it stays as it is.
        layers: the layers.
        gammas: some Γ for each layer's path.
        block: the block's shape.
        data: examples with labels, as in `bstf.batches.batches`.
        loss: as in `bstf.objective.Objective`.

    Returns:
        A Sensitivity, rows in the order of `layers` and of each layer's `gammas`.

    Raises:
        ValueError: as `sensitivity`.
        TypeError: as `sensitivity`.
    """
    objective = Objective(model, [layer for _, layer in layers], loss)
    tries: list[tuple[int, str, np.ndarray]] = [
        (index, path, gamma) for index, (path, _) in enumerate(layers) for gamma in gammas[path]
    ]
    losses, right, seen = np.zeros(len(tries) + 1), np.zeros(len(tries) + 1), 0
    count, classes = number_of_batches(data), True
    progress = Progress(count and count * len(losses), "evaluation")
    for batch in batches(data, labels=True):
        seen += batch.size
        for at, one in enumerate([None, *tries]):
            kernels = None if one is None else _with(objective.kernels, one[0], layers[one[0]].layer, one[2], block)
            value, outputs = objective.value(batch, kernels)
            found = _right(batch, outputs)
            losses[at] += batch.size * value
            right[at] += found or 0
            classes = classes and found is not None
            progress.step()
    progress.finish()
    base, *rows = (
        Measurement(path, float((gamma == 0).mean()), float(value / seen), float(hits / seen) if classes else None)
        for (_, path, gamma), value, hits in zip([(0, "", np.ones((1, 1))), *tries], losses, right)
    )
    return Sensitivity(model.name, base, tuple(rows))


def _with(kernels: Sequence[Any], index: int, layer: keras.Layer, gamma: np.ndarray, block: BlockShape) -> list[Any]:
    """The kernels, one of them zero in the dead blocks of its Γ; what LoRA adds there is taken off too."""
    kernel = effective_kernel(layer)
    dead = 1 - expand(gamma, kernel.shape, block)
    taken = from_planes(layer, kernel * dead)
    changed = ops.subtract(kernels[index], ops.convert_to_tensor(taken, kernels[index].dtype))
    return [*kernels[:index], changed, *kernels[index + 1 :]]


def _right(batch: Batch, outputs: Any) -> int | None:
    """How many examples get the class of their label; None if labels aren't classes."""
    if not (ops.is_tensor(outputs) and ops.is_tensor(batch.y)) or len(outputs.shape) != 2 or outputs.shape[1] < 2:
        return None
    labels = ops.convert_to_numpy(batch.y)
    if not np.issubdtype(labels.dtype, np.integer) or labels.size != batch.size:
        return None
    return int((ops.convert_to_numpy(outputs).argmax(axis=1) == labels.ravel()).sum())
