import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bstf_compiler
from bstf_compiler.aie.splitting import Split, splits
from bstf_compiler.graph import Window
from tests.bstf_compiler.aie.devices import small_device
from tests.bstf_compiler.networks import Builder, assert_equal_to_reference, random_images


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))
def test_every_way_to_split_covers_every_pixel_once_and_the_first_column_has_most(rows, width, columns):
    for split in splits(rows, width, columns, channels=True):
        met = np.zeros((rows, width), int)
        regions = split.regions(rows, width, columns)
        for own in regions:
            for ((top, bottom), (left, right)), (high, wide) in zip(own, regions[0]):
                met[top:bottom, left:right] += 1
                assert bottom - top <= high[1] - high[0] and right - left <= wide[1] - wide[0]
        assert (met == columns // split.parts).all()
        parts = [split.channel_part(column, columns) for column in range(columns)]
        assert sorted(parts) == sorted(list(range(columns // split.parts)) * split.parts)


def network(seed):
    """A convolution that reads far to the side, one that reads up and down, a sum, pools and a joined tensor."""
    rng = np.random.default_rng(seed)
    build = Builder(rng)
    rows, width = (int(size) for size in rng.integers(5, 20, 2))
    x = build.conv(build.input(rows, width, 16), 24, Window((1, 5), padding=(0, 0, 2, 2)))
    y = build.conv(x, 24, Window((5, 1), padding=(2, 2, 0, 0)))
    x = build.add(y, build.conv(x, 24, Window((3, 3), padding=(1, 1, 1, 1)), activation="linear"), "relu")
    pool = build.average_pool(x, Window((3, 3), padding=(1, 1, 1, 1)))
    return build.finish(build.max_pool(build.concat(pool, y), Window((2, 2), (2, 2))))


def chosen(monkeypatch, split):
    """The search offers one way to split, where cores reach all memory tiles."""
    monkeypatch.setattr("bstf_compiler.aie.tiling._splits", lambda layer, device, rows: [split])
