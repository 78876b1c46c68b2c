# make demo   fine-tunes a real model on real text, saves it, loads it, uses it
# make test   the whole test suite
# Each makes its environment first and reuses it afterwards. PYTHON and VENV choose another one:
#   make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
# the CPU build where pip is set up to find it; elsewhere see README, "Installing"
TORCH ?= torch==2.13.0
# triton brings no CUDA; without a GPU it runs the tests of the kernels in its interpreter
EXTRAS ?= train,tasks,search,gguf,triton,test,dev,docs

BIN := $(VENV)/bin
RELEASE := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
INSTALLED := $(VENV)/.installed-$(RELEASE)
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)
# nothing may be fetched while a model runs; a thread that spins while another program has its core holds the
# others up: 0.3 instead of 1.5 steps a second in the demo
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=passive $(BIN)/python

ON_TRITON := $(if $(TRITON),PYTHONPATH=$(CURDIR)/build/triton-$(TRITON))

.DEFAULT_GOAL := help
.PHONY: help environment demo report-screenshot test ladder gpu style format bench bench-smoke docs clean

help:
	@sed -n '1,4s/^# //p' Makefile
	@echo "also: make environment | style | format | bench | bench-smoke | gpu | docs | clean; make demo QUICK=1 takes about a minute"

environment: $(INSTALLED)

demo: environment
	$(RUN) examples/demo.py $(if $(QUICK),--quick)

# files side by side on up to four cores; PYTEST=-n0 runs them one after another
test: environment
	$(RUN) -m pytest -n logical --maxprocesses 4 --dist loadfile $(PYTEST)

# the demo's report as Chromium shows it: out/report-light.png, -dark.png, -phone.png; skipped without a browser
report-screenshot: environment
	$(RUN) examples/report_screenshot.py out/report out/movie_reviews/report.html out/quick/report.html

# what can be shown of the GPU kernels without a GPU, every dtype, size and target; needs some minutes
# on another release in a folder of its own: make ladder TRITON=3.6.0, whose interpreter wants numpy below 2.4
ladder: environment
	$(if $(TRITON),$(BIN)/python -m pip install -q --no-deps --target build/triton-$(TRITON) triton==$(TRITON) numpy==2.3.5)
	$(ON_TRITON) LADDER=full $(RUN) -m pytest tests/ladder $(PYTEST)
	$(ON_TRITON) $(RUN) tests/ladder/compile_gate.py --full --targets sm80,sm90,sm100,sm120

# for whoever has a GPU: every test on it, the sanitizer, benchmarks beside rivals; writes benchmarks/results/<device>.json
gpu: environment
	$(RUN) benchmarks/gpu.py

style: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CSRC),$(BIN)/clang-format --dry-run --Werror $(CSRC))
	$(RUN) -m pytest -q tests/test_layout.py

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

# every benchmark beside its rivals, the result as JSON, and the plot of it; wants a quiet machine, takes 25 minutes. What
# counts is timed in turn (benchmarks/conftest.py), so the plugin's own rounds are few
bench: environment
	$(RUN) -m pytest -q benchmarks --benchmark-max-time=0.2 --benchmark-min-rounds=3 --benchmark-json=benchmarks/results/$(shell date +%F).json
	$(RUN) benchmarks/plot.py

# one round each: shows that every benchmark runs, measures nothing
bench-smoke: environment
	$(RUN) -m pytest -q benchmarks --benchmark-disable

# the pages of docs/ as a site in out/docs; a warning is an error
docs: environment
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

clean:
	rm -rf build out *.egg-info .pytest_cache .ruff_cache .benchmarks pefast/*.so pefast/native/why_*.txt $(INSTALLED)
	find . -name __pycache__ -type d -not -path "./.venv*" -prune -exec rm -rf {} +

# torch first: every other requirement then takes the build that is already there. An editable install builds
# csrc in place.
$(INSTALLED): pyproject.toml setup.py constraints.txt pefast/tasks/carried.py $(CSRC)
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))" \
	  || { echo "make: $(PYTHON) is $(RELEASE); 3.10 to 3.13 will do: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c "import ensurepip" 2>/dev/null \
	  || { echo "make: $(PYTHON) cannot make environments; on Debian: apt-get install python3-venv python3-dev"; exit 1; }
	@test -x $(BIN)/python$(RELEASE) || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	$(BIN)/python -m pip install -q --no-deps $$($(BIN)/python -m pefast.tasks.carried)
	@touch $@
