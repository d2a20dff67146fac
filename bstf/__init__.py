"""Weight block sparsity for Keras CNNs: sparsify, train, quantise, export."""

from bstf import callbacks, penalties, schedules
from bstf.conversion import densify, sparsify
from bstf.distillation import Distiller
from bstf.export import export
from bstf.layers import MaskedConv2D, MaskedDense
from bstf.permutation import permute
from bstf.quantization import quantize
from bstf.recovery import recover
from bstf.report import SparsityReport, report
from bstf.sensitivity import Sensitivity, sensitivity

__all__ = [
    "Distiller",
    "MaskedConv2D",
    "MaskedDense",
    "Sensitivity",
    "SparsityReport",
    "callbacks",
    "densify",
    "export",
    "penalties",
    "permute",
    "quantize",
    "recover",
    "report",
    "schedules",
    "sensitivity",
    "sparsify",
]
