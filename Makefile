# make book [PRESET=laptop]    run the notebooks and render the book; presets: smoke, laptop, published, paper
# make test                    lint, types, the order of the packages, and the tests that take seconds
# make test-slow               the tests that take minutes
# All set up .venv first, once, with python3.11 or else python3 (PYTHON=... picks another); the tests add to it.

PRESET ?= laptop
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: book test test-slow clean

book: .venv/installed-book
	$(BIN)/python -m tools.build_book --preset $(PRESET)

test: .venv/installed-test
	$(BIN)/ruff check
	$(BIN)/mypy samlib tools/build_book.py tools/check_offline.py
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow" -n auto --maxprocesses 3

test-slow: .venv/installed-test
	$(PYTEST) -m slow -n auto --maxprocesses 2 --dist loadfile

.venv/installed-book: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python ...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@echo "Installing into .venv: some minutes and about 6 GB, once."
	$(INSTALL) '.[book]'
	@touch $@

.venv/installed-test: .venv/installed-book
	$(INSTALL) '.[book,test]'
	@touch $@

clean:
	rm -rf build
