# The doors for people: make demo, make test, make bench.
VENV := .venv
PYTHON := $(VENV)/bin/python
OUT ?= demo
BENCH_PYTHON := build/bench/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test bench clean

demo: $(STAMP)
	$(VENV)/bin/headstart demo --out "$(OUT)"

test: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy
	$(PYTHON) -m pytest -n 2

# The peers get an environment of their own: two of them do not get on with headstart's dependencies.
bench:
	test -x $(BENCH_PYTHON) || python3 -m venv build/bench
	$(BENCH_PYTHON) -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BENCH_PYTHON) -m pip install --quiet --no-deps --requirement benchmarks/no_deps.txt
	$(BENCH_PYTHON) -m benchmarks.reader --cold --json build/reader.json
	$(BENCH_PYTHON) -m benchmarks.loader --json build/loader.json
	$(BENCH_PYTHON) -m benchmarks.int8 --demo build/demo --json build/int8.json
	$(BENCH_PYTHON) -m benchmarks.extract --json build/extract.json
	$(BENCH_PYTHON) -m benchmarks.prepare --json build/prepare.json
	$(BENCH_PYTHON) -m benchmarks.train --json build/train.json
	$(BENCH_PYTHON) -m benchmarks.finetune --json build/finetune.json
	$(BENCH_PYTHON) -m benchmarks.pamr --json build/pamr.json
	$(BENCH_PYTHON) -m benchmarks.evaluate --json build/evaluate.json

# The stamp is written last, so an installation that was cut short starts again.
$(STAMP): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
