# recsys: `make run` sets up and runs the daily cycle, `make test` checks everything. `make help` lists the rest.
# Works with GNU make 3.81 (macOS) and any POSIX sh.

PYTHON = python3
VENV   = .venv
BIN    = $(VENV)/bin
# The name of the stamp holds the folder: scripts in .venv name it, so a .venv that was copied or moved is made again.
STAMP := $(VENV)/ready-$(shell pwd | cksum | cut -d' ' -f1)
# A copy of the tree, in which `make test` tries what must change nothing.
COPY   = $(VENV)/copy

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1
# Threads of torch, LightGBM and FAISS that wait for others sleep: where they spin, a busy machine takes ten times as long.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: help setup run test check-clean check-export check-notebooks check-readme prepare readme docs lab serve bench wheel clean

help:
	@echo 'make run       set up .venv if need be, then the daily cycle; see reports/index.html'
	@echo 'make test      set up .venv if need be, then all checks: notebooks, package, README, tests'
	@echo 'make serve     the HTTP service'
	@echo 'make lab       JupyterLab on nbs/'
	@echo 'make prepare   after editing notebooks: clean them, export recsys/, write README.md'
	@echo 'make readme    only README.md'
	@echo 'make docs      the documentation as a site: reports/docs/index.html'
	@echo 'make bench     the checks of nightly size'
	@echo 'make wheel     dist/recsys-VERSION.whl, with the job notebooks inside'
	@echo 'make setup     only .venv'
	@echo 'make clean     remove .venv and caches; data/ and reports/ stay'
	@echo 'Another Python: make run PYTHON=python3.12'

setup: $(STAMP)

# The stamp is written last, and removed first: an interrupted set-up begins again from nothing.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "$(PYTHON) is not Python 3.11 or newer: install one, or name it: make run PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) has no venv: install it (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@[ -f $@ ] || { echo 'Setting up .venv: some minutes, the first time'; rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@rm -f $(VENV)/ready-*
	@quiet=-q; [ -t 1 ] && quiet=; $(BIN)/python -m pip install $$quiet -c constraints.txt -e '.[dev,feast,redis,spark,milvus,tune,bench]'
	@touch $@

run: $(STAMP)
	@$(BIN)/recsys run

serve: $(STAMP)
	@$(BIN)/recsys serve

lab: $(STAMP)
	@$(BIN)/jupyter lab --notebook-dir=nbs

# Each check prints a line when it is content; pytest comes last, and its last line is the last that is printed.
test: check-readme
	@$(BIN)/python -m pytest -m 'not bench' -n 2 --no-loadscope-reorder

bench: $(STAMP)
	@$(BIN)/python -m pytest -m bench

check-clean: $(STAMP)
	@rm -rf $(COPY) && mkdir $(COPY) && cp -R nbs recsys pyproject.toml $(COPY)
	@cd $(COPY) && ../bin/nbdev-clean
	@diff -rq nbs $(COPY)/nbs || { echo 'These notebooks are not clean: make prepare' >&2; exit 1; }
	@echo 'clean: notebooks are as nbdev-clean leaves them'

check-export: check-clean
	@cd $(COPY) && find recsys -name '*.py' -exec rm {} + && cp ../../recsys/__init__.py recsys && ../bin/nbdev-export
	@diff -rq -x __pycache__ recsys $(COPY)/recsys || { echo 'recsys/ is not what the notebooks export: make prepare' >&2; exit 1; }
	@echo 'export: recsys/ is what the notebooks say'

check-notebooks: check-export
	@$(BIN)/nbdev-test --n-workers 2 > $(VENV)/notebooks.log 2>&1 || { cat $(VENV)/notebooks.log >&2; exit 1; }
	@echo 'notebooks: all run from the first cell to the last'

check-readme: check-notebooks
	@$(BIN)/python -c 'from recsys.operations.readme import make_readme; make_readme(target="$(COPY)/README.md")'
	@cmp -s README.md $(COPY)/README.md || { echo 'README.md is not what nbs/index.ipynb says: make readme' >&2; exit 1; }
	@echo 'readme: README.md is what nbs/index.ipynb says'

prepare: $(STAMP)
	@$(BIN)/nbdev-clean && $(BIN)/nbdev-export && $(MAKE) -s readme

readme: $(STAMP)
	@$(BIN)/python -c 'from recsys.operations.readme import make_readme; make_readme()'

# build/ would bring modules back that are gone.
wheel: $(STAMP)
	@rm -rf build && $(BIN)/python -m pip wheel -q --no-deps -w dist . && ls dist/*.whl

docs: $(STAMP)
	@$(BIN)/python -c 'from recsys.operations.docs import write_docs; print("Look at", write_docs())'

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis build dist lightning_logs *.egg-info
	find recsys tests -name __pycache__ -prune -exec rm -rf {} +
