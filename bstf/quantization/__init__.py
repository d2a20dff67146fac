"""Power-of-two INT8 quantisation: `quantize` turns a float model into a fixed-point model.

`prepare` and `convert` stand around a quantisation-aware training; `report` shows what the grids do to each layer.
"""

from bstf.quantization.quantize import quantize
from bstf.quantization.report import LayerNoise, QuantizationReport, report
from bstf.quantization.training import convert, prepare

__all__ = ["LayerNoise", "QuantizationReport", "convert", "prepare", "quantize", "report"]
