"""Upstream's own verifier."""

import shutil
import subprocess
from collections.abc import Callable

import pytest

from bstf_compiler.aie.mlir.upstream import IRDL, upstream


@pytest.fixture
def mlir_opt(request, tmp_path) -> Callable[[str], str]:
    """Has mlir-opt parse and verify a text in generic form; gives what it complains of, nothing if it is sound."""
    tool = request.config.getoption("--mlir-opt") or shutil.which("mlir-opt-19")
    if tool is None:
        pytest.skip("needs mlir-opt 19 (Debian: mlir-19-tools), or --mlir-opt=PATH")

    def complaints(text: str) -> str:
        path = tmp_path / "design.mlir"
        path.write_text(upstream(text))
        command = [tool, f"--irdl-file={IRDL}", "--allow-unregistered-dialect", str(path), "-o", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode == 0) == (not done.stderr), done.stderr[:500]
        return done.stderr

    return complaints
