"""What the demo adds to the report page of its programs: how right the networks are, and that the program is."""

from collections.abc import Iterable, Mapping
from typing import Any

from bstf_compiler.aie.report import Section
from bstf_compiler.aie.report.words import scrolling, tag, text

HEADINGS = ("network", "accuracy (test images)", "weight bytes", "multiply-adds", "time, estimated")
NOTE = (
    "dense, sparse: float32 in Keras; bytes of the weights that aren't zero. INT8: the quantised network in Keras; "
    "bytes of the program's packed weights, biases and block indices. simulated: the program of the sparse INT8 "
    "network, executed byte by byte. Multiply-adds and time are of one image; zero blocks don't count."
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the results as the table shows it, one text a heading."""
    seconds = row["seconds"]
    return [
        row["name"],
        f"{row['accuracy']:.1%} of {row['images']:,}",
        f"{row['weight_bytes']:,}",
        f"{row['macs']:,}",
        "-" if seconds is None else f"{seconds * 1e6:.2f} µs",
    ]


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The first section of the page.

    Args:
        results: what results.json holds.
    """
    recipe = results["recipe"]
    intro = (
        f"A small ResNet trained on {text(results['dataset'])}; {recipe['ratio']:.0%} of its 8x8 weight blocks made "
        "zero and trained back; quantised to INT8, exported, compiled and executed in simulation. Seed "
        f"{recipe['seed']}. " + tag("a", "All numbers", href="results.json") + "."
    )
    content = _verdict(results["simulation"]) + _table(results["networks"]) + tag("p", text(NOTE), class_="quiet")
    return [Section("accuracy", "Accuracy", "From training to the array", intro, content)]


def files(networks: Iterable[str]) -> dict[str, str]:
    """What the demo wrote, by its place in the demo's folder."""
    found = {"results.json": "all numbers of the demo", "timeline.png": "both timelines as a picture"}
    for name in networks:
        found |= {
            f"{name}/model/": f"the {name} network, exported",
            f"{name}/program/report.html": "a page like this one about its program alone",
            f"{name}/program/program.asm": "the program's instructions and memory map",
            f"{name}/program/data.bin": "its packed weights",
            f"{name}/program/layers.csv": "times of its layers",
            f"{name}/program/trace.json": "its timeline, for ui.perfetto.dev",
        }
    return found


def _verdict(simulation: Mapping[str, Any]) -> str:
    equal, images = simulation["equal"], simulation["images"]
    words = (
        f"The simulated program equals the integer reference, in each of its {len(simulation['compared']) - 1} layer "
        f"outputs and in what it returns, on <strong>{equal} of {images}</strong> test images."
    )
    return tag("p", words, class_="verdict equal" if equal == images else "verdict different")


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The networks, with a bar of each accuracy."""
    head = "".join(tag("th", text(one), scope="col") for one in HEADINGS)
    body = ""
    for row in rows:
        name, accuracy, *rest = map(text, cells(row))
        bar = tag("span", tag("i", style=f"width:{100 * row['accuracy']:.1f}%"), class_="meter", aria_hidden="true")
        others = "".join(tag("td", one) for one in rest)
        body += tag("tr", tag("th", name, scope="row") + tag("td", bar + tag("span", accuracy)) + others) + "\n"
    return scrolling(tag("table", tag("thead", tag("tr", head)) + tag("tbody", body)), "Networks")
