"""Channels and axes in another order: the layers behind them take their weights in that order."""

import numpy as np

from bstf.blocks import BlockShape, nonzero_blocks
from bstf.quantization.network import (
    BatchNorm,
    Convolution,
    Dense,
    Network,
    Permute,
    Reshape,
    Select,
    Weights,
)


def fold_orders(network: Network) -> None:
    """Takes selections of channels and permutations of axes out of a network, which computes the same.

    Scales and offsets go before a selection, and a convolution or dense layer behind it takes it in. Any other
    selection becomes a convolution with ones. A permutation can only be what a dense layer takes in behind a Flatten.

    Raises:
        ValueError: a permutation that nothing takes in; the sentence names the layer.
    """
    for op in [op for op in network.operations.values() if isinstance(op, Select)]:
        while isinstance(behind := network.only_consumer(op.name, network.consumers()), BatchNorm):
            if not _swap(network, op, behind):
                break
        if isinstance(behind, Dense) or (isinstance(behind, Convolution) and behind.groups == 1):
            _reorder(behind, network.operations[op.inputs[0]].shape[-1], np.array(op.numbers))
            network.remove(op)
        else:
            network.operations[op.name] = _convolution(network, op)
    for op in [op for op in network.operations.values() if isinstance(op, Permute)]:
        _fold_permutation(network, op)


def _swap(network: Network, op: Select, norm: BatchNorm) -> bool:
    """Computes a scale and an offset a channel before the selection; False if channels are there twice."""
    if len(set(op.numbers)) < len(op.numbers) or max(norm.scale.ndim, norm.offset.ndim) > 1:
        return False
    shape = network.operations[op.inputs[0]].shape
    scale, offset = np.ones(shape[-1]), np.zeros(shape[-1])
    scale[list(op.numbers)], offset[list(op.numbers)] = norm.scale, norm.offset
    norm.inputs, norm.shape, norm.scale, norm.offset = op.inputs, shape, scale, offset
    readers = network.consumers()[norm.name]
    for reader in readers:
        reader.inputs = tuple(op.name if name == norm.name else name for name in reader.inputs)
    network.outputs = tuple(op.name if name == norm.name else name for name in network.outputs)
    op.inputs = (norm.name,)
    names = list(network.operations)
    names.remove(norm.name)
    names.insert(names.index(op.name), norm.name)
    network.operations = {name: network.operations[name] for name in names}
    return True


def _reorder(layer: Weights, inputs: int, numbers: np.ndarray) -> None:
    """Lets a layer read `inputs` channels, of which number numbers[k] is what its input k was."""
    kernel = np.zeros((*layer.kernel.shape[:-2], inputs, layer.kernel.shape[-1]), np.float32)
    np.add.at(np.moveaxis(kernel, -2, 0), numbers, np.moveaxis(layer.kernel, -2, 0))
    layer.kernel = kernel
    if layer.gamma is not None:
        layer.gamma = nonzero_blocks(kernel, layer.block).astype(layer.gamma.dtype)


def _convolution(network: Network, op: Select) -> Convolution:
    source = network.operations[op.inputs[0]].shape
    if len(source) != 3:
        raise ValueError(f"layer {op.name!r} takes elements of a vector; only a dense layer may read them.")
    kernel = np.zeros((1, 1, source[-1], len(op.numbers)), np.float32)
    kernel[0, 0, op.numbers, range(len(op.numbers))] = 1
    return Convolution(
        name=op.name,
        inputs=op.inputs,
        shape=op.shape,
        kernel=kernel,
        bias=np.zeros(len(op.numbers), np.float32),
        block=BlockShape(8, 8),
        strides=(1, 1),
        padding="valid",
    )


def _fold_permutation(network: Network, op: Permute) -> None:
    readers = network.consumers()
    flat = network.only_consumer(op.name, readers)
    dense = readers[flat.name] if isinstance(flat, Reshape) and len(flat.shape) == 1 else []
    if not dense or flat.name in network.outputs or not all(isinstance(one, Dense) for one in dense):
        raise ValueError(
            f"layer {op.name!r} moves axes; that is supported only right before a Flatten that dense layers read."
        )
    source = network.operations[op.inputs[0]].shape
    numbers = np.arange(np.prod(source)).reshape(source).transpose(op.axes).ravel()
    for layer in dense:
        _reorder(layer, len(numbers), numbers)
    network.remove(op)
