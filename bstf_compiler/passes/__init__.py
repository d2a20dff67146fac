"""Graph rewriting: each pass is a class with `match` and `rewrite`; `LOWERING` is their order."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from bstf_compiler.graph import (
    Add,
    Affine,
    AveragePool,
    Concat,
    Conv,
    DepthToSpace,
    Graph,
    Lookup,
    MaxPool,
    Node,
    Product,
    Requantize,
    Resize,
    Softmax,
)
from bstf_compiler.passes.activations import FoldActivation, MergeRelu6
from bstf_compiler.passes.affine import FoldBias, FoldScale, MergeAffine
from bstf_compiler.passes.averages import FormAveragePool, SumToConv
from bstf_compiler.passes.concat import FlattenConcat
from bstf_compiler.passes.dead import remove_dead
from bstf_compiler.passes.dense import DenseToConv
from bstf_compiler.passes.dilation import FormDilation
from bstf_compiler.passes.duplicates import MergeDuplicates
from bstf_compiler.passes.functions import FormFunction
from bstf_compiler.passes.grids import AbsorbGrid, FormLookup, IntegerConstants, KeepGrid
from bstf_compiler.passes.host import FormAffine, FormMeanImage
from bstf_compiler.passes.padding import FoldPadding, PadToPool
from bstf_compiler.passes.reshapes import FoldTranspose, RemoveReshape
from bstf_compiler.passes.strides import FoldDownsampling, MoveStrides
from bstf_compiler.passes.sums import check_sums
from bstf_compiler.passes.transposed import SinkDepthToSpace, SubpixelConv


class Pass(Protocol):
    """A local rewriting rule."""

    def match(self, graph: Graph, node: Node) -> bool:
        """Whether the rule applies at `node`."""

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Applies it: changes `graph` in place."""


LOWERED = (
    Conv,
    Add,
    Product,
    Requantize,
    Lookup,
    MaxPool,
    AveragePool,
    Concat,
    Resize,
    DepthToSpace,
    Affine,
    Softmax,
)
"""What a fixed-point graph consists of after lowering."""

LOWERING: tuple[Pass, ...] = (
    FormAffine(),
    FormMeanImage(),
    FoldTranspose(),
    RemoveReshape(),
    FormFunction(),
    SubpixelConv(),
    SinkDepthToSpace(),
    FlattenConcat(),  # those that no grid rounds before
    SumToConv(),
    FormDilation(),
    FoldScale(),
    FoldBias(),
    MergeAffine(),
    DenseToConv(),
    MergeRelu6(),
    FoldPadding(),
    FoldDownsampling(),
    PadToPool(),
    FormAveragePool(),
    FoldActivation(),
    AbsorbGrid(),
    KeepGrid(),
    FlattenConcat(),  # those that have the grid of the next
    FormLookup(),
    IntegerConstants(),
    MergeDuplicates(),
)


def apply(rule: Pass, graph: Graph) -> int:
    """Runs one pass over all nodes, in topological order; returns how often it applied."""
    count = 0
    for node in list(graph.nodes):
        while node in graph.nodes and rule.match(graph, node):
            rule.rewrite(graph, node)
            count += 1
    return count


def lower(graph: Graph) -> Graph:
    """A graph as the front end reads it to one of the operations that the back ends run; changes it in place.

    Raises:
        ValueError: if a fixed-point graph holds an operation that no back end runs, a constant that isn't on its grid,
            or sums that could leave 32 bits; if only some tensors have grids, or something reads a softmax.
    """
    for rule in LOWERING:
        remove_dead(graph)
        apply(rule, graph)
    remove_dead(graph)
    _check_softmax(graph)
    if graph.is_fixed_point:
        _check_operations(graph)
        check_sums(graph)
    else:
        _check_no_grids(graph)
    return graph


def without_unread_pixels(graph: Graph) -> Graph:
    """A copy of a lowered graph that computes only pixels that something reads."""
    copy = replace(
        graph,
        nodes=[replace(node, inputs=list(node.inputs)) for node in graph],
        tensors={name: replace(tensor) for name, tensor in graph.tensors.items()},
    )
    while apply(MoveStrides(), copy):
        pass
    return copy


def _check_softmax(graph: Graph) -> None:
    for node in graph:
        if isinstance(node.op, Softmax) and (readers := graph.consumers(node.output)):
            raise ValueError(
                f"layer '{node.name}': '{readers[0].name}' reads its softmax; a softmax is supported at the end of a "
                "network only: end it there"
            )


def _check_no_grids(graph: Graph) -> None:
    for node in graph:
        if graph.tensors[node.output].position is not None:
            raise ValueError(
                f"layer '{node.name}' has a fixed-point grid, but the network's input has none, or several: quantise "
                "the whole network with bstf.quantize"
            )


def _check_operations(graph: Graph) -> None:
    for node in graph:
        if not isinstance(node.op, LOWERED):
            raise ValueError(
                f"layer '{node.name}': a {node.op.kind} here is part of no layer that the compiler knows; replace it, "
                "or end the network before it"
            )
