"""The networks of which designs are made here."""

from __future__ import annotations

import numpy as np

from bstf_compiler.graph import Graph, Window
from tests.bstf_compiler.networks import Builder

SAME = Window((3, 3), padding=(1, 1, 1, 1))
PIXEL = Window((1, 1))


def resnet20() -> Graph:
    """He et al.'s network for CIFAR, random weights, half of the blocks zero; 1x1 convolutions where shapes change."""
    build = Builder(np.random.default_rng(0), Graph("resnet20"))
    x = build.conv(build.input(32, 32, 3), 16, SAME, 0.0)
    for width in (16, 32, 64):
        for block in range(3):
            stride = 2 if width > 16 and block == 0 else 1
            y = build.conv(x, width, Window((3, 3), (stride, stride), (1, 1, 1, 1)))
            y = build.conv(y, width, SAME, activation="linear")
            if stride > 1:
                x = build.conv(x, width, Window((1, 1), (2, 2)), activation="linear")
            x = build.add(y, x, "relu")
    x = build.average_pool(x, Window((8, 8)))
    return build.finish(build.conv(x, 10, PIXEL, 0.0, activation="linear"))


def bottlenecks(size: int, blocks: int) -> Graph:
    """The first stage of ResNet50, 64 channels inside and 256 outside, on an image of another size."""
    build = Builder(np.random.default_rng(0), Graph("bottlenecks"))
    x = build.input(size, size, 64)
    for block in range(blocks):
        y = build.conv(build.conv(x, 64, PIXEL), 64, SAME)
        y = build.conv(y, 256, PIXEL, activation="linear")
        x = build.add(y, x if block else build.conv(x, 256, PIXEL, activation="linear"), "relu")
    return build.finish(x)


def small(rows: int = 13, channels: int = 24) -> Graph:
    """One of each kernel."""
    build = Builder(np.random.default_rng(0), Graph("small"))
    image = build.input(rows, 11, 3)
    x = build.max_pool(build.conv(image, channels, SAME, 0.0), Window((3, 3), (2, 2), (1, 1, 1, 1)))
    y = build.conv(build.conv(x, channels, SAME), channels, PIXEL, activation="linear")
    y = build.add(y, x, "relu")
    z = build.requantize(build.average_pool(x, Window((3, 3), padding=(1, 1, 1, 1))), "relu")
    x = build.max_pool(build.add(z, y), Window((2, 2)))
    return build.finish(build.conv(x, 10, PIXEL, activation="linear"))
