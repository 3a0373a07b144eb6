# make demo    fine-tune a small model on the data in examples/ and show what changed
# make test    the test suite, against the installed package; ARGS="-k nf4" goes on to pytest
# make oldest  the test suite on the lowest versions that pyproject.toml names
#
# All make a virtual environment of their own in $(VENV) and need only Python, a C++ compiler and the package index.
# TORCH chooses the torch to install: make test TORCH=torch==2.13.0
# WHEEL installs a wheel of nf4lora that was built before: make test WHEEL=nf4lora-0.1.0-....whl

PYTHON ?= python3
TORCH ?= torch>=2.11
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) tools/install.py
# The demo needs no kernels for a card that is not there; compiling them takes longer than everything else.
DEMO := $(if $(wildcard $(VENV)/test /dev/nvidia* /dev/dxg),wheel,wheel-demo)
BUILT := $(or $(WHEEL),$(VENV)/wheel)
DEMO_BUILT := $(or $(WHEEL),$(VENV)/$(DEMO))
SOURCES := $(shell find csrc python bench _build -type f -not -name '*.so' -not -path '*/__pycache__/*' 2>/dev/null) \
           CMakeLists.txt pyproject.toml
export CMAKE_BUILD_PARALLEL_LEVEL ?= 2

.PHONY: demo test oldest lint format gate sanitize instrumented gpu clean

demo: $(VENV)/train
	$(RUN) examples/demo.py

# Several tests at once (ARGS="-n0" for one), each file in one process, which makes what its tests share. Threads of torch
# that wait for work sleep, or they would take the time of the other tests.
PYTEST := OMP_WAIT_POLICY=passive $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile
test: $(VENV)/test
	$(PYTEST) $(ARGS)

# The file of constraints holds the bounds that can be installed; the others are named before and after the tests.
OLDEST := .venv-oldest
oldest:
	rm -rf $(OLDEST)
	mkdir $(OLDEST)
	$(PYTHON) tools/oldest.py constraints $(OLDEST)/constraints.txt
	PIP_CONSTRAINT=$(abspath $(OLDEST))/constraints.txt $(MAKE) test VENV=$(OLDEST); code=$$?; \
	$(OLDEST)/bin/python tools/oldest.py installed && exit $$code

lint: $(VENV)/lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files 'csrc/*' 'tests/*.cu' 'tests/*.cpp' 'bench/*.cpp' 'bench/*.h')
	$(VENV)/bin/mypy

format: $(VENV)/lint
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*' 'tests/*.cu' 'tests/*.cpp' 'bench/*.cpp' 'bench/*.h')

# Registers, spills and shared memory of every CUDA kernel, against tools/ptxas_baseline.json, and the instructions of
# its machine code: of the wheel, where a disassembler is there or can be installed; else nvcc compiles again.
gate: $(VENV)/torch $(BUILT)
	-$(INSTALL) "installing disassemblers" install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(RUN) tools/ptxas_gate.py --wheel $$(find $(BUILT) -name '*.whl')
	$(RUN) tools/sass_gate.py --wheel $$(find $(BUILT) -name '*.whl')

# The CPU tests of the ops again, with the C++ code under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/test
	VENV=$(VENV) tools/sanitize.sh
instrumented: $(VENV)/test
	VENV=$(VENV) tools/sanitize.sh build

# On a machine with an NVIDIA GPU: build for it, test, sanitize, measure. ARGS=--quick takes three minutes;
# ARGS="--minutes 5" does what decides and fits into five, and --wheel FILE takes a wheel that was made beforehand.
gpu:
	$(PYTHON) tools/gpu.py $(ARGS)

$(VENV)/torch:
	@echo 'making a virtual environment in $(VENV)'
	$(PYTHON) -m venv $(VENV)
	@$(if $(filter torch>=2.11,$(TORCH)),$(TORCH_IS_LARGE),:)
	$(INSTALL) 'installing $(TORCH)' install '$(TORCH)' numpy
	touch $@

TORCH_IS_LARGE = \
  echo 'torch with CUDA and its libraries: about 3 GB to fetch and 6 GB on disk. Without an NVIDIA GPU a build for' && \
  echo 'CPUs does the same work (0.2 GB to fetch). Ctrl-C, and:' && \
  echo '    make $(MAKECMDGOALS) TORCH=torch==2.13.0'

# The package is compiled once, for whatever will install it.
$(VENV)/wheel: $(VENV)/torch $(SOURCES)
	rm -rf $@
	$(INSTALL) "compiling nf4lora (some minutes where nvcc compiles its CUDA kernels)" wheel -v --no-deps -w $@ .

$(VENV)/wheel-demo: $(VENV)/torch $(SOURCES)
	rm -rf $@
	NF4LORA_CUDA=$${NF4LORA_CUDA:-OFF} $(INSTALL) "compiling nf4lora for CPUs" wheel -v --no-deps -w $@ .

# pip leaves an installed package of the same version alone, whatever its files are: so it is told to put them anew.
$(VENV)/train: $(VENV)/torch $(DEMO_BUILT)
	$(INSTALL) "installing nf4lora" install --force-reinstall --no-deps $$(find $(DEMO_BUILT) -name '*.whl')
	$(INSTALL) "installing what training needs (about 0.2 GB)" install "$$(find $(DEMO_BUILT) -name '*.whl')[train]" gguf
	touch $@

$(VENV)/test: $(VENV)/torch $(BUILT)
	$(INSTALL) "installing nf4lora" install --force-reinstall --no-deps $$(find $(BUILT) -name '*.whl')
	$(INSTALL) "installing what the tests need (about 0.3 GB)" install "$$(find $(BUILT) -name '*.whl')[test]"
	touch $@

# mypy reads the classes that ours extend.
$(VENV)/lint: $(VENV)/torch
	$(INSTALL) "installing ruff, mypy, clang-format" install ruff mypy clang-format types-PyYAML transformers peft
	touch $@

clean:
	rm -rf build dist $(VENV)
