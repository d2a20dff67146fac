import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import aie_dealing
from bstf.blocks import BlockShape
from bstf.selection import select


@pytest.fixture
def run(tmp_path, monkeypatch):
    def dealing(**given):
        values = {"networks": ["small_resnet"], "devices": ["aie2_2x2", "aie2_1x3"], "ratio": 0.5, "jobs": 1}
        values |= {"side_divisor": 1, "output": str(tmp_path)}
        monkeypatch.setattr(aie_dealing, "FLAGS", SimpleNamespace(**values | given))
        aie_dealing.main([])
        return [json.loads(line) for line in (tmp_path / "dealing.jsonl").read_text().splitlines()]

    return dealing


def test_uneven_zero_blocks_take_about_the_time_of_even_ones(run, tmp_path, capsys):
    records = run()
    assert [(one["device"], one["mask"]) for one in records] == [
        (device, mask) for device in ("aie2_2x2", "aie2_1x3") for mask in ("column", "layer", "uneven")
    ]
    times = {(one["device"], one["mask"]): one["seconds"] for one in records}
    for one in records:
        assert one["over_column"] == pytest.approx(times[one["device"], one["mask"]] / times[one["device"], "column"])
        assert one["lower_bound_seconds"] <= one["seconds"] and one["over_column"] < 1.1
    with (tmp_path / "dealing.csv").open() as file:
        assert [float(row["seconds"]) for row in csv.DictReader(file)] == list(times.values())
    assert "over column" in capsys.readouterr().out


def test_uneven_columns_vary_more_than_chance_has_it():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 512, 512))
    scores = {name: aie_dealing.uneven(kernel, BlockShape(8, 8)) for name in ("once", "again")}
    assert np.array_equal(scores["once"], scores["again"])
    kept = select(scores["once"], 0.5).sum(axis=0)
    assert kept.std() > 2 * np.sqrt(64 * 0.5 * 0.5)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [({"networks": ["AlexNet"]}, "no network 'AlexNet'"), ({"devices": ["aie3_2x2"]}, "unknown device 'aie3_2x2'")],
)
def test_wrong_arguments_end_in_a_sentence(run, argument, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run(**argument)
