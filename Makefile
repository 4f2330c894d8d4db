# make demo   raw videos in, an exported encoder and a report out; minutes on two cores
# make test   linters, types, import contracts, tests
# make docs   the documentation as a site, in site/index.html
# make clean  remove everything that the other targets made

PYTHON ?= python3
DEMO ?=
TESTS ?= tests
# One more than two cores, because tests on SLURM and of time-outs mostly wait.
WORKERS ?= 3

.PHONY: demo test docs clean

demo: .venv/ready-demo
	.venv/bin/vjepa demo --out runs/demo $(DEMO)

test: .venv/ready-test
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright
	.venv/bin/lint-imports
	OMP_NUM_THREADS=1 .venv/bin/pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder $(TESTS)

docs: .venv/ready-test
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

.venv/bin/pip:
	$(PYTHON) -m venv .venv

# Exact versions; pyproject.toml gives the ranges that users may install.
.venv/ready-demo: .venv/bin/pip pyproject.toml constraints.txt
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[hf]"
	touch $@

.venv/ready-test: .venv/bin/pip pyproject.toml constraints.txt
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
