# run · check · test · soak · lab · app · benchmark · clean: each sets up .venv by itself, once, and again when pyproject.toml
# or constraints.txt change. check: a minute and a half of lint, units, oracles and one notebook. test: everything, seeded.
# soak: faults at random moments, fuzz by other seeds than those of test.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
JOBS ?= 2

.PHONY: run check lint test soak lab app benchmark clean

run: .venv/.ready
	@$(BIN)/companion run $(ARGS)

lint: .venv/.ready
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

check: lint
	@$(PYTEST) -m "not slow and not browser and not soak" $(ARGS)

test: lint
	@$(PYTEST) -m "not soak" $(ARGS)

soak: .venv/.ready
	@COMPANION_HYPOTHESIS=soak $(PYTEST) -m "soak or hypothesis" $(ARGS)

lab: .venv/.ready
	@$(BIN)/companion lab -- $(ARGS)

app: .venv/.ready
	@$(BIN)/voila notebooks/10_live_lab.ipynb --Voila.ip=127.0.0.1 $(ARGS)

benchmark: .venv/.benchmark
	@$(BIN)/python -m benchmarks $(ARGS)

.venv/.benchmark: .venv/.ready
	@echo "Adding to .venv what the benchmarks compare with: once, about 1.9 GB"
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[benchmark]'
	@touch $@

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up .venv: once, some minutes; torch's default build brings several GB"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv outputs/runs outputs/benchmarks outputs/store build src/*.egg-info
