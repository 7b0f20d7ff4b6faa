# The pipeline is a page: one target a stage, in their order. A target first brings up to date what it needs; what is up to
# date says so in one line. `make` alone shows this list.

CONFIG    ?= configs/tiny.yaml
ARTIFACTS ?= artifacts
SET       ?=
MODELS    ?= sft,ppo
BENCH     ?= ppo
KILLS     ?= 200
EXTRAS    ?= dev
PYTHON    ?= python3

VENV  := .venv
RLHF  := $(VENV)/bin/rlhf
STAMP := $(VENV)/.installed

# What stands on make's command line as NAME=VALUE. make itself takes any name and says nothing, so a misspelled one would
# change nothing: what has a dot is a setting of the experiment (so are name and seed) and goes to rlhf word for word, and
# anything else that is not of this file is refused. .VARIABLES, value and origin are in GNU make 3.81, too.
KNOWN   := CONFIG ARTIFACTS SET MODELS BENCH KILLS EXTRAS YES PYTHON
INNER   := VENV RLHF STAMP SHELL MAKEFLAGS
STAGES  := world base sft rankings rm ppo dpo evaluate report
GIVEN   := $(foreach .v,$(.VARIABLES),$(if $(filter command,$(origin $(.v))),$(.v)))
DOTTED  := $(foreach .v,$(GIVEN),$(if $(findstring .,$(.v))$(filter name seed,$(.v)),$(.v)))
UNKNOWN := $(filter-out $(KNOWN) $(INNER) $(DOTTED),$(GIVEN))
ifneq ($(UNKNOWN),)
WRONG   := $(firstword $(UNKNOWN))
NEAREST := $(shell $(PYTHON) -c "import difflib, sys; name, *known = sys.argv[1:]; \
	print(*difflib.get_close_matches(name.upper(), known, 1, 0.7))" '$(WRONG)' $(KNOWN) 2>/dev/null)
STAGE   := $(firstword $(filter $(STAGES),$(MAKECMDGOALS)) ppo)
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
.PHONY: help setup demo world base sft rankings rm ppo dpo evaluate report status doctor chat \
        test test-slow lint bench faults frontier clean-artifacts

help: ## show this list
	@echo 'make TARGET [CONFIG=configs/tiny.yaml] [ARTIFACTS=artifacts] [ppo.kl_coef=0.05 ...]'
	@echo
	@echo '  SET="ppo.kl_coef=0.05 --restart" does the same, and takes flags of `rlhf run`, too.'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything in it (EXTRAS=dev,s3 for more)

# torch first and by its exact version: a build that the machine already offers (CPU or CUDA) is found before a range could
# pull in another. pip says what it does: a download of minutes that is silent looks like one that hangs.
PIP = $(VENV)/bin/pip install --disable-pip-version-check -c constraints.txt
$(STAMP): pyproject.toml constraints.txt
	@echo 'setup: $(VENV), then torch, then the other packages: some minutes, most of them the downloads of torch'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e ".[$(EXTRAS)]"
	@touch $@
	@echo 'setup: done. `make demo` runs every stage; `make` alone lists what there is'

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
chat: $(STAMP) ## talk to policies side by side (MODELS=sft,ppo)
	@$(RLHF) chat $(PLACE) --models '$(MODELS)' $(SETTINGS)

# One worker a core, and one thread a worker: the tests' models are so small that a second thread only costs. A file's tests stay
# in one worker, since they share its fixtures.
test: $(STAMP) ## the quick tests
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n logical --dist loadfile --no-loadscope-reorder
test-slow: $(STAMP) ## the slow ones: whole chains, kills, real training
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -m slow -n logical --dist loadfile --no-loadscope-reorder
lint: $(STAMP) ## ruff (rules and format) and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

clean-artifacts: $(STAMP) ## say what CONFIG's artifacts are, ask, and remove them (YES=1: without asking)
	@$(RLHF) clean $(PLACE) $(if $(filter command,$(origin YES)),$(if $(filter 1 y yes,$(YES)),--yes)) $(SETTINGS)

bench: $(STAMP) ## run tests/benchmarks/BENCH.py (BENCH=ppo)
	@test -f tests/benchmarks/$(BENCH).py || { echo "error: tests/benchmarks/$(BENCH).py: no such benchmark; there are: $(basename $(notdir $(wildcard tests/benchmarks/*.py)))" >&2; exit 2; }
	@$(VENV)/bin/python tests/benchmarks/$(BENCH).py
frontier: $(STAMP) ## reward against KL: PPO over kl_coef, DPO over beta, best of n; a table and a picture
	@$(VENV)/bin/python tests/benchmarks/frontier.py $(PLACE) $(SETTINGS)
faults: $(STAMP) ## kill, starve and damage the stages KILLS times; the same bytes must come out
	@$(VENV)/bin/python tests/resume/faults.py --kills $(KILLS) --table tests/resume/results.md
