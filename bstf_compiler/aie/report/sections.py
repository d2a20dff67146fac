"""What a report page says in words and tables, section by section; empty where there is nothing to say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bstf_compiler.aie.estimate import Estimate, LayerEstimate
from bstf_compiler.aie.explain import Explanation, LayerExplanation
from bstf_compiler.aie.isa import KINDS
from bstf_compiler.aie.layer import BLOCK
from bstf_compiler.aie.report.data import Panel
from bstf_compiler.aie.report.words import bars, count, micro, plain_table, scrolling, seconds, size, tag, text


def facts(subject: Panel, dense: Panel | None, gammas: Mapping[str, np.ndarray]) -> str:
    """The figures of the whole network, each with the dense network's beside it."""
    own, other = subject.estimate, None if dense is None else dense.estimate
    packing, limit = subject.code.packing, subject.code.device.memtile.memory_bytes
    cards = [
        ("Time of one image", seconds(own.total_seconds), _beside(own, other)),
        ("Lower bound", seconds(own.lower_bound_seconds), "in any schedule of these layers on this device"),
        _zero_blocks(gammas),
        (
            "Multiply-adds",
            count(_macs(own)),
            "effective: zero blocks don't count" + _was(other and count(_macs(other))),
        ),
        (
            "Weights in DDR",
            size(subject.code.weight_bytes),
            "packed, with biases and indices" + _was(dense and size(dense.code.weight_bytes)),
        ),
        (
            "Memory tiles",
            size(packing.peak),
            f"of {size(limit)} each at the peak; {size(packing.spilled)} of tensors spilled to DDR",
        ),
    ]
    return "".join(
        tag("div", tag("dt", text(name)) + tag("dd", text(value)) + tag("dd", text(note), class_="note"))
        for name, value, note in filter(None, cards)
    )


def _beside(own: Estimate, other: Estimate | None) -> str:
    if other is None or not own.total_seconds:
        return f"estimated, {own.cost_model} cost model"
    return f"dense {seconds(other.total_seconds)}: {other.total_seconds / own.total_seconds:.2f} times as long"


def _was(dense: str | None) -> str:
    return f"; dense {dense}" if dense else ""


def _zero_blocks(gammas: Mapping[str, np.ndarray]) -> tuple[str, str, str] | None:
    if not gammas:
        return None
    blocks = sum(gamma.size for gamma in gammas.values())
    zero = blocks - sum(int(np.count_nonzero(gamma)) for gamma in gammas.values())
    sparse = sum(not gamma.all() for gamma in gammas.values())
    note = f"{zero:,} of {blocks:,} weight blocks of {BLOCK}x{BLOCK}, in {sparse} of {len(gammas)} layers"
    return "Zero blocks", f"{zero / blocks:.1%}", note


def _macs(estimate: Estimate) -> int:
    return sum(layer.macs for layer in estimate.layers)


def held_back(panels: Sequence[Panel], explanation: Explanation | None) -> str:
    """Which kinds of instruction the time goes to, and what a faster device would bring."""
    parts = []
    for panel in panels:
        total = panel.estimate.total_seconds
        if total:
            bound = dict.fromkeys(KINDS, 0.0)
            for layer in panel.estimate.layers:
                bound[layer.bound] += layer.seconds
            title = panel.title or "all layers"
            parts.append(tag("p", text(f"{title}, {seconds(total)}"), class_="name") + bars(bound, total, title))
    if explanation is None or not explanation.seconds:
        return "".join(parts)
    gains = sorted(((explanation.seconds / then, name) for name, then in explanation.doubled.items()), reverse=True)
    rows = "".join(
        tag("li", tag("span", text(_twice(name))) + _gain(gain) + tag("b", f"{gain:.2f}x")) for gain, name in gains
    )
    intro = (
        "How many times as fast the same program is on a device with one thing doubled; a full bar is twice as fast. A "
        "compiler that knew the faster device might cut layers in another way and gain more."
    )
    return "".join(parts) + tag("h3", "What would help") + tag("p", intro) + tag("ul", rows, class_="gains")


def _twice(name: str) -> str:
    return f"twice the rate of {name}" if name in KINDS else f"twice the {name}"


def _gain(gain: float) -> str:
    """A bar that is full at twice as fast, which doubling one thing can't pass."""
    return tag(
        "span", tag("i", style=f"width:{100 * min(1.0, max(0.0, gain - 1)):.1f}%"), class_="track", aria_hidden="true"
    )


def layers(
    subject: Panel, dense: Panel | None, gammas: Mapping[str, np.ndarray], explanation: Explanation | None
) -> str:
    """The table of layers: a row a layer, cells with the numbers that they are sorted by."""
    reasons = {} if explanation is None else {layer.name: layer for layer in explanation.layers}
    others = {} if dense is None else {layer.name: layer for layer in dense.estimate.layers}
    longest = max((one.seconds for one in (*subject.estimate.layers, *others.values())), default=0.0) or 1.0
    columns = [*_columns(dense is not None, bool(gammas), explanation is not None)]
    head = "".join(
        tag(
            "th",
            tag("button", text(name), type="button", title=about),
            scope="col",
            aria_sort="none",
            class_=kind,
        )
        for name, about, kind in columns
    )
    rows = "".join(
        tag("tr", "".join(_cells(number, layer, others, gammas, reasons, longest, columns))) + "\n"
        for number, layer in enumerate(subject.estimate.layers, start=1)
    )
    caption = f"Layers of {subject.code.name} on {subject.code.device.name}, in the order in which they run"
    above = tag("caption", text(caption))
    foot = tag("tfoot", tag("tr", "".join(_totals(subject, dense, columns))))
    table = tag("table", above + tag("thead", tag("tr", head)) + tag("tbody", rows) + foot, id="table")
    return scrolling(table, caption)


def _columns(dense: bool, gamma: bool, explained: bool) -> Iterator[tuple[str, str, str]]:
    """Heading, what it means, class of the cells."""
    yield "#", "Place in the order of execution", "number"
    yield "layer", "Choose a layer to see it everywhere on this page", "words"
    yield "op", "What the cores compute", "words"
    if gamma:
        yield "kept", "Blocks of 8x8 weights that aren't zero", "number"
    yield "time, µs", "Estimated time of one image in this layer", "number timed"
    if dense:
        yield "dense, µs", "The same of the dense network", "number"
        yield "gain", "Time of the dense layer over this one's", "number"
    yield "least, µs", "What no schedule of this layer can go below, at full rates", "number"
    yield "bound", "The instruction kind whose busiest unit works longest", "words"
    if explained:
        yield "why not less", "What keeps the layer from being faster", "words long"
        yield "double for, µs", "What of the device to double for the shortest time, and the time then", "words"
    yield "multiply-adds", "Effective: on kept blocks only", "number more"
    yield "bytes", "Moved by all instructions", "number more"
    for kind in KINDS:
        yield f"{kind}, µs", f"Work of the busiest unit of {kind}", "number more"


def _cells(
    number: int,
    layer: LayerEstimate,
    others: Mapping[str, LayerEstimate],
    gammas: Mapping[str, np.ndarray],
    reasons: Mapping[str, LayerExplanation],
    longest: float,
    columns: Sequence[tuple[str, str, str]],
) -> Iterator[str]:
    gamma, other, reason = gammas.get(layer.name), others.get(layer.name), reasons.get(layer.name)
    kept = None if gamma is None else np.count_nonzero(gamma) / gamma.size
    helps = reason.with_help if reason and reason.helps else None
    shown = {
        "#": (number, str(number)),
        "op": (layer.op, layer.op),
        "kept": (kept, "" if kept is None else f"{kept:.0%}"),
        "dense, µs": (other and other.seconds, "" if other is None else micro(other.seconds)),
        "gain": _ratio(other, layer),
        "least, µs": (layer.lower_bound_seconds, micro(layer.lower_bound_seconds)),
        "bound": (layer.bound, layer.bound),
        "multiply-adds": (layer.macs, f"{layer.macs:,}"),
        "bytes": (layer.bytes, f"{layer.bytes:,}"),
        "why not less": (reason and reason.reason, reason.reason if reason else ""),
        "double for, µs": ("", f"{reason.helps}: {micro(helps)}" if helps else "nothing helps"),
        **{f"{kind}, µs": (busy, micro(busy)) for kind in KINDS for busy in [layer.kinds.get(kind, 0.0)]},
    }
    for name, _, kind in columns:
        if name == "layer":
            button = tag("button", text(layer.name), type="button", data_layer=layer.name)
            yield tag("th", button, scope="row", data_value=layer.name, class_=kind)
        elif name == "time, µs":
            lengths = "".join(
                tag("i", class_=which, style=f"width:{100 * one.seconds / longest:.2f}%")
                for which, one in (("dense", other), ("sparse", layer))
                if one is not None
            )
            both = tag("span", lengths, class_="lengths", aria_hidden="true") + micro(layer.seconds)
            yield tag("td", both, data_value=layer.seconds, class_=kind)
        else:
            value, words = shown[name]
            yield tag("td", text(words), data_value="" if value is None else value, class_=kind)


def _ratio(dense: LayerEstimate | None, layer: LayerEstimate) -> tuple[float | None, str]:
    gain = dense.seconds / layer.seconds if dense is not None and layer.seconds else None
    return gain, "" if gain is None else f"{gain:.2f}"


def _totals(subject: Panel, dense: Panel | None, columns: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    own = subject.estimate
    totals = {
        "layer": "total",
        "time, µs": micro(own.total_seconds),
        "least, µs": micro(own.lower_bound_seconds),
        "multiply-adds": f"{_macs(own):,}",
        "bytes": f"{sum(layer.bytes for layer in own.layers):,}",
    }
    if dense is not None:
        totals["dense, µs"] = micro(dense.estimate.total_seconds)
        totals["gain"] = f"{dense.estimate.total_seconds / own.total_seconds:.2f}" if own.total_seconds else ""
    for name, _, kind in columns:
        if name == "layer":
            yield tag("th", totals[name], scope="row", class_=kind)
        else:
            yield tag("td", text(totals.get(name, "")), class_=kind)


def panel(index: int, shown: Panel, several: bool) -> str:
    """One program over time: places for its drawings, and what memory tiles hold as a table."""
    estimate, packing = shown.estimate, shown.code.packing
    title = (f"{shown.title}: " if several else "") + seconds(estimate.total_seconds)
    name = f"{shown.title or shown.code.name} on {estimate.device}"
    canvas = {"tabindex": "0", "role": "application", "aria_describedby": "keys", "data_panel": index}
    lanes = tag(
        "canvas",
        "",
        class_="lanes",
        aria_roledescription="timeline",
        aria_label=f"Timeline of {name}: {len(estimate.layers)} layers in {seconds(estimate.total_seconds)}, a lane "
        "for each kind of instruction and the bandwidth of DDR. The table of layers has the same numbers.",
        **canvas,
    )
    memory = tag(
        "canvas",
        "",
        class_="memory",
        aria_roledescription="memory map",
        aria_label=f"What each memory tile holds while {name} runs: at most {size(packing.peak)} of "
        f"{size(estimate.memtile_bytes)}. The table below has the same numbers.",
        **canvas,
    )
    ends = [layer.name for layer in estimate.layers]
    rows = [
        (one.name, f"{one.address:,}", f"{one.bytes:,}", ends[one.first], ends[one.last])
        for one in sorted(estimate.held, key=lambda one: (one.first, one.address))
    ]
    table = plain_table(
        ("held", "address", "bytes", "from the begin of", "to the end of"), rows, f"What each memory tile holds, {name}"
    )
    details = tag("details", tag("summary", "Memory map as a table") + table) if rows else ""
    about = (
        f"at most {size(packing.peak)} of {size(estimate.memtile_bytes)} of each memory tile; no placement of the same "
        f"tensors needs less than {size(packing.least)}"
    )
    return tag(
        "section",
        tag("h3", text(title)) + lanes + tag("p", text(f"Memory map: {about}."), class_="name") + memory + details,
        class_=f"panel {'dense' if several and index == 0 else 'sparse'}",
    )
