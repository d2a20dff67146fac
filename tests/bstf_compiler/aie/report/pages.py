"""A small network, dense and with zero blocks, compiled; and the report page of both."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np

import bstf_compiler
from bstf_compiler.aie.report import Panel, gammas_of, write_report
from bstf_compiler.graph import Graph, Window
from tests.bstf_compiler.networks import Builder


def network(ratio: float) -> Graph:
    """Convolutions one after the other and a sum; its weights are the same at every ratio, but for the zero blocks."""
    build = Builder(np.random.default_rng(0))
    image = build.input(12, 12, 8)
    stem = build.conv(image, 32, Window((3, 3), padding=(1, 1, 1, 1)), ratio=0.0)
    body = build.conv(build.conv(stem, 32, Window((1, 1)), ratio=ratio), 32, Window((1, 1)), ratio=ratio)
    total = build.add(body, stem)
    head = build.conv(build.max_pool(total, Window((2, 2), (2, 2))), 64, Window((1, 1)), ratio=ratio)
    return build.finish(build.conv(head, 24, Window((1, 1)), ratio=ratio))


@cache
def compiled() -> tuple[tuple[Graph, ...], tuple[Panel, ...]]:
    """Graphs and panels, dense and sparse."""
    graphs = network(0.0), network(0.5)
    programs = [bstf_compiler.compile(graph, "aie2_2x2") for graph in graphs]
    panels = [Panel(title, one, one.estimate()) for title, one in zip(("dense", "sparse"), programs)]
    return graphs, tuple(panels)


def write(path: Path, **options) -> Path:
    """The page of both."""
    graphs, panels = compiled()
    gammas = gammas_of(graphs[1], [layer.name for layer in panels[1].estimate.layers])
    write_report(path, panels, gammas, **options)
    return path


def data_of(path: Path) -> dict:
    """What the page's scripts read."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S)
    return json.loads(found)
