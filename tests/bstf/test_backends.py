"""The backends that the suite doesn't run on: `test_any_backend.py` in a process for each."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

MODULE = Path(__file__).with_name("test_any_backend.py")


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_backend(backend):
    if backend == keras.backend.backend():
        pytest.skip("the suite itself runs on it")
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} isn't installed")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(MODULE)]
    # JAX compiles without the optimisations that take most of its time here.
    settings = {"KERAS_BACKEND": backend, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
