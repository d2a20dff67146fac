import json

import numpy as np
import pytest

import bstf
from benchmarks import harness, network
from bstf.applications import small_resnet


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    model = small_resnet((12, 12, 1), widths=(8, 16), depth=1)
    bstf.export(model, folder / "model")
    x = np.random.default_rng(0).normal(size=(2, 12, 12, 1)).astype(np.float32)
    np.savez(folder / "images.npz", x=x, y=model.predict(x, verbose=0))
    return network.Case(folder, "small", 1.0, 3, 1, 1000, "float32")


def test_the_engine_runs_a_case(case):
    work = network.bstf_engine(case)
    assert work.error <= network.SUITE.tolerances["float32"]
    assert work.run().shape == (3, 10)


def test_a_suite_records_compares_and_prints(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "wait_for_quiet", lambda: 0.0)
    suite = harness.Suite("network", {"bstf_engine": network.bstf_engine}, "bstf_engine", {"float32": 1e-4})
    log = harness.Log(tmp_path, "network")
    suite.measure([[case]], [], 3, log)
    (record,) = [json.loads(line) for line in (tmp_path / "network.jsonl").read_text().splitlines()]
    assert record["speedup_over_bstf_engine"] == 1
    assert record["batch"] == 3
    assert record["effective_gflops"] == pytest.approx(1000 / record["seconds"] / 1e9)
    suite.show(log, {})
    assert "bstf_engine" in capsys.readouterr().out
    network.plot(log.records, tmp_path / "network.png")
    assert (tmp_path / "network.png").stat().st_size > 5000
