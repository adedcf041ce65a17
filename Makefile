# `make test` and `make demo` work on a fresh clone: the first run sets up .venv and builds.
# PYTHON: the interpreter (3.11 or newer) that makes .venv. TORCH: the torch to install there.
# ARGS: options of the command, as in `make demo ARGS=--quick`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip -qq --disable-pip-version-check
# What is imported is compiled then, and kept whatever the environment says: most of what torch and
# the peers bring never is, and the tests start hundreds of processes.
INSTALL := $(PIP) install --no-compile
export PYTHONDONTWRITEBYTECODE :=
# One more than there are cores: some tests wait for processes of their own.
WORKERS = $$(( $$(getconf _NPROCESSORS_ONLN) + 1 ))
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt \
    $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup demo test compat proof compiled fuzz lint bench report wheel hub aarch64 clean

setup: $(VENV)/setup.stamp

$(VENV)/tools.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=<path>" \
	    if sys.version_info < (3, 11) else 0)'
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -c requirements.txt setuptools wheel pybind11 cmake ninja
	@touch $@

# torch comes first and alone: the bare version also matches a CPU build where pip is offered one.
$(VENV)/requirements.stamp: $(VENV)/tools.stamp
	@$(INSTALL) -c requirements.txt $(TORCH)
	@$(INSTALL) -r requirements.txt
	@touch $@

# The extension knows no torch: with `make -j2` it is built while that comes over the network.
$(VENV)/build.stamp: $(VENV)/tools.stamp $(BUILD_INPUTS)
	@echo "building the extension (incremental after the first time)"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/setup.stamp: $(VENV)/requirements.stamp $(VENV)/build.stamp
	@touch $@
	@$(RUN) -m contrastive_kernels info

# The packages whose losses the integrations replace: only tests and benchmarks need them.
$(VENV)/peers.stamp: $(VENV)/requirements.stamp requirements-peers.txt requirements-alone.txt
	@echo "installing the peers of the integrations"
	@$(INSTALL) -r requirements.txt -r requirements-peers.txt
	@$(INSTALL) --no-deps -r requirements-alone.txt
	@touch $@

# Their oldest versions, in an environment beside it that shares torch.
$(VENV)/oldest.stamp: $(VENV)/peers.stamp requirements-oldest.txt
	@rm -rf $(VENV)/oldest
	@$(RUN) tests/integrations/matrix.py --environment $(VENV)/oldest requirements-oldest.txt
	@touch $@

$(VENV)/docs.stamp: $(VENV)/requirements.stamp requirements-docs.txt
	@echo "installing what builds the documentation"
	@$(INSTALL) -r requirements.txt -r requirements-docs.txt
	@touch $@

demo: setup
	@$(RUN) -m contrastive_kernels demo $(ARGS)

# The build and lint, which take one core each, beside the packages that come over the network.
test:
	@$(MAKE) --no-print-directory -j2 lint $(VENV)/peers.stamp
	@$(MAKE) --no-print-directory -j2 $(VENV)/oldest.stamp $(VENV)/docs.stamp
	@$(RUN) -m pytest -q -n $(WORKERS) --maxprocesses=8 --dist=loadfile \
	    --no-loadscope-reorder --durations=10 $(ARGS)

# More calls, drawn anew each time; `make fuzz ARGS=--hypothesis-seed=7` draws those of a seed.
fuzz: setup
	@$(RUN) -m pytest -q -n logical --maxprocesses=8 tests/losses/test_fuzz.py \
	    --hypothesis-profile=fuzz $(ARGS)

# The drop-ins in every version of their packages, each installed on its own; some at a time:
# `make compat ARGS="lightly transformers==5.0.0"`. Writes the table of docs/integrations.md.
compat: setup $(VENV)/peers.stamp
	@$(RUN) tests/integrations/matrix.py $(ARGS)

# One case of every loss compiled and launched as on an H200, by a driver that executes nothing.
proof: setup
	@CK_PROOF=1 $(RUN) -m pytest -q tests/kernels/test_launches.py $(ARGS)

# What is kept of the Triton kernels for GPUs, so that a test need not compile all of them again.
compiled: setup
	@PYTHONPATH=. $(RUN) tests/kernels/compiles.py --write > /dev/null

lint: setup
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --quiet --check .
	@$(RUN) -m mypy --no-error-summary
	@find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	    | xargs $(VENV)/bin/clang-format --dry-run --Werror

bench: setup $(VENV)/peers.stamp
	@$(RUN) -m contrastive_kernels bench $(ARGS)

# The site, in build/site. Building it needs no network; a broken link or name is an error (with
# --quiet it would not be).
.PHONY: docs
docs: setup $(VENV)/docs.stamp
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@echo "build/site is there; read it with $(RUN) -m http.server -d build/site"

# README, pages and pictures from benchmarks/results.
report: setup
	@$(RUN) -m benchmarks.report
	@$(RUN) -m benchmarks.scaling --plot
	@$(RUN) -m benchmarks.grid
	@$(RUN) -m benchmarks.infomin --plot --report
	@$(RUN) -m benchmarks.claims --plot --report

# For this Python and any torch >= 2.10, of what is built; auditwheel finds the platform's tag.
wheel: setup
	@rm -rf build/lib.* build/wheel
	@$(PIP) wheel --no-build-isolation --no-deps -w build/wheel .
	@PATH="$(abspath $(VENV))/bin:$$PATH" \
	    $(RUN) -m auditwheel repair --strip -w dist build/wheel/*.whl

# The engine's C++ and its tests for another processor, emulated: Debian's g++-aarch64-linux-gnu and
# qemu-user.
aarch64: setup
	@CXX=aarch64-linux-gnu-g++ CK_EMULATOR="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
	    $(RUN) -m pytest -q tests/kernels/test_products.py tests/kernels/test_fold.py $(ARGS)

# The kernel repository of what is Python and Triton alone: docs/hub.md.
HUB ?= build/hub
hub:
	@rm -rf $(HUB)
	@mkdir -p $(HUB)/torch-ext
	@cp hub/build.toml $(HUB)
	@find contrastive_kernels -name '*.py' -exec cp --parents {} $(HUB)/torch-ext \;

# For a machine with a GPU and no network: PYTHON itself has torch, triton, pytest and the build
# tools. Logs and results are left in OUT.
OUT ?= build/gpu
.PHONY: gpu
gpu:
	@$(PYTHON) -m benchmarks.gpu --out $(OUT)

clean:
	rm -rf $(VENV) build dist *.egg-info contrastive_kernels/*.so \
	    contrastive_kernels/_build_report.json
