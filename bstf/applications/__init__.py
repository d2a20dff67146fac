"""Small reference networks whose channels are whole blocks."""

from bstf.applications.small_resnet import small_resnet

__all__ = ["small_resnet"]
