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
RUN    = @$(RLHF) run $@ -c $(CONFIG) --artifacts $(ARTIFACTS) $(SET)

.DEFAULT_GOAL := help
.PHONY: help setup demo world base sft rankings rm ppo dpo evaluate report status doctor chat \
        test test-slow lint bench faults frontier clean-artifacts

help: ## show this list
	@echo 'make TARGET [CONFIG=configs/tiny.yaml] [ARTIFACTS=artifacts] [SET="ppo.kl_coef=0.05 ppo.total_episodes=2048"]'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything in it (EXTRAS=dev,s3 for more)

# torch first and by its exact version: a build that the machine already offers (CPU or CUDA) is found before a range could
# pull in another.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/pip install -qq -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

demo: $(STAMP) ## every stage of CONFIG in one process, then the table and the path of the report
	@$(RLHF) run report -c $(CONFIG) --artifacts $(ARTIFACTS) $(SET)

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
	@$(RLHF) status -c $(CONFIG) --artifacts $(ARTIFACTS) $(SET)
doctor: $(STAMP) ## versions, device, threads, disk, and what is missing
	@$(RLHF) doctor -c $(CONFIG) --artifacts $(ARTIFACTS) $(SET)
chat: $(STAMP) ## talk to policies side by side (MODELS=sft,ppo)
	@$(RLHF) chat -c $(CONFIG) --artifacts $(ARTIFACTS) --models $(MODELS) $(SET)

test: $(STAMP) ## the quick tests
	@$(VENV)/bin/pytest -q
test-slow: $(STAMP) ## the slow ones: whole chains, kills, real training
	@$(VENV)/bin/pytest -q -m slow
lint: $(STAMP) ## ruff
	@$(VENV)/bin/ruff check .

clean-artifacts: $(STAMP) ## say what CONFIG's artifacts are, then remove them
	@$(RLHF) clean -c $(CONFIG) --artifacts $(ARTIFACTS) $(SET)

bench: $(STAMP) ## run tests/benchmarks/BENCH.py (BENCH=ppo)
	@test -f tests/benchmarks/$(BENCH).py || { echo "error: tests/benchmarks/$(BENCH).py: no such benchmark; there are: $(basename $(notdir $(wildcard tests/benchmarks/*.py)))" >&2; exit 2; }
	@$(VENV)/bin/python tests/benchmarks/$(BENCH).py
frontier: $(STAMP) ## reward against KL: PPO over kl_coef, DPO over beta, best of n; a table and a picture
	@$(VENV)/bin/python tests/benchmarks/frontier.py -c $(CONFIG) --artifacts $(ARTIFACTS) $(SET)
faults: $(STAMP) ## kill, starve and damage the stages KILLS times; the same bytes must come out
	@$(VENV)/bin/python tests/resume/faults.py --kills $(KILLS) --table tests/resume/results.md
