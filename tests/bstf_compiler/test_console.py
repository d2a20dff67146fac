"""How programs begin and end: help, version, exit codes, wrong flags; and names that don't exist."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import bstf
import bstf_compiler
from bstf_compiler.suggestion import suggestion

PROGRAM = '''
"""paint: paints.

    paint --colour=red
"""
import json, os, sys
from absl import app, flags, logging
from bstf_compiler import console

def define_flags():
    flags.DEFINE_string("colour", None, "What to paint with; needed.", required=True)
    flags.DEFINE_enum("size", "small", ["small", "large"], "How much.")
    flags.DEFINE_integer("coats", 0, "How often.", lower_bound=0)
    flags.DEFINE_bool("dry", False, "Waits.")

def main(_):
    if flags.FLAGS.colour == "none":
        raise app.UsageError("Nothing to paint with.")
    logging.info("Pigments were found.")  # as libraries tell their developers
    print(flags.FLAGS.colour)
    return 1 if flags.FLAGS.colour == "wet" else None

for words, name in json.loads(sys.argv[1]):
    if not os.fork():  # a child each: what one of them imports serves all
        for stream in (1, 2):
            os.dup2(os.open(f"{name}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv[1:] = words
        console.run("paint", __doc__, main, define_flags)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
'''


WRONG = [
    ([], "--colour=... is missing"),
    (["--color=red"], "there is no flag --color (did you mean 'colour'?)"),
    (["--colour=red", "--size=lagre"], "--size=lagre must be one of small, large (did you mean 'large'?)"),
    (["--colour=red", "--coats=-1"], "--coats=-1: -1 is not a non-negative integer"),
    (["--colour=red", "blue"], "'blue' isn't a flag: all arguments are --name=value"),
    (["--colour=none"], "Nothing to paint with"),
]


@pytest.fixture(scope="module")
def paint(tmp_path_factory):
    """Runs a program with such flags: exit code, standard output, standard error; all runs are made at once."""
    folder = tmp_path_factory.mktemp("paint")
    right = [["--help"], ["--version"], ["--colour=red"], ["--colour=wet"], ["--colour=red", "--verbosity=0"]]
    runs = [*right, *(words for words, _ in WRONG)]
    cases = [(words, str(folder / str(number))) for number, words in enumerate(runs)]
    command = [sys.executable, "-c", PROGRAM, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    results = {
        tuple(words): (int(code), *(Path(f"{name}.{stream}").read_text() for stream in (1, 2)))
        for (words, name), code in zip(cases, done.stdout.split(), strict=True)
    }
    return lambda *words: results[words]


def test_help_has_examples_and_flags(paint):
    code, out, err = paint("--help")
    assert (code, err) == (0, "") and out.startswith("paint: paints.\n\n    paint --colour=red\n")
    assert [line.strip() for line in out.splitlines() if line.startswith("  --")] == [
        "--colour", "--size", "--coats", "--[no]dry", "--help, --version",
    ]  # fmt: skip
    assert "How much. One of small, large. Default: small." in out


def test_version(paint):
    code, out, err = paint("--version")
    assert (code, err) == (0, "") and out.startswith("paint ") and out.strip() != "paint"


@pytest.mark.parametrize("words, sentence", WRONG)
def test_wrong_command_lines_are_a_sentence_and_exit_code_2(paint, words, sentence):
    assert paint(*words) == (2, "", f"paint: {sentence}; see --help\n")


def test_exit_code_is_that_of_the_program(paint):
    assert paint("--colour=red") == (0, "red\n", "")
    assert paint("--colour=wet") == (1, "wet\n", "")


def test_what_libraries_tell_their_developers_is_for_those_who_ask(paint):
    code, out, err = paint("--colour=red", "--verbosity=0")
    assert (code, out) == (0, "red\n") and "Pigments were found." in err


def test_suggestions_take_other_cases_and_small_slips():
    known = ["ResNet50", "VGG16"]
    assert suggestion("resnet50", known) == suggestion("ResNet5O", known) == " (did you mean 'ResNet50'?)"
    assert suggestion("transformer", known) == "" == suggestion("x", [])


@pytest.mark.parametrize("name", ["console.py", "suggestion.py"])
def test_both_packages_begin_and_end_alike(name):
    """Neither imports the other, so each has its own copy; but for names in imports and examples they are one."""
    one, two = (Path(package.__file__).with_name(name).read_text(encoding="utf-8") for package in (bstf, bstf_compiler))
    assert one.replace("bstf.", "bstf_compiler.") == two
