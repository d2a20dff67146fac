# Targets create .venv and install into it what they need, once. Python compiles a module when it is first imported and
# keeps that, whatever the environment says: most of what is installed is never imported, the rest by many processes.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A folder with the published per-layer tables; tests of the `published` cost model read it.
PAPER_TABLES ?=

MATMUL := $(BIN)/python -m benchmarks.block_matmul
SHAPES := --preset=square --preset=resnet50
FLOATS := --dtype=float32 --dtype=float64
RESULTS := benchmarks/results/block_matmul

# Upstream's mlir-opt of LLVM 19 (Debian and Ubuntu: apt-get install mlir-19-tools).
MLIR_OPT ?= $(firstword $(shell command -v mlir-opt-19 mlir-opt))

.PHONY: install demo test lint mlir-check docs build build-check bench kills fuzz clean

install: $(STAMP)

$(STAMP): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[demo,test]"
	touch $@

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo --output=build/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(if $(PAPER_TABLES),--paper-tables=$(PAPER_TABLES))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

mlir-check: $(STAMP)
	@test -n "$(MLIR_OPT)" || { echo "mlir-check needs mlir-opt: install mlir-19-tools, or give MLIR_OPT=PATH" >&2; exit 1; }
	$(BIN)/python -m pytest -n 0 --mlir-opt=$(MLIR_OPT) tests/bstf_compiler/aie/mlir -k upstream

$(VENV)/.documented: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[docs]"
	touch $@

docs: $(VENV)/.documented
	$(BIN)/python -m mkdocs build --strict --quiet

build: $(STAMP)
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist .

# The wheel in an environment of its own, of any Python: make build-check PYTHON=python3.13
build-check: build
	rm -rf build/clean
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet build/dist/*.whl
	cd build && clean/bin/python ../tests/packaging/smoke.py

$(VENV)/.benched: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[bench]"
	touch $@

bench: $(VENV)/.benched
	$(BIN)/python -m benchmarks.resnet50 --output=benchmarks/results/resnet50
	$(BIN)/python -m benchmarks.aie_sweep --output=benchmarks/results/aie_sweep
	$(BIN)/python -m benchmarks.aie_timelines --output=benchmarks/results/aie_timelines
	$(BIN)/python -m benchmarks.network --network=ResNet50 --density=1 --density=0.5 --density=0.25 \
		--output=benchmarks/results/network/resnet50
	$(BIN)/python -m benchmarks.network --network=VGG16 --dtype=float32 --output=benchmarks/results/network/vgg16
	$(BIN)/python -m benchmarks.network --network=InceptionV3 --output=benchmarks/results/network/inceptionv3
	$(MATMUL) $(SHAPES) $(FLOATS) --output=$(RESULTS)/half
	$(MATMUL) $(SHAPES) $(FLOATS) $(foreach density,1 0.5 0.25 0.1,--density=$(density)) --algorithm=bstf \
		--algorithm=bstf_packed --algorithm=dense --rounds=3 --output=$(RESULTS)/density
	$(MATMUL) $(SHAPES) --dtype=int8 $(foreach peer,bstf bstf_packed bstf_avx2 bstf_portable,--algorithm=$(peer)) \
		--output=$(RESULTS)/int8
	$(MATMUL) --shapes=1024x1024x1024,784x512x512 $(foreach block,1 2 4 16 16x4 4x16,--block=$(block)) \
		$(foreach peer,bstf bstf_packed dense mkl_csr mkl_bsr,--algorithm=$(peer)) --output=$(RESULTS)/blocks
	$(MATMUL) --op=spgemm --preset=fig1 --block=1 --block=8 $(FLOATS) --threads=1 --threads=2 --rounds=3 \
		--output=$(RESULTS)/fig1
	$(BIN)/python -m benchmarks.trainable_gamma --output=benchmarks/results/trainable_gamma

# Kills train, export, compile, sweep and study 50 times each at random moments (an hour on two cores); then runs train
# and compile on full disks (a superuser mounts them) and with little memory.
kills: $(STAMP)
	$(BIN)/python -m tests.faults.kills --output=benchmarks/results/faults
	$(BIN)/python -m tests.faults.limits --output=benchmarks/results/faults

$(VENV)/.fuzzed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[fuzz]"
	touch $@

# A million executions of each reader of what may come from anybody.
fuzz: $(VENV)/.fuzzed
	for target in assembly program device bstf_json; do \
		$(BIN)/python -m tests.fuzz.run --target=$$target --output=benchmarks/results/fuzz || exit 1; \
	done

clean:
	rm -rf build $(VENV) *.egg-info
