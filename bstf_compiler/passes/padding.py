"""Zeros around an image into the window that reads it."""

from __future__ import annotations

from dataclasses import replace

from bstf_compiler.graph import Conv, Graph, MaxPool, Node, Pad, SumPool, Window


class FoldPadding:
    """Padding before a convolution, a sum or a maximum becomes the window's own."""

    def match(self, graph: Graph, node: Node) -> bool:
        """A padded image that only windows read; one that doesn't count its own padding must have none."""
        if not isinstance(node.op, Pad) or node.output in graph.outputs:
            return False
        readers = graph.consumers(node.output)
        return bool(readers) and all(
            isinstance(reader.op, Conv)
            or (isinstance(reader.op, (MaxPool, SumPool)) and not any(reader.op.window.padding))
            for reader in readers
        )

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Widens every reader's window."""
        for reader in graph.consumers(node.output):
            reader.op = replace(reader.op, window=reader.op.window.padded(node.op.padding))
            if isinstance(reader.op, MaxPool):
                reader.op = replace(reader.op, zero_padding=True)
        graph.bypass(node)


class PadToPool:
    """Padding that nothing can take in is a maximum over one pixel, padded by zeros."""

    def match(self, graph: Graph, node: Node) -> bool:
        """Any padding that is left."""
        return isinstance(node.op, Pad)

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Replaces the operation."""
        node.op = MaxPool(Window((1, 1), padding=node.op.padding), zero_padding=True)
