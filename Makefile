# Everything a person does here starts with make; `make help` lists it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The variable reaches the build of the package too, the option would not.
PIP := PIP_CONSTRAINT="$(CURDIR)/constraints.txt" $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Four distributions out of one checkout: the client library, whose extras name the services, stands before these.
PARTS := --editable training_common --editable cognate_server --editable agent_server
CODE := clients training_common cognate_server agent_server tests tools deploy

.DEFAULT_GOAL := help
.PHONY: help install install-run demo up test unit test-ray fuzz chaos rehearsal lint format proto proto-breaking docs bench capacity release clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# Two sets of packages share one environment: what a demonstration needs, and what development needs on top.
$(VENV)/.run: $(wildcard pyproject.toml */pyproject.toml) constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing the services and the client library (PyTorch is the largest part)"
	$(PIP) --editable '.[cognate,agent,dashboard]' $(PARTS)
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing the development tools"
	$(PIP) --editable '.[dev]' $(PARTS)
	@touch $@

install-run: $(VENV)/.run

install: $(VENV)/.dev ## Install everything into .venv.

demo: $(VENV)/.run ## Pretrain a Cognate, fetch it across the boundary, make an agent of it.
	@$(BIN)/python -m deploy.demo $(DEMO)

up: $(VENV)/.run ## Run both services until Ctrl-C, with their state in var/.
	@$(BIN)/python -m deploy.up

test: lint unit ## Everything that CI runs: lint, then the tests, fast ones first.

# A file's tests stay together, on any one of as many processes as there are cores, in the order of tests/conftest.py.
unit: $(VENV)/.dev ## The tests alone; make unit TESTS=tests/jobs for some of them.
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder $(TESTS)

test-ray: $(VENV)/.dev ## The tests of the Ray engine, on a cluster of three nodes here. Installs Ray into .venv.
	$(PIP) --editable '.[dev,ray]' $(PARTS)
	$(BIN)/python -m pytest tests/jobs/test_ray.py

fuzz: $(VENV)/.dev ## Press every RPC with 20,000 requests out of its descriptor; make fuzz FUZZ="COUNT SEED".
	$(BIN)/python -m tests.fuzz.run $(FUZZ)

chaos: $(VENV)/.dev ## Kill parts of both services at 200 random moments of real jobs; make chaos CHAOS="KILLS SEED".
	$(BIN)/python -m tests.chaos.run $(CHAOS)

rehearsal: $(VENV)/.dev ## Update both services from the release before, and back, under load; ends in one JSON line.
	$(BIN)/python -m tests.upgrade.rehearse $(REHEARSAL)

lint: $(VENV)/.dev ## Style, types, floors and the contract's own rules.
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

format: $(VENV)/.dev ## Format code and contracts.
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)
	$(BIN)/buf format --write protos

proto: $(VENV)/.dev ## Generate the Python side of the contracts; commit what it writes.
	$(BIN)/python tools/generate.py
	$(BIN)/buf lint

proto-breaking: $(VENV)/.dev ## Compare the contracts with those of the last release.
	$(BIN)/buf breaking protos --against protos/released.binpb

docs: $(VENV)/.dev ## Write docs/reference.md, docs/metrics.md and parts of docs/capacity.md; commit what it writes.
	$(BIN)/python tools/contract_doc.py
	$(BIN)/python tools/metrics_doc.py
	$(BIN)/python -m tools.capacity_doc

release: $(VENV)/.dev ## What a release of one part consists of, in dist/: make release PART=cognate.
	@test -n "$(PART)" || { echo "name one: make release PART=client, common, cognate or agent"; exit 2; }
	$(BIN)/python tools/release.py $(PART)

bench: $(VENV)/.dev ## One benchmark: make bench BENCH=train_step. Its last line is one JSON object.
	@test -n "$(BENCH)" || { echo "name one: make bench BENCH=name, of:"; ls tests/benchmarks | sed -nE 's/^bench_(.*)\.py$$/  \1/p'; exit 2; }
	@env $$($(BIN)/python -c 'from training_common.engines.processes import WORKER_ENVIRONMENT as e; print(*map("=".join, e.items()))') $(BIN)/python tests/benchmarks/bench_$(BENCH).py

capacity: $(VENV)/.dev ## What a scale comes to: make capacity ARGS="cluster --set nodes=200"; docs/capacity.md explains.
	@$(BIN)/python -m tools.capacity $(ARGS)

clean: ## Remove what was installed and built; var/ with its models stays.
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
