# make demo      set up, then learn, segment and write the nuclei of sample_project/
# make test      set up, then run the tests
# make check     set up, then run the linters; those of Groovy where there are java and npm
# make docs      set up, then build the guide into site/, with warnings as errors
# make wheel     build the wheel, and try it in a clean environment
# make resolve   see that there are wheels for each Python and each system, without installing any
# make install   set up only: a virtual environment in .venv
# PYTHON=... names the Python to set up with; else .ci/python finds one. With CONSTRAINTS= it is set up with
# the newest versions of all packages, rather than those of constraints.txt.
CONSTRAINTS := constraints.txt
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

.PHONY: install demo test check docs wheel resolve bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	python=$$(.ci/python) && "$$python" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %) --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/patchcl-qp run sample_project/project.qpproj

test: install
	$(BIN)/pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder --max-worker-restart=1

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	.ci/groovy

docs: install
	$(BIN)/mkdocs build --strict --quiet

wheel:
	.ci/wheel

resolve:
	.ci/resolve

bench: install
	$(BIN)/python benchmarks/speed.py

clean:
	rm -rf .venv site build sample_project/patchcl
