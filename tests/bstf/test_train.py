"""bstf-train end to end on a few images, and its refusals."""

import io
import json
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl.testing import flagsaver
from rich.console import Console

import bstf
from bstf import progress, train, training
from bstf.datasets import Dataset
from tests.bstf.idx import write_idx

if "output" not in train.FLAGS:
    train.define_flags()


@pytest.fixture(autouse=True)
def parsed_flags():
    """The program's flags at their defaults."""
    train.FLAGS(["bstf-train", "--output=unused"])
    with flagsaver.flagsaver():
        yield


def stripes(count=64, size=12):
    """Two classes that a small network learns at once: horizontal and vertical stripes."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 2
    lines = np.broadcast_to(np.arange(size) % 2, (size, size)).astype("float32")
    images = np.stack([lines.T if label else lines for label in labels])[..., None]
    images = (images + rng.normal(0, 0.1, images.shape)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((images, labels)).batch(16)
    return Dataset("stripes", data, data, (size, size, 1), 2)


def write_stripes(folder):
    for images, labels in stripes(40).train.unbatch().batch(40):
        for i, (image, label) in enumerate(zip(images.numpy(), labels.numpy())):
            (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
            keras.utils.save_img(folder / f"class{label}" / f"{i:03}.png", np.repeat(image, 3, axis=-1))


def small(data, classes=2):
    return bstf.applications.small_resnet(data.input_shape, classes, widths=(8, 16), depth=1)


class Terminal(io.StringIO):
    """What a terminal shows."""

    def isatty(self):
        return True


def run_main(capsys, *argv, **values):
    """Exit code, standard output and standard error of the program."""
    with flagsaver.flagsaver(**values):
        code = train.main(["bstf-train", *argv])
    return code, *capsys.readouterr()


def test_train_dense_and_sparse():
    data = stripes()
    keras.utils.set_random_seed(0)
    model = small(data)
    history = train.train(model, data, epochs=6, learning_rate=0.01, verbose=0)
    assert len(history.history["val_accuracy"]) == 6
    assert train.accuracy(model, data) == pytest.approx(history.history["val_accuracy"][-1])
    sparse = bstf.sparsify(model, ratio=0.5)
    before = bstf.report(sparse).to_dict()
    train.train(sparse, data, epochs=2, verbose=0)
    assert bstf.report(sparse).to_dict() == before and before["zeros"] > 0
    assert train.accuracy(sparse, data) == 1.0
    # A network without a softmax is trained on logits, and reaches the same.
    logits = keras.Model(model.input, keras.layers.Dense(2)(model.get_layer("pool").output))
    train.train(logits, data, epochs=6, learning_rate=0.01, verbose=0)
    assert logits.loss.from_logits and not model.loss.from_logits
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        train.train(model, data, epochs=0)


def test_the_whole_program(tmp_path, capsys):
    write_stripes(tmp_path / "images")
    output = tmp_path / "deep" / "out"
    keras.utils.set_random_seed(0)
    small(Dataset("", None, None, (12, 12, 3), 2)).save(tmp_path / "net.keras")
    code, out, err = run_main(
        capsys,
        network=str(tmp_path / "net.keras"),
        dataset=str(tmp_path / "images"),
        image_size=12,
        ratio=0.5,
        block=["8", "4"],
        importance="l1",
        epochs=1,
        retrain_epochs=2,
        batch_size=8,
        calibration=8,
        output=str(output),
    )
    assert (code, err) == (0, "")
    assert {path.name for path in output.iterdir()} == {
        *("dense.keras", "sparse.keras", "float", "int8", "sparsity.csv", "flags.json")
    }
    assert "Epoch 2/2" in out and "test accuracy" in out and "Block sparsity of small_resnet" in out
    dense = keras.models.load_model(output / "dense.keras")
    sparse = keras.models.load_model(output / "sparse.keras")
    assert bstf.report(dense).zeros == 0 and sparse.get_layer("predictions").__class__ is keras.layers.Dense
    gamma = np.asarray(sparse.get_layer("stage2_block1_2_conv").gamma)
    assert gamma.shape == (2, 4) and (gamma == 0).sum() == 4
    x = np.random.default_rng(0).random((3, 12, 12, 3)).astype("float32")
    served = tf.saved_model.load(output / "float")
    (outputs,) = served.signatures["serving_default"](tf.constant(x)).values()
    np.testing.assert_allclose(outputs, sparse(x), rtol=1e-4, atol=1e-5)


def test_recovery_and_distillation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.datasets, "load", lambda *_, **__: stripes())
    monkeypatch.setattr(train, "network", lambda name, data: small(data))
    monkeypatch.setattr(train, "export", lambda model, path: None)
    output = tmp_path / "out"
    code, out, err = run_main(
        capsys, epochs=2, retrain_epochs=1, recover=True, distill=0.5, calibration=32, output=str(output),
        importance="taylor", scope="column",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "Recovering the outputs of the sparse network: its test accuracy is" in out and "and then" in out
    gamma = keras.models.load_model(output / "sparse.keras").get_layer("stage2_block1_2_conv").gamma
    assert np.sum(gamma, axis=0).tolist() == [1, 1]  # of 2


@pytest.mark.parametrize("schedule, epochs", [("cubic", 2), ("steps", 5)])
def test_gradual_schedules(tmp_path, capsys, monkeypatch, schedule, epochs):
    monkeypatch.setattr(train.datasets, "load", lambda *_, **__: stripes())
    monkeypatch.setattr(train, "network", lambda name, data: small(data))
    monkeypatch.setattr(train, "export", lambda model, path: None)
    ratio = 0.15 if schedule == "steps" else 0.5
    code, out, err = run_main(
        capsys, schedule=schedule, ratio=ratio, epochs=0, retrain_epochs=epochs, output=str(tmp_path / "out"),
        importance="wanda" if schedule == "cubic" else "l2",
    )  # fmt: skip
    assert (code, err) == (0, "") and f"Epoch {epochs}/{epochs}  " in out and "block_ratio: " in out
    gamma = keras.models.load_model(tmp_path / "out" / "sparse.keras").get_layer("stage2_block1_2_conv").gamma
    assert np.count_nonzero(gamma) == (2 if schedule == "cubic" else 3)  # of 4


@pytest.mark.parametrize("wish", ["json", "quiet"])
def test_json_or_nothing_is_printed(tmp_path, capsys, monkeypatch, wish):
    monkeypatch.setattr(train.datasets, "load", lambda *_, **__: stripes())
    monkeypatch.setattr(train, "network", lambda name, data: small(data))
    monkeypatch.setattr(train, "export", lambda model, path: None)
    monkeypatch.setattr(train, "quantize", lambda model, images: model)
    output = tmp_path / "out"
    code, out, err = run_main(capsys, epochs=0, output=str(output), **{wish: True})
    assert (code, err) == (0, "")
    if wish == "quiet":
        assert out == ""
        return
    found = json.loads(out)
    assert [one["name"] for one in found["networks"]] == ["dense", "sparse", "sparse INT8"]
    sparse = keras.models.load_model(output / "sparse.keras")
    assert found["networks"][1]["accuracy"] == pytest.approx(training.accuracy(sparse, stripes()))
    assert found["networks"][1]["files"] == [str(output / "sparse.keras"), str(output / "float")]
    assert found["sparsity"] == json.loads(json.dumps(bstf.report(sparse).to_dict()))


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    """The bar is on standard error, is gone at the end, and stays so when the training is interrupted."""
    seen = Terminal()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=seen, width=80))

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    data = stripes()
    with pytest.raises(KeyboardInterrupt), progress.EpochLog("dense") as log:
        training.train(small(data), data, epochs=3, verbose=0, callbacks=[log, Stop()])
    out, err = capsys.readouterr()
    assert re.fullmatch(r"(Epoch [12]/3  accuracy: \d\.\d{4}  loss: .*val_loss: \d+\.\d{4}  \(\d+\.\d s\)\n){2}", out)
    assert err == "" and "dense, epoch 2 of 3" in seen.getvalue() and "4/4" in seen.getvalue()
    assert seen.getvalue().endswith(("\x1b[?25h", "\x1b[2K", "\x1b[1A\x1b[2K", "\r\x1b[1A\x1b[2K"))


def test_the_schedule_of_the_paper_needs_its_epochs():
    data = stripes()
    with pytest.raises(
        ValueError, match=r"reaches the ratio 0\.5 in 19 epochs, and the retraining has 18: give it more"
    ):
        train.gradual("steps", 0.5, 18, data)
    schedule = train.gradual("steps", 0.5, 19, data).schedule
    assert schedule(18, 10**6) == pytest.approx(0.5) and schedule(17, 10**6) < 0.46
    with pytest.raises(ValueError, match="There is no schedule 'linear'"):
        train.gradual("linear", 0.5, 5, data)


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"ratio": 1.0}, "ratio is the fraction of zero blocks"),
        ({"block": ["a"]}, "--block must be one number or two, like 8 or 8,4; got a."),
        ({"block": ["8", "8", "8"]}, "--block must be one number or two"),
        ({"block": ["0"]}, "block must be a positive integer"),
        ({"schedule": "cubic", "recover": True}, "--recover needs all zero blocks before the retraining"),
        ({"schedule": "cubic", "retrain_epochs": 0}, "takes blocks during the retraining, which has no epochs"),
        ({"schedule": "steps"}, "reaches the ratio 0.5 in 19 epochs, and the retraining has 5"),
        ({"distill": 0.5, "retrain_epochs": 0}, "--distill is about the retraining, which has no epochs"),
        ({"importance": "size"}, "importance must be one of l1, l2, variance"),
        ({"dataset": "nonono"}, "There is no data set 'nonono'"),
        ({"dataset": "mnist5"}, "There is no data set 'mnist5' (did you mean 'mnist5k'?)"),
        ({"dataset": "photos/"}, "There is no data set 'photos/'"),
        ({"dataset": "cifar10:9.9.9"}, "The data set 'cifar10:9.9.9' can't be had"),
        ({"dataset": "/no/images"}, "There is no folder '/no/images' with images"),
        ({"classes": ["1", "x"]}, "'mnist5k' has no class 'x': it has labels 0 to 9"),
        ({"augment": ["blur"]}, "There is no augmentation 'blur'"),
        ({"mean": ["a"]}, "--mean must be numbers"),
        ({"distribute": "jax"}, "start the program with KERAS_BACKEND=jax"),
        ({"process_id": 1}, "only processes of the kind 'jax' find each other"),
        ({"network": "NoNet"}, "There is no network 'NoNet'"),
        ({"network": "resnet5"}, "There is no network 'resnet5' (did you mean 'ResNet50'?)"),
        ({"network": "/no/net.keras"}, "There is no file '/no/net.keras'"),
        ({"network": "ResNet50"}, "at least 32x32"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, values, sentence):
    code, _, err = run_main(capsys, output=str(tmp_path / "out"), **values)
    assert code == 1 and sentence in err and re.fullmatch(r"bstf-train: .*\n", err)
    assert not (tmp_path / "out").exists()


def test_output_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    for output in (tmp_path, tmp_path / "mine.txt"):
        code, _, err = run_main(capsys, output=str(output))
        assert code == 1 and "exists and isn't an empty folder" in err
    code, _, err = run_main(capsys, output=str(tmp_path / "mine.txt" / "out"))
    assert code == 1 and re.fullmatch(r"bstf-train: Can't write .*out: not a directory; name another place.\n", err)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_network_of_another_shape_is_refused(tmp_path):
    data = stripes()
    small(data, classes=3).save(tmp_path / "three.keras")
    with pytest.raises(ValueError, match=r"has outputs \(3,\), but 'stripes' has 2 classes"):
        train.network(str(tmp_path / "three.keras"), data)
    with pytest.raises(ValueError, match=r"takes images \(9, 9, 1\), but those of 'stripes' are \(12, 12, 1\)"):
        training.check_fit(bstf.applications.small_resnet((9, 9, 1), 2), data)
    inputs = [keras.Input((12, 12, 1)), keras.Input((12, 12, 1))]
    two = keras.Model(inputs, keras.layers.Add()(inputs))
    with pytest.raises(ValueError, match="one input and one output"):
        training.check_fit(two, data)


def test_a_network_that_cannot_be_quantised_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.datasets, "load", lambda *_, **__: stripes())
    inputs = keras.Input((12, 12, 1))
    x = keras.layers.LayerNormalization(name="odd")(keras.layers.Conv2D(8, 3)(inputs))
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x))
    keras.Model(inputs, outputs).save(tmp_path / "net.keras")
    code, out, err = run_main(capsys, network=str(tmp_path / "net.keras"), output=str(tmp_path / "out"))
    assert code == 1 and "'odd' (LayerNormalization)" in err and "Epoch" not in out
    assert not (tmp_path / "out").exists()


def test_interrupting_leaves_complete_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.datasets, "load", lambda *_, **__: stripes())
    monkeypatch.setattr(train, "network", lambda name, data: small(data))

    def interrupted(model, *_, **__):
        if any(hasattr(layer, "block") for layer in model.layers):
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    code, _, err = run_main(capsys, output=str(tmp_path / "out"))
    assert code == 130 and "interrupted" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"dense.keras", "flags.json"}
    keras.models.load_model(tmp_path / "out" / "dense.keras")


def untrained(monkeypatch):
    """The program without its data and trainings; the rest is real."""
    monkeypatch.setattr(train.datasets, "load", lambda *_, **__: stripes())
    monkeypatch.setattr(train, "network", lambda name, data: small(data))
    monkeypatch.setattr(train, "train", lambda *_, **__: None)
    monkeypatch.setattr(train, "accuracy", lambda *_: 0.5)


@pytest.mark.parametrize(
    ("room", "function", "left"),
    [
        (train.datasets, "load", None),
        (train, "quantize", None),  # before the training it is tried
        (train, "train", {"flags.json"}),
        (train, "export", {"flags.json", "dense.keras", "sparse.keras"}),
    ],
)
def test_no_memory_is_one_sentence_and_leaves_whole_files(room, function, left, tmp_path, capsys, monkeypatch):
    untrained(monkeypatch)

    def greedy(*_, **__):
        raise MemoryError

    monkeypatch.setattr(room, function, greedy)
    code, _, err = run_main(capsys, output=str(tmp_path / "out"))
    assert code == 1 and re.fullmatch(r"bstf-train: there is not enough memory; give a smaller --batch_size .*\n", err)
    assert (left is None) == (not (tmp_path / "out").exists())
    assert {path.name for path in tmp_path.glob("out/*")} == (left or set())
    for path in tmp_path.glob("out/*.keras"):
        keras.models.load_model(path)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_where_there_is_room(tmp_path, capsys, monkeypatch, disk):
    untrained(monkeypatch)
    place = disk(320)
    code, _, err = run_main(capsys, output=str(place / "out"))
    assert code == 1 and re.fullmatch(r"bstf-train: Can't write .*: no space left on device; make room there.*\n", err)
    assert {path.name for path in place.rglob("*")} == {"out", "flags.json", "dense.keras", "sparse.keras"}
    for path in place.glob("out/*.keras"):
        keras.models.load_model(path)
    subprocess.run(["mount", "-o", "remount,size=16m", str(place)], check=True)
    code, _, err = run_main(capsys, output=str(place / "out"))
    assert (code, err) == (0, "")
    names = {"dense.keras", "sparse.keras", "sparsity.csv", "flags.json", "float", "int8"}
    assert {path.name for path in (place / "out").iterdir()} == names


def killed(monkeypatch, *epochs):
    """Kills the training (as SIGKILL would: no more code of its own runs) each time that so many epochs have ended."""
    kills, ended = list(epochs), [0]

    class Kill(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            ended[0] += 1

        def on_train_batch_begin(self, batch, logs=None):
            if kills and ended[0] == kills[0] and batch == 1:
                kills.pop(0)
                raise SystemExit(9)

    honest = train.train
    monkeypatch.setattr(
        train,
        "train",
        lambda *args, callbacks=(), **kwargs: honest(*args, callbacks=[*callbacks, Kill()], **kwargs),
    )


def dropping(data):
    """A network that draws random numbers in its training."""
    layers = keras.layers
    image = keras.Input(data.input_shape)
    x = layers.Conv2D(16, 3, activation="relu", name="first")(image)
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(24, 3, name="second")(x)))
    x = layers.Dropout(0.3)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(image, layers.Dense(3, activation="softmax", name="classes")(x))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "network", lambda name, data: dropping(data))
    monkeypatch.setattr(train, "export", lambda model, path: None)
    monkeypatch.setattr(train, "quantize", lambda model, images: model)
    flags = {
        "dataset": write_idx(tmp_path / "idx", size=(12, 12)), "classes": ["1", "7", "8"], "limit": 27,
        "augment": ["pad_crop"], "batch_size": 12,
        "schedule": "cubic", "importance": "taylor", "epochs": 2, "retrain_epochs": 3, "distill": 0.5,
    }  # fmt: skip
    assert run_main(capsys, output=str(tmp_path / "whole"), **flags)[0] == 0
    killed(monkeypatch, 1, 3)  # in the dense training, and while blocks go
    for dense in (False, True):
        with pytest.raises(SystemExit):
            run_main(capsys, output=str(tmp_path / "killed"), **flags)
        assert ("Epoch 1/2" in capsys.readouterr().out) != dense
        assert (tmp_path / "killed" / "dense.keras").exists() == dense
        assert not (tmp_path / "killed" / "sparse.keras").exists()
    code, _, err = run_main(capsys, output=str(tmp_path / "killed"), **{**flags, "epochs": 3})
    assert code == 1 and "holds an interrupted run with epochs=2, and not 3: give the same flags" in err
    code, out, err = run_main(capsys, output=str(tmp_path / "killed"), **flags)
    assert (code, err) == (0, "") and "Epoch 1/2" not in out
    for name in ("dense", "sparse"):
        models = [keras.models.load_model(tmp_path / run / f"{name}.keras") for run in ("whole", "killed")]
        for one, other in zip(*(model.get_weights() for model in models)):
            np.testing.assert_array_equal(one, other)
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names == {"dense.keras", "sparse.keras", "sparsity.csv", "flags.json"}
    code, _, err = run_main(capsys, output=str(tmp_path / "killed"), **flags)
    assert code == 1 and "holds a finished run: name another folder" in err


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    data = stripes()
    train.train(small(data), data, epochs=1, checkpoint=tmp_path / "c", verbose=0)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["epoch-0001.weights.h5"]
    with pytest.raises(ValueError, match="epoch-0001.weights.h5' isn't one of 'sequential.*: remove it"):
        other = keras.Sequential([keras.Input((12, 12, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
        train.train(other, data, epochs=2, checkpoint=tmp_path / "c", verbose=0)


def test_data_that_does_not_say_its_length(tmp_path):
    data = stripes()
    endless = Dataset("stripes", data.train.filter(lambda x, y: True), data.test, (12, 12, 1), 2)
    with pytest.raises(ValueError, match="'stripes' doesn't say how many training batches it has"):
        train.train(small(data), endless, epochs=1, verbose=0)


def test_help_has_examples(tmp_path):
    command = [sys.executable, "-m", "bstf.train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0 and "Exit codes: 0" in done.stdout
    assert "bstf-train --output=build/digits" in done.stdout and "Traceback" not in done.stderr
    for flag in ("--augment", "--classes", "--distribute", "--[no]tensorboard", "--[no]recover", "--output"):
        assert flag in done.stdout


def test_console_program(tmp_path):
    command = [sys.executable, "-m", "bstf.train", f"--output={tmp_path / 'out'}", "--ratio=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "bstf-train: ratio is the fraction of zero blocks" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
