"""Power-of-two INT8 quantisation: `quantize` turns a float model into a fixed-point model.

`prepare` and `convert` stand around a quantisation-aware training.
"""

from bstf.quantization.quantize import quantize
from bstf.quantization.training import convert, prepare

__all__ = ["convert", "prepare", "quantize"]
