"""Concatenation by memory: a part that its layer writes straight into its place in the joined tensor needs no copy."""

from __future__ import annotations

from dataclasses import dataclass

from bstf_compiler.aie.reach import BLOCK, Sliding, Source, blocks_of
from bstf_compiler.graph import Affine, Concat, Graph, Node


@dataclass(frozen=True)
class Slice:
    """Where a part lies in the tensor that joins it with others: its first channel block there."""

    joined: str
    block: int


def slices(graph: Graph, outputs: list[str]) -> dict[str, Slice]:
    """The parts that need no copy: whole blocks (the last part's last one may be ragged) on the joined tensor's grid,
    made by the array and not one of its `outputs`. A part lies in one joined tensor only.
    """
    found: dict[str, Slice] = {}
    for node in graph:
        if not isinstance(node.op, Concat):
            continue
        grid, end = graph.tensors[node.output].position, graph.tensors[node.output].shape[-1]
        for name, start in _starts(graph, node):
            tensor, maker = graph.tensors[name], graph.producer(name)
            stop = start + tensor.shape[-1]
            made = maker is not None and not isinstance(maker.op, Affine) and name not in outputs
            whole = start % BLOCK == 0 and (stop % BLOCK == 0 or stop == end)
            if made and whole and tensor.position == grid and name not in found and node.inputs.count(name) == 1:
                found[name] = Slice(node.output, start // BLOCK)
    return found


def copies(graph: Graph, node: Node, found: dict[str, Slice]) -> tuple[tuple[Source, ...], tuple[tuple[int, int], ...]]:
    """What is left for a concatenation to copy: its sources, and the runs (first block, blocks) of the joined tensor
    that they fill. The sources' offsets count in these runs, one after the other.
    """
    sources, runs = [], []
    before, previous = 0, False  # blocks of earlier runs; whether the last part was copied too
    for name, start in _starts(graph, node):
        here = name in found and found[name].joined == node.output
        if not here:
            _, rows, columns, channels = graph.tensors[name].shape
            if not previous:
                before = sum(blocks for _, blocks in runs)
                runs.append((start // BLOCK, 0))
            first = runs[-1][0]
            runs[-1] = (first, blocks_of(start + channels) - first)
            offset = start + (before - first) * BLOCK
            sources.append(Source(name, Sliding(rows), Sliding(columns), channels, offset=offset))
        previous = not here
    return tuple(sources), tuple(runs)


def _starts(graph: Graph, node: Node) -> list[tuple[str, int]]:
    """Each part and its first channel."""
    starts, start = [], 0
    for name in node.inputs:
        starts.append((name, start))
        start += graph.tensors[name].shape[-1]
    return starts
