"""A design's generic form as upstream `mlir-opt --irdl-file=aie.irdl.mlir --allow-unregistered-dialect` can verify it.

A dialect that IRDL defines has neither terminators nor symbol tables. So terminators get a dialect of their own, blocks
that need none get one, and kernels' declarations move from their device to the module, under a name for each device.
Everything else stays as it is, line by line.
"""

from __future__ import annotations

import re
from pathlib import Path

IRDL = Path(__file__).with_name("aie.irdl.mlir")
"""The operations' definitions."""

_TERMINATOR = re.compile(r'"aie\.(dma_start|next_bd|end)"')
_OPEN_END = re.compile(r'^( *)\}\) \{(?:sym_name = "(?:main_)?sequence"|symbol = @)')
_KERNEL = re.compile(r'(sym_name = "|callee = @)(bstf_\w+)')


def upstream(text: str) -> str:
    """The text for mlir-opt.

    Args:
        text: what generic.py wrote.

    Example:
        >>> Path("checked.mlir").write_text(upstream(text))
    """
    head, declarations, body = [], [], []
    device = 0
    for line in text.splitlines():
        if line.startswith("//") or line.startswith('"builtin.module"'):
            head.append(line)
            continue
        if line.startswith('  "aie.device"'):
            device += 1
        if line.startswith('    "func.func"'):
            declarations.append(_KERNEL.sub(rf"\g<1>d{device}_\2", line[2:]))
            continue
        if ending := _OPEN_END.match(line):
            body.append(f'{ending[1]}  "terminator.end"() : () -> ()')
        body.append(_TERMINATOR.sub(r'"terminator.\1"', _KERNEL.sub(rf"\g<1>d{device}_\2", line)))
    return "\n".join((*head, *declarations, *body)) + "\n"
