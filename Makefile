# One target for each stage, in their order. A target first brings up to date the stages that it needs;
# a stage that is up to date prints one line. `make` without a target lists the targets.

CONFIG    ?= configs/tiny.yaml
ARTIFACTS ?= artifacts
SET       ?=
MODELS    ?= sft,ppo
BENCH     ?= ppo
KILLS     ?= 200
EXTRAS    ?= dev
PYTHON    ?= python3
VERSIONS  ?=
VERSIONS_TESTS ?=
QUICK     ?=
ONLY      ?=

VENV  := .venv
RLHF  := $(VENV)/bin/rlhf
STAMP := $(VENV)/.installed

# Variables given on make's command line as NAME=VALUE. make accepts any name, so a misspelled variable
# would have no effect and no message. Here a name with a dot (also name and seed) is a setting of the
# experiment and is passed to rlhf as it is; any other name must be a variable of this file.
# .VARIABLES, value and origin exist in GNU make 3.81 already.
KNOWN   := CONFIG ARTIFACTS SET MODELS BENCH KILLS EXTRAS YES PYTHON VERSIONS VERSIONS_TESTS QUICK ONLY
INNER   := VENV RLHF STAMP SHELL MAKEFLAGS
STAGES  := world base sft rankings rm ppo dpo evaluate report
GIVEN   := $(foreach .v,$(.VARIABLES),$(if $(filter command,$(origin $(.v))),$(.v)))
DOTTED  := $(foreach .v,$(GIVEN),$(if $(findstring .,$(.v))$(filter name seed,$(.v)),$(.v)))
UNKNOWN := $(filter-out $(KNOWN) $(INNER) $(DOTTED),$(GIVEN))
ifneq ($(UNKNOWN),)
WRONG   := $(firstword $(UNKNOWN))
NEAREST := $(shell $(PYTHON) -c "import difflib, sys; name, *known = sys.argv[1:]; \
	print(*difflib.get_close_matches(name.upper(), known, 1, 0.7))" '$(WRONG)' $(KNOWN) 2>/dev/null)
STAGE   := $(firstword $(filter $(STAGES) rank playground,$(MAKECMDGOALS)) ppo)
ifneq ($(NEAREST),)
$(error $(WRONG)=$(value $(WRONG)): make has no variable $(WRONG) here; did you mean $(NEAREST)=$(value $(WRONG))? \
(a setting has a dot: ppo.kl_coef=0.2))
endif
$(error $(WRONG)=$(value $(WRONG)): make has no variable $(WRONG) here; variables are $(KNOWN), and a setting is named \
with its section: $(STAGE).$(WRONG)=$(value $(WRONG)), or SET="$(STAGE).$(WRONG)=$(value $(WRONG))")
endif
quoted   = '$(subst ','\'',$(1))'
SETTINGS = $(foreach .v,$(DOTTED),$(call quoted,$(.v)=$(value $(.v)))) $(SET)

path     = $(if $(filter ~%,$(1)),$(1),$(call quoted,$(1)))
PLACE    = -c $(call path,$(CONFIG)) --artifacts $(call path,$(ARTIFACTS))
RUN      = @$(RLHF) run $@ $(PLACE) $(SETTINGS)

.DEFAULT_GOAL := help
.PHONY: help setup demo world base sft rankings rm ppo dpo evaluate report status doctor rank playground chat \
        test test-slow test-exhaustive test-versions lint bench faults frontier claims clean-artifacts

help: ## show this list
	@echo 'make TARGET [CONFIG=configs/tiny.yaml] [ARTIFACTS=artifacts] [ppo.kl_coef=0.05 ...]'
	@echo
	@echo '  SET="ppo.kl_coef=0.05 --restart" does the same, and takes flags of `rlhf run`, too.'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything in it (EXTRAS=dev,s3 for more)

# torch is installed first, by its exact version: pip then takes the build that the machine offers (CPU or
# CUDA), before a version range of another package selects a different one. pip is not silenced: a download
# of several minutes without output looks like a hang.
PIP = $(VENV)/bin/pip install --disable-pip-version-check -c constraints.txt
$(STAMP): pyproject.toml constraints.txt
	@echo 'setup: $(VENV), then torch, then the other packages: some minutes, most of them the downloads of torch'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e ".[$(EXTRAS)]"
	@touch $@
	@echo 'setup: done. `make demo` runs every stage; `make` lists the other targets'

demo: $(STAMP) ## every stage of CONFIG in one process, then the table and the path of the report
	@$(RLHF) run report $(PLACE) $(SETTINGS)

world: $(STAMP) ## write the embedded world: corpus, demonstrations, prompts
	$(RUN)
base: $(STAMP) ## pretrain a language model (or convert one)
	$(RUN)
sft: $(STAMP) ## fine-tune it on demonstrations
	$(RUN)
rankings: $(STAMP) ## sample responses and rank them (or take rankings that people made)
	$(RUN)
rm: $(STAMP) ## train the reward model on the rankings
	$(RUN)
ppo: $(STAMP) ## train the policy against it, with the KL penalty and the pretraining gradient
	$(RUN)
dpo: $(STAMP) ## train a policy on the rankings directly
	$(RUN)
evaluate: $(STAMP) ## compare the policies on the evaluation prompts
	$(RUN)
report: $(STAMP) ## the same as demo: table, curves, samples on one page
	$(RUN)

status: $(STAMP) ## which stages are done, stale (and why), interrupted, missing or damaged
	@$(RLHF) status $(PLACE) $(SETTINGS)
doctor: $(STAMP) ## versions, device, threads, disk, and what is missing
	@$(RLHF) doctor $(PLACE) $(SETTINGS)
rank: $(STAMP) ## let people rank answers in a browser
	@$(RLHF) rank $(PLACE) $(SETTINGS)
playground: $(STAMP) ## let people talk to policies in a browser
	@$(RLHF) playground $(PLACE) $(SETTINGS)
chat: $(STAMP) ## talk to policies side by side (MODELS=sft,ppo)
	@$(RLHF) chat $(PLACE) --models '$(MODELS)' $(SETTINGS)

# One worker per core, with one thread each: the tests' models are too small to gain from a second thread.
# The tests of a file stay in one worker, since they share its fixtures.
test: $(STAMP) ## the quick tests
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n logical --dist loadfile --no-loadscope-reorder
test-slow: $(STAMP) ## the slow ones: whole chains, kills, real training
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -m 'slow and not exhaustive' -n logical --dist loadfile --no-loadscope-reorder
test-exhaustive: $(STAMP) ## more of their kind: every tuning method, every layout
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -m exhaustive -n logical --dist loadfile --no-loadscope-reorder
test-versions: $(STAMP) ## them with the lowest and newest libraries on each Python (VERSIONS=lowest VERSIONS_TESTS=tests/data)
	@$(VENV)/bin/python tests/versions/matrix.py $(VERSIONS:%=--only %) --tests=$(call quoted,$(VERSIONS_TESTS))
lint: $(STAMP) ## ruff (rules and format) and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

clean-artifacts: $(STAMP) ## say what CONFIG's artifacts are, ask, and remove them but what people said (YES=1: without asking)
	@$(RLHF) clean $(PLACE) $(if $(filter command,$(origin YES)),$(if $(filter 1 y yes,$(YES)),--yes)) $(SETTINGS)

bench: $(STAMP) ## run tests/benchmarks/BENCH.py (BENCH=ppo)
	@test -f tests/benchmarks/$(BENCH).py || { echo "error: tests/benchmarks/$(BENCH).py: no such benchmark; there are: $(basename $(notdir $(wildcard tests/benchmarks/*.py)))" >&2; exit 2; }
	@$(VENV)/bin/python tests/benchmarks/$(BENCH).py
frontier: $(STAMP) ## reward against KL: PPO over kl_coef, DPO over beta, best of n; a table and a picture
	@$(VENV)/bin/python tests/benchmarks/frontier.py $(PLACE) $(SETTINGS)
# The config is each row's own, so CONFIG counts only where it is given.
claims: $(STAMP) ## what the papers claim, a verdict a row: hours; QUICK=1: less; ONLY="ROW …"; one page
	@$(VENV)/bin/python tests/benchmarks/claims.py $(if $(filter command,$(origin CONFIG)),-c $(call path,$(CONFIG))) \
		--artifacts $(call path,$(ARTIFACTS)) $(if $(filter 1 y yes,$(QUICK)),--quick) \
		$(if $(ONLY),--only $(ONLY)) $(SETTINGS)
faults: $(STAMP) ## kill, starve and damage the stages KILLS times; the same bytes must come out
	@$(VENV)/bin/python tests/resume/faults.py --kills $(KILLS) --table tests/resume/results.md
