import csv
import json
from types import SimpleNamespace

import pytest
from matplotlib.image import imread

from benchmarks import aie_timelines


@pytest.fixture
def run(tmp_path, monkeypatch):
    def timelines(**given):
        values = {"network": "small_resnet", "device": "aie2_2x2", "ratio": 0.5, "output": str(tmp_path / "out")}
        monkeypatch.setattr(aie_timelines, "FLAGS", SimpleNamespace(**values | given))
        aie_timelines.main([])
        return tmp_path / "out"

    return timelines


def test_dense_and_sparse_are_drawn_and_told(run, capsys):
    folder = run()
    name = "small_resnet_aie2_2x2"
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.{kind}" for kind in ("png", "html", "trace.json", "jsonl", "csv")
    }
    header, dense, sparse = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    assert "machine" in header and (dense["blocks"], sparse["blocks"]) == ("dense", "50% zero blocks")
    assert sparse["seconds"] < dense["seconds"] and sparse["weight_bytes"] < dense["weight_bytes"]
    for one in (dense, sparse):
        assert one["memtile_least"] <= one["memtile_peak"] <= one["memtile_bytes"]
        assert 0 < one["ddr_mean"] <= one["ddr_peak"] <= one["ddr_rate"]
    with (folder / f"{name}.csv").open() as file:
        assert [float(row["seconds"]) for row in csv.DictReader(file)] == [dense["seconds"], sparse["seconds"]]
    trace = json.loads((folder / f"{name}.trace.json").read_text())
    assert [one["seconds"] for one in trace["otherData"]["estimates"]] == [dense["seconds"], sparse["seconds"]]
    height, width, _ = imread(folder / f"{name}.png").shape
    assert width >= 1200 and height > 800
    assert f"{dense['seconds'] / sparse['seconds']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [({"network": "AlexNet"}, "no network 'AlexNet'"), ({"device": "aie3_2x2"}, "unknown device 'aie3_2x2'")],
)
def test_wrong_arguments_end_in_a_sentence(run, argument, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        run(**argument)
    assert not (tmp_path / "out").exists()
