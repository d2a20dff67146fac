"""Does a trained Γ choose better blocks than the norm does? Ways to choose, at the same ratio and the same epochs.

    python -m benchmarks.trainable_gamma --output=benchmarks/results/trainable_gamma

A dense network is trained once for each seed. Every method then gets the same number of epochs: "l2" chooses all blocks
at once, by their norms, and retrains; the others train for `warm_up` of the epochs in their own way, choose, and
retrain for the rest. Each of the two trainings has its own cosine of the learning rate. "l2, later" trains on without
anything new in its warm-up: what a method does better than that is due to the method.

Writes runs.jsonl, a line for each run as it ends: an interrupted program goes on where it stopped. Prints means and
standard deviations over the seeds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

import bstf
from benchmarks.records import Records
from bstf import console, datasets
from bstf.blocks import BlockShape
from bstf.importance import model_scores
from bstf.penalties import BoxedGammaRange, BoxedGammaRatio, GammaRange
from bstf.places import eligible
from bstf.selection import select_all
from bstf.training import network, train

FLAGS = flags.FLAGS
_CONSOLE = Console(width=130)


@dataclass(frozen=True)
class Method:
    """A way to choose blocks.

    Attributes:
        importance: by what they are compared in the end, as in `bstf.sparsify`.
        prepare: `prepare(dense, ratio)` is the model to warm up; None if there is no warm-up.
    """

    importance: str
    prepare: Callable[[keras.Model, float], keras.Model] | None


def trained(penalty: Callable[[float], keras.regularizers.Regularizer] | None = None) -> Method:
    """A Γ that multiplies the kernel, with a penalty of the ratio."""

    def prepare(dense: keras.Model, ratio: float) -> keras.Model:
        regularizer = penalty and penalty(ratio)
        return bstf.sparsify(dense, ratio=0, trainable_gamma=True, gamma_regularizer=regularizer)

    return Method("gamma", prepare)


def methods(strengths: Sequence[float], lasso: float) -> dict[str, Method]:
    """All methods by the names that the table shows."""
    found = {
        "l2": Method("l2", None),
        "l2, later": Method("l2", lambda dense, ratio: bstf.sparsify(dense, ratio=0)),
        "group lasso": Method("l2", lambda dense, ratio: bstf.sparsify(dense, ratio=0, group_lasso=lasso)),
        "straight-through": Method(
            "gamma", lambda dense, ratio: bstf.sparsify(dense, ratio=ratio, trainable_gamma="straight_through")
        ),
        "Γ, no penalty": trained(),
    }
    for strength in strengths:
        how = {"strength": strength}
        found |= {
            f"Γ, eq. 13 x {strength:g}": trained(lambda ratio, how=how: GammaRange(ratio, **how)),
            f"Γ, eq. 14 x {strength:g}": trained(lambda ratio, how=how: BoxedGammaRange(ratio, **how)),
            f"Γ, eq. 15 x {strength:g}": trained(lambda ratio, how=how: BoxedGammaRatio(ratio, **how)),
            f"Γ, eq. 15 reversed x {strength:g}": trained(lambda ratio, how=how: BoxedGammaRatio(ratio, **how, sign=1)),
        }
    return found


def run(method: Method, dense: keras.Model, data: datasets.Dataset, ratio: float, epochs: int, warm_up: int) -> dict:
    """Warms up, chooses and retrains; returns what there is to know of it."""
    start, model, left = time.perf_counter(), dense, epochs
    found: dict[str, Any] = {}
    if method.prepare is not None:
        model, left = method.prepare(dense, ratio), epochs - warm_up
        found["warm_accuracy"] = train(model, data, epochs=warm_up, verbose=0).history["val_accuracy"][-1]
        spread = [np.ptp(keras.ops.convert_to_numpy(layer.soft_gamma)) for layer in soft_layers(model)]
        if spread:
            found["gamma_range"] = float(np.mean(spread))
    sparse = bstf.sparsify(model, ratio=ratio, importance=method.importance)
    found["same_as_l2"] = agreement(sparse, dense, ratio)
    history = train(sparse, data, epochs=left, verbose=0).history
    return {
        **found,
        "accuracy": history["val_accuracy"][-1],
        "loss": history["val_loss"][-1],
        "block_ratio": bstf.report(sparse).ratio,
        "seconds": time.perf_counter() - start,
    }


def soft_layers(model: keras.Model) -> list[keras.Layer]:
    """The layers with a trained Γ."""
    return [layer for layer in model.layers if getattr(layer, "trainable_gamma", False)]


def agreement(sparse: keras.Model, dense: keras.Model, ratio: float) -> float:
    """The fraction of blocks that are as the norms of the dense network would have them."""
    targets = eligible(dense, BlockShape.of(8))
    by_norm = select_all(model_scores(dense, targets, BlockShape.of(8), "l2"), ratio)
    gammas = {path: keras.ops.convert_to_numpy(layer.gamma) for path, layer in eligible(sparse, BlockShape.of(8))}
    return float(np.concatenate([(gammas[path] == gamma).ravel() for path, gamma in by_norm.items()]).mean())


@dataclass(frozen=True)
class Case:
    """What tells a run from the others; a file holds every case once."""

    dataset: str
    network: str
    image_size: int
    method: str
    ratio: float
    seed: int
    dense_epochs: int
    epochs: int
    warm_up: int
    lasso: float


def cases() -> Iterator[Case]:
    """What the flags ask for, seed by seed."""
    names = methods(FLAGS.strength, FLAGS.group_lasso)
    for seed in range(FLAGS.seeds):
        for ratio in FLAGS.ratio:
            for name in FLAGS.method or names:
                yield Case(
                    dataset=FLAGS.dataset,
                    network=FLAGS.network,
                    image_size=FLAGS.image_size,
                    method=name,
                    ratio=ratio,
                    seed=seed,
                    dense_epochs=FLAGS.dense_epochs,
                    epochs=FLAGS.epochs,
                    warm_up=FLAGS.warm_up,
                    lasso=FLAGS.group_lasso,
                )


def study(path: Path) -> list[dict[str, Any]]:
    """Runs all cases that aren't in the file yet; returns the records of all that are asked for."""
    wanted, records = list(cases()), Records(path)
    known = methods(FLAGS.strength, FLAGS.group_lasso)
    before: Any = None
    for case in wanted:
        if any(asdict(case).items() <= record.items() for record in records):
            continue
        if before is None or before[0] != case.seed:
            keras.utils.set_random_seed(case.seed)
            data = datasets.load(case.dataset, seed=case.seed, image_size=(FLAGS.image_size,) * 2)
            dense = network(case.network, data)
            history = train(dense, data, epochs=case.dense_epochs, verbose=0).history
            before = case.seed, data, dense, history["val_accuracy"][-1]
        _, data, dense, reached = before
        keras.utils.set_random_seed(case.seed)
        result = run(known[case.method], dense, data, case.ratio, case.epochs, case.warm_up)
        records.add({**asdict(case), "dense_accuracy": reached, **result})
        _CONSOLE.print(
            f"seed {case.seed}, ratio {case.ratio}, {case.method}: {result['accuracy']:.4f}", highlight=False
        )
    return [record for record in records if any(asdict(case).items() <= record.items() for case in wanted)]


def table(records: Sequence[dict[str, Any]]) -> Table:
    """Means and standard deviations over the seeds, a line for each method and ratio."""
    seeds = sorted({record["seed"] for record in records})
    made = Table(title=f"{records[0]['network']} on {records[0]['dataset']}, {len(seeds)} seeds, test images")
    for name in ("ratio", "method", "dense", "accuracy", "over l2", "loss", "Γ as l2's", "range of Γ"):
        made.add_column(name, justify="left" if name == "method" else "right")
    for ratio, method in dict.fromkeys((record["ratio"], record["method"]) for record in records):
        group = [record for record in records if (record["ratio"], record["method"]) == (ratio, method)]
        base = {one["seed"]: one["accuracy"] for one in records if (one["ratio"], one["method"]) == (ratio, "l2")}
        gains = [one["accuracy"] - base[one["seed"]] for one in group if one["seed"] in base]
        made.add_row(
            f"{ratio:g}",
            method,
            *(spread([one[key] for one in group], 100, 2) for key in ("dense_accuracy", "accuracy")),
            spread(gains, 100, 2, "+") if gains else "",
            spread([one["loss"] for one in group], 1, 4),
            f"{statistics.mean(one['same_as_l2'] for one in group):.0%}",
            spread([one["gamma_range"] for one in group], 1, 3) if "gamma_range" in group[0] else "",
        )
    return made


def spread(values: Sequence[float], scale: float, digits: int, sign: str = "") -> str:
    """Mean ± standard deviation."""
    scaled = [value * scale for value in values]
    deviation = f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.mean(scaled):{sign}.{digits}f}{deviation}"


def define_flags() -> None:
    """The flags of the program."""
    flags.DEFINE_string("dataset", datasets.MNIST5K, "as for bstf-train: a name or a folder")
    flags.DEFINE_string("network", "small_resnet", "as for bstf-train: a name or a .keras file")
    flags.DEFINE_integer("image_size", 14, "height and width to resize the images to", lower_bound=1)
    flags.DEFINE_multi_float("ratio", [0.75], "fractions of zero blocks", 0.0, 0.99)
    flags.DEFINE_integer("seeds", 3, "number of seeds, from 0", lower_bound=1)
    flags.DEFINE_integer("dense_epochs", 4, "epochs of the dense training", lower_bound=1)
    flags.DEFINE_integer("epochs", 4, "epochs of every method after it", lower_bound=2)
    flags.DEFINE_integer("warm_up", 2, "epochs of these before blocks are chosen", lower_bound=1)
    flags.DEFINE_multi_float("strength", [1.0], "factors of the penalties on Γ", 0.0)
    flags.DEFINE_float("group_lasso", 1e-4, "strength of the group lasso", 0.0)
    flags.DEFINE_multi_string("method", [], "which methods, by their names in the table; default: all")
    flags.DEFINE_string("output", None, "folder for runs.jsonl", required=True)


def check_flags() -> None:
    """Raises a ValueError for flags that don't go together."""
    if FLAGS.warm_up >= FLAGS.epochs:
        raise ValueError(f"--warm_up={FLAGS.warm_up} leaves nothing of --epochs={FLAGS.epochs} to retrain in.")
    known = methods(FLAGS.strength, FLAGS.group_lasso)
    unknown = [name for name in FLAGS.method if name not in known]
    if unknown:
        raise ValueError(f"There is no method {unknown[0]!r}; there are {', '.join(map(repr, known))}.")


def main(_: Sequence[str]) -> None:
    """Runs what is missing and prints the table."""
    check_flags()
    _CONSOLE.print(table(study(Path(FLAGS.output) / "runs.jsonl")))


if __name__ == "__main__":
    console.run("trainable_gamma", __doc__, main, define_flags)
