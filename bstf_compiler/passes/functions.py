"""Functions that exporters write as several operations: swish as x * sigmoid(x), hard_sigmoid as relu6(x + 3) / 6."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy import special

from bstf_compiler.graph import Add, BiasAdd, FakeQuant, Function, Graph, Multiply, Node, Product, Relu

# What values these have, in float64; the first ones are looked for.
_FOUND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: x / 2 * (1 + special.erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "swish": lambda x: x * special.expit(x),
}
_KNOWN = _FOUND | {"erf": special.erf, "exp": np.exp, "sigmoid": special.expit, "tanh": np.tanh}
_BOUNDS = {"linear": (-np.inf, np.inf), "relu": (0, np.inf), "relu6": (0, 6)}
# The longest of these, gelu_tanh, takes ten operations.
_MOST = 12
_ARGUMENTS = np.concatenate([np.linspace(-12, 12, 401), [-1e4, -100, -30, 30, 100, 1e4]])


class FormFunction:
    """Element-wise operations on one tensor become the function that they make of its values, however it is written.

    They are a function of one value if all their constants are single numbers; which one, its values tell.
    """

    def match(self, graph: Graph, node: Node) -> bool:
        """The last of these operations, in a float graph; nobody else reads the others."""
        return _links(graph, node) and self._find(graph, node) is not None

    def rewrite(self, graph: Graph, node: Node) -> None:
        """Makes it the function, of what the first one reads, and drops the others."""
        name, argument, links = self._find(graph, node)
        node.op, node.inputs = Function(name), [argument]
        for link in links:
            if link is not node:
                graph.nodes.remove(link)
                del graph.tensors[link.output]

    def _find(self, graph: Graph, node: Node) -> tuple[str, str, list[Node]] | None:
        """The function, its argument, and the operations that make it."""
        if any(isinstance(other.op, FakeQuant) for other in graph):  # a grid in between rounds
            return None
        for argument, links in _chains(graph, node):
            with np.errstate(all="ignore"):  # what overflows is none of them
                values = _values(graph, argument, links)
            for name, function in _FOUND.items():
                if np.allclose(values, function(_ARGUMENTS), rtol=1e-5, atol=1e-6):
                    return name, argument, links
        return None


def _links(graph: Graph, node: Node) -> bool:
    """Whether an operation makes a value of values in its place, the same for all places."""
    if isinstance(node.op, Function):
        return node.op.name in _KNOWN
    if isinstance(node.op, Relu):
        return node.op.activation in _BOUNDS
    if isinstance(node.op, (Multiply, BiasAdd)):
        return graph.constants(node)[0].data.size == 1
    shapes = {tensor.shape for tensor in graph.activations(node)}
    return isinstance(node.op, (Product, Add)) and len(shapes) == 1


def _chains(graph: Graph, last: Node) -> Iterator[tuple[str, list[Node]]]:
    """All operations that end with this one, read by no others, and read one tensor: its name and they, in order."""
    links = [last]
    while len(links) <= _MOST:
        made = {link.output for link in links}
        read = {tensor.name for link in links for tensor in graph.activations(link)} - made
        if len(links) > 1 and len(read) == 1:
            yield read.copy().pop(), list(links)
        more = [
            node
            for node in graph
            if node.output in read
            and node.output not in graph.outputs
            and _links(graph, node)
            and all(reader in links for reader in graph.consumers(node.output))
        ]
        if not more:
            return
        links.insert(0, more[-1])


def _values(graph: Graph, argument: str, links: list[Node]) -> np.ndarray:
    """What operations in order make of `_ARGUMENTS`."""
    values = {argument: _ARGUMENTS}
    for node in links:
        op, (x, *others) = node.op, [values[tensor.name] for tensor in graph.activations(node)]
        constants = [float(constant.data.ravel()[0]) for constant in graph.constants(node)]
        if isinstance(op, Function):
            values[node.output] = _KNOWN[op.name](x)
        else:
            other, bounds = [*constants, *others, 0.0][0], _BOUNDS[getattr(op, "activation", "linear")]
            if isinstance(op, (Multiply, Product)):
                x = x * other
            else:
                x = x - other if getattr(op, "subtract", False) else x + other
            values[node.output] = np.clip(x, *bounds)
    return values[links[-1].output]
