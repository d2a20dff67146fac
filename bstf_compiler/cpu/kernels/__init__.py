"""Block-sparse kernels for the CPU at hand."""
