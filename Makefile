# Two commands do everything on a fresh machine with Python 3.11: `make pipeline` and `make test`.

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
CONFIG  ?= configs/default.yaml
RUN     ?=
SET     ?=
QUICK   ?=
CONFIGS  = $(foreach c,$(CONFIG),--config $(c))
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/installed
FLAGS    = $(CONFIGS) $(if $(RUN),--run_dir '$(RUN)') $(if $(QUICK),--quick_test)
# In a recipe: the words of SET become --set WORD ... in "$$@". Quotes are the shell's: SET='data.path="my data/a.txt" seed=3'
export SET
SETTINGS = set -ef; eval "set -- $$SET"; for s; do set -- "$$@" --set "$$s"; shift; done
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: pipeline quick_test test test-fast test-long test-commands benchmark-quick inspect doctor report docs lint language types format setup help

## Run all seven stages; finished ones are skipped (CONFIG=FILE, SET="key=value ...", RUN=FOLDER, QUICK=1)
pipeline: $(STAMP)
	@$(SETTINGS); REMASK_MAKE=1 $(BIN)/python -m lib.pipeline $(FLAGS) "$$@"

## Run all seven stages from scratch with small models, in under a minute
quick_test: $(STAMP)
	@$(SETTINGS); REMASK_MAKE=1 $(BIN)/python -m lib.pipeline $(CONFIGS) "$$@" --quick_test --overwrite \
	    --run_dir outputs/quick_test

## Run all tests except the long ones and those of the documented commands
test: $(STAMP)  # two processes of one thread each are faster than one of two
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not commands and not long"

## Run the tests that repeat at length what shorter ones assert
test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m long

## Run the tests that need no pipeline run, in under 90 seconds
test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not commands and not slow and not long"

## Run every command of README, docs, configs and docstrings, small, in a copy of the tree
test-commands: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m commands

## Compare the re-masking policies on small models, in under five minutes
benchmark-quick: $(STAMP)
	REMASK_MAKE=1 $(BIN)/python -m benchmarks.remasking outputs/remasking_quick --quick

## Print one line per manifest of the newest run (or RUN=FOLDER)
inspect: $(STAMP)
	@$(BIN)/python -m lib.runs $(if $(RUN),'$(RUN)')

## Say what this machine has, what of the newest run (or RUN=FOLDER) is complete or damaged, and how to continue it
doctor: $(STAMP)
	@$(BIN)/python -m lib.doctor $(if $(RUN),'$(RUN)')

## Print the path of the report of the newest run (or RUN=FOLDER); run stage 06 if the report is missing
report: $(STAMP)
	@$(SETTINGS); REMASK_MAKE=1 $(BIN)/python 06_sample.py $(FLAGS) "$$@"
	@ls $(if $(RUN),'$(RUN)',outputs/run_*)/06_sample/report.html | tail -n 1

## Write docs/configuration.md from the settings, and docs/results.md and README's table from the stored results
docs: $(STAMP)
	$(BIN)/python -m lib.config_reference
	$(BIN)/python -m benchmarks.results_page

## Check style and format
lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

## List old words, long sentences, long files and long parameter lists
language: $(STAMP)
	$(BIN)/python -m tests.language

## Check types
types: $(STAMP)
	$(BIN)/pyright

## Format the code, and fix what ruff can fix
format: $(STAMP)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

## Install the environment into .venv (the other targets do this when needed)
setup: $(STAMP)

$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # on all cores; a few files of packages are templates
	@touch $(STAMP)

## Print this list
help:
	@awk '/^## /{text=substr($$0,4)} /^[a-z_-]+:/{if(text){sub(":.*","");printf "make %-16s %s\n",$$0,text;text=""}}' Makefile
