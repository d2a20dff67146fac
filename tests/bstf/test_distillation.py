"""Distiller: its loss against NumPy, and that training, callbacks and files are the student's."""

import keras
import numpy as np
import pytest

import bstf
from bstf.callbacks import BlockSparsity
from bstf.schedules import Cubic


def classifier(seed, softmax=False, classes=4):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6, 6, 8)),
            keras.layers.Conv2D(16, 3, activation="relu", name="conv"),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.GlobalAveragePooling2D(name="pool"),
            keras.layers.Dense(classes, activation="softmax" if softmax else None, name="predictions"),
        ]
    )


def data(n=32):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 6, 6, 8)).astype("float32"), rng.integers(0, 4, n)


def log_softmax(logits):
    logits = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("student_softmax, teacher_softmax", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_hintons(student_softmax, teacher_softmax, weighted):
    student, teacher = classifier(1, student_softmax), classifier(2, teacher_softmax)
    x, y = data()
    weights = np.random.default_rng(1).random(len(x)).astype("float32") if weighted else None
    distiller = bstf.Distiller(student, teacher, temperature=3.0, soft_weight=0.7)
    distiller.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=not student_softmax))
    outputs = [np.asarray(model(x, training=False)) for model in (student, teacher)]
    logits = [np.log(out) if soft else out for out, soft in zip(outputs, (student_softmax, teacher_softmax))]
    student_log, teacher_log = (log_softmax(one / 3.0) for one in logits)
    soft = (np.exp(teacher_log) * (teacher_log - student_log)).sum(axis=-1)
    hard = -log_softmax(logits[0])[np.arange(len(y)), y]
    expected = ((0.7 * 9 * soft + 0.3 * hard) * (1 if weights is None else weights)).mean()
    found = distiller.compute_loss(x, y, student(x, training=False), weights)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    validation = distiller.compute_loss(x, y, student(x, training=False), weights, training=False)
    assert float(validation) == pytest.approx((hard * (1 if weights is None else weights)).mean(), rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_regularisers_count_whole(share):
    student, teacher = classifier(1), classifier(2)
    x, y = data()

    def loss(regularizer):
        student.get_layer("conv").kernel.regularizer = regularizer
        distiller = bstf.Distiller(student, teacher, soft_weight=share)
        distiller.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        outputs = distiller(x)
        return float(distiller.compute_loss(x, y, outputs, training=True))

    penalty = 0.5 * float(np.square(student.get_layer("conv").kernel).sum())
    assert loss(keras.regularizers.L2(0.5)) - loss(None) == pytest.approx(penalty, rel=1e-4)


def test_training_reaches_the_student_and_leaves_the_teacher(tmp_path):
    teacher = classifier(2)
    student = bstf.sparsify(teacher, block=4, ratio=0)
    taught = [weight.copy() for weight in teacher.get_weights()]
    x, y = data()
    distiller = bstf.Distiller(student, teacher)
    distiller.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    callbacks = [
        BlockSparsity(Cubic(0.5, end=2)),
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
    ]
    history = distiller.fit(x, y, epochs=3, verbose=0, validation_data=(x, y), callbacks=callbacks).history
    assert {"loss", "accuracy", "val_loss", "val_accuracy", "block_ratio"} == history.keys()
    assert len(distiller.weights) == len(student.weights)
    for before, after in zip(taught, teacher.get_weights()):
        np.testing.assert_array_equal(before, after)
    assert (np.asarray(student.get_layer("conv").gamma) == 0).sum() == 4  # of 2x4
    assert (np.asarray(student.get_layer("conv").kernel) != np.asarray(teacher.get_layer("conv").kernel)).any()
    np.testing.assert_array_equal(distiller.predict(x, verbose=0), student.predict(x, verbose=0))
    saved = keras.models.load_model(tmp_path / "3.keras")
    np.testing.assert_array_equal(saved.predict(x, verbose=0), student.predict(x, verbose=0))
    assert type(saved) is keras.Sequential


def test_a_student_learns_without_labels():
    student, teacher = classifier(1), classifier(2)
    x, y = data(64)
    distiller = bstf.Distiller(student, teacher, soft_weight=1.0)
    distiller.compile(keras.optimizers.Adam(0.02), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def agreement():
        return (student.predict(x, verbose=0).argmax(-1) == teacher.predict(x, verbose=0).argmax(-1)).mean()

    before = agreement()
    history = distiller.fit(x, np.zeros_like(y), epochs=25, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] / 2
    assert agreement() > max(before, 0.75)


@pytest.mark.parametrize(
    "kwargs, sentence",
    [
        ({"temperature": 0}, "temperature must be above 0; got 0"),
        ({"soft_weight": 1.5}, r"soft_weight is the teacher's share of the loss, in \[0, 1\]; got 1.5"),
        ({"teacher": classifier(1, classes=3)}, r"outputs \(None, 4\) and the teacher '.*' \(None, 3\)"),
    ],
)
def test_errors_are_sentences(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        bstf.Distiller(**{"student": classifier(1), "teacher": classifier(2), **kwargs})
