"""Power-of-two INT8 quantisation: `quantize` turns a float model into a fixed-point model."""

from bstf.quantization.quantize import quantize

__all__ = ["quantize"]
