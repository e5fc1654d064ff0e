# make demo | test | test-all | trainers | versions | docs | aot | machine-code | gpu | lint | format | bench | wheel | clean
# Another interpreter, the first time: make demo PYTHON=python3.12

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
NATIVE_SOURCES := CMakeLists.txt setup.py $(shell find csrc kernels/cuda -type f 2>/dev/null)
CPP_FILES := $(shell find csrc kernels/cuda tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

# A spinning OpenMP thread would take the core of another test worker.
export OMP_WAIT_POLICY ?= passive

CHROMIUM ?= $(firstword $(foreach name,chromium chromium-browser google-chrome,$(shell command -v $(name))))

# One architecture for the tests: tests/machine_code/test_cuda_aot.py compiles others.
$(VENV)/native: export MFD_FAST_CUDA_ARCHS ?= 90

.SILENT:
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-rest test-all trainers no-trainers versions docs no-browser aot machine-code gpu lint mypy format bench wheel clean

help:
	sed -n '1,2s/^# //p' Makefile

demo: $(VENV)/native
	$(BIN)/mfd-fast demo $(ARGS)

# Every op, backend, divergence, dtype and option once; test-all is everything, test-rest what test leaves out.
test: TIER = quick
test-rest: TIER = rest
test-all: TIER = all
test test-all: lint mypy
test test-rest test-all: $(VENV)/packages-test $(VENV)/native
	echo "tests: pytest --tier $(TIER) -n $(WORKERS)"
	$(BIN)/python -m pytest -q --tier $(TIER) -n $(WORKERS) --dist worksteal $(ARGS)
test-all: versions
test-all: $(if $(wildcard build/trainers-venv/packages),trainers,no-trainers)
test-all: $(if $(CHROMIUM),docs,no-browser)

# A wheel of this tree beside the newest PyTorch to be had, and on newer Pythons: values, gradients and compile.
versions: $(VENV)/packages-test $(VENV)/native
	$(BIN)/python tests/versions.py --workers $(WORKERS) $(ARGS)

# The adapters of mfd_fast/integrations against the trainers themselves, in an environment with another PyTorch:
# 102 packages, 2 GB beside it. The native module is this tree's: it has no tie to a PyTorch.
TRAINERS := build/trainers-venv
trainers: $(VENV)/native $(TRAINERS)/packages
	echo "tests: the trainers"
	MFD_FAST_TRAINERS=1 $(TRAINERS)/bin/python -m pytest --confcutdir=tests/integrations -p no:cacheprovider -W ignore -q -n $(WORKERS) $(ARGS) tests/integrations

no-trainers:
	echo "trainers: the adapters are not tried, since their environment is not there (make trainers)"

$(TRAINERS)/packages: pyproject.toml constraints-trainers.txt $(VENV)/python
	echo "install: torch and the trainers (takes minutes the first time)"
	$(BIN)/python -m venv --clear $(TRAINERS)
	$(TRAINERS)/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints-trainers.txt \
	  torch torchvision setuptools pybind11 cmake ninja pytest pytest-xdist
	MFD_FAST_NATIVE=0 $(TRAINERS)/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints-trainers.txt \
	  --no-build-isolation --editable '.[trainers]'
	# One file of AutoGluon is tried, whose old timm and transformers cannot live here; torchtune as a whole from a
	# folder of its own, for an old torchao.
	$(TRAINERS)/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints-trainers.txt \
	  --no-deps autogluon.multimodal torchtune
	$(TRAINERS)/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints-trainers.txt \
	  --no-deps --upgrade --target $(TRAINERS)/torchtune torchtune torchao sentencepiece tiktoken
	touch $@

NO_BROWSER := echo "docs: the pages are not tried, since no browser was found (chromium; Debian: apt install chromium)"

# The site in build/docs, of docs/ and the docstrings; warnings and unresolved references are errors. A browser then
# reads it: Chromium, which no package of PyPI has.
docs: $(VENV)/packages-docs
	echo "docs: build/docs"
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --write-all --builder html --doctree-dir build/docs-doctrees \
	  docs build/docs
	$(if $(CHROMIUM),echo "tests: the pages in $(CHROMIUM)",$(NO_BROWSER))
	$(if $(CHROMIUM),MFD_FAST_SITE=build/docs MFD_FAST_BROWSER=$(CHROMIUM) \
	  $(BIN)/python -m pytest --confcutdir=tests/site -p no:cacheprovider -q $(ARGS) tests/site)

no-browser:
	$(NO_BROWSER)

# Every Triton kernel with every option and every CUDA source for every GPU: it takes long.
aot: $(VENV)/packages-test $(VENV)/native
ifdef TRITON
	test -d build/triton/$(TRITON) || \
	$(BIN)/python -m pip install --quiet --no-deps --target build/triton/$(TRITON) triton==$(TRITON)
	MFD_FAST_AOT=each MFD_FAST_AOT_TRITON=$(CURDIR)/build/triton/$(TRITON) $(BIN)/python -m pytest -q -n $(WORKERS) \
	--dist worksteal tests/machine_code/test_triton_aot.py tests/machine_code/test_triton_aot_fusion.py \
	-k "test_machine_code or test_the_triton" $(ARGS)
else
	MFD_FAST_AOT=complete $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal tests/machine_code
endif

# What the CUDA kernels' sm_90 machine code costs, by executing it: WORDS="1000 bfloat16" picks cases, WORDS=--kept prints
# counts.json, WORDS=--write renews it.
machine-code: $(VENV)/packages-test $(VENV)/native
	cd tests && $(abspath $(BIN))/python -m machine_code $(WORDS)

# On a machine with a GPU, with the packages of $(PYTHON) and no environment of our own; `make gpu ARGS=--help`.
# DEVICE=cpu rehearses it; PART=smoke names one part; RESULTS=folder; MINUTES of this call.
DEVICE ?= cuda
gpu:
	$(PYTHON) tests/gpu --device $(DEVICE) $(addprefix --part ,$(PART)) $(addprefix --minutes ,$(MINUTES)) \
	  $(addprefix --results ,$(RESULTS)) $(ARGS)

lint: $(VENV)/packages-test
	echo "lint: ruff, codespell, clang-format"
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --diff .
	$(BIN)/codespell
	$(if $(CPP_FILES),$(BIN)/clang-format --dry-run --Werror $(CPP_FILES))

mypy: $(VENV)/packages-test $(VENV)/native
	echo "types: mypy"
	$(BIN)/mypy --no-error-summary

format: $(VENV)/packages-test
	$(BIN)/ruff check --quiet --fix-only .
	$(BIN)/ruff format --quiet .
	$(if $(CPP_FILES),$(BIN)/clang-format -i $(CPP_FILES))

# Times are those of PyTorch's own settings: OpenMP threads may spin here.
bench: $(VENV)/packages-test $(VENV)/native
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks --growth $(ARGS)

# Needs no PyTorch: make wheel VENV=build/py310 PYTHON=python3.10
wheel: $(VENV)/packages-wheel
	echo "wheel and sdist: dist/"
	mkdir -p build
	$(BIN)/python -m build --no-isolation --wheel --sdist --outdir dist . > build/wheel.log 2>&1 \
	  || { cat build/wheel.log; exit 1; }
	ls -sh dist

clean:
	rm -rf $(VENV) build dist *.egg-info mfd_fast/_C.*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/native: $(NATIVE_SOURCES) $(VENV)/packages-demo
	echo "build: the native module"
	mkdir -p build
	$(PIP) --verbose --no-deps --no-build-isolation --editable . > build/install.log 2>&1 \
	  || { cat build/install.log; exit 1; }
	sed -n 's/^.*\(mfd_fast: .* left out .*\)$$/\1/p' build/install.log | sort -u
	touch $@

$(VENV)/packages-demo: pyproject.toml constraints.txt $(VENV)/python
	echo "install: torch and the demo's packages (takes minutes the first time)"
	$(PIP) -qq setuptools pybind11 ninja cmake
	MFD_FAST_NATIVE=0 $(PIP) -qq --no-build-isolation --editable '.[demo]'
	touch $@

$(VENV)/packages-test: $(VENV)/packages-demo
	echo "install: the packages of the tests"
	MFD_FAST_NATIVE=0 $(PIP) -qq --no-build-isolation --editable '.[test]'
	touch $@

$(VENV)/packages-wheel: constraints.txt $(VENV)/python
	echo "install: the packages of the build"
	$(PIP) -qq build setuptools pybind11 ninja cmake
	touch $@

$(VENV)/packages-docs: $(VENV)/packages-demo
	echo "install: the packages of the documentation"
	MFD_FAST_NATIVE=0 $(PIP) -qq --no-build-isolation --editable '.[docs]'
	touch $@

$(VENV)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "mfd_fast needs Python 3.10 or newer; name one: make PYTHON=python3.12"; exit 1; }
	echo "environment: $(VENV), $$($(PYTHON) --version)"
	$(PYTHON) -m venv --clear $(VENV) > /dev/null 2>&1 || { \
	  echo "Python's venv cannot install pip (Debian: apt install python3-venv); trying pip --python, then virtualenv."; \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) > /dev/null 2>&1 \
	    && $(PYTHON) -m pip --python $(BIN)/python --quiet install pip > /dev/null 2>&1 \
	  || $(PYTHON) -m virtualenv --quiet --clear $(VENV) > /dev/null 2>&1 \
	  || { echo "No way to make $(VENV) was found: install python3-venv."; rm -rf $(VENV); exit 1; }; }
	touch $@
