# Everything runs from .venv, which is created on first use.
#   make demo                 train a small language model with a coordinator and four nodes on this machine
#   make run CONFIG=file      launch a run with a coordinator and PEERS local nodes (default 1)
#   make join INVITE=psyche1… join a run with this machine
#   make bench                loss against the large batch's; make bench-codec: speed and error of the codecs;
#                             make bench-engine: speed of a node beside PyTorch and transformers.Trainer
#   make test | test-slow | test-hostile | lint | clean
PYTHON ?= python3
PEERS  ?= 1
BIN    := .venv/bin
PIP    := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo run join test test-slow test-hostile lint bench bench-codec bench-engine clean

# Sources of psyche._native.
NATIVE := kernels/build/CMakeLists.txt $(wildcard kernels/cpu/* kernels/include/*)

# Stamps: nothing is installed again until the pinned versions or the C++ sources change.
.venv/run.stamp: pyproject.toml constraints.txt $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing psyche into .venv (the first time takes a minute or more, because torch is large)"
	@$(PIP) torch==2.13.0 && $(PIP) -e .
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	@$(PIP) -e '.[dev]'
	@touch $@

# Rivals are kept outside the environment: transformers imports torchao wherever it is installed, which is slow.
.venv/rivals: .venv/run.stamp
	@$(PIP) --no-deps --upgrade --target $@ bitsandbytes torchao accelerate
	@touch $@

demo: .venv/run.stamp
	@$(BIN)/psyche demo $(ARGS)

run: .venv/run.stamp
	@test -n "$(CONFIG)" || { echo "make run needs CONFIG=configs/….yaml"; exit 2; }
	@$(BIN)/psyche run $(CONFIG) --peers $(PEERS) $(ARGS)

join: .venv/run.stamp
	@test -n "$(INVITE)" || { echo "make join needs INVITE=psyche1…, which the operator of the run gives you"; exit 2; }
	@$(BIN)/psyche join $(INVITE) $(ARGS)

FAST = $(BIN)/pytest -m 'not slow' -n 2 --dist worksteal
test: .venv/dev.stamp
	@$(FAST) $(ARGS)

test-slow: .venv/dev.stamp
	@$(BIN)/pytest -m slow --timeout=3600 $(ARGS)

# The tests of `make test` under three conditions that must not change their outcome: kernels of other CPUs and another
# order; no compiled codecs; a busy machine.
SEED ?= 1
test-hostile: .venv/dev.stamp
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(FAST) --shuffle $(SEED) --hypothesis-profile thorough $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 PSYCHE_NATIVE=0 $(FAST) $(ARGS)
	yes >/dev/null & one=$$!; yes >/dev/null & trap "kill $$one $$!" EXIT; $(FAST) $(ARGS)

lint: .venv/dev.stamp
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: .venv/run.stamp
	@$(BIN)/psyche bench convergence --json runs/bench/convergence.json $(ARGS)

bench-codec: .venv/rivals
	@PYTHONPATH=.venv/rivals $(BIN)/psyche bench codec --json runs/bench/codec.json $(ARGS)

bench-engine: .venv/rivals
	@PYTHONPATH=.venv/rivals $(BIN)/psyche bench engine --json runs/bench/engine.json $(ARGS)

clean:
	rm -rf .venv build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis psyche/_native.*.so
	find kernels/build -mindepth 1 ! -name CMakeLists.txt -delete
