"""Where the long runs of the tests leave what they counted."""

import json
from pathlib import Path
from typing import Any

from bstf_compiler.files import replacing


def write(record: dict[str, Any], path: Path) -> None:
    """Writes a record as JSON, whole or not at all, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
