# Every target sets up its own environment: .venv here, or the folder that HARLI_VENV names
# (with SGLANG=0.5.16: .venv-0.5.16).
# Needed beforehand: Python 3.11 or 3.12, make and a C compiler.
#
#   make install   SGLang's full stack at the versions of constraints/, and this project, editable
#   make demo      a model, a server under load, a finetune job, and the taught answer
#   make test      the tests; those that need a GPU are skipped with a reason where there is none
#   make test-pinned  with SGLang 0.5.16: the tests that touch SGLang
#   make test-long those that are slow and rarely break: kills, faults of the disk, crashes, load, profiles
#   make seams     whether the installed SGLang has everything that is leaned on (docs/sglang-versions.md)
#   make lint      ruff, the formatter's check and pyright
#   make bench     the benchmarks that run on a CPU; results under benchmark/results/
#   make wheel     dist/sglang_harli-*.whl
#   make lock      constraints/ from pyproject.toml (UPGRADE=1: newest versions instead of the present ones)
#
# Every target takes SGLANG=0.5.16: the other supported SGLang, in an environment of its own.
# Settings: SGLANG, HARLI_VENV, PYTHON (an interpreter instead of the first that fits), PYTEST_ARGS, BENCH_ARGS.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory --no-builtin-rules
.DEFAULT_GOAL := install
.PHONY: install demo test test-pinned touching test-long lint seams bench wheel lock

# The supported versions of SGLang, the newest first.
SUPPORTED := 0.5.23 0.5.16
NEWEST := $(firstword $(SUPPORTED))
PINNED := $(lastword $(SUPPORTED))
override SGLANG := $(or $(SGLANG),$(NEWEST))
ifeq ($(filter $(SGLANG),$(SUPPORTED)),)
$(error SGLANG=$(SGLANG) is not supported; these are: $(SUPPORTED))
endif
CONSTRAINTS := constraints/sglang-$(SGLANG).txt

VENV := $(abspath $(or $(HARLI_VENV),.venv))$(if $(filter-out $(NEWEST),$(SGLANG)),-$(SGLANG))
BIN := $(VENV)/bin
UV := $(BIN)/python -m uv
STAMP := $(VENV)/.harli-installed
CODE := python test benchmark examples

# The environment is current when the stamp says so: by content, because a checkout does not keep times.
STATE := $(shell cat pyproject.toml $(CONSTRAINTS) | cksum) $(CURDIR)
ifneq ($(STATE),$(shell cat '$(STAMP)' 2>/dev/null))
.PHONY: $(STAMP)
endif

# uv does not read pip's settings: hand it the index that pip is set up with.
export UV_HTTP_TIMEOUT ?= 300
PIP_INDEX = $${UV_DEFAULT_INDEX:-$${UV_INDEX_URL:-$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null || true)}}}
WITH_INDEX = index="$(PIP_INDEX)"; if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi

# What runs here is local: no hub, no telemetry, and no more threads than the tests are sized for.
# SGLang compiles extensions, for its own version and torch's: never those of another environment.
RUN_ENV := TORCH_EXTENSIONS_DIR=$(VENV)/torch_extensions \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false \
	HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1

install: $(STAMP)

demo: $(STAMP)
	@$(RUN_ENV) exec $(BIN)/python examples/demo.py

# Tests without a server share the cores, two files at a time; servers need both cores each.  With PYTEST_ARGS a part
# may have nothing to run, which pytest answers with 5.
define RUN_TESTS
@export $(RUN_ENV)
run() {
	$(BIN)/python -m pytest -m "$(1)" --durations=10 --durations-min=1 "$$@" $(PYTEST_ARGS) || { code=$$?; [ $$code = $(if $(PYTEST_ARGS),5,0) ] || exit $$code; }
}
endef

test: $(STAMP)
	$(call RUN_TESTS,not long)
	OMP_NUM_THREADS=1 run test/unit -n 2 --dist loadfile
	OMP_NUM_THREADS=1 run test/sglang -n 2 --dist loadfile
	run test/e2e test/gpu

# The other SGLang, in its own environment: what touches SGLang, torch or transformers.
test-pinned:
	@$(MAKE) SGLANG=$(PINNED) touching

touching: $(STAMP)
	$(call RUN_TESTS,not long)
	$(BIN)/python -W ignore -m sglang_harli.tools.seam_check --problems
	OMP_NUM_THREADS=1 run test/unit/seams test/unit/peft_trainer test/unit/guards/test_wheel.py -n 2 --dist loadfile
	OMP_NUM_THREADS=1 run test/sglang -n 2 --dist loadfile
	run test/e2e

test-long: $(STAMP)
	$(call RUN_TESTS,long)
	OMP_NUM_THREADS=1 run test/unit -n 2 --dist loadfile
	run test/e2e

lint: $(STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/pyright --pythonpath $(BIN)/python

seams: $(STAMP)
	$(BIN)/python -W ignore -m sglang_harli.tools.seam_check --problems

bench: $(STAMP)
	$(RUN_ENV) $(BIN)/python benchmark/bench_start.py $(BENCH_ARGS)
	$(RUN_ENV) $(BIN)/python benchmark/bench_overhead.py $(BENCH_ARGS)
	$(RUN_ENV) $(BIN)/python benchmark/bench_step.py
	$(RUN_ENV) $(BIN)/python benchmark/bench_predictor.py
	$(RUN_ENV) $(BIN)/python benchmark/bench_http_api.py
	$(RUN_ENV) $(BIN)/python benchmark/bench_http_live.py
	$(RUN_ENV) $(BIN)/python benchmark/bench_pool.py --quick $(BENCH_ARGS)
	$(RUN_ENV) $(BIN)/python benchmark/bench_colocate.py --quick $(BENCH_ARGS)

wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

lock: $(BIN)/uv
	@$(WITH_INDEX)
	for version in $(SUPPORTED); do
		file=constraints/sglang-$$version.txt
		printf 'uv\nsglang==%s\n' $$version | $(UV) pip compile pyproject.toml - --extra dev --extra disaggregation --universal \
			--python-version 3.11 --quiet --no-annotate --no-emit-index-url --no-emit-find-links \
			--custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) --output-file $$file
		echo "$$file: $$(grep -c == $$file) versions"
	done

# Only `python3.12 --version` tells whether a name on PATH runs: version managers leave shims that do not.
$(BIN)/uv:
	@fits='import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
	python=
	for name in $(or $(PYTHON),python3.11 python3.12 python3 python); do
		if "$$name" -c "$$fits" >/dev/null 2>&1; then python=$$name; break; fi
	done
	if [ -z "$$python" ]; then
		echo "make: no Python 3.11 or 3.12 (with venv and pip) found$(if $(PYTHON), at PYTHON=$(PYTHON)):" \
			"install one, or name it with PYTHON=/path/to/python3.11" >&2
		exit 1
	fi
	if ! "$(BIN)/python" -m pip --version >/dev/null 2>&1; then
		echo "$(VENV): a new environment with $$("$$python" --version)"
		"$$python" -m venv "$(VENV)"
	fi
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) uv

$(STAMP): $(BIN)/uv
	@$(WITH_INDEX)
	$(UV) pip install --python "$(BIN)/python" --constraint $(CONSTRAINTS) --editable '.[dev,disaggregation]' setuptools
	echo '$(STATE)' > "$@"

.ONESHELL:
