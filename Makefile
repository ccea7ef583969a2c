# make test                    lint, types and tests
# make book [PRESET=laptop]    run the notebooks and render the book; presets: smoke, laptop, published, paper
# Both set up .venv first, once, with python3.11 or else python3 (PYTHON=... picks another).

PRESET ?= laptop
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: book test clean

book: $(INSTALLED)
	$(BIN)/python -m tools.build_book --preset $(PRESET)

test: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/mypy samlib tools/build_book.py tools/check_offline.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n auto --maxprocesses 4

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python ...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@echo "Installing into .venv: some minutes and about 6 GB, once."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[book,test]'
	@touch $@

clean:
	rm -rf build
