"""Programs for real parts as mlir-aie designs with C++ kernels: written, checked, read back and executed."""
