"""Why a program takes as long as it does: what each layer waits for, what its zero blocks gain, what would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from rich.table import Table

from bstf_compiler.aie.code import Code
from bstf_compiler.aie.device import DeviceSpec
from bstf_compiler.aie.estimate import Estimate, LayerEstimate, layer_seconds
from bstf_compiler.aie.isa import KINDS

_UNCHANGED = 0.95  # work that zero blocks leave at this part of the dense layer's or more counts as left as it was
_WORTH_IT = 0.99  # a change of the device that leaves more of the time helps nobody


@dataclass(frozen=True)
class LayerExplanation:
    """One layer. Times in seconds.

    `bound`: the instruction kind whose busiest unit works longest; `busy`: how long that is; `lower_bound_seconds`: see
    bounds.py. `gain`: time of the dense layer over this one's, and `left`: the kinds that zero blocks left as they were
    and that take the layer's longest time, so that there is no more to gain from zeros; both None without a dense
    program that has the layer. `helps`: what to double of the device for the shortest time, "" if nothing shortens it;
    `with_help`: the time then.
    """

    name: str
    op: str
    seconds: float
    lower_bound_seconds: float
    bound: str
    busy: float
    gain: float | None
    left: tuple[str, ...] | None
    helps: str
    with_help: float

    @property
    def reason(self) -> str:
        """In words, why the layer takes no less time."""
        if self.left:
            return f"zero blocks leave {' and '.join(self.left)} as it was"
        if self.busy < 0.8 * self.seconds:
            return f"no unit works longer than {self.busy / self.seconds:.0%} of the time: units wait for each other"
        if not self.seconds:
            return "takes no time"
        if self.busy > self.seconds:  # weights come under the layers before
            return f"{self.bound} works {self.busy * 1e6:,.1f} us for it, and began earlier"
        return f"{self.bound} works {self.busy / self.seconds:.0%} of the time"


@dataclass(frozen=True)
class Explanation:
    """A whole program on a device; `dense_seconds`: the dense program's time, None without one; `doubled`: the
    network's seconds with one thing of the device doubled, by its name.
    """

    name: str
    device: str
    seconds: float
    lower_bound_seconds: float
    dense_seconds: float | None
    doubled: dict[str, float]
    layers: tuple[LayerExplanation, ...]

    def to_dict(self) -> dict:
        """Everything as plain values, for json."""
        return asdict(self) | {"layers": [asdict(layer) | {"reason": layer.reason} for layer in self.layers]}

    def table(self) -> Table:
        """A row a layer: times in microseconds, bound, gain over dense, reason, what helps and the time then."""
        seconds, least = self.seconds * 1e3, self.lower_bound_seconds * 1e3
        title = f"{self.name} on {self.device}: {seconds:.3f} ms, at least {least:.3f} ms"
        table = Table(title=title, caption=self._doubled())
        for column, justify in (("layer", "left"), ("us", "right"), ("least us", "right"), ("bound", "left")):
            table.add_column(column, justify=justify, overflow="fold")
        table.add_column("dense / this", justify="right")
        table.add_column("why not less")
        table.add_column("double ... for us")
        for one in self.layers:
            gain = "" if one.gain is None else f"{one.gain:.2f}"
            times = (f"{seconds * 1e6:,.1f}" for seconds in (one.seconds, one.lower_bound_seconds))
            helps = f"{one.helps}: {one.with_help * 1e6:,.1f}" if one.helps else "nothing helps"
            table.add_row(one.name, *times, one.bound, gain, one.reason, helps)
        return table

    def _doubled(self) -> str:
        shares = sorted((seconds / self.seconds, name) for name, seconds in self.doubled.items() if self.seconds)
        return "whole network with twice the " + ", ".join(f"{name}: {1 / share:.2f}x" for share, name in shares)


def explain(code: Code, times: Estimate, dense: Estimate | None = None) -> Explanation:
    """Times a program again with one thing of its device doubled at a time.

    The program stays as it is: a compiler that knew the faster device might cut layers in another way and gain more.

    Args:
        code: the program.
        times: its estimate under the `exact` cost model.
        dense: that of the same network without zero blocks, on the same device, to tell what they gain.

    Raises:
        ValueError: `dense` has no layer of the program.

    Example:
        >>> rich.print(explain(program, program.estimate(), dense.estimate()).table())
    """
    reference = {layer.name: layer for layer in dense.layers} if dense else {}
    if dense and not any(layer.name in reference for layer in times.layers):
        raise ValueError(
            f"the dense program has no layer of '{code.name}'; compile the same network before its blocks became zero"
        )
    doubled = {name: layer_seconds(code, device) for name, device in _doubled(code.device)}
    layers = []
    for index, layer in enumerate(times.layers):
        then = {name: seconds[index] for name, seconds in doubled.items()}
        best = min(then, key=then.get)
        helps = best if then[best] < _WORTH_IT * layer.seconds else ""
        layers.append(_layer(layer, reference.get(layer.name), helps, then[best] if helps else layer.seconds))
    return Explanation(
        code.name, times.device, times.total_seconds, times.lower_bound_seconds,
        dense.total_seconds if dense else None,
        {name: sum(seconds) for name, seconds in doubled.items()}, tuple(layers),
    )  # fmt: skip


def _doubled(device: DeviceSpec) -> Iterator[tuple[str, DeviceSpec]]:
    """The device with one thing doubled, by name; of links to DDR with what the DDR itself can do."""
    core, ddr = device.core, device.ddr
    for name, rate in vars(device.links).items():
        cap = {"load": "read_rate", "loadw": "read_rate", "write": "write_rate"}.get(name)
        memory = replace(ddr, **{cap: 2 * getattr(ddr, cap)}) if cap and getattr(ddr, cap) else ddr
        yield name.upper(), replace(device, links=replace(device.links, **{name: 2 * rate}), ddr=memory)
    faster = replace(core, macs_per_cycle=2 * core.macs_per_cycle, elementwise_per_cycle=2 * core.elementwise_per_cycle)
    yield "work a cycle", replace(device, core=faster)
    yield "clock", replace(device, clock_hz=2 * device.clock_hz)


def _layer(layer: LayerEstimate, dense: LayerEstimate | None, helps: str, with_help: float) -> LayerExplanation:
    gain = left = None
    if dense is not None and layer.seconds:
        gain = dense.seconds / layer.seconds
        longest = layer.kinds[layer.bound]
        left = tuple(
            kind
            for kind in KINDS
            if layer.kinds[kind] >= _UNCHANGED * longest > 0 and layer.kinds[kind] >= _UNCHANGED * dense.kinds[kind]
        )
    return LayerExplanation(
        layer.name, layer.op, layer.seconds, layer.lower_bound_seconds, layer.bound, layer.kinds[layer.bound],
        gain, left, helps, with_help,
    )  # fmt: skip
