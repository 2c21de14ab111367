# run · test · lab · app · benchmark · clean: each sets up .venv by itself, once, and again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
JOBS ?= 2

.PHONY: run test lab app benchmark clean

run: .venv/.ready
	@$(BIN)/companion run $(ARGS)

test: .venv/.ready
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

lab: .venv/.ready
	@$(BIN)/companion lab -- $(ARGS)

app: .venv/.ready
	@$(BIN)/voila notebooks/10_live_lab.ipynb --Voila.ip=127.0.0.1 $(ARGS)

benchmark: .venv/.benchmark
	@$(BIN)/python -m benchmarks $(ARGS)

.venv/.benchmark: .venv/.ready
	@echo "Adding to .venv what the benchmarks compare with: once, about 1.5 GB"
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
