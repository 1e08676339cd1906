# make demo | test | fuzz | lint | docs | dev: each makes .venv first where it is missing or older than its inputs.

PYTHON ?= python3
WORKERS ?= 2
GRAPHS ?= 5000
FILES ?= 10000
TIME ?= 3600
BIN := .venv/bin
STAMP := .venv/.stamp

.DELETE_ON_ERROR:
.PHONY: fuzz zoo zoo-all demo test lint docs pictures dev format clean

demo: $(STAMP)
	$(BIN)/fxzip demo $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q $(ARGS)

zoo zoo-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.zoo $(if $(filter zoo-all,$@),--all) $(ARGS)

# Random networks, then mutated files: at most TIME seconds each. Called again, it goes on where it ended.
fuzz: $(STAMP)
	@export OMP_NUM_THREADS=1; status=0; \
	$(BIN)/python -m tests.fuzz --graphs $(GRAPHS) --seconds $(TIME) $(ARGS) || status=1; \
	$(BIN)/python -m tests.fuzz.files --count $(FILES) --seconds $(TIME) || status=1; \
	exit $$status

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site; a warning is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What the docs and the readme show and takes time: drawings, what the guides' code prints, tables.
pictures: $(STAMP)
	$(BIN)/python docs/make_pictures.py
	$(BIN)/python docs/examples/run.py
	$(BIN)/python -m benchmarks.tables

dev: $(STAMP)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info fxzip/passes .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The link lets tools that only follow paths see passes/ as fxzip.passes; imports do without it.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	ln -sfn ../passes fxzip/passes
	touch $@
