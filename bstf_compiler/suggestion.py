"""What somebody may have meant who wrote a name that doesn't exist."""

import difflib
from collections.abc import Iterable


def suggestion(word: str, known: Iterable[str]) -> str:
    """A question about the likeliest of the known words, to put behind a wrong one; nothing if none is like it.

    Example:
        >>> suggestion("npu11", ["npu1", "npu2", "aie2_4x4"])
        " (did you mean 'npu1'?)"
    """
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean '{by_lower[close[0]]}'?)" if close else ""
