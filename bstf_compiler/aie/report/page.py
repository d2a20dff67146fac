"""One HTML file about a program: what it takes, where the time goes, what it skips. It needs only a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np

from bstf_compiler.aie.explain import Explanation, explain
from bstf_compiler.aie.report import sections
from bstf_compiler.aie.report.data import Panel, page_data
from bstf_compiler.aie.report.words import tag, text
from bstf_compiler.files import replacing

_PAGE = Path(__file__).with_name("page")
_SCRIPTS = ("base.js", "axis.js", "timeline.js", "memory.js", "roofline.js", "table.js", "gammas.js", "start.js")


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; `content` and `intro` are HTML, `link` is what leads to it."""

    name: str
    link: str
    heading: str
    intro: str
    content: str


def write_report(
    path: str | Path,
    panels: Sequence[Panel],
    gammas: Mapping[str, np.ndarray] | None = None,
    first: Sequence[Section] = (),
    files: Mapping[str, str] | None = None,
    title: str = "",
) -> None:
    """Writes the page.

    Args:
        path: file to write. Replaced only when complete.
        panels: the program that the page is about, or the dense network's program and it.
        gammas: Γ of its convolutions by layer, bool (input blocks, output blocks); see `gammas_of`.
        first: sections to come before all others.
        files: what else there is to read: addresses relative to the page, and what they hold.
        title: of the page; by default the network's name.

    Raises:
        ValueError: no panel, more than two, or two of different devices.
        FileNotFoundError: the folder of `path` does not exist.

    Example:
        >>> write_report("report.html", [Panel("", program, program.estimate())])
    """
    if not 1 <= len(panels) <= 2:
        raise ValueError(f"A report is about one program, or a dense one and it; it was given {len(panels)}.")
    if panels[0].code.device != panels[-1].code.device:
        one, other = (panel.code.device.name for panel in panels)
        raise ValueError(f"the dense program is for {one}, this one for {other}; compile both for one")
    with replacing(path) as temporary:
        temporary.write_text(_page(panels, gammas or {}, first, files or {}, title), encoding="utf-8")


def _page(
    panels: Sequence[Panel],
    gammas: Mapping[str, np.ndarray],
    first: Sequence[Section],
    files: Mapping[str, str],
    title: str,
) -> str:
    subject, device = panels[-1], panels[-1].code.device
    shown = [*first, *_sections(panels, gammas, files)]
    about = (
        f"{device.columns} x {device.rows} AIE2 cores at {device.clock_hz / 1e9:g} GHz. Times are estimates "
        f"for a model of the array ({subject.estimate.cost_model} cost model), not measurements."
    )
    if subject.estimate.host:
        about += f" On the host, in none of the times: {'; '.join(subject.estimate.host)}."
    # A "<" inside a string could end the script element; its JSON escape is the same string.
    data = json.dumps(page_data(panels, gammas), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template(_read("page.html")).substitute(
        title=text(f"{title or subject.code.name} on {device.name}"),
        about=text(about),
        style=_read("page.css"),
        links="".join(tag("li", tag("a", text(one.link), href=f"#{one.name}")) + "\n" for one in shown),
        sections="".join(_section(one) for one in shown),
        data=data,
        script="".join(map(_read, _SCRIPTS)),
    )


def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _section(one: Section) -> str:
    heading = tag("h2", text(one.heading), id=f"{one.name}-heading")
    intro = tag("p", one.intro, class_="intro") if one.intro else ""
    return tag("section", heading + intro + one.content, id=one.name, aria_labelledby=f"{one.name}-heading") + "\n"


def _sections(panels: Sequence[Panel], gammas: Mapping[str, np.ndarray], files: Mapping[str, str]) -> Iterator[Section]:
    subject, dense = panels[-1], panels[0] if len(panels) > 1 else None
    why = _explanation(subject, dense)
    facts = tag("dl", sections.facts(subject, dense, gammas), class_="facts")
    yield Section("summary", "Summary", "Summary", "", facts)
    drawn = "".join(sections.panel(index, one, dense is not None) for index, one in enumerate(panels))
    yield Section("time", "Over time", "What the array does over time", _read("time.html"), _keys() + drawn)
    yield Section("bound", "What holds it back", "What holds it back", _BOUND, sections.held_back(panels, why))
    both = "" if dense is None else _key("dense-c", dense.title, "") + _key("sparse-c", subject.title, "")
    yield Section("roof", "Roofline", "Roofline", _ROOFLINE, tag("p", both) + _read("roofline.html"))
    table = _read("table.html") + sections.layers(subject, dense, gammas, why)
    yield Section("layers", "Layers", "Layers", "", table)
    zero = {name for name, gamma in gammas.items() if not gamma.all()}
    if zero:
        yield Section(
            "blocks",
            "Blocks",
            "Blocks kept",
            _BLOCKS,
            tag("div", "", id="gammas", tabindex="0", role="group", aria_label="Pictures of Γ"),
        )
    yield Section("meaning", "What it means", "What the numbers mean, and what they don't", "", _read("meaning.html"))
    if files:
        rows = "".join(
            tag("li", tag("a", text(place), href=place) + text(f": {what}")) for place, what in files.items()
        )
        yield Section("files", "Files", "Files", "", tag("ul", rows))


def _explanation(subject: Panel, dense: Panel | None) -> Explanation | None:
    """Only of times under the cost model that it is about."""
    if subject.estimate.cost_model != "exact":
        return None
    return explain(subject.code, subject.estimate, None if dense is None else dense.estimate)


def _keys() -> str:
    """The buttons over the drawings, and what their colours are."""
    kinds = "".join(_key(kind.lower(), kind, what) for kind, what in _KINDS.items())
    held = "".join(_key(name.split()[-1], name, what) for name, what in _HELD.items())
    return _read("tools.html") + tag("p", kinds + held, class_="kinds")


def _key(color: str, name: str, what: str) -> str:
    swatch = tag("i", style=f"background:var(--{color})")
    return tag("span", swatch + tag("b", text(name)) + tag("span", text(what), class_="quiet"), class_="key")


_KINDS = {
    "LOAD": "activations, DDR to memory tiles",
    "LOADW": "weights, DDR to memory tiles",
    "LOADFM": "activations, memory tiles to cores",
    "LOADWM": "weights, memory tiles to cores",
    "COMP": "cores compute",
    "WRITEFM": "activations, cores to memory tiles",
    "WRITE": "activations, memory tiles to DDR",
}
_HELD = {
    "tensors": "whole, in a memory tile",
    "staging": "a part of a tensor that lives in DDR",
    "weight chunks": "on their way to cores",
}
_BOUND = text(
    "The time of all layers by the kind of instruction that bounds each: the kind whose busiest unit works longest."
)
_ROOFLINE = text(
    "Each dot is a layer that multiplies; its area grows with its time. The line is what the device can do at most: "
    "its links at full rate on the left, its cores on the right. Zero blocks move a layer down and to the left, for "
    "their work is gone while activations still move; what counts is the time. Weights that are loaded while the layer "
    "before runs count for their own layer, which may lift it over the line of the DDR."
)
_BLOCKS = text(
    "Γ of the convolutions, as found in the weights: a row for 8 input channels, a column for 8 output channels. Dark "
    "(light, on a dark page) blocks are kept; the others are zero, and neither stored nor moved nor multiplied."
)
