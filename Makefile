# `make demo`, `make test` and `make test-all` need only python3 (3.11 or later): each makes .venv and installs what it uses.
PYTHON ?= python3
BIN = .venv/bin
# The tests bring GPU compilers along; without a GPU they must not be asked for one. For a GPU: JAX_PLATFORMS=cuda,cpu.
export JAX_PLATFORMS ?= cpu
PROMPTS = --prompt "red circle moving left" --prompt "green ring moving down"

# Passed to pytest in place of its default, all tests in two processes: make test ARGS="tests/convert -k full_disk"
ARGS = -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lint clean

.venv/demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[demo]'
	touch $@

.venv/test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@ .venv/demo

demo: .venv/demo
	mkdir -p out
	$(BIN)/python -m convert models/demo/checkpoint out/demo-checkpoint --overwrite
	$(BIN)/python -m models.sample --checkpoint out/demo-checkpoint $(PROMPTS) --compare --steps 40 --sparsity 0.8 --out out/demo

lint: .venv/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(ARGS)

test-all: lint
	$(BIN)/python -m pytest $(ARGS) -m ""

clean:
	rm -rf .venv out
