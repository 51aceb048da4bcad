# make env        installs what is missing: the packages of requirements.lock, and .venv, which sees them
# make demo       installs what is missing and runs the main job on the embedded default (Fashion-MNIST, two ranks)
# make demo-long  the demo whose numbers docs/quick-start.md shows
# make test       installs what is missing and runs lint, types and tests
# make lint, types, format    ruff and mypy alone; format rewrites
# make docs       builds the documentation into site/, which needs no network to be read
# make campaigns  lists the long campaigns with their minutes; make campaigns RUN="resume fuzz" (or RUN=all) runs them
# make lock       writes requirements.lock and requirements-docs.lock anew (tools/lock.py)
# make clean      removes .venv, data, runs and site
# Packages live outside the checkout, under ~/.cache/ticketworks or $TICKETWORKS_ENV_ROOT (tools/environment.py).
# Another Python or other versions: make test PYTHON=python3.12, TICKETWORKS_LOCK=other.lock make test
PYTHON ?= python3
BIN := .venv/bin
DATA := data/fashion_mnist

.PHONY: installed env demo demo-long test lint types format docs campaigns lock clean

installed:
	@$(PYTHON) tools/environment.py

env: installed
	@echo "the environment is ready; activate it in this shell with: source .venv/bin/activate"

$(DATA)/val.beton.json: | installed
	$(BIN)/python -m data_prep fashion-mnist --output $(DATA)

demo: demo-long

demo-long: installed $(DATA)/val.beton.json
	$(BIN)/deepspeed --quiet --num_gpus 2 launchers/train.py --config fashion_mnist_s90.yaml --resume auto

lint: installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: installed
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile

format: installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs:
	@$(PYTHON) tools/site.py

campaigns: installed
	@$(BIN)/python -m tests.campaigns $(RUN)

lock: installed
	$(BIN)/python -m tools.lock $(NEWEST)

clean:
	rm -rf .venv data runs site
