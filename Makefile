# make demo   transform the shipped model and show what it cost      make test   run all tests
# Both do their own set-up, in .venv (or VENV=...). PYTHON picks the interpreter: 3.11, 3.12 or 3.13.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1
FUZZ_MINUTES ?= 10

.PHONY: demo test lint docs tables fuzz mutants convert gpu-packages setup clean

setup: $(VENV)/.ready

# torch goes first: on machines with a CPU-only wheel nothing after it then pulls the CUDA one.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,examples,triton]"
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadscope

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python docs/make_pages.py

tables: setup
	$(BIN)/python benchmarks/quality_tables.py

fuzz: setup
	$(BIN)/python -m graphopt.testing.fuzz --minutes $(FUZZ_MINUTES) --out out/fuzz

mutants: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "cosmic-ray==8.7.0"
	$(BIN)/python benchmarks/mutation.py $(if $(SAMPLE),--sample $(SAMPLE))

# Conversion of a 7B-shaped checkpoint needs 30 GB of disk: make convert SHAPE=7b WORK=/big/disk MERGEKIT=.../mergekit-yaml
convert: setup
	$(BIN)/python benchmarks/convert.py --shape $(or $(SHAPE),1b) --work $(or $(WORK),out/convert) --estimate \
		--kills 10 --flap $(if $(MERGEKIT),--mergekit $(MERGEKIT))

# What a GPU machine with torch and transformers, but no network, lacks: copy .gpu_packages along, benchmarks/gpu.sh finds it.
gpu-packages:
	rm -rf .gpu_packages
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .gpu_packages --only-binary=:all: \
		--python-version $(or $(GPU_PYTHON),3.12) "pydantic>=2.9"

clean:
	rm -rf $(VENV) .gpu_packages out build dist *.egg-info
