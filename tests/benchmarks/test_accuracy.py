"""The accuracy study on a tiny data set: what a trial does, what is written, how a study goes on."""

import json
import shutil
from dataclasses import replace

import keras
import numpy as np
import pytest

import bstf
from benchmarks import int8
from benchmarks.accuracy import Setting, Study, begin, run
from benchmarks.trials import STUDIES, Trial


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Squares of ten colours, and the smallest CIFAR ResNet with random weights."""
    folder, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for label in range(10):
        colour = rng.integers(0, 255, 3)
        (folder / f"{label}").mkdir()
        for index in range(20):
            image = np.clip(colour + rng.normal(0, 60, (32, 32, 3)), 0, 255)
            keras.utils.save_img(folder / f"{label}" / f"{index}.png", image, scale=False)
    return Setting(
        network="resnet8", weights=None, dataset=str(folder), data_dir=None, classes=(), limit=None, batch_size=16,
        learning_rate=0.1, start_epochs=6, calibration=64, precision="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def start(setting, tmp_path_factory):
    return begin(setting, tmp_path_factory.mktemp("start"))


def test_a_trial_trains_what_is_left(setting, start, tmp_path):
    dense = run(setting, Trial(ratio=0, epochs=1), tmp_path, start, False)
    assert dense["before"] >= 0.5 and dense["zero_blocks"] == 0  # begins with what the start trained
    record = run(setting, Trial(epochs=5, recovery="obs", teacher="start"), tmp_path, start, False)
    assert record["trial"] == "8x8 50% l2 obs distilled, 5 epochs"
    assert record["zero_blocks"] == 0.5
    assert record["accuracy"] > 0.3  # chance is 0.1
    assert not list((tmp_path / "interrupted").glob("*/*"))


def test_recovery_without_training_tells_itself_apart(setting, start, tmp_path):
    lost, recovered = (run(setting, Trial(recovery=way), tmp_path, start, False) for way in ("none", "obs+batch_norm"))
    assert all(record["before"] == record["accuracy"] and "zero_blocks" not in record for record in (lost, recovered))
    assert recovered["accuracy"] > lost["accuracy"]


def test_a_schedule_reaches_the_ratio_or_is_refused(setting, start, tmp_path):
    low = replace(setting, precision="mixed_bfloat16")
    record = run(low, Trial(schedule="cubic", teacher="start", epochs=1), tmp_path, start, False)
    assert record["zero_blocks"] == 0.5 and record["before"] >= 0.5
    with pytest.raises(ValueError, match="reaches the ratio 0.5 in 19 epochs, and the retraining has 4"):
        run(setting, Trial(schedule="steps", epochs=4), tmp_path, start, False)


def test_what_the_dense_network_trained_to_teaches(setting, start, tmp_path, monkeypatch):
    teachers = []

    class Distiller(bstf.Distiller):
        def __init__(self, student, teacher):
            teachers.append(teacher.get_weights())
            super().__init__(student, teacher)

    monkeypatch.setattr(bstf, "Distiller", Distiller)
    taught = Trial(teacher="trained", epochs=1)
    with pytest.raises(FileNotFoundError, match="dense-1-epochs-0.weights.h5"):
        run(setting, taught, tmp_path, start, False)
    run(setting, taught.dense, tmp_path, start, False)
    record = run(setting, taught, tmp_path, start, False)
    trained, begun = setting.dense(), setting.dense()
    trained.load_weights(tmp_path / "weights" / "dense-1-epochs-0.weights.h5")
    begun.load_weights(start)
    (teacher,) = teachers
    assert all(map(np.array_equal, teacher, trained.get_weights()))
    assert not all(map(np.array_equal, teacher, begun.get_weights()))
    assert record["trial"] == "8x8 50% l2 distilled from trained, 1 epochs"


def test_the_dense_network_trains_before_those_it_teaches(setting, tmp_path):
    taught = Trial(block=(1, 1), teacher="trained", epochs=1)
    study = Study(replace(setting, start_epochs=0), tmp_path)
    study.run([taught, taught.dense], 1, False)
    assert [record["trial"] for record in study.records] == [taught.dense.name, taught.name]


def test_int8_measures_whatever_a_study_has_trained(setting, tmp_path):
    taught = Trial(teacher="start", epochs=1)
    quick = replace(setting, start_epochs=0)
    Study(quick, tmp_path).run([taught, taught.dense], 1, False)
    file = tmp_path / "trials.jsonl"
    file.write_text(file.read_text().replace('"teacher": "start"', '"distill": true'))  # as earlier studies have it
    found = dict(int8.networks(tmp_path, quick))
    assert set(found) == {"dense, 1 epochs, seed 0", "8x8 50% l2 distilled, 1 epochs, seed 0"}
    assert bstf.report(found["8x8 50% l2 distilled, 1 epochs, seed 0"]).ratio == 0.5


def test_names_tell_all_trials_of_a_study_apart():
    for name, trials in STUDIES.items():
        made = trials(4)
        assert len({trial.name for trial in made}) == len(set(made)) == len(made), name


def test_a_study_goes_on_where_it_stopped(setting, tmp_path, capsys):
    quick = replace(setting, start_epochs=0)
    trials = [Trial(ratio=0), Trial(ratio=0.25, recovery="batch_norm")]
    Study(quick, tmp_path).run(trials[:1], 1, False)
    again = Study(quick, tmp_path)
    again.run(trials, 1, False)
    assert "1 trials are in" in capsys.readouterr().out
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line).get("ratio") for line in lines] == [None, 0, 0.25]
    again.report()
    rows = again.summary()
    assert rows[0]["lost"] == 0 and rows[1]["lost"] == pytest.approx(100 * (rows[0]["accuracy"] - rows[1]["accuracy"]))
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert (tmp_path / "summary.csv").read_text().count("\n") == 3
    with pytest.raises(ValueError, match="is a study of another setting"):
        Study(setting, tmp_path)


def test_some_classes_of_a_network(setting):
    some = replace(setting, classes=(7, 2, 5))
    model, whole = some.dense(), setting.dense()
    whole.set_weights(model.get_weights())
    data = some.data(model)
    assert data.classes == 3 and model.output_shape == (None, 3)
    for images, labels in data.test:
        np.testing.assert_allclose(model(images), np.array(whole(images))[:, [7, 2, 5]], rtol=1e-5)
        assert set(np.array(labels)) <= {0, 1, 2}


def test_a_network_of_other_classes_is_refused(setting, tmp_path):
    for label in ("0", "1"):
        shutil.copytree(f"{setting.dataset}/{label}", tmp_path / label)
    with pytest.raises(ValueError, match=r"resnet8 knows 10 classes and '.*' has 2: choose another"):
        other = replace(setting, dataset=str(tmp_path))
        other.data(other.dense())
