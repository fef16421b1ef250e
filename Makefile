# Two commands from a fresh clone: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
SEED ?= 0
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: demo test check trust bench matrix notebooks docs clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mi-weightspace needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/mi-weightspace demo --out $(OUT) --seed $(SEED)

# Tiny matrices: threads would wait for each other, five times longer where a core is busy.
test check: export OMP_NUM_THREADS ?= 1

test: $(STAMP)
	$(BIN)/python -m pytest tests -m 'not slow and not gpu'

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest tests -m 'quick and not slow'

trust: $(STAMP)
	$(BIN)/python -m tests.trust.trust_table --slow

bench: $(STAMP)
	$(BIN)/python benchmarks/svd_diff.py
	$(BIN)/python benchmarks/svd_diff.py --full
	$(BIN)/python benchmarks/activation_stats.py
	$(BIN)/python benchmarks/vpd_step.py
	$(BIN)/python benchmarks/diff_vpd_scale.py
	$(BIN)/python benchmarks/sae_encode.py
	$(BIN)/python -m benchmarks.sweep
	$(BIN)/python -m benchmarks.collect

# The quick tests beside TransformerLens 3 and 4, each in an environment of its own (build/matrix).
matrix:
	$(PYTHON) tests/matrix.py

notebooks: $(STAMP)
	mkdir -p notebooks
	$(BIN)/python -m ipykernel install --sys-prefix --name python3
	for name in walkthrough inoculation_walkthrough vpd_walkthrough sweep_walkthrough; do \
		$(BIN)/jupytext --to ipynb --set-kernel python3 --output notebooks/$$name.ipynb experiments/$$name.py && \
		PYTHONWARNINGS=ignore $(BIN)/jupyter-execute --inplace notebooks/$$name.ipynb || exit 1; \
	done

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m ipykernel install --sys-prefix --name python3
	touch $@

# Offline once installed: runs every block and notebook, builds build/docs, then looks at what was built.
docs: $(DOCS_STAMP)
	PYTHONWARNINGS=ignore NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	$(BIN)/python -m pytest tests/docs -k 'not blocks_run'  # the build has run them
	$(BIN)/python docs/sitetools/check_site.py build/docs

clean:
	rm -rf $(VENV) runs build .cache/docs *.egg-info
