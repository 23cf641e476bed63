# Every target sets up .venv first; stamp files make a second call start at once.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
LOCK := .venv/.build.lock
SOURCES := setup.py $(shell find csrc -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
LAST_BUILD := fastnas/_build.json

.PHONY: search test bench lint docs build fuzz sanitize matrix
.DELETE_ON_ERROR:

search: $(BUILT)
	@$(BIN)/python -m fastnas.search $(ARGS)

test: $(BUILT)
	@$(BIN)/python -m pytest $(ARGS)

bench: $(BUILT)
	@$(BIN)/python -m pytest bench/ --benchmark-only $(ARGS)

lint: $(BUILT)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@find csrc tests/kernels/cuda_host -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

docs: $(BUILT)
	@$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || \
		$(BIN)/python -m pip install -q -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "the site: site/index.html"

build: $(BUILT)

# At night: 100,000 cases for each parser, the C++ ops under the sanitizers, and pairs of Python and torch.
fuzz: $(BUILT)
	@FASTNAS_FUZZ_CASES=100000 $(BIN)/python -m pytest tests/fuzz $(ARGS)

sanitize: $(BUILT)
	@tests/sanitize.sh $(BIN)/python $(ARGS)

matrix:
	@$(PYTHON) tests/matrix.py $(ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastnas needs Python 3.10 or later; name one with: make PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments; install them first (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(VENV)/bin/python constraints.txt pyproject.toml
	$(BIN)/python -m pip install --upgrade -c constraints.txt pip setuptools ninja
	$(BIN)/python -m pip install -c constraints.txt torch torchvision
	flock $(LOCK) $(BIN)/python -m pip install --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	@# The install has just compiled the library; only a source that is newer than it needs another build.
	@if [ -n "$$(find $(SOURCES) -newer $(LAST_BUILD) 2>&1)" ]; then \
		flock $(LOCK) $(BIN)/python setup.py -q build_ext --inplace; fi
	@touch $@
