"""Fills the tables of README.md and the documents from benchmarks/results: python docs/tables.py.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a function below.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rows(path: str) -> list[dict[str, str]]:
    with (RESULTS / path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *map(list, body)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


PEERS = {"bstf_engine": "`bstf`", "openvino": "OpenVINO", "litert": "LiteRT, XNNPACK", "tensorflow": "TensorFlow"}
KEPT = {"1.0": "all blocks", "0.5": "half", "0.25": "a quarter"}


def network_times(networks: Iterable[str], densities: Iterable[str], dtypes: Iterable[str]) -> str:
    """Medians of one image: a row a peer, a column a network, number format and density."""
    found = {
        (row["network"], row["dtype"], row["density"], row["peer"]): float(row["seconds"])
        for network in networks
        for row in rows(f"network/{network.lower()}/network.csv")
        if (row["batch"], row["threads"]) == ("1", "2") and row["seconds"]
    }
    columns = [(n, t, d) for n in networks for t in dtypes for d in densities if (n, t, d, "bstf_engine") in found]

    def cell(key: tuple[str, str, str], peer: str) -> str:
        if (*key, peer) not in found:
            return ""
        fastest = min(found[(*key, one)] for one in PEERS if (*key, one) in found)
        seconds = found[(*key, peer)]
        return f"**{milliseconds(seconds)}**" if seconds == fastest else milliseconds(seconds)

    head = [f"{network}{' INT8' * (dtype == 'int8')}, {KEPT[density]}" for network, dtype, density in columns]
    return markdown(["one image, 2 threads", *head], ([PEERS[p], *(cell(key, p) for key in columns)] for p in PEERS))


def speed() -> str:
    return network_times(["ResNet50"], ["1.0", "0.5"], ["float32", "int8"])


def network() -> str:
    return "\n".join(
        network_times([name], KEPT, ["float32", "int8"]) for name in ("ResNet50", "InceptionV3", "VGG16")
    )  # fmt: skip


NAMES = {"resnet20": "ResNet-20", "resnet56": "ResNet-56"}


def accuracy() -> str:
    """The best sparse network of each study beside the dense one that was trained for as many epochs, and in INT8."""
    body = []
    for name, written in NAMES.items():
        int8 = {row["weights"].removesuffix(", seed 0"): row for row in rows(f"int8/{name}/int8.csv")}
        (sparse,) = (weights for weights in int8 if weights.startswith("8x8 50%"))
        epochs = sparse.rpartition(", ")[2]
        trained = {row["trial"]: row["accuracy"] for row in rows(f"accuracy/{name}/summary.csv")}
        numbers = trained[f"dense, {epochs}"], trained[sparse], int8[sparse]["int8"]
        body.append([f"{written}, {epochs}", *(percent(number) for number in numbers)])
    return markdown(["top-1", "dense", "half of the 8x8 blocks zero", "the same in INT8"], body)


def int8() -> str:
    """What quantisation costs dense and sparse networks."""
    body = (
        [NAMES[name], row["weights"].removesuffix(", seed 0"), percent(row["float32"]), percent(row["int8"])]
        for name in NAMES
        for row in rows(f"int8/{name}/int8.csv")
    )
    return markdown(["network", "weights", "float32", "INT8"], body)


def percent(number: str) -> str:
    return f"{100 * float(number):.2f} %"


DEVICES = ("aie2_2x2", "aie2_4x4", "aie2_6x6", "aie2_8x8")


def array_time() -> str:
    """Milliseconds of an image, dense -> half of the blocks zero, by mesh."""
    found = {(row["network"], row["device"]): row for row in rows("aie_sweep/sweep.csv")}

    def cell(network: str, device: str) -> str:
        row = found[network, device]
        return f"{float(row['dense_ms']):.2f} → {float(row['sparse_50%_ms']):.2f} ms"

    networks = dict.fromkeys(network for network, _ in found)
    return markdown(["", *(f"`{d}`" for d in DEVICES)], ([n, *(cell(n, d) for d in DEVICES)] for n in networks))


def sweep() -> str:
    """All cells of the sweep."""
    names = {
        "network": "network", "device": "device", "dense_ms": "dense, ms", "dense_over_bound": "over its bound",
        "sparse_50%_ms": "half zero, ms", "sparse_50%_over_bound": "over its bound", "speedup_50%": "dense / half",
        "published_dense_ms": "published dense, ms", "published_sparse_ms": "published half, ms",
    }  # fmt: skip

    def cell(text: str) -> str:
        return f"{float(text):.2f}" if re.fullmatch(r"[\d.]+", text) else text

    return markdown(names.values(), ([cell(row[name]) for name in names] for row in rows("aie_sweep/sweep.csv")))


def resnet50() -> str:
    """ResNet50 on one mesh, dense and sparse."""
    results = json.loads((RESULTS / "resnet50" / "results.json").read_text(encoding="utf-8"))
    dense, sparse = results["dense"], results["sparse"]
    lines = {
        "weights, biases and indices in DDR, MiB": ("weight_bytes", 2.0**20),
        "effective multiply-adds, 10⁹": ("effective_macs", 1e9),
        "estimated time of an image, `exact`, ms": ("estimated_seconds", 1e-3),
    }
    return markdown(
        [f"ResNet50 on `{results['device']}`", "dense", "half of the blocks", "ratio"],
        (
            [name, f"{dense[key] / unit:.2f}", f"{sparse[key] / unit:.2f}", f"{sparse[key] / dense[key]:.2f}"]
            for name, (key, unit) in lines.items()
        ),
    )


def block_matmul() -> str:
    """Products of a dense and a block-sparse matrix."""
    peers = {"dense": "NumPy, dense", "bstf": "`bstf`", "bstf_packed": "`bstf`, x packed before"}
    peers |= {"mkl_bsr": "MKL BSR", "scipy_bsr": "SciPy BSR"}
    found: dict[str, dict[str, str]] = {}
    for row in rows("block_matmul/half/spmm.csv"):
        if row["dtype"] == "float32":
            found.setdefault(row["case"], {})[row["peer"]] = f"{float(row['seconds']) * 1e3:.2f}"
    head = ["float32, half of the 8x8 blocks, 2 threads, ms", *peers.values()]
    return markdown(head, ([case.replace("x", " x "), *(times[p] for p in peers)] for case, times in found.items()))


def studies() -> str:
    """Trials of the accuracy studies, those with the best known recipe first."""
    body = []
    for folder in ("resnet20", "resnet20_8_epochs", "resnet56", "resnet56_3_epochs"):
        for row in rows(f"accuracy/{folder}/summary.csv"):
            name = NAMES[folder.partition("_")[0]]
            body.append([name, row["trial"], row["seeds"], percent(row["before"]), percent(row["accuracy"])])
    return markdown(["network", "trial", "seeds", "before training", "after"], body)


TABLES: dict[str, Callable[[], str]] = {
    one.__name__: one for one in (speed, network, accuracy, int8, array_time, sweep, resnet50, block_matmul, studies)
}


def filled(text: str) -> str:
    """The text with its tables made anew."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def pages() -> list[Path]:
    """README and all documents."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
