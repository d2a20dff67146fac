"""Weight block sparsity for Keras CNNs: sparsify, train, quantise, export."""

from bstf.conversion import densify, sparsify
from bstf.export import export
from bstf.layers import MaskedConv2D, MaskedDense
from bstf.quantization import quantize
from bstf.report import SparsityReport, report
from bstf.sensitivity import Sensitivity, sensitivity

__all__ = [
    "MaskedConv2D",
    "MaskedDense",
    "Sensitivity",
    "SparsityReport",
    "densify",
    "export",
    "quantize",
    "report",
    "sensitivity",
    "sparsify",
]
