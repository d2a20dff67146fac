"""Pixels that no layer reads, and convolutions of some pixels only."""

from __future__ import annotations

from dataclasses import replace

from bstf_compiler.graph import Add, Conv, Graph, MaxPool, Node, Relu, Requantize, Softmax, Tensor, Window


class MoveStrides:
    """Strides of windows of one pixel move to the layers before them, which then compute fewer pixels.

    A sum takes them over by picking pixels of both its inputs, with windows of one pixel; these move on in turn.
    """

    def match(self, graph: Graph, node: Node) -> bool:
        """A layer whose output is read only by windows of one pixel with the same strides."""
        movable = isinstance(node.op, (Conv, Add, Requantize, Relu)) and node.output not in graph.outputs
        strides = {_skipped(graph, reader) for reader in graph.consumers(node.output)}
        return movable and len(strides) == 1 and None not in strides

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Gives the strides of its readers to the layer, or to what it reads."""
        readers = graph.consumers(node.output)
        down, across = strides = readers[0].op.window.strides
        if isinstance(node.op, Conv):
            before = node.op.window.strides
            node.op = replace(node.op, window=replace(node.op.window, strides=(before[0] * down, before[1] * across)))
        else:
            node.inputs = [_pick(graph, name, strides) for name in node.inputs]
        tensor = graph.tensors[node.output]
        tensor.shape = _shape(tensor, strides)
        for reader in readers:
            if isinstance(reader.op, MaxPool):
                graph.bypass(reader)
            else:
                reader.op = replace(reader.op, window=replace(reader.op.window, strides=(1, 1)))


class FoldDownsampling:
    """Every n-th row and column, then convolutions, are convolutions with strides; and dilated, for larger kernels."""

    def match(self, graph: Graph, node: Node) -> bool:
        """Windows of one pixel with strides that only convolutions read."""
        readers = graph.consumers(node.output)
        return (
            isinstance(node.op, MaxPool)
            and node.op.window == Window((1, 1), node.op.window.strides)
            and node.output not in graph.outputs
            and bool(readers)
            and all(isinstance(reader.op, Conv) for reader in readers)
        )

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Multiplies steps and padding of every reader."""
        size = graph.tensors[node.inputs[0]].shape[1:3]
        for reader in graph.consumers(node.output):
            window, out = reader.op.window, graph.tensors[reader.output].shape[1:3]
            strides, dilation = (
                tuple(own * step for own, step in zip(steps, node.op.window.strides))
                for steps in (window.strides, window.dilation)
            )
            widened = replace(window, strides=strides, dilation=dilation)
            pads = []
            for axis, before in enumerate((window.padding[0], window.padding[2])):
                first = before * node.op.window.strides[axis]
                last = (out[axis] - 1) * strides[axis] + widened.extent[axis]
                pads += [first, max(0, last - first - size[axis])]
            reader.op = replace(reader.op, window=replace(widened, padding=tuple(pads)))
        graph.bypass(node)


def _skipped(graph: Graph, node: Node) -> tuple[int, int] | None:
    """The strides of a window of one pixel that skips some, else None; a maximum that ends the network stays."""
    if not isinstance(node.op, (Conv, MaxPool)):
        return None
    ends = node.output in graph.outputs or any(isinstance(one.op, Softmax) for one in graph.consumers(node.output))
    if isinstance(node.op, MaxPool) and ends:
        return None
    window = node.op.window
    if window.kernel != (1, 1) or any(window.padding) or window.strides == (1, 1):
        return None
    return window.strides


def _pick(graph: Graph, name: str, strides: tuple[int, int]) -> str:
    """The tensor of every n-th row and column of another one, made right after it."""
    picked, tensor = f"{name} picked {strides[0]}x{strides[1]}", graph.tensors[name]
    if picked not in graph.tensors:
        node = Node(picked, MaxPool(Window((1, 1), strides)), [name])
        source = graph.producer(name)
        graph.nodes.insert(graph.nodes.index(source) + 1 if source else 0, node)
        graph.tensors[picked] = replace(tensor, name=picked, shape=_shape(tensor, strides))
    return picked


def _shape(tensor: Tensor, strides: tuple[int, int]) -> tuple[int, ...]:
    batch, height, width, channels = tensor.shape
    return batch, -(-height // strides[0]), -(-width // strides[1]), channels
