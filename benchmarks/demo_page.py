"""The demo's page: one HTML file that needs nothing but a browser."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

HEADINGS = ("network", "accuracy (test images)", "weight bytes", "multiply-adds", "time, estimated")
NOTE = (
    "dense, sparse: float32 in Keras; bytes of the weights that aren't zero. INT8: the quantised network in Keras; "
    "bytes of the program's packed weights, biases and block indices. simulated: the program of the sparse INT8 "
    "network, executed byte by byte. Multiply-adds and time are of one image; zero blocks don't count."
)
_TEMPLATE = Path(__file__).with_name("demo_page.html")
_ROW, _BAR, _LEFT, _WIDTH = 34, 11, 230, 900  # pixels of the plot of layers
_CELL = 13  # pixels of a block in the pictures of Γ


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the results as the table shows it, one text a heading."""
    seconds = row["seconds"]
    return [
        row["name"],
        f"{row['accuracy']:.1%} of {row['images']:,}",
        f"{row['weight_bytes']:,}",
        f"{row['macs']:,}",
        "-" if seconds is None else f"{seconds * 1e6:.2f} µs",
    ]


def page(results: Mapping[str, Any], gammas: Mapping[str, np.ndarray], timeline: bytes) -> str:
    """Writes the page.

    Args:
        results: what results.json holds.
        gammas: Γ by layer name, (rows, cols).
        timeline: both timelines as a PNG; the page carries it.

    Returns:
        HTML. Its links lead to files of the demo's folder.
    """
    simulation, recipe = results["simulation"], results["recipe"]
    dense, sparse = (sum(layer[name]["seconds"] for layer in results["layers"]) for name in ("dense", "sparse"))
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        dataset=html.escape(results["dataset"]),
        device=html.escape(results["device"]),
        ratio=f"{recipe['ratio']:.0%}",
        seed=recipe["seed"],
        verdict="equal" if simulation["equal"] == simulation["images"] else "different",
        equal=simulation["equal"],
        images=simulation["images"],
        compared=len(simulation["compared"]) - 1,
        headings=_cells("th", HEADINGS),
        rows="\n".join(f"<tr>{_cells('td', cells(row))}</tr>" for row in results["networks"]),
        note=html.escape(NOTE),
        dense=f"{dense * 1e6:.2f}",
        sparse=f"{sparse * 1e6:.2f}",
        plot=_plot(results["layers"]),
        gammas="\n".join(_gamma(name, gamma) for name, gamma in gammas.items()),
        timeline=base64.b64encode(timeline).decode("ascii"),
        files="\n".join(_files(name) for name in ("dense", "sparse")),
    )


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _plot(layers: Sequence[Mapping[str, Any]]) -> str:
    """Two bars a layer, dense and sparse, with their times and what bounds them."""
    longest = max(layer[name]["seconds"] for layer in layers for name in ("dense", "sparse"))
    room = _WIDTH - _LEFT - 150  # for the text behind the bars
    parts = []
    for index, layer in enumerate(layers):
        top = index * _ROW
        parts.append(f'<text x="{_LEFT - 8}" y="{top + 18}" text-anchor="end">{html.escape(layer["name"])}</text>')
        for number, name in enumerate(("dense", "sparse")):
            one, y = layer[name], top + 4 + number * (_BAR + 2)
            length = one["seconds"] / longest * room
            text = f"{one['seconds'] * 1e6:.2f} µs, {html.escape(one['bound'])}"
            parts.append(f'<rect class="{name}" x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}"/>')
            parts.append(f'<text class="small" x="{_LEFT + length + 6:.1f}" y="{y + 9}">{text}</text>')
    height = len(layers) * _ROW
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="Estimated time of each layer, dense and sparse">{"".join(parts)}</svg>'
    )


def _gamma(name: str, gamma: np.ndarray) -> str:
    """A picture of Γ: a row an input block, a column an output block."""
    rows, columns = gamma.shape
    squares = "".join(
        f'<rect class="{"kept" if gamma[row, column] else "zero"}" x="{column * _CELL}" y="{row * _CELL}" '
        f'width="{_CELL - 1}" height="{_CELL - 1}"/>'
        for row in range(rows)
        for column in range(columns)
    )
    kept = int(np.count_nonzero(gamma))
    width, height = columns * _CELL, rows * _CELL
    caption = f"{html.escape(name)}<br>{rows}x{columns}, {kept} of {gamma.size} blocks kept"
    return (
        f'<figure><svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Γ of {html.escape(name)}">{squares}</svg><figcaption>{caption}</figcaption></figure>'
    )


def _files(name: str) -> str:
    """Links to what the demo wrote about a network."""
    links = {
        "model/": "exported SavedModel",
        "program/program.asm": "program",
        "program/data.bin": "packed weights",
        "program/layers.csv": "layers",
        "program/trace.json": "trace for Perfetto",
        "program/timeline.html": "timeline",
        "program/timeline.png": "timeline as picture",
    }
    items = "".join(f'<li><a href="{name}/{path}">{name}/{path}</a>: {what}</li>' for path, what in links.items())
    return f"<ul>{items}</ul>"
