import csv
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import harness, network, roofline
from bstf.applications import small_resnet
from bstf_compiler.cpu.engine import LayerTime, Profile

ROOFS = {"operations": 100e9, "bandwidth": 10e9, "cache bandwidth": 100e9}


def test_the_bound_of_a_layer_is_the_longest_of_its_least_times():
    layers = [
        LayerTime("products", "conv", 4e-3, 200_000_000, 400_000_000, 1000, 1000, 1000),
        LayerTime("weights", "conv", 8e-3, 1_000_000, 1_000_000, 40_000_000, 1000, 1000),
        LayerTime("pixels", "elementwise", 1e-3, 0, 0, 0, 10_000_000, 20_000_000),
    ]
    found = roofline.rows(Profile(1, layers, 1, 1), ROOFS)
    assert [one["bound"] for one in found] == ["multiply-adds", "weights", "activations"]
    np.testing.assert_allclose([one["least_seconds"] for one in found], [2e-3, 4e-3, 0.3e-3])
    np.testing.assert_allclose([one["reached"] for one in found], [0.5, 0.5, 0.3])
    assert found[0]["gflops"] == pytest.approx(50) and found[2]["bytes"] == 30_000_000
    cached = roofline.rows(Profile(1, [layers[0], layers[2]], 1, 1), ROOFS)  # weights that the last cache holds
    assert cached[0]["bound"] == "multiply-adds"


def test_a_network_is_measured_layer_by_layer(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(network, "build", lambda name: small_resnet((12, 12, 1), widths=(8, 16), depth=1))
    monkeypatch.setattr(harness, "roofs", lambda dtypes, threads: {"float32": 100e9, "bandwidth": 10e9})
    monkeypatch.setattr(harness, "bandwidth", lambda size, threads: 100e9)
    given = {"network": "small", "density": 0.5, "dtype": "float32", "batch": 2, "threads": 1, "repeats": 1}
    monkeypatch.setattr(roofline, "FLAGS", SimpleNamespace(**given, output=str(tmp_path / "found")))
    roofline.main([])
    with (tmp_path / "found" / "roofline.csv").open() as file:
        found = list(csv.DictReader(file))
    assert found[0]["does"] == "load" and all(float(one["bytes"]) for one in found)
    shown = capsys.readouterr().out
    assert "small, float32, density 0.5, batch 2" in shown and "operations: 100.0 G operations/s" in shown
    assert sum(" layers " in line for line in shown.splitlines()) >= 1
