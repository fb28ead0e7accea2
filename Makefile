# Two commands do all of their own set-up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/installed
WORKERS ?= 3
PEER = .venv-peer
PEER_STAMP = $(PEER)/installed

.PHONY: demo test lint types benchmark parity clean help

help:
	@echo "make demo       install into $(VENV), run everything on painted parts, leave demo-output/report.html"
	@echo "make test       install into $(VENV), run all tests"
	@echo "make lint       ruff and mypy"
	@echo "make benchmark  the figures of the README, on this machine (minutes; see benchmarks/README.md)"
	@echo "make parity     compare with a peer's implementation in an environment of its own (large download)"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --upgrade "pip>=24"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/edgead demo --output demo-output --force

# Side by side, one thread for each: many tests wait for servers and processes. `make test WORKERS=0` is one by one.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(STAMP)
	$(BIN)/python -m benchmarks

$(PEER_STAMP):
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/pip install --quiet "anomalib[openvino]==2.7.0" onnxruntime "open_clip_torch>=2.23,<2.26.1"
	touch $@

parity: $(STAMP) $(PEER_STAMP)
	$(BIN)/python -m benchmarks.parity_with_peer --peer-python $(PEER)/bin/python
	$(BIN)/python -m benchmarks.winclip_parity --peer-python $(PEER)/bin/python

clean:
	rm -rf $(VENV) $(PEER) build demo-output .mypy_cache .ruff_cache .pytest_cache
