"""SavedModel folders to graphs. The only room of the compiler that imports TensorFlow."""

from bstf_compiler.frontend.savedmodel import read

__all__ = ["read"]
