"""Dilated convolutions as TensorFlow writes them."""

from __future__ import annotations

from dataclasses import replace

from bstf_compiler.graph import BatchToSpace, Conv, Graph, Node, SpaceToBatch


class FormDilation:
    """SpaceToBatch, Conv, BatchToSpace -> Conv with dilation.

    The images in the batch hold every dh-th row and dw-th column, so neighbours there are dh and dw pixels apart.
    """

    def match(self, graph: Graph, node: Node) -> bool:
        """The gathering of images, which must undo a scattering before a convolution in between."""
        if not isinstance(node.op, BatchToSpace):
            return False
        conv = self._before(graph, node)
        scatter = self._before(graph, conv)
        if not (
            conv is not None
            and isinstance(conv.op, Conv)
            and conv.op.window == replace(conv.op.window, strides=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1))
            and scatter is not None
            and isinstance(scatter.op, SpaceToBatch)
            and scatter.op.block == node.op.block
            and min(self._padding(scatter, node)) >= 0
        ):
            raise ValueError(
                f"layer '{node.name}': BatchToSpaceND is supported only right after a convolution without strides or "
                "padding, right after SpaceToBatchND of the same block, as a dilated convolution; replace the layer"
            )
        return True

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Sets the dilation and the padding, and drops the moves."""
        conv = self._before(graph, node)
        scatter = self._before(graph, conv)
        window = replace(conv.op.window, padding=self._padding(scatter, node), dilation=node.op.block)
        conv.op = replace(conv.op, window=window)
        graph.tensors[conv.output].shape = graph.tensors[node.output].shape
        graph.bypass(node)
        graph.bypass(scatter)

    def _before(self, graph: Graph, node: Node | None) -> Node | None:
        """The node whose output only `node` reads, as its image."""
        name = node.inputs[0] if node is not None else ""
        return graph.producer(name) if name and graph.only_consumer(name) is node else None

    def _padding(self, scatter: Node, gather: Node) -> tuple[int, ...]:
        """What is padded and not cropped again: a pixel cropped at an end is a pixel of padding less there."""
        return tuple(pad - crop for pad, crop in zip(scatter.op.padding, gather.op.crop))
