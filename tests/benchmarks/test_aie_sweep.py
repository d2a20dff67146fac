import csv
import json
from types import SimpleNamespace

import pytest

from benchmarks import aie_sweep


@pytest.fixture
def run(tmp_path, monkeypatch):
    def sweep(**given):
        values = {"networks": ["small_resnet"], "devices": ["aie2_2x2"], "ratios": ["0", "0.5"], "block": 8, "jobs": 1}
        values |= {"side_divisor": 1, "simulate": False, "published": None, "output": str(tmp_path)}
        monkeypatch.setattr(aie_sweep, "FLAGS", SimpleNamespace(**values | given))
        aie_sweep.main([])
        return [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]

    return sweep


def test_cells_are_compiled_simulated_and_kept(run, tmp_path, capsys):
    published = tmp_path / "totals.csv"
    published.write_text("mesh,model,dense_s,sparse_s\n2x2,Resnet,0.02,failed\n")
    records = run(devices=["aie2_2x2", "aie2_2x1"], simulate=True, published=str(published))
    assert [(r["device"], r["ratio"]) for r in records] == [
        ("aie2_2x2", 0.0), ("aie2_2x1", 0.0), ("aie2_2x2", 0.5), ("aie2_2x1", 0.5),
    ]  # fmt: skip
    assert all(r["result"] == "ok" and r["simulated"] == "equal" for r in records)
    times = {(r["device"], r["ratio"]): r["seconds"] for r in records}
    assert times["aie2_2x2", 0.0] < times["aie2_2x1", 0.0] and times["aie2_2x1", 0.5] < times["aie2_2x1", 0.0]
    # A second run adds what is missing and nothing else.
    again = run(devices=["aie2_2x2", "aie2_1x1"], ratios=["0"], simulate=True)
    assert again[:4] == records and [r["device"] for r in again[4:]] == ["aie2_1x1"]
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["device"] for row in rows] == ["aie2_2x2", "aie2_2x1", "aie2_1x1"]
    assert float(rows[0]["speedup_50%"]) == pytest.approx(times["aie2_2x2", 0.0] / times["aie2_2x2", 0.5], rel=1e-3)
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    assert "small_resnet" in capsys.readouterr().out


def test_published_totals_stand_beside_ours(tmp_path):
    table = tmp_path / "totals.csv"
    table.write_text("mesh,model,dense_s,sparse_s\n4x4,Resnet,0.02,0.01\n5x5,Resnet,failed,0.005\n")
    published = aie_sweep.read_published(str(table))
    about = {"network": "ResNet50", "side": 224, "block": 8, "result": "ok", "cores": 16, "device": "aie2_4x4"}
    lines = [
        about | {"ratio": 0.0, "seconds": 0.004, "lower_bound_seconds": 0.003},
        about | {"ratio": 0.5, "seconds": 0.002, "lower_bound_seconds": 0.002},
    ]
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut short')
    sweep = aie_sweep.Sweep(tmp_path, 1, False)
    (row,) = sweep.rows(published)
    assert row["published_dense_ms"] == 20 and row["published_sparse_ms"] == 10 and row["speedup_50%"] == 2
    assert row["dense_over_bound"] == pytest.approx(4 / 3) and row["sparse_50%_over_bound"] == 1
    with pytest.raises(ValueError, match="there is no file"):
        aie_sweep.read_published(str(tmp_path / "nothing.csv"))


def test_the_front_has_no_beaten_record():
    records = [{"cores": c, "seconds": s} for c, s in [(4, 5.0), (16, 2.0), (16, 1.0), (25, 1.5), (64, 0.5)]]
    assert [r["seconds"] for r in aie_sweep.pareto(records)] == [5.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"networks": ["AlexNet"]}, "no network 'AlexNet'"),
        ({"devices": ["aie3_2x2"]}, "unknown device 'aie3_2x2'"),
        ({"ratios": ["half"]}, "--ratios holds 'half'"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(run, argument, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run(**argument)
