"""Draws the pictures of the documents: python docs/pictures.py writes docs/images/*.svg."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent / "images"
INK, PALE, KEPT, OTHER = "#263238", "#eceff1", "#00897b", "#5e35b1"


def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that many inches whose axes count in inches too."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str = PALE) -> None:
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=0.8))
    ink = INK if color == PALE else "white"
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=9, linespacing=1.4)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", **options: object) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK, linewidth=0.9, **options))
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x, y + 0.07, text, ha="center", va="bottom", color=INK, fontsize=7.5, family="monospace")


def road() -> Figure:
    """From a Keras model to a program and an engine."""
    figure, axes = sheet(9, 2.7)
    steps = ["Keras model", "block sparse", "trained back", "INT8", "SavedModel"]
    for number, (name, does) in enumerate(zip(steps, ["sparsify", "fit", "quantize", "export", ""])):
        x = 0.15 + 1.78 * number
        box(axes, x, 1.75, 1.1, 0.6, name, KEPT if name == "SavedModel" else PALE)
        if does:
            arrow(axes, (x + 1.1, 2.05), (x + 1.78, 2.05), does)
    axes.text(0.15, 2.47, "bstf", color=KEPT, fontsize=10, weight="bold")
    axes.text(0.15, 1.25, "bstf_compiler", color=OTHER, fontsize=10, weight="bold")
    box(axes, 5.49, 0.75, 1.1, 0.6, "graph", PALE)
    arrow(axes, (7.6, 1.75), (6.6, 1.15))
    axes.text(7.25, 1.3, "load", color=INK, fontsize=7.5, family="monospace")
    box(axes, 3.3, 1.0, 1.3, 0.5, "AIE2 program", OTHER)
    box(axes, 3.3, 0.3, 1.3, 0.5, "CPU engine", OTHER)
    arrow(axes, (5.49, 1.1), (4.6, 1.25), "compile")
    arrow(axes, (5.49, 0.95), (4.6, 0.55))
    axes.text(5.05, 0.55, "Engine", color=INK, fontsize=7.5, family="monospace")
    arrow(axes, (3.3, 1.25), (2.75, 1.25))
    axes.text(2.7, 1.25, "simulate, estimate,\nexplain, write", ha="right", va="center", color=INK, fontsize=8.5)
    arrow(axes, (3.3, 0.55), (2.75, 0.55))
    axes.text(2.7, 0.55, "logits, profile", ha="right", va="center", color=INK, fontsize=8.5)
    return figure


def blocks() -> Figure:
    """A kernel's plane of channels, its Γ, and what is stored."""
    figure, axes = sheet(9, 3.2)
    rng = np.random.default_rng(3)
    gamma = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]])
    weights = np.abs(rng.normal(size=(32, 32))) * np.kron(gamma, np.ones((8, 8)))
    axes.imshow(weights, extent=(0.7, 3.2, 0.3, 2.8), cmap="Greens", vmax=3, aspect="auto", zorder=1)
    for at in range(5):
        axes.plot([0.7, 3.2], [0.3 + at * 0.625] * 2, color=INK, linewidth=0.7, zorder=2)
        axes.plot([0.7 + at * 0.625] * 2, [0.3, 2.8], color=INK, linewidth=0.7, zorder=2)
    axes.text(1.95, 2.87, "kernel: 32 output channels", ha="center", color=INK, fontsize=9)
    axes.text(0.55, 1.55, "32 input channels", ha="center", va="center", rotation=90, color=INK, fontsize=9)
    axes.text(1.95, 0.1, "every block has all kernel positions", ha="center", color=INK, fontsize=8, style="italic")
    for i, j in np.ndindex(4, 4):
        color = KEPT if gamma[i, j] else "white"
        x, y = 4.1 + 0.45 * j, 2.2 - 0.45 * i
        axes.add_patch(Rectangle((x, y), 0.45, 0.45, facecolor=color, edgecolor=INK, linewidth=0.8))
        ink = "white" if gamma[i, j] else INK
        axes.text(x + 0.225, y + 0.225, str(gamma[i, j]), ha="center", va="center", color=ink, fontsize=11)
    axes.text(5.0, 2.87, "Γ (gamma), ratio 0.5", ha="center", color=INK, fontsize=9)
    kept = np.argwhere(gamma.T)
    for number, (j, i) in enumerate(kept):
        x, y = 6.8 + 0.5 * (number // 2), 1.9 - 0.7 * (number % 2)
        rows = weights[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
        axes.imshow(rows, extent=(x, x + 0.42, y, y + 0.42), cmap="Greens", vmax=3, aspect="auto", zorder=1)
        axes.add_patch(Rectangle((x, y), 0.42, 0.42, fill=False, edgecolor=INK, linewidth=0.8, zorder=2))
        axes.text(x + 0.21, y - 0.13, f"row {i}", ha="center", va="center", color=INK, fontsize=6.5)
    axes.text(7.75, 2.87, "stored, column by column", ha="center", color=INK, fontsize=9)
    axes.set(xlim=(0, 9), ylim=(0, 3.2))
    return figure


def positions() -> Figure:
    """The grids of two positions on one line of values."""
    figure, axes = sheet(9, 1.9)
    for y, bits, label in ((1.25, 1, "position 1: step 1/2, from -64 to 63.5"), (0.5, 3, "position 3: step 1/8, ±16")):
        axes.text(0.2, y + 0.3, label, color=INK, fontsize=9)
        axes.plot([0.2, 8.8], [y, y], color=INK, linewidth=0.8)
        for integer in range(-4 * 2**bits, 4 * 2**bits + 1):
            x, whole = 4.5 + integer / 2**bits * 1.05, integer % 2**bits == 0
            color, size = (KEPT, 0.11) if whole else (OTHER, 0.06)
            axes.plot([x, x], [y - size, y + size], color=color, linewidth=1.2)
            if whole:
                axes.text(x, y - 0.28, f"{integer / 2**bits:g}", ha="center", color=INK, fontsize=7.5)
    return figure


def array() -> Figure:
    """DDR, memory tiles and cores, and the instructions that move data between them."""
    figure, axes = sheet(9, 4.1)
    box(axes, 0.3, 0.2, 5.4, 0.5, "DDR")
    for column in range(4):
        x = 0.3 + 1.4 * column
        box(axes, x, 1.15, 1.2, 0.5, "memory tile", OTHER)
        for row in range(4):
            box(axes, x, 2.05 + 0.5 * row, 1.2, 0.38, f"core {column}.{row}", KEPT)
        for shift in (0.4, 0.8):
            ends = [(x + shift, 0.7), (x + shift, 1.15)]
            arrow(axes, *(ends if shift < 0.6 else ends[::-1]))
            ends = [(x + shift, 1.65), (x + shift, 2.05)]
            arrow(axes, *(ends if shift < 0.6 else ends[::-1]))
    words = [
        ("COMP", "a core computes a sub-volume", 2.95),
        ("LOADFM", "activations to the cores of a column", 2.12),
        ("LOADWM", "weights to the cores of a row", 1.92),
        ("WRITEFM", "a column's results to its memory tile", 1.72),
        ("LOAD, LOADW", "activations, weights from DDR", 1.0),
        ("WRITE", "activations to DDR", 0.8),
    ]
    for name, meaning, y in words:
        axes.text(7.0, y, name, color=INK, fontsize=8, weight="bold", family="monospace", ha="right")
        axes.text(7.1, y, meaning, color=INK, fontsize=7.6)
    return figure


def subvolume() -> Figure:
    """How a layer's output is cut for 4 x 4 cores."""
    figure, axes = sheet(9, 3.2)
    shades = ["#b2dfdb", "#80cbc4", "#4db6ac", "#26a69a"]
    for column in range(4):
        for row in range(7):
            x, y = 0.6 + 0.72 * column, 2.45 - 0.33 * row
            axes.add_patch(Rectangle((x, y), 0.68, 0.29, facecolor=shades[column], edgecolor=INK, linewidth=0.6))
    axes.text(2.04, 2.9, "output: width over columns of cores", ha="center", color=INK, fontsize=9)
    axes.text(0.42, 1.6, "height: one band an iteration", ha="center", va="center", rotation=90, color=INK, fontsize=9)
    axes.add_patch(Rectangle((1.32, 1.46), 0.68, 0.29, fill=False, edgecolor="#d81b60", linewidth=2.2))
    arrow(axes, (2.0, 1.6), (4.5, 1.6))
    for core in range(4):
        x, y = 4.6 + 0.3 * core, 0.9 + 0.32 * core
        color = shades[core]
        axes.add_patch(Rectangle((x, y), 1.2, 0.5, facecolor=color, edgecolor=INK, linewidth=0.8, zorder=5 - core))
        axes.text(x + 1.28, y + 0.12, f"output channels of core 1.{core}", color=INK, fontsize=8)
    axes.text(5.2, 2.9, "channels over the cores of a column", ha="left", color=INK, fontsize=9)
    axes.text(4.6, 0.45, "one box: a sub-volume, what one core computes in one iteration", color=INK, fontsize=8.5)
    return figure


def main() -> None:
    matplotlib.rcParams |= {"svg.hashsalt": "bstf", "svg.fonttype": "none"}  # same bytes at each run; text is text
    FOLDER.mkdir(exist_ok=True)
    for draw in (road, blocks, positions, array, subvolume):
        draw().savefig(FOLDER / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
