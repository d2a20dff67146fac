"""Numbers and pieces of HTML as a report page shows them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping

_BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_COUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def seconds(value: float) -> str:
    """A time in the largest unit that it fills, or in microseconds: four digits."""
    scale, unit = next((one for one in _TIMES if value >= one[0]), _TIMES[-1])
    return f"{_digits(value / scale)} {unit}"


def size(value: float) -> str:
    """Bytes, in binary units."""
    scale, unit = next((one for one in _BYTES if value >= one[0]), (1, "bytes"))
    return f"{value:,.0f} bytes" if scale == 1 else f"{_digits(value / scale)} {unit}"


def count(value: float) -> str:
    """A large number, in thousands, millions, ..."""
    scale, unit = next((one for one in _COUNTS if value >= one[0]), (1, ""))
    return f"{value:,.0f}" if scale == 1 else f"{_digits(value / scale)} {unit}"


def micro(value: float) -> str:
    """Seconds as microseconds without the unit."""
    return f"{value * 1e6:,.2f}"


def tag(name: str, content: str = "", **attributes: str | float | bool) -> str:
    """An element around HTML; `data_kind` stands for data-kind, `class_` for class, True for an attribute alone."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not False
    )
    return f"<{name}{written}>{content}</{name}>"


def text(words: object) -> str:
    """Words as HTML."""
    return html.escape(str(words))


def plain_table(headings: Iterable[str], rows: Iterable[Iterable[object]], caption: str, **attributes: str) -> str:
    """A table of texts; the first of each row heads it."""
    head = "".join(tag("th", text(one), scope="col") for one in headings)
    body = "".join(
        tag("tr", tag("th", text(first), scope="row") + "".join(tag("td", text(one)) for one in rest)) + "\n"
        for first, *rest in rows
    )
    above = tag("caption", text(caption))
    content = tag("table", above + tag("thead", tag("tr", head)) + tag("tbody", body), **attributes)
    return scrolling(content, caption)


def scrolling(content: str, name: str) -> str:
    """HTML that may be wider than the page; `name` is for those who hear it."""
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=name)


def bars(parts: Mapping[str, float], whole: float, name: str) -> str:
    """One bar of coloured parts, each with its name and share; parts under a hundredth have none written on them."""
    pieces = "".join(
        tag(
            "span",
            text(f"{part} {amount / whole:.0%}") if amount > 0.06 * whole else "",
            class_=f"part {part.lower()}",
            style=f"width:{100 * amount / whole:.3f}%",
            title=f"{part}: {amount / whole:.1%}, {seconds(amount)}",
        )
        for part, amount in parts.items()
        if amount > 0
    )
    label = f"{name}: " + ", ".join(f"{part} {amount / whole:.1%}" for part, amount in parts.items() if amount > 0)
    return tag("div", pieces, class_="stack", role="img", aria_label=label)


def _digits(value: float) -> str:
    """Four digits or more, those before the point never cut."""
    return f"{value:,.{max(0, 3 - len(str(int(value))) + (value < 1000))}f}"
