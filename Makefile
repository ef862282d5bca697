# make demo: trains a small Mamba and lets it write.  make test: the whole suite.  make check: style and types.
TORCH ?= torch==2.13.0
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
CONSTRAINT := $(VENV)/torch.txt

MAKEFLAGS += --no-print-directory

.PHONY: .venv native check test test-slow test-sanitizers test-cuda test-llamacpp soak induction bench-cuda bench-cpu evaluate-zeroshot demo clean \
    FORCE

.venv: $(INSTALLED)

# torch goes first, so that the package finds the wanted build of it and never pulls another.
$(INSTALLED): pyproject.toml $(CONSTRAINT)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install --constraint $(CONSTRAINT) --editable ".[dev,plots]"
	touch $@

$(CONSTRAINT): FORCE
	@mkdir -p $(VENV)
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

# An installation falls back to plain torch when the library does not build; here that is an error.
native: $(INSTALLED)
	@if for cxx in $$CXX c++ g++ clang++; do command -v $$cxx && break; done | grep -q .; then \
	    $(BIN)/cmake -S . -B build/native --log-level=WARNING && \
	    $(BIN)/cmake --build build/native --parallel 2 && \
	    $(BIN)/cmake --install build/native && \
	    $(BIN)/python -c "from selective_ssm.ops import native; native.load()"; \
	else \
	    echo "no C++ compiler: the CPU library is not built, the reference backend serves"; \
	fi

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: native
	$(BIN)/python -m pytest

test-slow: native
	$(BIN)/python -m pytest -m slow

# The CPU library's tests on a build that ends at the first bad access or undefined behaviour. Leaks are Python's own; the
# standard library must be there before torch throws; the compiler of CUDA sources does not run in such a process.
SANITIZERS := $(CURDIR)/build/sanitizers
test-sanitizers: $(INSTALLED)
	$(BIN)/cmake -S . -B $(SANITIZERS) -DSANITIZE=ON --log-level=WARNING
	$(BIN)/cmake --build $(SANITIZERS) --parallel 2
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 \
	    SELECTIVE_SSM_LIBRARY=$(SANITIZERS)/selective_ssm_native.so \
	    $(BIN)/python -m pytest tests/ops/test_maths.py tests/ops/test_parallel.py tests/ops/test_*_cpu*.py \
	    tests/ops/test_add_rms_norm.py tests/ops/test_linear.py -k 'not compiles'

# Thousands of drawn cases on a GPU, and what is timed there; both run from the source tree without an installation too.
test-cuda: $(INSTALLED)
	$(BIN)/python -m pytest tests/ops
	$(BIN)/python -m tests.ops.wide_grid --count 3000 --seconds 120

# llama.cpp on what is exported for it, in an environment of its own; to build it takes two cores 8 minutes, once.
LLAMACPP := $(CURDIR)/build/llamacpp
test-llamacpp: native
	test -x $(LLAMACPP)/bin/python || $(PYTHON) -m venv $(LLAMACPP)
	$(LLAMACPP)/bin/python -m pip install llama-cpp-python
	SELECTIVE_SSM_LLAMACPP=$(LLAMACPP)/bin/python $(BIN)/python -m pytest -m slow tests/interop/test_llamacpp.py

# Ten thousand requests through an engine, and a million tokens in one text.
soak: native
	$(BIN)/python -m tests.generation.soak

# Induction heads learned on a processor, from short rows, and asked for in rows 128 times as long; some minutes.
induction: native
	$(BIN)/selective-ssm reproduce table2 --cell mamba --budget 1500 --output runs/induction --plot true \
	    --set "task={kind: induction_heads, length: 32, vocab_size: 16}" --set batch_size=64 --set test_rows=256 \
	    --set "test_lengths=[64,256,1024,4096]" --set far_length=null --set "learning_rates=[0.001]"

bench-cuda: $(INSTALLED)
	for subject in scan conv norm step host first-call blocks neighbours lengths model decode generate transformers; do \
	    $(BIN)/python -m selective_ssm bench $$subject --device cuda --peer mamba_ssm,sdpa,transformers,fla,torch || exit; \
	done

# On a machine that does nothing else; peers that are not installed are told as such (pip install transformers mambapy).
bench-cpu: native
	for subject in scan conv step model decode generate transformers; do \
	    $(BIN)/python -m selective_ssm bench $$subject --device cpu --peer transformers,mambapy || exit; \
	done

# The whole sets, from the folder that SELECTIVE_SSM_DATA names: for a small model of bytes, trained if absent, or CHECKPOINT.
NOVELS_MODEL := runs/novels_bytes/last
CHECKPOINT ?= $(NOVELS_MODEL)
ZEROSHOT := lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande
evaluate-zeroshot: native $(CHECKPOINT)
	$(BIN)/selective-ssm evaluate $(CHECKPOINT) --tasks $(ZEROSHOT) --data-dir $(SELECTIVE_SSM_DATA)/zeroshot \
	    --output benchmarks/results/cpu/zeroshot.json
	$(BIN)/selective-ssm evaluate $(CHECKPOINT) --tasks wikitext --data-dir $(SELECTIVE_SSM_DATA)/wikitext2_valid_test \
	    --output benchmarks/results/cpu/wikitext.json

$(NOVELS_MODEL):
	$(BIN)/selective-ssm train --config tinyshakespeare_bytes --model.d_model 128 --model.n_layer 4 \
	    --data.source $(SELECTIVE_SSM_DATA)/english_novels/english_novels.jsonl.xz \
	    --trainer.output $(patsubst %/last,%,$@) --trainer.max_steps 600

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

clean:
	rm -rf build dist src/selective_ssm/_native .hypothesis .pytest_cache .ruff_cache
	find src tests examples -name __pycache__ -prune -exec rm -rf {} +
