"""A small data set in the format of MNIST's files, written with struct: ten classes that a network learns at once."""

import gzip
import struct

import numpy as np


def write_idx(folder, train=90, test=30, size=(8, 8), compressed=False):
    """Writes the four files; no two images are equal, and image i is of class i % 10."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    patterns = rng.integers(40, 215, (10, *size))
    for name, count in (("train", train), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = (patterns[labels] + rng.integers(-40, 41, (count, *size))).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
            if compressed:
                (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{name}-{kind}-ubyte").write_bytes(content)
    return str(folder)
