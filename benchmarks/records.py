"""Records in a file, a line of JSON each: what a run that is killed leaves, the next one goes on from."""

import json
import os
from pathlib import Path
from typing import Any

from bstf_compiler.files import replacing


class Records(list[dict[str, Any]]):
    """The records of a file, to which more are added one at a time; a last line that was cut short is dropped.

    Args:
        path: of the file; its folder is made if need be.

    Example:
        >>> records = Records(Path("build/sweep/sweep.jsonl"))
        >>> records.add({"network": "VGG16", "seconds": 0.01})
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with replacing(path) as temporary:
                temporary.write_bytes(whole)
        super().__init__(json.loads(line) for line in whole.splitlines())

    def add(self, record: dict[str, Any]) -> None:
        """Adds a record, which is on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.append(record)
