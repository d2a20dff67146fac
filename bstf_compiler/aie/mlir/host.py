"""What the host gives a design and gets back: one buffer with the packed weights, the inputs and the outputs."""

from __future__ import annotations

import numpy as np

from bstf_compiler.aie.code import Code
from bstf_compiler.aie.simulate import Machine


def random_images(code: Code, seed: int = 0) -> list[np.ndarray]:
    """A float32 image (h, w, c) for every input, spread evenly over what its grid represents."""
    rng = np.random.default_rng(seed)
    return [rng.uniform(*code.image_range(port), port.shape).astype(np.float32) for port in code.inputs]


def host_image(code: Code, images: list[np.ndarray]) -> np.ndarray:
    """The host's buffer, int8, before a run: images of every input on their grids, and the packed weights."""
    image = Machine(code).inputs(images)
    return np.concatenate([image, np.zeros(-len(image) % 4, np.int8)])


def expected(code: Code, images: list[np.ndarray]) -> list[np.ndarray]:
    """The integers (h, w, c) of every output, by the simulation of the program."""
    machine = Machine(code)
    for _ in machine.run(images):
        pass
    return [machine.tensor(port.tensor) for port in code.outputs]


def outputs(code: Code, host: np.ndarray) -> list[np.ndarray]:
    """The integers (h, w, c) of every output, from the host's buffer after a run."""
    return [_pixels(code, host, port.tensor) for port in code.outputs]


def _pixels(code: Code, host: np.ndarray, name: str) -> np.ndarray:
    place, channels, _ = code.tensors[name]
    strides = (place.shape[1] * place.pixel, place.pixel, 1)
    shape = (*place.shape[:2], place.length)
    return np.lib.stride_tricks.as_strided(host[place.address :], shape, strides)[..., :channels].copy()


def layout(code: Code) -> dict:
    """Where things lie in the host's buffer, for a program that fills it: bytes, shapes of int8, and the weights."""
    places = {"bytes": -(-(code.data_address + len(code.data)) // 4) * 4}
    made = {affine.input: affine.tensor for affine in code.affines}
    for name, ports in (("inputs", code.inputs), ("outputs", code.outputs)):
        places[name] = []
        for port in ports:
            tensor = made.get(port.tensor, port.tensor)
            if tensor not in code.tensors:
                continue
            place, channels, position = code.tensors[tensor]
            places[name].append(
                {
                    "tensor": tensor,
                    "address": place.address,
                    "shape": [*place.shape[:2], channels],
                    "pixel_bytes": place.pixel,
                    "position": position,
                }
            )
    places["weights"] = {"address": code.data_address, "bytes": len(code.data)}
    return places
