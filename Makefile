# make help lists the targets. Variables: PRECISION=fp32|bf16  SAN=address|undefined|thread  ARCH=90a|80|100
ARCH      ?= 90a
CXX       ?= g++
NVCC      ?= nvcc
SAN       ?=
COV       ?=
COMMIT    := $(shell git describe --always --dirty 2>/dev/null || echo unknown)

ifneq ($(filter-out fp32 bf16,$(PRECISION)),)
$(error PRECISION=$(PRECISION): must be fp32 or bf16)
endif
ifneq ($(filter-out address undefined thread,$(SAN)),)
$(error SAN=$(SAN): must be address, undefined or thread)
endif

# fp32 is the default on a CPU (it is faster there and proves the maths), bf16 on a GPU.
HOST_PREC := $(if $(PRECISION),$(PRECISION),fp32)
CUDA_PREC := $(if $(PRECISION),$(PRECISION),bf16)
UP         = $(subst fp32,FP32,$(subst bf16,BF16,$(1)))

O         := build/$(HOST_PREC)$(if $(SAN),-$(SAN))$(if $(COV),-coverage)
OPT       := $(if $(SAN),-O1,-O3 -march=native)
# sqrt without errno vectorises; contraction into FMA is what nvcc does too. Never -ffast-math: it would drop NaN.
HOST_FLAGS = -std=c++17 $(OPT) -g1 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra -Wno-unknown-pragmas -Werror \
             -Illmc/host -I. $(if $(COV),--coverage -fprofile-update=atomic) $(EXTRA)
SAN_FLAGS  = $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer) $(if $(filter undefined,$(SAN)),-fno-sanitize-recover=all)
SAN_DEFS   = $(if $(filter address,$(SAN)),-DHOST_ASAN) $(if $(filter thread,$(SAN)),-DHOST_TSAN)
HOST_LIBS  = -ldnnl -lgomp -lpthread
CUDA_FLAGS = -std=c++17 -O3 -lineinfo -gencode arch=compute_$(ARCH),code=sm_$(ARCH) -Werror all-warnings -I. --threads 2
CUDA_LIBS  = -lcublasLt
DEFS       = -DGIT_COMMIT='"$(COMMIT)"'

TESTS     := test_services test_oracle test_host test_kernels test_model test_golden
HOST_OBJ  := $(O)/host/engine.o $(O)/host/runtime.o $(O)/host/cublasLt.o

.PHONY: all test test-nvcc mutations coverage bench help clean FORCE
.DELETE_ON_ERROR:
.SECONDARY:
all: train_gpt2_cpu

train_gpt2_cpu: $(O)/train_gpt2_cpu FORCE      ## the trainer on the CPU, running the CUDA kernels on the host layer
	@cmp -s $< $@ || cp $< $@
train_gpt2: build/cuda-$(ARCH)-$(CUDA_PREC)/train_gpt2 FORCE      ## the trainer for NVIDIA GPUs (nvcc, cuBLASLt)
	@cmp -s $< $@ || cp $< $@
build/test_%: $(O)/test_% FORCE
	@cmp -s $< $@ || cp $< $@

# ---- host build ----------------------------------------------------------------------------
$(O)/host/%.o: llmc/host/%.cpp
	@mkdir -p $(@D)
	$(CXX) $(HOST_FLAGS) $(SAN_DEFS) -MMD -MP -c $< -o $@
$(O)/train_gpt2_cpu: train_gpt2.cu $(HOST_OBJ) $(O)/commit
	$(CXX) $(HOST_FLAGS) $(SAN_FLAGS) $(SAN_DEFS) $(DEFS) -DPRECISION_$(call UP,$(HOST_PREC)) -MMD -MP -MF $@.d \
	    -x c++ $< -x none $(HOST_OBJ) $(HOST_LIBS) -o $@
# The tests include the trainer without its main: what only main calls is unused there.
$(O)/%: test/%.cu $(HOST_OBJ)
	$(CXX) $(HOST_FLAGS) -Wno-unused-function $(SAN_FLAGS) $(SAN_DEFS) -DPRECISION_$(call UP,$(HOST_PREC)) -MMD -MP -MF $@.d \
	    -x c++ $< -x none $(HOST_OBJ) $(HOST_LIBS) -o $@
$(O)/%: dev/%.cu $(HOST_OBJ)
	$(CXX) $(HOST_FLAGS) -Wno-unused-function $(SAN_FLAGS) $(SAN_DEFS) -DPRECISION_$(call UP,$(HOST_PREC)) -MMD -MP -MF $@.d \
	    -x c++ $< -x none $(HOST_OBJ) $(HOST_LIBS) -o $@
$(O)/%: test/%.c
	@mkdir -p $(@D)
	$(CXX) $(HOST_FLAGS) $(SAN_FLAGS) -MMD -MP -MF $@.d -x c++ $< -o $@
$(O)/%: dev/%.c
	@mkdir -p $(@D)
	$(CXX) $(HOST_FLAGS) $(SAN_FLAGS) -MMD -MP -MF $@.d -x c++ $< -o $@
build/%: $(O)/%
	@cmp -s $< $@ || cp $< $@
# The commit's name goes into the log: relink when it changes, and only then.
$(O)/commit: FORCE
	@mkdir -p $(@D)
	@echo '$(COMMIT)' | cmp -s - $@ || echo '$(COMMIT)' > $@

# ---- CUDA build ----------------------------------------------------------------------------
build/cuda-$(ARCH)-$(CUDA_PREC)/train_gpt2: train_gpt2.cu
	@mkdir -p $(@D)
	$(NVCC) $(CUDA_FLAGS) $(DEFS) -DPRECISION_$(call UP,$(CUDA_PREC)) -MMD -MP -MF $@.d -Xptxas -v $< -o $@ $(CUDA_LIBS) \
	    2> $(@D)/ptxas.txt || { cat $(@D)/ptxas.txt; false; }

# ---- tests ---------------------------------------------------------------------------------
GOLDEN := $(patsubst %/,%,$(sort $(dir $(wildcard test/golden/*/init.safetensors))))
comma  := ,
empty  :=
list    = $(subst $(empty) $(empty),$(comma),$(strip $(1)))
# What runs in every build; what is too slow for a sanitizer; what does not depend on the build.
RUNS   := $(O)/test_host $(O)/test_kernels $(O)/test_model
ifeq ($(SAN),)
RUNS   += $(O)/test_golden,$(call list,$(GOLDEN)) test/cli.sh,$(O)/train_gpt2_cpu
ifeq ($(HOST_PREC),fp32)
RUNS   += $(O)/test_oracle $(O)/test_services
endif
endif

test: $(foreach run,$(RUNS),$(filter build/%,$(firstword $(subst $(comma), ,$(run))))) \
      $(if $(SAN),,$(O)/train_gpt2_cpu $(O)/text_to_shards)     ## the tests of one build; scripts/test.sh runs them all
	test/run.sh $(RUNS)
test-nvcc:               ## compiles and links for three GPU architectures, compares dev/kernels.txt
	test/nvcc.sh
mutations:               ## breaks the kernels one way after another and expects red tests (minutes)
	test/mutate.sh
bench: $(O)/bench        ## ns per element and GFLOP/s of each kernel, time of the 124M step by kernel
	$(O)/bench
coverage:                ## line coverage of llmc/ and train_gpt2.cu by the tests
	dev/coverage.sh
help:                    ## this list
	@sed -nE 's/^([a-z_0-9-]+):[^#]*## *(.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo '  next: ./scripts/quickstart.sh'
clean:                   ## removes build/ and the programs
	rm -rf build train_gpt2 train_gpt2_cpu

-include $(wildcard build/*/*.d build/*/host/*.d)
