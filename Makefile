# make demo, make test: each sets up all it needs, in .venv.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
# Two workers with a thread each; the tests of threading set their own number.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

.PHONY: build demo test test-slow test-all test-torch cuda-build emulate gpu lint format bench results verify sdist-check clean

build: $(VENV)/.built

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==$(TORCH) "setuptools>=77" wheel ninja
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

demo: build
	$(BIN)/fastvae demo

verify: build
	$(BIN)/fastvae verify

test: build
	$(PYTEST) tests

test-slow: build
	$(PYTEST) --slow -m slow tests

test-all: build
	$(PYTEST) --slow tests

# The whole suite on another torch, in an environment of its own: make test-torch TORCH=2.11.0. It compiles the extension
# against that torch, so the build folder and the extension are that environment's as well.
TREE := .venv-torch-$(TORCH)/tree
test-torch:
	rm -rf $(TREE) && mkdir -p $(TREE)
	git ls-files -z | xargs -0 cp --parents --target-directory=$(TREE)
	$(MAKE) -C $(TREE) test-all VENV=../env TORCH=$(TORCH)

# The CUDA kernels compiled, linked, loaded and looked at, which needs no GPU, and the CPU's tests beside them: with a CUDA
# torch and the compiler from Python's packages, in an environment of its own.
CUDA_TORCH := 2.11.0
CUDA_TREE := .venv-cuda/tree
NVCC := nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-cccl
cuda-build:
	rm -rf $(CUDA_TREE) && mkdir -p $(CUDA_TREE)
	git ls-files -z | xargs -0 cp --parents --target-directory=$(CUDA_TREE)
	$(MAKE) -C $(CUDA_TREE) VENV=../env TORCH=$(CUDA_TORCH) ../env/.torch
	.venv-cuda/env/bin/python -m pip install --quiet $(NVCC:=~=13.0.0)
	FASTVAE_CUDA=1 TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0;12.0" CUDA_HOME=$$(echo $(CURDIR)/.venv-cuda/env/lib/python3*/site-packages/nvidia/cu13) \
		$(MAKE) -C $(CUDA_TREE) VENV=../env TORCH=$(CUDA_TORCH) build
	cd $(CUDA_TREE) && ../env/bin/fastvae info && ../env/bin/python csrc/cuda/check.py
	$(MAKE) -C $(CUDA_TREE) VENV=../env TORCH=$(CUDA_TORCH) test

# The CUDA kernels run by the CPU (tests/emulation): what they read, write and add up, where there is no GPU.
EMULATION_TREE := $(VENV)-emulation/tree
EMULATED := $(patsubst %,tests/test_%.py,autograd kl_normal layout noise numbers properties reconstruction_loss reparameterize sample_and_kl vae_loss)
emulate: build
	mkdir -p $(EMULATION_TREE)
	git ls-files -z | xargs -0 cp --parents --update --target-directory=$(EMULATION_TREE)
	cd $(EMULATION_TREE) && FASTVAE_CUDA=emulation $(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace
	cd $(EMULATION_TREE) && PYTHONPATH=. $(PYTEST:$(BIN)/%=$(CURDIR)/$(BIN)/%) $(EMULATED)

# All that a GPU has to show, with the Python at hand (which has a CUDA torch), without a network: make gpu OUT=results
# STAGES="build test". tests/gpu.py has the stages.
OUT ?= gpu-results
STAGES ?= build test verify sanitize bench
gpu:
	$(PYTHON) tests/gpu.py --out $(OUT) $(STAGES)

bench: build
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-autosave

# Pages, pictures and the README's section on speed, from benchmarks/results/*/results.json.
results: build
	$(BIN)/python benchmarks/publish.py

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/publish.py --check
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/emulation/*.*)

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/emulation/*.*)

# What a user gets: built from the sdist, in an environment that knows nothing of this checkout.
sdist-check: build
	rm -rf build/sdist $(VENV)-sdist
	$(BIN)/python -m build --quiet --sdist --no-isolation --outdir build/sdist
	$(PYTHON) -m venv $(VENV)-sdist
	$(VENV)-sdist/bin/python -m pip install --quiet torch==$(TORCH) "setuptools>=77" wheel ninja
	$(VENV)-sdist/bin/python -m pip install --quiet --no-build-isolation build/sdist/fastvae-*.tar.gz
	cd build/sdist && ../../$(VENV)-sdist/bin/fastvae info && ../../$(VENV)-sdist/bin/fastvae verify --quick

clean:
	rm -rf build dist *.egg-info fastvae/_C.* $(VENV) $(VENV)-sdist .venv-torch-* .venv-cuda $(VENV)-emulation
