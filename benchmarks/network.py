"""Whole networks on the CPU: this package, and what else there is, on the same SavedModels.

    python -m benchmarks.network --network=ResNet50 --density=1 --density=0.5 --dtype=int8 --output=DIR

The networks are those of `keras.applications` with random weights (seed 0), up to their logits, and EfficientNet-Lite0;
`density` is the part of the 8x8 blocks that is kept. All densities of a network are timed in turn. Images are random,
or photos (`--photos`). In int8, networks are quantised with `bstf.quantize`, and OpenVINO computes the same fixed-point
SavedModel in INT8, too; the others have no such path. Effective operations are 2 x multiply-adds on kept blocks, for
pixels that a layer reads: who multiplies zeros too has fewer GFLOPS by this count, and who needs fewer multiplications
(Winograd's method) may have more than the machine's peak.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import app, flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import harness
from benchmarks.harness import Suite, Work
from bstf_compiler import console
from bstf_compiler.files import replacing

if TYPE_CHECKING:
    import keras

FLAGS = flags.FLAGS
NETWORKS = ("ResNet50", "VGG16", "InceptionV3", "MobileNetV2", "EfficientNetLite0")
# Images that a network is quantised with.
_CALIBRATION = 8


@dataclass(frozen=True)
class Case:
    """A network in a folder: `model`, its SavedModel; `network.tflite`; `images.npz`, images and Keras' outputs."""

    folder: Path
    network: str
    density: float
    batch: int
    threads: int
    operations: int
    dtype: str

    @property
    def name(self) -> str:
        """The network."""
        return self.network

    def fields(self) -> dict[str, Any]:
        """What tells a record of this case from others."""
        return {name: value for name, value in asdict(self).items() if name not in ("folder", "operations")}

    def work(self, function: Callable[[np.ndarray], np.ndarray]) -> Work:
        """The network as a function of images."""
        with np.load(self.folder / "images.npz") as arrays:
            x, right = (np.resize(arrays[name], (self.batch, *arrays[name].shape[1:])) for name in ("x", "y"))
        error = float(np.abs(np.float64(function(x)) - right).max() / np.abs(right).max())
        return Work(lambda: function(x), error)


def build(network: str) -> keras.Model:
    """A network with random weights, whose outputs are logits."""
    import keras

    from bstf import applications

    keras.utils.set_random_seed(0)
    if network == "EfficientNetLite0":
        return applications.efficientnet_lite0()
    return getattr(keras.applications, network)(weights=None, classifier_activation=None)


def normalise(model: keras.Model, x: np.ndarray) -> None:
    """Gives batch normalisations the mean and variance that they meet, or random weights would let signals fade."""
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(x, training=True)


def images(shape: tuple[int, int, int], photos: str | None) -> np.ndarray:
    """Images to calibrate and to infer: the photos of a folder in [-1, 1], or random ones."""
    import keras

    if photos is None:
        return np.random.default_rng(0).normal(size=(_CALIBRATION, *shape)).astype(np.float32)
    files = sorted(path for path in Path(photos).iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise FileNotFoundError(f"no photos (jpg, jpeg, png) in '{photos}'")
    loaded = [keras.utils.img_to_array(keras.utils.load_img(path, target_size=shape[:2])) for path in files]
    return np.stack(loaded).astype(np.float32) / 127.5 - 1


def prepare(folder: Path, network: str, density: float, dtype: str, photos: str | None = None) -> int:
    """Writes a network into a folder, and measures the machine for it; returns its effective operations an image."""
    import bstf
    from bstf_compiler import Engine

    model = build(network)
    x = images(model.input_shape[1:], photos)
    if density < 1:
        model = bstf.sparsify(model, block=8, ratio=1 - density)
    normalise(model, x[:_CALIBRATION])
    if dtype == "int8":
        model = bstf.quantize(model, x[:_CALIBRATION])
    bstf.export(model, folder / "model")
    np.savez(folder / "images.npz", x=x, y=model.predict(x, verbose=0))
    harness.wait_for_quiet()  # what was just written may still be on its way to the disk
    engine = Engine(folder / "model", recalibrate=dtype == "float32")  # earlier measurements may have been disturbed
    return sum(layer.operations for layer in engine.profile(x[:1], repeats=1).layers)


def write_lite(folder: Path) -> None:
    """Converts the SavedModel in a folder for LiteRT."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / "model"))
    (folder / "network.tflite").write_bytes(converter.convert())


def bstf_engine(case: Case) -> Work:
    """The engine of this package."""
    from bstf_compiler import Engine

    work = case.work(Engine(case.folder / "model", threads=case.threads))
    if case.dtype == "int8" and work.error:
        raise ValueError(f"the engine isn't equal to Keras on {case}: off by {work.error:.2g} of the largest logit")
    return work


def openvino(case: Case) -> Work:
    """OpenVINO: fixed-point networks in INT8, others in float32 (it would choose bfloat16 where the machine has it)."""
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": case.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = ov.convert_model(case.folder / "model")
    shape = model.inputs[0].partial_shape
    shape[0] = case.batch
    model.reshape(shape)
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    return case.work(lambda x: request.infer([x], share_inputs=True)[0])


def litert(case: Case) -> Work:
    """LiteRT with XNNPACK."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(case.folder / "network.tflite"), num_threads=case.threads)
    source, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.resize_tensor_input(source["index"], [case.batch, *source["shape"][1:]])
    interpreter.allocate_tensors()

    def run(x: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(source["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return case.work(run)


def tensorflow(case: Case) -> Work:
    """TensorFlow, the SavedModel's own function."""
    import tensorflow as tf

    if tf.config.threading.get_intra_op_parallelism_threads() != case.threads:
        tf.config.threading.set_intra_op_parallelism_threads(case.threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    model = tf.saved_model.load(str(case.folder / "model"))
    return case.work(lambda x: model.serve(tf.constant(x)).numpy())


PEERS: dict[str, Callable[[Case], Work]] = {one.__name__: one for one in (bstf_engine, openvino, litert, tensorflow)}
# How wrong a result may be, as a part of the largest logit. Networks of random weights enlarge every rounding, most on
# images that are noise; on photos the engine stays below 1e-5. OpenVINO rounds halves of integers to even, too.
# OpenVINO's INT8 sums in 16 bits where a CPU has no VNNI, and what doesn't fit is wrong.
SUITE = Suite("network", PEERS, "openvino", {"float32": 5e-4, "int8": 0.5}, approximate=("openvino",))
# Who computes a type.
COMPUTES = {"float32": tuple(PEERS), "int8": ("bstf_engine", "openvino")}


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Milliseconds of every peer, a group a network, density and batch."""
    done = [one for one in records if "seconds" in one]

    def group(one: dict[str, Any]) -> tuple:
        return one["network"], one["dtype"], one["batch"], one["density"]

    groups = list(dict.fromkeys(group(one) for one in done))
    peers = list(dict.fromkeys(one["peer"] for one in done))
    figure = Figure(figsize=(2 + 1.3 * len(groups), 4.5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    for place, peer in enumerate(peers):
        times = {group(one): one["seconds"] * 1e3 / one["batch"] for one in done if one["peer"] == peer}
        shift, width = (place - (len(peers) - 1) / 2) * 0.8 / len(peers), 0.8 / len(peers)
        drawn = [(index + shift, times[key]) for index, key in enumerate(groups) if key in times]
        axes.bar(*zip(*drawn), width, label=peer)
    labels = [f"{network}\n{dtype}\nbatch {batch}\ndensity {density:g}" for network, dtype, batch, density in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=7)
    axes.set(ylabel="ms an image, median")
    axes.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def define_flags() -> None:
    """The flags of the program."""
    flags.DEFINE_multi_enum("network", list(NETWORKS), NETWORKS, "networks of keras.applications; default: all")
    flags.DEFINE_multi_float("density", [1.0, 0.5], "fractions of the 8x8 blocks that are kept", 0.01, 1.0)
    flags.DEFINE_multi_integer("batch", [1], "images of an inference", lower_bound=1)
    flags.DEFINE_multi_enum("dtype", ["float32", "int8"], ["float32", "int8"], "what to compute in")
    flags.DEFINE_string("photos", None, "folder of photos to infer; default: random images")
    flags.DEFINE_integer("threads", 2, "number of threads", lower_bound=1)
    flags.DEFINE_multi_enum("algorithm", [], list(PEERS), "who infers; default: all")
    flags.DEFINE_integer("rounds", 5, "samples of every peer", lower_bound=3)
    flags.DEFINE_string("output", None, "folder for network.jsonl, network.csv and network.png", required=True)


def main(_: Sequence[str]) -> None:
    """Runs the cases."""
    if not any(name in COMPUTES[dtype] for dtype in FLAGS.dtype for name in FLAGS.algorithm or PEERS):
        who = ", ".join(FLAGS.algorithm)
        raise app.UsageError(f"{who} can't compute {FLAGS.dtype[0]}: choose another --algorithm.")
    folder = Path(FLAGS.output)
    log = harness.Log(folder, "network")
    ceilings = {FLAGS.threads: harness.roofs(FLAGS.dtype, FLAGS.threads)}
    log.header({"machine": harness.machine(), "roofs": ceilings})
    with tempfile.TemporaryDirectory() as work:
        for network, dtype in itertools.product(FLAGS.network, FLAGS.dtype):
            names = [name for name in FLAGS.algorithm or PEERS if name in COMPUTES[dtype]]
            if not names:  # nobody who was asked for computes in this type
                continue
            cases = []
            for index, density in enumerate(FLAGS.density):
                place = Path(work) / str(index)
                with Console(stderr=True).status(f"writing {network} in {dtype} with {density:.0%} of its blocks"):
                    operations = prepare(place, network, density, dtype, FLAGS.photos)
                    if "litert" in names:
                        write_lite(place)
                cases += [
                    Case(place, network, density, batch, FLAGS.threads, operations * batch, dtype)
                    for batch in FLAGS.batch
                ]
            # Densities in turn: the time of a dense network some minutes ago tells little on a shared machine.
            SUITE.measure(
                [[one for one in cases if one.batch == batch] for batch in FLAGS.batch], names, FLAGS.rounds, log
            )
            for place in Path(work).iterdir():
                shutil.rmtree(place)
    log.write_csv()
    SUITE.show(log, ceilings)
    plot(log.records, folder / "network.png")


if __name__ == "__main__":
    console.run("network", __doc__, main, define_flags)
