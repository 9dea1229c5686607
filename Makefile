# `make check` runs what CI runs.
.PHONY: check lint test format

check: lint test

lint:
	ruff format --check .
	ruff check .
	mypy
	lint-imports

test:
	pytest

format:
	ruff format .
	ruff check --fix .
