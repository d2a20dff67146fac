"""What README and the documents tell to run does run: Python blocks of a page one after the other, and its commands."""

import importlib.util
import re
import shlex
import subprocess
import sys
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
    fit, evaluate = keras.Model.fit, keras.Model.evaluate

    def short(self, *args, **kwargs):
        return fit(self, *args, **{**kwargs, "epochs": 1, "steps_per_epoch": 2, "validation_steps": 1})

    monkeypatch.setattr(keras.Model, "fit", short)
    monkeypatch.setattr(keras.Model, "evaluate", lambda *args, **kwargs: evaluate(*args, **{**kwargs, "steps": 1}))


@pytest.fixture
def small_data(monkeypatch):
    """256 of the digits."""
    load = train.datasets.load
    monkeypatch.setattr(train.datasets, "load", lambda *args, **kwargs: load(*args, **{**kwargs, "limit": 256}))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, tmp_path, monkeypatch, a_little_training, small_data):
    monkeypatch.chdir(tmp_path)
    namespace, trainings = {"__name__": "page"}, []
    for number, (language, text) in enumerate(blocks(page), start=1):
        if language == "python":
            exec(compile(text, f"{page.name}, block {number}", "exec", dont_inherit=True), namespace)
        elif language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                run(shlex.split(line, comments=True), monkeypatch, trainings)
        else:
            pytest.fail(f"{page.name}, block {number}: nothing runs {language}.")


def test_the_guides_network_is_a_teacher_after_a_little_training(monkeypatch):
    """Whoever has few steps needs moving averages that follow: else all that the guide makes of it is worth nothing."""
    fit = keras.Model.fit
    monkeypatch.setattr(keras.Model, "fit", lambda *args, **kwargs: fit(*args, **{**kwargs, "epochs": 4, "verbose": 0}))
    keras.utils.set_random_seed(0)
    namespace = {"__name__": "page"}
    exec(next(text for language, text in blocks(ROOT / "docs" / "guides" / "keras.md")), namespace)
    assert namespace["model"].evaluate(namespace["data"].test, verbose=0)[1] > 0.65


def run(words, monkeypatch, trainings):
    """Runs bstf-compile on what the page wrote; of what trains or measures for long, the flags are checked."""
    program = words[0]
    if program == "bstf-compile":  # on a model that a command before it would have trained: flags alone
        values = flags.FlagValues()
        compiler.define_flags(values)
        values(words)
        trained = any(Path(values.model).is_relative_to(folder) for folder in trainings)
        with monkeypatch.context() as patch:
            patch.setattr(compiler, "FLAGS", values)
            assert trained or compiler.main([program]) == 0
    elif program == "bstf-train":
        if "output" not in train.FLAGS:
            train.define_flags()
        with flagsaver.flagsaver():
            train.FLAGS(words)
            trainings.append(train.FLAGS.output)
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


def test_names_can_be_had_without_what_tests_import():
    """A page runs here in a process in which much is imported already; a reader has what the page imports."""
    text = "".join(text for page in PAGES for language, text in blocks(page) if language == "python")
    text += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "colabs").glob("*.ipynb"))
    names = sorted(set(re.findall(r"(?<!import )(?<!from )\b(?:bstf|bstf_compiler)(?:\.[A-Za-z]\w*)+", text)))
    assert "bstf.callbacks.BlockSparsity" in names
    program = f"import bstf, bstf_compiler\n{chr(10).join(names)}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
