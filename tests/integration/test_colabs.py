"""Every notebook of colabs/ runs, and what it computes is right."""

from pathlib import Path

import nbclient
import nbformat
import pytest

COLABS = sorted((Path(__file__).parents[2] / "colabs").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.name for path in COLABS] == ["quickstart.ipynb"]


@pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)
def test_notebook_runs_and_simulation_equals_integer_reference(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what the notebook writes goes where pytest cleans up
    notebook = nbformat.read(path, as_version=4)
    # Every notebook says in `equal` whether its simulation equals the integer reference.
    notebook.cells.append(nbformat.v4.new_code_cell("print(repr(equal))"))
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert notebook.cells[-1].outputs[-1].text == "True\n"
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
