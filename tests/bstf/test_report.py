"""The report against counts worked out here, on plain, masked and fixed-point models."""

import csv
import io
import json

import keras
import numpy as np
import pytest
from keras import layers

import bstf
from bstf.quantization.fixed_point import FixedPointConv2D


def network():
    """9x9x3 images; ragged, grouped and depthwise convolutions, a shared layer, a nested model."""
    inner = keras.Sequential([keras.Input((9, 9, 16)), layers.Conv2D(24, 3, name="conv")], name="inner")
    inputs = keras.Input((9, 9, 3))
    x = layers.Conv2D(16, 3, padding="same", name="first")(inputs)
    shared = layers.Conv2D(16, 1, name="shared")
    x = inner(shared(shared(x)))
    x = layers.Conv2D(24, 3, groups=3, name="grouped")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.BatchNormalization()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(12, name="last")(x), name="net")


def rows_of(report):
    return {row.layer: row for row in report.layers}


def test_masked_model():
    report = bstf.report(bstf.sparsify(network(), ratio=0.5))
    rows = rows_of(report)
    assert list(rows) == ["first", "shared", "inner/conv", "grouped", "depthwise", "last"]
    assert rows["first"].skipped == "3 input channels, fewer than the 8 of a block"
    assert rows["grouped"].skipped == "grouped (groups=3)"
    assert rows["depthwise"].skipped == "DepthwiseConv2D has no block-sparse form"
    assert not any(rows[name].skipped for name in ("shared", "inner/conv", "last"))
    assert rows["inner/conv"].gamma == (2, 3) and rows["inner/conv"].kernel == (3, 3, 16, 24)
    assert rows["inner/conv"].zeros == 3 and rows["inner/conv"].ratio == 0.5
    dense_macs = {
        "first": 81 * 9 * 3 * 16,
        "shared": 2 * 81 * 16 * 16,
        "inner/conv": 49 * 9 * 16 * 24,
        "grouped": 25 * 9 * 8 * 24,
        "depthwise": 9 * 9 * 24,
        "last": 24 * 12,
    }
    assert {name: row.dense_macs for name, row in rows.items()} == dense_macs
    assert rows["first"].macs == dense_macs["first"] and rows["shared"].macs == dense_macs["shared"] // 2
    assert report.dense_macs == sum(dense_macs.values())
    assert report.zeros == 2 + 3 + rows["last"].zeros and report.ratio == report.zeros / (4 + 6 + 6)


def test_ragged_blocks_count_their_own_size():
    model = keras.Sequential([keras.Input((12,)), bstf.MaskedDense(20, name="d")])
    model.get_layer("d").set_gamma([[1, 0, 1], [0, 1, 0]])
    (row,) = bstf.report(model).layers
    assert row.macs == 8 * 8 + 8 * 4 + 4 * 8 and row.dense_macs == 240 and row.zeros == 3


def test_plain_model():
    rows = rows_of(bstf.report(network()))
    assert all(row.zeros == 0 and row.macs == row.dense_macs for row in rows.values())
    assert rows["shared"].skipped == "no zero blocks"
    assert rows_of(bstf.report(network(), block=4))["shared"].gamma == (4, 4)
    unselected = bstf.report(bstf.sparsify(network(), layers="last"))
    assert rows_of(unselected)["shared"].skipped == "no zero blocks"


def test_densified_model_reads_like_the_masked_one():
    sparse = bstf.sparsify(network(), ratio=0.5)
    assert bstf.report(bstf.densify(sparse)).to_dict() == bstf.report(sparse).to_dict()


def test_fixed_point_layer():
    layer = FixedPointConv2D(16, 1, kernel_position=7, bias_position=7, block=8, name="fixed")
    model = keras.Sequential([keras.Input((4, 4, 16)), layer])
    kernel = np.ones((1, 1, 16, 16))
    kernel[..., :8, 8:] = 0
    layer.kernel.assign(kernel)
    (row,) = bstf.report(model).layers
    assert (row.zeros, row.gamma, row.skipped, row.macs) == (1, (2, 2), "", 16 * 192)


def test_layers_inside_other_layers_and_open_sizes():
    inputs = keras.Input((None, 16))
    x = layers.TimeDistributed(layers.Dense(16, name="inside"), name="time")(inputs)
    report = bstf.report(bstf.sparsify(keras.Model(inputs, layers.Dense(16, name="plain")(x))))
    rows = rows_of(report)
    assert rows["time/inside"].skipped == "inside a TimeDistributed"
    assert rows["plain"].macs is None and report.macs is None and " - " in str(report)


def test_subclassed_model_is_read_too():
    class Net(keras.Model):
        def __init__(self):
            super().__init__(name="net")
            self.dense = bstf.MaskedDense(16, name="dense")

        def call(self, x):
            return self.dense(x)

    model = Net()
    model(np.ones((1, 16)))
    (row,) = bstf.report(model).layers
    assert row.layer == "dense" and row.macs is None


def test_it_prints_a_table():
    report = bstf.report(bstf.sparsify(network(), ratio=0.5))
    assert str(report) == repr(report)
    lines = str(report).splitlines()
    assert "Block sparsity of net" in lines[0]
    assert lines[2].split() == ["layer", "kernel", "Γ", "zeros", "ratio", "MACs", "kept", "skipped", "because"]
    line = next(line for line in lines if "inner/conv" in line)
    assert line.split()[:5] == ["inner/conv", "3x3x16x24", "2x3", "3", "0.500"] and "(50%)" in line
    assert any("first" in line and "3 input channels, fewer" in line for line in lines)
    assert lines[-1].split()[0] == "all"


def test_dict_and_csv(tmp_path):
    report = bstf.report(bstf.sparsify(network(), ratio=0.5))
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["gamma"] == [2, 2]
    text = report.to_csv(tmp_path / "report.csv")
    assert (tmp_path / "report.csv").read_text(encoding="utf-8") == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows[2]["layer"] == "inner/conv" and rows[2]["kernel"] == "3x3x16x24" and rows[2]["zeros"] == "3"
    assert rows[0]["gamma"] == "" and "3 input channels" in rows[0]["skipped"]


def test_not_a_model():
    with pytest.raises(TypeError, match=r"report takes a keras.Model; got str"):
        bstf.report("model")


def test_fixed_point_depthwise_kernels_have_no_blocks():
    model = keras.Sequential([keras.Input((4, 4, 8)), layers.DepthwiseConv2D(3, depth_multiplier=8)])
    (row,) = bstf.report(bstf.quantize(model, np.ones((1, 4, 4, 8), "float32"))).layers
    assert row.gamma is None and "no block-sparse form" in row.skipped
    assert row.macs == row.dense_macs == 4 * 9 * 64
