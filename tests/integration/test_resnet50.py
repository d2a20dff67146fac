"""The ResNet50 study on small images."""

import json

from benchmarks import resnet50


def test_study_on_small_images(tmp_path):
    results = resnet50.study(size=64, ratio=0.5, device="aie2_4x4")
    dense, sparse = results["dense"], results["sparse"]
    assert dense["different_layers"] == sparse["different_layers"] == []
    assert dense["compared_layers"] == sparse["compared_layers"] == len(results["layers"]) == 56
    assert sparse["weight_bytes"] <= 0.53 * dense["weight_bytes"]
    assert sparse["estimated_seconds"] < dense["estimated_seconds"]
    assert resnet50.unhelped(results["layers"]) == []
    resnet50.write(results, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "layers.csv", "layers.png"}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_what_zero_blocks_do_not_help_is_named():
    layer = {"name": "a", "dense_seconds": 2.0, "sparse_seconds": 1.0, "dense_macs": 2, "sparse_macs": 1}
    layer["dense_bound"] = "LOADW"
    assert resnet50.unhelped([layer]) == []
    assert resnet50.unhelped([layer | {"sparse_seconds": 2.0}]) == ["a"]
    assert resnet50.unhelped([layer | {"sparse_seconds": 2.0, "dense_bound": "LOADFM"}]) == []
    assert resnet50.unhelped([layer | {"sparse_seconds": 2.1, "dense_bound": "LOADFM"}]) == ["a"]
