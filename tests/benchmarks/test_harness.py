import csv
import json

import numpy as np
import pytest

from benchmarks import harness, spgemm, spmm


def right(case):
    return harness.Work(lambda: sum(range(case)), 0.0)


def wrong(case):
    return harness.Work(lambda: None, 0.5)


def absent(case):
    raise ImportError("no such library")


def broken(case):
    raise ValueError("a broken peer")


def compare(approximate=(), **peers):
    made = [harness.Peer(name, prepare, 1) for name, prepare in peers.items()]
    try:
        return harness.compare(made, (1000, 100_000), 3, 1e-6, approximate)
    finally:
        for peer in made:
            peer.close()


def test_peers_are_timed_in_their_own_processes(monkeypatch):
    monkeypatch.setattr(harness, "wait_for_quiet", lambda: 0.0)
    short, long = compare(one=right, two=absent)
    assert short["two"] == long["two"] == {"missing": "no such library"}
    assert short["one"]["samples"] == long["one"]["samples"] >= 3
    assert 0 < short["one"]["p10"] <= short["one"]["seconds"] <= short["one"]["p90"] < 1
    assert short["one"]["seconds"] < long["one"]["seconds"]


def test_wrong_results_and_failures_end_the_run():
    with pytest.raises(ValueError, match="bad is wrong by 0.5"):
        compare(bad=wrong)
    with pytest.raises(RuntimeError, match="ValueError: a broken peer"):
        compare(worse=broken)


def test_a_wrong_result_of_an_approximate_peer_is_not_timed(monkeypatch):
    monkeypatch.setattr(harness, "wait_for_quiet", lambda: 0.0)
    results, _ = compare(["bad"], good=right, bad=wrong)
    assert results["bad"] == {"missing": "its result is wrong by 0.5"}
    assert results["good"]["samples"] >= 3


def test_summary():
    assert harness.summary([1.0, 2.0, 3.0, 4.0, 100.0])["seconds"] == 3.0
    assert harness.summary([1.0, 2.0, 3.0, 4.0, 100.0])["mad"] == 1.0


def test_records_are_on_disk_at_once(tmp_path):
    log = harness.Log(tmp_path / "new", "run")
    log.header({"machine": {}})
    log.add({"peer": "a", "seconds": 1.0})
    log.add({"peer": "b", "missing": "why"})
    lines = (tmp_path / "new" / "run.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][1:] == log.records
    log.write_csv()
    with (tmp_path / "new" / "run.csv").open() as file:
        assert [row["peer"] for row in csv.DictReader(file)] == ["a", "b"]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_cases_count_kept_blocks_and_peers_agree(dtype):
    case = spmm.Case(40, 48, 32, (8, 8), dtype, 0.5, 1)
    _, w = case.operands()
    assert np.count_nonzero(w) == 0.5 * 48 * 32
    assert case.operations == 2 * 40 * 48 * 32 // 2
    for name in ("bstf", "bstf_packed", "dense", "scipy_bsr", "scipy_csr"):
        try:
            work = spmm.PEERS[name](case)
        except ImportError:
            assert dtype == "int8"
            continue
        assert work.error <= spmm.TOLERANCES[dtype]
        work.run()


@pytest.mark.parametrize(("rows", "degree", "side"), [(100, 8, 8), (300, 5, 1), (64, 1, 4)])
def test_the_grid_has_as_many_operations_as_published(rows, degree, side):
    (case,) = spgemm.cases([], [f"{rows}x{degree}"], [(side, side)], ["float32"], 1)
    assert case.operations == 2 * side**3 * rows * degree**2
    a = case.operand()
    assert np.array_equal(np.bincount(a.rows), np.full(rows, degree))
    assert len(np.unique(a.rows * rows + a.columns)) == rows * degree
    assert set(zip(range(rows), range(rows))) <= set(zip(a.rows.tolist(), a.columns.tolist()))
    for name in ("gustavson", "gustavson_reused", "coo_merge", "sort_shuffled", "sort_reversed", "scipy"):
        work = spgemm.PEERS[name](case)
        assert work.error == 0
        work.run()


def test_grid_of_the_published_study():
    cases = spgemm.cases(["fig1"], [], [(1, 1), (8, 8)], ["float32"], 2)
    assert sorted({case.operations for case in cases if case.block == (8, 8)}) == [
        16_384_000, 32_768_000, 65_536_000, 131_072_000, 262_144_000,
    ]  # fmt: skip
    assert min(case.operations for case in cases) == 1_024_000
    assert max(case.operations for case in cases if case.block == (1, 1)) == 49_152_000
