# Each target sets up what it needs: a virtual environment in .venv, unless PYTHON names your own.
#   PYTHON=python make test        uses the environment you are in

.DEFAULT_GOAL := help
.PHONY: help demo study evidence test stress pretrain-upreid pretrain-personvit finetune evaluate check-gpu bench readme clean test-first test-second

DATASET   ?= synthetic
DATA_ROOT ?= data
STUDY     ?= few-shot
FLAGS     ?=
TRAIN      = $(PYTHON) $(if $(GPUS),-m torch.distributed.run --standalone --nproc-per-node $(GPUS) --) train.py

ifndef PYTHON
PYTHON := .venv/bin/python
SETUP  := .venv/ready
endif

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-19s %s\n", $$1, $$2}'
	@echo "  variables: DATASET=$(DATASET) DATA_ROOT=$(DATA_ROOT) ARCH= WEIGHTS= GPUS= STUDY=$(STUDY) FLAGS= PYTHON=$(PYTHON)"

.venv/ready: requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed, python3 is $$(python3 --version)"; exit 1; }
	@python3 -m venv .venv || \
	  { echo "error: python3 cannot make a virtual environment; install your system's python3-venv package"; exit 1; }
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: $(SETUP)  ## synthetic people: draw, pre-train, fine-tune, evaluate, rank list; minutes on a CPU
	$(PYTHON) -m extra.study demo --data-root "$(DATA_ROOT)" $(FLAGS)

study: $(SETUP)  ## does pre-training help? STUDY=few-shot upreid personvit epochs data initialisation; five seeds, hours
	$(PYTHON) -m extra.study $(STUDY) --dataset "$(DATASET)" --data-root "$(DATA_ROOT)" $(FLAGS)

evidence: $(SETUP)  ## ... of ViT-S, on a GPU: DATASET=market1501; goes on after a stop
	$(PYTHON) -m extra.study evidence --dataset "$(DATASET)" --data-root "$(DATA_ROOT)" $(FLAGS)

test: $(SETUP)  ## all tests, on the CPU, in two processes at a time
	@$(MAKE) --no-print-directory -j2 test-first test-second

FIRST = tests/test_train.py tests/test_workers.py
test-first test-second: $(SETUP)
test-first:
	$(PYTHON) -m pytest -q -p no:cacheprovider $(FIRST)
test-second:
	$(PYTHON) -m pytest -q -p no:cacheprovider $(FIRST:%=--ignore=%) tests *.py --doctest-modules

stress: $(SETUP)  ## kill trainings at random moments, continue, compare: FLAGS="--kills 20"
	$(PYTHON) tests/stress.py $(FLAGS)

pretrain-upreid: $(SETUP)  ## UP-ReID pre-training: DATASET=luperson GPUS=8, or any folder
	$(TRAIN) --pretrain upreid --dataset "$(DATASET)" --data-root "$(DATA_ROOT)" \
	  $(if $(ARCH),--arch $(ARCH)) $(FLAGS)

pretrain-personvit: $(SETUP)  ## PersonViT pre-training: DATASET=luperson GPUS=8 ARCH=vit_small, or any folder
	$(TRAIN) --pretrain personvit --dataset "$(DATASET)" --data-root "$(DATA_ROOT)" \
	  $(if $(ARCH),--arch $(ARCH)) $(FLAGS)

finetune: $(SETUP)  ## fine-tune and evaluate: DATASET=msmt17 ARCH=vit_small WEIGHTS=pretrained.pth
	$(TRAIN) --dataset "$(DATASET)" --data-root "$(DATA_ROOT)" $(if $(ARCH),--arch $(ARCH)) \
	  $(if $(WEIGHTS),--weights "$(WEIGHTS)") $(FLAGS)

evaluate: $(SETUP)  ## evaluate a fine-tuned model: DATASET=msmt17 WEIGHTS=runs/msmt17_vit_small/model.pth
	$(PYTHON) evaluate.py --dataset "$(DATASET)" --data-root "$(DATA_ROOT)" $(if $(WEIGHTS),--weights "$(WEIGHTS)") $(FLAGS)

check-gpu: $(SETUP)  ## is this GPU right? a step of each training beside the CPU's, in a minute or a few
	$(PYTHON) -m extra.bench --check $(FLAGS)

bench: $(SETUP)  ## speed on this machine: whole trainings, ranking; FLAGS="--only personvit"
	$(PYTHON) -m extra.bench $(FLAGS)

readme:  ## repair the line numbers of the links in README.md and docs/
	python3 tests/links.py

clean:  ## remove .venv and caches; data/ and runs/ are yours and stay
	rm -rf .venv .pytest_cache __pycache__ extra/__pycache__ tests/__pycache__
