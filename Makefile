# make ask    a question about a picture: IMAGE=... QUESTION=... ; the first call creates .venv
# make demo   a chat in the browser; MODEL=... for another than the bundled nano
# make test   all tests;  make lint: style and types;  make nano: train the bundled model from nothing, and measure it
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
IMAGE ?= docs/pictures/penguin.png

.PHONY: ask demo test lint nano clean

ask: $(VENV)/.ready
ifdef QUESTION
	@$(BIN)/yi-vl ask $(IMAGE) "$(QUESTION)"
else
	@echo "$(IMAGE)  What is in this picture?"
	@$(BIN)/yi-vl ask $(IMAGE) "What is in this picture?"
	@echo "$(IMAGE)  图片里是什么？"
	@$(BIN)/yi-vl ask $(IMAGE) "图片里是什么？"
endif

demo: $(VENV)/.ready-for-demo
	$(BIN)/python -m demo $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/.ready-for-tests
	$(BIN)/python -m pytest -q

lint: $(VENV)/.ready-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

nano: $(VENV)/.ready-for-tests
	$(BIN)/python -m train.nano data
	$(BIN)/python -m train.nano train
	$(BIN)/python -m train.nano export
	$(BIN)/python -m train.nano measure

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.ready-for-demo: $(VENV)/.ready
	$(BIN)/pip install --quiet --editable ".[demo]"
	@touch $@

$(VENV)/.ready-for-tests: $(VENV)/.ready
	$(BIN)/pip install --quiet --editable ".[train,nano,eval,serve,demo,test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
