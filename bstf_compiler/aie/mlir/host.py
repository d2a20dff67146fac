"""What the host gives a design and gets back: one buffer with the packed weights, the inputs and the outputs."""

from __future__ import annotations

import numpy as np

from bstf_compiler.aie.code import Code
from bstf_compiler.aie.simulate import Machine


def host_image(code: Code, images: list[np.ndarray]) -> np.ndarray:
    """The host's buffer, int8, before a run: float32 images (h, w, c) of every input on their grids, packed weights,
    and nothing else that is known.
    """
    image = Machine(code).inputs(images)
    return np.concatenate([image, np.zeros(-len(image) % 4, np.int8)])


def outputs(code: Code, host: np.ndarray) -> list[np.ndarray]:
    """The integers (h, w, c) of every output, from the host's buffer after a run."""
    return [tensor(code, host, port.tensor) for port in code.outputs]


def tensor(code: Code, host: np.ndarray, name: str) -> np.ndarray:
    """The integers (h, w, c) of a tensor that lives in the host's buffer."""
    place, channels, _ = code.tensors[name]
    rows, width, _ = place.shape
    strides = (width * place.pixel, place.pixel, 1)
    shape = (rows, width, place.length)
    return np.lib.stride_tricks.as_strided(host[place.address :], shape, strides)[..., :channels].copy()
