"""What README and the documents tell to run does run: Python blocks of a page one after the other, and its commands."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import keras
import pytest
from absl import flags
from absl.testing import flagsaver

from bstf import train
from bstf_compiler import main as compiler

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """Language and text of the page's blocks of code."""
    return [found.groups() for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if blocks(page)]


@pytest.fixture
def a_little_training(monkeypatch):
    """Two batches instead of epochs of them; what is trained is seen elsewhere."""
    fit = keras.Model.fit

    def short(self, *args, **kwargs):
        return fit(self, *args, **{**kwargs, "epochs": 1, "steps_per_epoch": 2, "validation_steps": 1})

    monkeypatch.setattr(keras.Model, "fit", short)


@pytest.fixture
def small_data(monkeypatch):
    """256 of the digits."""
    load = train.datasets.load
    monkeypatch.setattr(train.datasets, "load", lambda *args, **kwargs: load(*args, **{**kwargs, "limit": 256}))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, tmp_path, monkeypatch, a_little_training, small_data):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for number, (language, text) in enumerate(blocks(page), start=1):
        if language == "python":
            exec(compile(text, f"{page.name}, block {number}", "exec", dont_inherit=True), namespace)
        elif language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                run(shlex.split(line, comments=True), monkeypatch)
        else:
            pytest.fail(f"{page.name}, block {number}: nothing runs {language}.")


def run(words, monkeypatch):
    """Runs a command of ours; of a benchmark, which may take hours, the flags are looked up."""
    program = words[0]
    if program == "bstf-compile":
        values = flags.FlagValues()
        compiler.define_flags(values)
        with monkeypatch.context() as patch:
            patch.setattr(compiler, "FLAGS", values)
            assert compiler.main(values(words)) == 0
    elif program == "bstf-train":
        if "output" not in train.FLAGS:
            train.define_flags()
        with flagsaver.flagsaver():
            assert train.main(train.FLAGS(words)) == 0
    elif program == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["python", "-m"]:
        check_flags(words[2], words[3:])
    else:
        pytest.fail(f"{program} is no program of ours.")


def check_flags(module, words):
    """Fails if a benchmark or what it shares with others defines no such flag."""
    sources = [ROOT / "benchmarks" / f"{name}.py" for name in (module.rpartition(".")[2], "harness")]
    known = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", "".join(path.read_text("utf-8") for path in sources)))
    used = {word.lstrip("-").partition("=")[0] for word in words}
    assert used <= known, f"{module} has no {used - known}"


def test_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{page.name}: run python docs/tables.py"


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
