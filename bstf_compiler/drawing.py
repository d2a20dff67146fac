"""A picture of a graph."""

from __future__ import annotations

from pathlib import Path

import networkx as nx

from bstf_compiler.files import replacing
from bstf_compiler.graph import Graph

_COLOURS = {"conv": "#cfe2f3", "concat": "#d9ead3", "add": "#fff2cc", "product": "#fff2cc", "lookup": "#f4cccc"}
_HOST = "#eeeeee"
_KINDS = "svg", "png", "pdf"
_INCHES = 0.55, 2.6  # a row, a column


def draw(graph: Graph, path: str | Path) -> None:
    """Draws a graph: a box an operation, in rows by their distance from the inputs; arrows are tensors.

    Args:
        graph: as `bstf_compiler.load` returns it.
        path: of the picture, .svg, .png or .pdf; a file there is replaced.

    Raises:
        ValueError: another kind of file.
        OSError: the file can't be written.

    Example:
        >>> bstf_compiler.draw(bstf_compiler.load("resnet"), "resnet.svg")
    """
    from matplotlib.figure import Figure  # takes long to import, and only pictures need it

    flow = nx.DiGraph()
    flow.add_nodes_from(graph.inputs)
    for node in graph:
        flow.add_edges_from((tensor.name, node.output) for tensor in graph.activations(node))
    rows = list(nx.topological_generations(flow))
    places = {name: (i - (len(row) - 1) / 2, -depth) for depth, row in enumerate(rows) for i, name in enumerate(row)}
    width = max(len(row) for row in rows)
    figure = Figure(figsize=(_INCHES[1] * width + 1, _INCHES[0] * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-width / 2 - 0.2, width / 2 + 0.2)
    axes.set_ylim(-len(rows), 1)
    for source, target in flow.edges:
        arrow = {"arrowstyle": "->", "color": "0.5", "shrinkA": 9, "shrinkB": 9, "connectionstyle": "arc3,rad=0.05"}
        axes.annotate("", places[target], places[source], arrowprops=arrow)
    kinds = {node.output: node.op.kind for node in graph}
    for name, place in places.items():
        colour = _COLOURS.get(kinds.get(name, ""), "white" if graph.tensors[name].position is not None else _HOST)
        box = {"boxstyle": "round,pad=0.25", "facecolor": colour, "edgecolor": "0.4"}
        axes.text(*place, _label(graph, name, kinds.get(name, "input")), ha="center", va="center", fontsize=7, bbox=box)
    kind = Path(path).suffix[1:]
    if kind not in _KINDS:
        raise ValueError(f"'{path}' can't be drawn: give a name that ends in .{', .'.join(_KINDS)}")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind)


def _label(graph: Graph, name: str, kind: str) -> str:
    tensor = graph.tensors[name]
    grid = "" if tensor.position is None else f" @{tensor.position}"
    return f"{name}\n{kind} {'x'.join(map(str, tensor.shape[1:]))}{grid}"
