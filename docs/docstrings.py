"""Griffe extension: an "Example:" of a docstring is shown as code, as "Examples:" is."""

from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Renames the section before the docstring is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
