"""How a program begins and ends: help with examples, version, and a sentence with an exit code for what goes wrong.

Exit codes: 0 all went well, 1 something went wrong, 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NoReturn

from absl import app, flags, logging

from bstf_compiler.suggestion import suggestion

ERROR, USAGE, INTERRUPTED = 1, 2, 130
_HELP, _VERSION = ("--help", "-help", "--helpshort", "-h", "-?"), ("--version", "-version", "-V")


def run(
    name: str, about: str, main: Callable[[Sequence[str]], int | None], define_flags: Callable[[], None]
) -> NoReturn:
    """Runs a program and leaves Python with its exit code.

    Args:
        name: of the program, before its errors.
        about: what it is for, with examples: the head of --help.
        main: takes what is left of the command line, its name alone; returns the exit code, None for 0. It may raise an
            app.UsageError.
        define_flags: defines the program's flags.
    """
    before = set(flags.FLAGS)
    define_flags()
    own = [flags.FLAGS[flag] for flag in flags.FLAGS if flag not in before]
    if any(word in _HELP for word in sys.argv[1:]):
        print(help_text(about, own))
        sys.exit(0)
    if any(word in _VERSION for word in sys.argv[1:]):
        print(f"{name} {version()}")
        sys.exit(0)

    def guarded(argv: Sequence[str]) -> int | None:
        try:
            return main(argv)
        except app.UsageError as error:
            _refuse(name, str(error))

    app.run(guarded, flags_parser=lambda argv: _parsed(name, argv, [flag.name for flag in own]))


def version() -> str:
    """The version of the installed package."""
    try:
        return metadata.version("bstf")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def help_text(about: str, own: Sequence[flags.Flag]) -> str:
    """What a program is for, and its flags in the order in which they were defined."""
    width = min(120, shutil.get_terminal_size((120, 24)).columns)
    lines = []
    for flag in own:
        words = re.sub(r"^<[^>]*>: ", "", flag.help)
        if values := getattr(flag.parser, "enum_values", None):
            words += f" One of {', '.join(values)}."
        if flag.default not in (None, [], "", False):
            words += f" Default: {flag.default_as_str.strip(chr(39))}."
        lines.append(f"  --{'[no]' if flag.boolean else ''}{flag.name}")
        lines += textwrap.wrap(words, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    lines += ["  --help, --version", "        Print this, or the version."]
    return f"{about.strip()}\n\nFlags:\n" + "\n".join(lines)


def _parsed(name: str, argv: Sequence[str], known: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _refuse(name, explained(str(error), known))
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # absl would show what libraries tell their developers
    if len(rest) > 1:
        _refuse(name, f"{rest[1]!r} isn't a flag: all arguments are --name=value")
    return rest


def explained(error: str, flag_names: Sequence[str]) -> str:
    """Absl's words about a wrong flag, for those who don't know absl."""
    if missing := re.match(r"flag --(\w+)=None: ", error):
        return f"--{missing[1]}=... is missing"
    if wrong := re.match(r"flag --(\w+)=(.*): value should be one of <(.*)>", error):
        known = wrong[3].split("|")
        return f"--{wrong[1]}={wrong[2]} must be one of {', '.join(known)}{suggestion(wrong[2], known)}"
    if unknown := re.match(r"Unknown command line flag '(\w+)'", error):
        return f"there is no flag --{unknown[1]}{suggestion(unknown[1], (*flag_names, 'help', 'version'))}"
    return error.removeprefix("flag ").rstrip(".")


def _refuse(name: str, sentence: str) -> NoReturn:
    print(f"{name}: {sentence.rstrip('.')}; see --help", file=sys.stderr)
    sys.exit(USAGE)
