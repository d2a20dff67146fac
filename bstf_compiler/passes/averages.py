"""Sums over a window: averages if constant factors follow, depthwise convolutions in a float graph."""

from __future__ import annotations

import numpy as np

from bstf_compiler.graph import AveragePool, Conv, FakeQuant, Graph, Multiply, Node, SumPool

_MOST_SHIFT = 20  # any float32 is n / 2**m for a large enough m


class SumToConv:
    """In a float graph a sum over a window is a depthwise convolution with ones, and takes part in its rules."""

    def match(self, graph: Graph, node: Node) -> bool:
        """A window sum in a graph without grids: those that end in a fixed-point average have one around them."""
        return isinstance(node.op, SumPool) and not any(isinstance(other.op, FakeQuant) for other in graph)

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Adds the kernel."""
        channels = graph.tensors[node.output].shape[-1]
        ones = np.ones((*node.op.window.kernel, 1, channels), np.float32)
        node.inputs.append(graph.add_constant(f"{node.name} kernel", ones))
        node.op = Conv(node.op.window, groups=channels)


class FormAveragePool:
    """SumPool then Multiply by factors n / 2**m -> AveragePool with integer numerators."""

    def match(self, graph: Graph, node: Node) -> bool:
        """The product, right after a window sum that nobody else reads."""
        if not isinstance(node.op, Multiply):
            return False
        before = graph.producer(node.inputs[0])
        return before is not None and isinstance(before.op, SumPool) and graph.only_consumer(before.output) is not None

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Writes the factors over one power of two, one numerator an output pixel."""
        pool = graph.producer(node.inputs[0])
        height, width = pool.op.window.output_size(*graph.tensors[pool.inputs[0]].shape[1:3])
        factors = graph.constants(node)[0].data.astype(np.float64)
        if factors.size > 1 and factors.shape != (1, height, width, 1):
            raise ValueError(
                f"layer '{pool.name}': its averaging factors have shape {factors.shape}; one number, or a map "
                f"(1, {height}, {width}, 1) over pixels is supported"
            )
        if factors.size > 1:
            factors = factors.reshape(height, width)
        shift = next(
            (m for m in range(_MOST_SHIFT + 1) if np.array_equal(np.ldexp(factors, m) % 1, np.zeros_like(factors))),
            None,
        )
        if shift is None:
            raise ValueError(
                f"layer '{pool.name}': its averaging factors are not n / 2**m with m <= {_MOST_SHIFT}; quantise with "
                "bstf.quantize"
            )
        numerators = np.broadcast_to(np.ldexp(factors, shift).reshape(factors.shape or (1, 1)), (height, width))
        name = graph.add_constant(f"{pool.name} numerators", np.ascontiguousarray(numerators, dtype=np.int32))
        pool.op = AveragePool(pool.op.window, shift)
        pool.inputs.append(name)
        graph.tensors[pool.output].shape = (1, height, width, graph.tensors[pool.output].shape[-1])
        graph.bypass(node)
