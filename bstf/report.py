"""What is sparse in a model, layer by layer, counted on the kernels themselves."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

import keras
from rich import box
from rich.console import Console
from rich.table import Table

from bstf import layouts
from bstf.blocks import BlockShape, expand, grid, nonzero_blocks
from bstf.files import replacing
from bstf.places import DEPTHWISE, effective_kernel, everywhere, ineligible, is_masked, positions, unfit


@dataclass(frozen=True)
class LayerSparsity:
    """A layer with a kernel.

    Attributes:
        layer: its name, after the names of the nested models around it.
        kernel: shape of its kernel, (..., cin, cout); the pointwise one's of a separable convolution.
        block: (input channels, output channels) of a block.
        gamma: shape of Γ, (rows, cols); None if the layer can't have one.
        zeros: number of blocks that are exactly zero.
        ratio: zeros / blocks.
        macs: multiply-adds of one input on the nonzero blocks, and on a separable convolution's depthwise kernel;
            None if the input's size isn't known.
        dense_macs: the same on all blocks.
        skipped: why the layer isn't block sparse; empty if it is.
    """

    layer: str
    kernel: tuple[int, ...]
    block: tuple[int, int]
    gamma: tuple[int, int] | None
    zeros: int
    ratio: float
    macs: int | None
    dense_macs: int | None
    skipped: str

    @property
    def blocks(self) -> int:
        """The number of blocks, 0 if the layer can't have any."""
        return 0 if self.gamma is None else math.prod(self.gamma)


@dataclass(frozen=True)
class SparsityReport:
    """The layers with kernels of a model; prints as a table.

    Attributes:
        model: the model's name.
        layers: one entry a layer, in the model's order.
    """

    model: str
    layers: tuple[LayerSparsity, ...]

    @property
    def zeros(self) -> int:
        """Zero blocks of all layers."""
        return sum(row.zeros for row in self.layers)

    @property
    def ratio(self) -> float:
        """Zero blocks of all layers over their blocks."""
        return self.zeros / max(1, sum(row.blocks for row in self.layers))

    @property
    def macs(self) -> int | None:
        """Multiply-adds of one input on nonzero blocks, of all layers where they are known."""
        return _total(row.macs for row in self.layers)

    @property
    def dense_macs(self) -> int | None:
        """Multiply-adds of one input on all blocks, of all layers where they are known."""
        return _total(row.dense_macs for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists and numbers, ready for `json.dumps`."""
        return {
            "model": self.model,
            "zeros": self.zeros,
            "ratio": self.ratio,
            "macs": self.macs,
            "dense_macs": self.dense_macs,
            "layers": [asdict(row) for row in self.layers],
        }

    def to_csv(self, path: str | PathLike | None = None) -> str:
        """Returns one line a layer, shapes written like 3x3x16x32; writes them to `path` if there is one."""
        text = io.StringIO()
        writer = csv.DictWriter(text, LayerSparsity.__dataclass_fields__, lineterminator="\n")
        writer.writeheader()
        for row in self.layers:
            fields = asdict(row) | {name: _shape(getattr(row, name)) for name in ("kernel", "block", "gamma")}
            writer.writerow(fields)
        if path is not None:
            with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                file.write(text.getvalue())
        return text.getvalue()

    def __str__(self) -> str:
        table = Table(title=f"Block sparsity of {self.model}", box=box.SIMPLE_HEAD, show_footer=True)
        table.add_column("layer", footer="all", overflow="fold")
        table.add_column("kernel")
        table.add_column("Γ")
        for name, footer in (
            ("zeros", str(self.zeros)),
            ("ratio", f"{self.ratio:.3f}"),
            ("MACs kept", _kept(self.macs, self.dense_macs)),
        ):
            table.add_column(name, footer=footer, justify="right")
        table.add_column("skipped because", overflow="fold")
        for row in self.layers:
            table.add_row(
                row.layer,
                _shape(row.kernel),
                _shape(row.gamma) or "-",
                str(row.zeros) if row.gamma else "-",
                f"{row.ratio:.3f}" if row.gamma else "-",
                _kept(row.macs, row.dense_macs),
                row.skipped,
            )
        console = Console(file=io.StringIO(), width=140, color_system=None)
        console.print(table)
        return console.file.getvalue().rstrip() + "\n"

    __repr__ = __str__


def report(model: keras.Model, block: int | Sequence[int] = 8) -> SparsityReport:
    """Lists the layers with kernels of a model: what is zero, what it saves, and what was left dense and why.

    Zeros are counted on the kernels, so a plain, a masked and a fixed-point model are read alike.

    Args:
        model: a built Keras model, Sequential, functional or subclassed.
        block: the block that layers without one of their own are read with.

    Returns:
        A SparsityReport: `print` it, or take its `layers`, `to_dict()` or `to_csv()`.

    Raises:
        TypeError: `model` isn't a Keras model.

    Example:
        >>> print(bstf.report(bstf.sparsify(model, ratio=0.5)))
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"report takes a keras.Model; got {type(model).__name__}.")
    default = BlockShape.of(block)
    counts = positions(model)
    rows = []
    for path, layer, owner in everywhere(model):
        if any(len(weight.shape) > 1 for weight in _own_weights(layer)):
            row = _row(path, layer, default, counts.get(id(layer)))
            if owner is not None and row.gamma and not is_masked(layer):
                row = replace(row, skipped=f"inside a {type(owner).__name__}")
            rows.append(row)
    return SparsityReport(model.name, tuple(rows))


def _row(name: str, layer: keras.Layer, default: BlockShape, count: int | None) -> LayerSparsity:
    block = getattr(layer, "block", None) or default
    # Layers that carry a block of their own, masked or fixed-point, are block sparse by class.
    reason = unfit(layer, block) if hasattr(layer, "block") else ineligible(layer, block)
    beside = layer.depthwise_kernel.shape if isinstance(layer, keras.layers.SeparableConv2D) else (0,)
    if reason is not None:
        known = layouts.layout(layer) is not None
        kernel = layouts.plane_shape(layer) if known and not layouts.refusal(layer) else _own_shape(layer)
        counted = count is not None and (known or isinstance(layer, DEPTHWISE))
        macs = count * (math.prod(kernel) + math.prod(beside)) if counted else None
        return LayerSparsity(name, kernel, tuple(block), None, 0, 0.0, macs, macs, reason)
    kernel = effective_kernel(layer)
    kept = nonzero_blocks(kernel, block)
    zeros = int(kept.size - kept.sum())
    weights = math.prod(kernel.shape[:-2]) * int(expand(kept, kernel.shape, block).sum())
    return LayerSparsity(
        layer=name,
        kernel=kernel.shape,
        block=tuple(block),
        gamma=grid(*kernel.shape[-2:], block),
        zeros=zeros,
        ratio=zeros / kept.size,
        macs=None if count is None else count * (weights + math.prod(beside)),
        dense_macs=None if count is None else count * (kernel.size + math.prod(beside)),
        skipped="" if zeros or is_masked(layer) else "no zero blocks",
    )


def _own_shape(layer: keras.Layer) -> tuple[int, ...]:
    return next(tuple(weight.shape) for weight in _own_weights(layer) if len(weight.shape) > 1)


def _own_weights(layer: keras.Layer) -> list[keras.Variable]:
    return layer._trainable_variables + layer._non_trainable_variables


def _total(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _shape(shape: Sequence[int] | None) -> str:
    return "x".join(map(str, shape or ()))


def _kept(macs: int | None, dense: int | None) -> str:
    return "-" if macs is None else f"{macs:,} ({macs / dense:.0%})"
