"""Options and fixtures for the whole suite."""

from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--paper-tables",
        default=None,
        metavar="DIR",
        help="folder with the published per-layer tables (CSV); without it their tests are skipped",
    )
    parser.addoption(
        "--mlir-opt",
        default=None,
        metavar="PATH",
        help="upstream's mlir-opt, version 19; without it one on the path is taken, or its tests are skipped",
    )


@pytest.fixture(scope="session")
def paper_tables(request) -> Path:
    """The folder of the published tables; skips the test without one."""
    folder = request.config.getoption("--paper-tables")
    if folder is None:
        pytest.skip("needs --paper-tables=DIR")
    path = Path(folder)
    if not (path / "totals.csv").is_file():
        pytest.fail(f"--paper-tables: {path} holds no totals.csv.")
    return path
