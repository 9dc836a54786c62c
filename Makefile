# make demo: everything from nothing to figures; demo-robot: to a robot that reaches its goals. make test: the test suite.
# make test-quick: its heart, within a minute. make test-long: the campaigns beside it. All install into .venv first what they need.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO := .venv/.installed-demo
# One thread per process: two threads on a busy two-core machine are many times slower.
export OMP_NUM_THREADS ?= 1
# Else every process compiles the package again, and pytest the tests: a fifth of a short process.
unexport PYTHONDONTWRITEBYTECODE
# dvc and jepa-cache start `python`; it must be this one.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install install-sim demo demo-robot test test-quick test-long bench bench-peers lint types format clean

install: $(INSTALLED)

# Made again only when pyproject.toml or the tried versions changed. constraints.txt holds versions that were seen to work together.
# The demos need dvc and the simulator, tests and lint much more.
$(INSTALLED): EXTRAS := dev
$(DEMO): EXTRAS := dvc,sim
$(INSTALLED) $(DEMO): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	@echo "installing into .venv: some minutes; a torch for CPUs needs 2.6 GB, that for CUDA 6.3 GB"
	@$(PYTHON) -m venv $(BIN)/..
	@$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

# The models of the simulated robot: files of gym-hil, whose own requirements (pygame and more) nothing here needs. MuJoCo itself comes
# with the demos. It draws with a system library, which `jepa-cache doctor` names where it is missing.
install-sim: .venv/.installed-sim

.venv/.installed-sim: $(DEMO)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gym-hil==0.1.14
	@$(BIN)/python -c 'from jepa_cache.cli.doctor import check_robot; print(*check_robot(needed=True))'
	@touch $@

demo: $(DEMO)
	$(BIN)/dvc repro
	@echo
	@echo "page: outputs/evaluate/report.html, figures: outputs/evaluate/metrics.json"
	@echo "next: source .venv/bin/activate, then docs/quickstart.md, A first experiment"

# params.yaml stays the Minecraft sample's. Run again, it renders again and takes the rest as it is.
demo-robot: install-sim
	for stage in sample encode fit_scaler train_predictor act; do $(BIN)/python stages/$$stage.py configs/robot.yaml || exit; done
	@echo "figures: outputs/act/metrics.json, film: outputs/act/run/film.gif, page: outputs/act/run/report.html; docs/acting.md explains them"

test: install
	$(BIN)/python -m pytest tests benchmarks --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Golden vectors, the first release's stores and checkpoint (encode, train, read: end to end), rules of the house, pure functions.
QUICK := tests/test_architecture.py tests/test_golden.py tests/test_first_release.py tests/test_actions.py tests/test_poses.py \
	tests/test_episode.py tests/encoder/test_frozen.py tests/encoder/test_vit.py \
	tests/encoding/test_recipes.py tests/encoding/test_steps.py tests/data/test_windows.py tests/store/test_quantisation.py \
	tests/predictor/test_model.py tests/predictor/test_rollout.py tests/training/test_losses.py tests/evaluation/test_distances.py

test-quick: install
	$(BIN)/python -m pytest $(QUICK) --numprocesses 2 --dist loadfile

# Every fault at every change to the disk, every bit flipped, long random histories, real commands killed at random moments: hours.
# Of the kills: CAMPAIGN_TRIALS of each kind (12), drawn from CAMPAIGN_SEED (0), as in `make test-long CAMPAIGN_SEED=1`.
test-long: install
	$(BIN)/python -m pytest tests -m long --numprocesses 2

# On two cores that do nothing else, 5 GB in the temporary folder. docs/benchmarks.md says how to read it.
bench: install
	$(BIN)/python benchmarks/read.py --rounds 20
	$(BIN)/python benchmarks/encode.py --rounds 3
	$(BIN)/python benchmarks/loader.py

# The libraries that read.py compares with. litdata and mosaicml-streaming require torchvision (mosaicml-streaming also the clients of
# four clouds), whose registry build is for CUDA and breaks imports beside a CPU torch; reading needs none of that.
bench-peers: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps litdata lightning-utilities tifffile \
		mosaicml-streaming brotli catalogue cramjam python-snappy xxhash zstd

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy | $(BIN)/mypy-baseline filter

# After types were mended: takes what is gone out of mypy-baseline.txt.
types: install
	$(BIN)/mypy | $(BIN)/mypy-baseline sync

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv outputs shards
