# Everything from a fresh clone: `make demo` runs the main job, `make test` the tests. Each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
# For a GPU: make TORCH=torch, or your own environment and `pip install --no-build-isolation .`
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/* csrc/*.cpp csrc/*/*)

.PHONY: demo test bench lint clean

demo: $(VENV)/.ready
	$(BIN)/tdkern demo --outdir demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest tests

bench: $(VENV)/.ready
	$(BIN)/python -m pytest bench

lint: $(VENV)/.ready
	$(BIN)/ruff check .

$(VENV)/.ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet "setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.12"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info tdkern/lib tdkern/*.so compile_commands.json
