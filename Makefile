# Everything runs from .venv, which the first target that needs it makes.
#   make demo                 a coordinator and four nodes train a small language model, here
#   make run CONFIG=file      launch a run: coordinator, and PEERS local nodes (default 1)
#   make join INVITE=psyche1… join somebody's run with this machine
#   make bench                loss against the large batch's; make bench-codec: speed and error of the codecs;
#                             make bench-engine: speed of a node beside PyTorch and transformers.Trainer
#   make test | test-slow | test-hostile | lint | clean
PYTHON ?= python3
PEERS  ?= 1
BIN    := .venv/bin
PIP    := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo run join test test-slow test-hostile lint bench bench-codec bench-engine clean

# What is compiled into psyche._native.
NATIVE := kernels/build/CMakeLists.txt $(wildcard kernels/cpu/* kernels/include/*)

# Stamps make set-up idempotent: nothing is installed again until the pins or the C++ sources change.
.venv/run.stamp: pyproject.toml constraints.txt $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing psyche into .venv (torch is large; the first time takes a minute or more)"
	@$(PIP) torch==2.13.0 && $(PIP) -e .
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	@$(PIP) -e '.[dev]'
	@touch $@

# Rivals lie beside the environment: transformers imports torchao wherever it finds it, and every command would pay.
.venv/rivals: .venv/run.stamp
	@$(PIP) --no-deps --upgrade --target $@ bitsandbytes torchao accelerate
	@touch $@

demo: .venv/run.stamp
	@$(BIN)/psyche demo $(ARGS)

run: .venv/run.stamp
	@test -n "$(CONFIG)" || { echo "make run needs CONFIG=configs/….yaml"; exit 2; }
	@$(BIN)/psyche run $(CONFIG) --peers $(PEERS) $(ARGS)

join: .venv/run.stamp
	@test -n "$(INVITE)" || { echo "make join needs INVITE=psyche1…, the string the operator gave you"; exit 2; }
	@$(BIN)/psyche join $(INVITE) $(ARGS)

FAST = $(BIN)/pytest -m 'not slow' -n 2 --dist worksteal
test: .venv/dev.stamp
	@$(FAST) $(ARGS)

test-slow: .venv/dev.stamp
	@$(BIN)/pytest -m slow --timeout=3600 $(ARGS)

# The tests of `make test`, three times: on what their outcome must not depend. Kernels of other CPUs and another order;
# no compiled codecs; a machine that is busy with something else.
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
