# Two commands, each from nothing: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test bench clean

demo: $(VENV)/.installed
	$(BIN)/python -m studies.two_by_two --profile quick

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --benchmark-disable

bench: $(VENV)/.installed
	$(BIN)/python -m pytest --override-ini addopts= tests/benchmarks --benchmark-only

$(VENV)/.installed: pyproject.toml constraints.txt tests/oracles.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed; this is %d.%d. Name one with: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r tests/oracles.txt
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
