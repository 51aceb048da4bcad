# make demo   installs what is missing and runs the main job on the embedded default (Fashion-MNIST, two ranks)
# make test   installs what is missing and runs lint, types and tests
# Dependencies live outside the checkout, under ~/.cache/ticketworks or $TICKETWORKS_ENV_ROOT (tools/environment.py).
PYTHON ?= python3
BIN := .venv/bin
DATA := data/fashion_mnist

.PHONY: env demo test lint types format clean

env:
	@$(PYTHON) tools/environment.py

$(DATA)/val.beton.json: | env
	$(BIN)/python -m data_prep fashion-mnist --output $(DATA)

demo: env $(DATA)/val.beton.json
	$(BIN)/deepspeed --num_gpus 2 launchers/train.py --config fashion_mnist_s90.yaml --resume auto

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv data runs
