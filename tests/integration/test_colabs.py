"""Every notebook of colabs/ runs, and what it computes is right."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
COLABS = sorted((ROOT / "colabs").glob("*.ipynb"))
# What a notebook's cell of sizes says in a test: small, for the tests' time.
SIZES = {
    "block_sparsity_gflops": "SIZE, ROUNDS, BLOCKS = 128, 1, (8,)",
    "choosing_gamma": "EPOCHS, IMAGES, TESTED, RATIOS = 1, 256, 100, (0.5,)",
    "cpu_engine": "SIDE, WIDTHS, ROUNDS = 16, (8, 16), 1",
    "keras_to_aie2": "SIDE, WIDTHS, DEVICES = 16, (8, 16), ('aie2_1x1', 'aie2_4x4')",
    "quickstart": "IMAGES, EPOCHS, TESTED = 160, 1, 100",
}


def test_there_are_notebooks():
    assert [path.stem for path in COLABS] == list(SIZES)


@pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)
def test_notebook_begins_with_a_badge_and_installs(path):
    first, second = nbformat.read(path, as_version=4).cells[:2]
    assert "colab-badge" in first.source and "%pip install" in second.source


@pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", COLABS, ids=lambda path: path.stem)
def test_notebook_runs_and_what_it_computes_is_right(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what the notebook writes goes where pytest cleans up
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this clone, wherever bstf is installed from
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += f"\n{SIZES[path.stem]}"
    # Every notebook says in `equal` whether its results are those of a reference, or of Keras.
    notebook.cells.append(nbformat.v4.new_code_cell("print(repr(equal))"))
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert notebook.cells[-1].outputs[-1].text == "True\n"
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
