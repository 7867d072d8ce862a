# The only requirement is Python 3.11 or newer. ARGS="..." reaches the program a target runs,
# PYTHON=... chooses the interpreter of .venv.

SHELL := /bin/sh
BIN := .venv/bin
RUN := $(BIN)/python tests/run.py
PARTS := lint docs unit simulator oldest sanity scenarios integration

# .venv is made anew when the requirements or its place change, or when another PYTHON is asked for.
KEY := $(shell { pwd; cat requirements.txt requirements-dev.txt constraints.txt; } | cksum | tr ' ' -)
READY := .venv/.ready-$(KEY)
READY_DEV := .venv/.ready-dev-$(KEY)
# The fuzzer has an environment of its own: few need it.
FUZZ := .cache/fuzz-venv
READY_FUZZ := $(FUZZ)/.ready-$(shell { pwd; cat requirements.txt constraints.txt tests/fuzz/requirements.txt; } | cksum | tr ' ' -)
ifdef PYTHON
REMAKE := $(shell [ "$$($(BIN)/python -V 2>&1)" = "$$($(PYTHON) -V 2>&1)" ] || echo remake)
endif

# ansible ignores an ansible.cfg in a world-writable directory unless it is named.
export ANSIBLE_CONFIG ?= $(CURDIR)/ansible.cfg

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: reap
reap: $(READY) ## run one sweep: ARGS="--check --diff -l rack1"
	@$(BIN)/ansible-playbook playbooks/reap.yml $(ARGS)

.PHONY: test
test: packages ## run every test
	@$(RUN) $(PARTS)

.PHONY: test-fast
test-fast: $(READY_DEV) ## run the tests that need no containers, in a minute
	@$(MAKE) --no-print-directory --output-sync=target -j 3 lint unit simulator

.PHONY: lint docs unit simulator oldest
lint: ## check style, types and the changelog
docs: ## check that the documentation of every plugin and role renders
unit: ## run the unit tests: ARGS="-k manifest"
simulator: ## run the seeded simulator of fleets and failures
oldest: ## sweep this machine with the oldest ansible-core that is promised to work
lint docs unit simulator oldest: $(READY_DEV)
	@$(RUN) $@ -- $(ARGS)

.PHONY: simulate
simulate: $(READY_DEV) ## run it for long, on all cores: SWEEPS=1000000 SEED=7
	@$(BIN)/python tests/simulator/simulate.py $(addprefix --sweeps ,$(SWEEPS)) $(addprefix --seed ,$(SEED)) $(if $(GAP),--gap "$(GAP)")

.PHONY: mutants
mutants: $(READY_DEV) ## try the unit tests on mutants of what decides: ARGS="--only ledger.py"
	@$(BIN)/python tests/mutation/run.py $(ARGS)

.PHONY: fuzz
fuzz: $(READY_FUZZ) ## fuzz what reads outside text: SECONDS=3600 TARGET=ledger_file
	@$(FUZZ)/bin/python tests/fuzz/run.py $(addprefix --seconds ,$(SECONDS)) $(addprefix --target ,$(TARGET)) $(ARGS)

.PHONY: sanity scenarios integration
sanity: ## run ansible-test sanity on the built artifact
scenarios: ## run the molecule scenarios: containers, and hosts with kernels of their own
integration: ## run the tests against real daemons and the test hosts
sanity scenarios integration: packages
	@$(RUN) $@ -- $(ARGS)

.PHONY: docs-check
docs-check: docs

.PHONY: packages
packages: $(READY_DEV) ## install the Debian packages the tests need
	@$(BIN)/python tests/packages.py bindep.txt

.PHONY: demo
demo: $(READY_DEV) packages ## show a sweep on hosts that lost track of their VMs
	@$(BIN)/python demo/demo.py $(ARGS)

.PHONY: bench
bench: $(READY_DEV) packages ## measure a sweep
	@$(BIN)/python bench/bench.py $(ARGS)

.PHONY: build
build: $(READY) ## build the collection into build/
	@$(BIN)/ansible-galaxy collection build --force --output-path build

.PHONY: changelog
changelog: $(READY_DEV) ## write CHANGELOG.rst from changelogs/fragments/
	@PATH="$(CURDIR)/$(BIN):$$PATH" antsibull-changelog release --update-existing

.PHONY: clean
clean: ## remove everything the targets made
	rm -rf .venv .cache .ansible .mypy_cache .pytest_cache .ruff_cache .hypothesis build tests/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): $(REMAKE)
	@$(call make_venv,.venv,requirements.txt)
	@touch $@

$(READY_DEV): $(REMAKE)
	@$(call make_venv,.venv,requirements-dev.txt)
	@touch $(READY) $@

$(READY_FUZZ):
	@$(call make_venv,$(FUZZ),tests/fuzz/requirements.txt)
	@touch $@

.PHONY: remake
remake:

# A python that answers may still lack venv: prefer one that has it, name the package if none does.
define make_venv
set -e; python=; incomplete=; \
for p in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
    "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
    if "$$p" -c 'import ensurepip, venv' 2>/dev/null; then python=$$p; break; fi; \
    incomplete=$${incomplete:-$$p}; \
done; \
if [ -z "$$python" ] && [ -n "$$incomplete" ]; then \
    echo "$$incomplete has no venv module: install it (Debian: apt-get install python3-venv)" >&2; exit 1; \
elif [ -z "$$python" ]; then \
    echo "No Python 3.11 or newer found (tried: $(or $(PYTHON),python3.13 python3.12 python3.11 python3)): set PYTHON=" >&2; exit 1; \
fi; \
echo "Making $(1) with $$("$$python" -V) from $(2)"; \
"$$python" -m venv --clear $(1); \
$(1)/bin/python -m pip install --quiet --disable-pip-version-check -r $(2)
endef
