# `make demo` runs the whole pipeline, `make test` the test suite; both install what they need.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
CLUSTER := $(VENV)/.installed-cluster
BROWSER := $(VENV)/.installed-browser
AUDIT := .venv-audit/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TARGETS := kuberay aws gcp on-premise slurm sky
FONT   := /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
PARALLEL := --numprocesses logical --maxprocesses 4 --durations 20
FAKETIME := /usr/bin/faketime
PROMETHEUS := /usr/bin/promtool
POSTGRESQL := /usr/lib/postgresql
REDIS := /usr/bin/redis-server
CHROMIUM := /usr/bin/chromium
AZURITE := $(VENV)/azurite/node_modules/azurite/dist/src/blob/main.js
SINCE  := HEAD
SUDO   := $(shell test "$$(id -u)" = 0 || echo sudo)

.PHONY: install install-dev demo docs test lint quick unit integration test-recipes test-faults test-cluster test-browser test-cluster-files render pretrain gpu-evidence clean help

help:
	@echo "make demo         the whole pipeline on the embedded default (about 15 minutes on 2 cores)"
	@echo "make test         linters, type checker and the test suite"
	@echo "make quick        linters, type checker and the unit tests of what changed since SINCE=HEAD"
	@echo "make unit         the unit tests alone (seconds)"
	@echo "make test-recipes every recipe stopped and resumed on a tiny model, slow strategies (an hour)"
	@echo "make test-faults  killed processes, damaged files, servers that go away, clocks that jump (minutes)"
	@echo "make test-cluster jobs on a cluster, services of infra/compose.yaml, in their own namespace (minutes; Linux)"
	@echo "make test-browser the evaluation's report in a browser, with accessibility checks (seconds)"
	@echo "make test-cluster-files  what cluster/ and infra/ hold, by the tools of each (minutes)"
	@echo "make docs         the documentation as a site in site/; a broken link is refused"
	@echo "make render       write cluster/ again from its recipe and values"
	@echo "make gpu-evidence  kernels and full-width steps on a GPU, by PYTHON's own torch (25 minutes)"
	@echo "make pretrain     train the default teacher again (hours on a CPU)"
	@echo "make clean        remove the environment and the runs"

install: $(STAMP) $(FONT)

install-dev: $(DEV) $(FONT)

# The pip that comes with Python 3.11 spends minutes on naming what it has installed.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "piflow needs Python 3.11 or newer; set one with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25'

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[ray,mlflow,s3,demo]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[ray,mlflow,s3,gcs,azure,demo,metrics,lowbit,deepspeed,cluster,dev]'
	@touch $(STAMP) $@

$(CLUSTER): $(DEV)
	$(INSTALL) --editable '.[ray,s3,gcp,dev,cluster-files]'
	@touch $@

# Apart from piflow's environment: checkov pins boto3 and others, and what cyclonedx-bom brings makes `import ray`
# take 1.3 s longer in every process of Ray.
$(AUDIT):
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check 'checkov==3.3.*' 'cyclonedx-bom==7.5.*'
	@touch $@

$(FONT):
	$(SUDO) apt-get update -qq
	$(SUDO) apt-get install -y -qq fonts-noto-color-emoji

$(BROWSER): $(DEV)
	$(INSTALL) --editable '.[browser]'
	@touch $@

$(CHROMIUM):
	$(SUDO) apt-get update -qq
	$(SUDO) apt-get install -y -qq --no-install-recommends chromium

$(FAKETIME):
	$(SUDO) apt-get update -qq
	$(SUDO) apt-get install -y -qq faketime

$(PROMETHEUS):
	$(SUDO) apt-get update -qq
	$(SUDO) env RUNLEVEL=1 apt-get install -y -qq --no-install-recommends prometheus  # starts no service

$(POSTGRESQL):
	$(SUDO) apt-get update -qq
	$(SUDO) env RUNLEVEL=1 apt-get install -y -qq --no-install-recommends postgresql  # starts no service

$(REDIS):
	$(SUDO) apt-get update -qq
	$(SUDO) env RUNLEVEL=1 apt-get install -y -qq --no-install-recommends redis-server  # starts no service

# Azure's own emulator of its storage; it comes as a package of Node.
$(AZURITE): | $(BIN)/python
	@command -v npm >/dev/null || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends npm; }
	npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@3.37.0

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site
	@echo "open site/index.html, or serve it: $(BIN)/mkdocs serve"

demo: install
	$(BIN)/piflow demo

test: install-dev lint unit integration

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

quick: lint
	@tests=$$($(BIN)/python tests/changed.py $(SINCE)); \
	if test -z "$$tests"; then echo "nothing changed that has unit tests of its own"; \
	else OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -q -x $$tests; fi

unit: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) tests/unit tests/security tests/recipes tests/conformance

integration: install-dev $(AZURITE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) tests/integration

test-recipes: install-dev
	$(BIN)/python -m pytest tests/integration -m smoke_all
	$(BIN)/python -m pytest tests/unit/sharding tests/unit/planning -m slow_runs

test-faults: install-dev $(FAKETIME)
	$(BIN)/python -m pytest tests/faults

test-cluster: install-dev $(PROMETHEUS) $(POSTGRESQL) $(REDIS)
	tests/cluster/isolated $(BIN)/python -m pytest tests/cluster

test-browser: install-dev $(BROWSER) $(CHROMIUM)
	$(BIN)/python -m pytest tests/browser

test-cluster-files: $(CLUSTER) $(AUDIT) $(PROMETHEUS)
	$(BIN)/python -m pytest tests/cluster_files

render: install
	for target in $(TARGETS); do \
	  $(BIN)/piflow render cluster/recipe.yaml --target $$target --out cluster/$$target || exit 1; done

gpu-evidence:
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/evidence.py --out gpu-evidence.jsonl

pretrain: install
	$(BIN)/piflow embed pipelines/recipes/emoji-teacher.yaml
	$(BIN)/piflow pretrain pipelines/recipes/emoji-teacher.yaml

clean:
	rm -rf $(VENV) .venv-audit runs
