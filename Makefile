# Every target makes its own virtual environment in .venv; nothing else on the machine is touched.
#   make demo        set up, train the small model by GRPO with rhythm credit, leave runs/demo/report.html
#   make demo-seeds  the demo's recipe for each mode (MODES) from each seed (SEEDS) into runs/seeds/<mode>-<seed>, then a
#                    comparison by mode, runs/seeds/compare.html; about 3 minutes a run. Finished runs are kept, so that
#                    an interrupted call goes on where it stopped: `make demo-seeds SEEDS="0 1 2 3" ARGS="grpo.max_steps=20"`
#                    (with other ARGS, remove runs/seeds first). The first mode is the one the others are compared with.
#   make test        set up, run the tests (under ten minutes)
#   make test-long   the tests that do not fit ten minutes
#   make lint        ruff and mypy
#   make bench       the benchmarks, results under benchmarks/results
#   make sanitize    the compiled CPU kernels under AddressSanitizer and UBSan
#   make matrix      other versions of torch, Triton, TRL and transformers, and optional peers, each in its own environment

PYTHON ?= python3
VENV ?= .venv
# Any torch from 2.10 on. For a CPU build from PyTorch's own index:
#   make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# Settings added to the demo's recipe, as in: make demo ARGS="grpo.max_steps=2"
ARGS ?=
# What demo-seeds trains: modes of credit, the base of the comparison first, and seeds
MODES ?= uniform random coupled
SEEDS ?= 0 1 2
PYTEST_ARGS ?= -n auto --maxprocesses=8

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu csrc/*/*/*.h)

.PHONY: demo demo-seeds test test-long lint bench sanitize matrix clean

demo: $(VENV)/.train
	$(BIN)/python -m training train training/recipes/countdown_tiny.yaml --overwrite $(ARGS)

# Seeds outside, modes inside, so that the modes have nearly the same seeds wherever it is stopped. A run is finished when
# it holds its result and its model, which is written last.
demo-seeds: $(VENV)/.train
	set -e; for seed in $(SEEDS); do for mode in $(MODES); do \
	    run=runs/seeds/$$mode-$$seed; \
	    if test -f $$run/result.json && test -d $$run/model; then echo "$$run is finished"; continue; fi; \
	    $(BIN)/python -m training train training/recipes/countdown_tiny.yaml $(ARGS) \
	        rhythm.mode=$$mode grpo.seed=$$seed output.path=$$run; \
	done; done
	$(BIN)/python -m training compare --output runs/seeds/compare.html \
	    $(foreach mode,$(MODES),$(foreach seed,$(SEEDS),runs/seeds/$(mode)-$(seed)))

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-long: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks

sanitize: $(VENV)/.test
	bash tests/native/sanitize.sh $(BIN)/python

matrix:
	bash tests/matrix.sh $(PYTHON)

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info runs rhythm_kernels/*.so

# torch first and pinned, as a bare requirement would fetch the newest CUDA build. The extension is built against it once;
# the extras below are those of the package that is then installed.
$(VENV)/.package: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) "setuptools>=77" wheel ninja
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/.train: $(VENV)/.package
	$(PIP) "rhythm-kernels[train]"
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP) "rhythm-kernels[train,tasks,test]"
	touch $@ $(VENV)/.train

$(VENV)/.dev: $(VENV)/.test
	$(PIP) "rhythm-kernels[dev]"
	touch $@
