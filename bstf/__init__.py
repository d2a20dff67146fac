"""Weight block sparsity for Keras CNNs: sparsify, train, quantise, export."""

from bstf import callbacks, penalties, schedules
from bstf.conversion import densify, sparsify
from bstf.distillation import Distiller
from bstf.export import export
from bstf.in_place import prune, sparsify_layers
from bstf.layers import (
    MaskedConv1D,
    MaskedConv2D,
    MaskedConv2DTranspose,
    MaskedConv3D,
    MaskedDense,
    MaskedEinsumDense,
    MaskedSeparableConv2D,
)
from bstf.permutation import permute
from bstf.quantization import quantize
from bstf.recovery import recover
from bstf.report import SparsityReport, report
from bstf.sensitivity import Sensitivity, sensitivity

__version__ = "0.1.0"
__all__ = [
    "Distiller",
    "MaskedConv1D",
    "MaskedConv2D",
    "MaskedConv2DTranspose",
    "MaskedConv3D",
    "MaskedDense",
    "MaskedEinsumDense",
    "MaskedSeparableConv2D",
    "Sensitivity",
    "SparsityReport",
    "callbacks",
    "densify",
    "export",
    "penalties",
    "permute",
    "prune",
    "quantize",
    "recover",
    "report",
    "schedules",
    "sensitivity",
    "sparsify",
    "sparsify_layers",
]
