# make help lists the targets. Variables: PRECISION=fp32|bf16  SAN=address|undefined|thread  ARCH=90a|80|100
# NCCL=0 (one rank, neither NCCL nor MPI)  MPICC=mpicc  MPI_HOME=, NCCL_HOME= (folders with include/ and lib/)
ARCH      ?= 90a
CXX       ?= g++
NVCC      ?= nvcc
MPICC     ?= mpicc
NCCL      ?= 1
SAN       ?=
COV       ?=
COMMIT    := $(or $(shell [ -e .git ] && git describe --always --dirty 2> /dev/null),unknown)

ifneq ($(filter-out fp32 bf16,$(PRECISION)),)
$(error PRECISION=$(PRECISION): must be fp32 or bf16)
endif
ifneq ($(filter-out address undefined thread,$(SAN)),)
$(error SAN=$(SAN): must be address, undefined or thread)
endif
ifneq ($(filter-out 0 1,$(NCCL)),)
$(error NCCL=$(NCCL): must be 0 or 1)
endif

# fp32 is the default on a CPU (it is faster there and proves the maths), bf16 on a GPU.
HOST_PREC := $(if $(PRECISION),$(PRECISION),fp32)
CUDA_PREC := $(if $(PRECISION),$(PRECISION),bf16)
UP         = $(subst fp32,FP32,$(subst bf16,BF16,$(1)))

ALONE     := $(if $(filter 0,$(NCCL)),-alone)
O         := build/$(HOST_PREC)$(if $(SAN),-$(SAN))$(if $(COV),-coverage)$(ALONE)
CUDA_O    := build/cuda-$(ARCH)-$(CUDA_PREC)$(ALONE)
OPT       := $(if $(SAN),-O1,-O3 -march=native)
# A warning is an error with the compiler whose warnings have been looked at; another one's do not stop a build.
WERROR    := $(if $(filter 12,$(shell $(CXX) -dumpversion)),-Werror)
# sqrt without errno vectorises; contraction into FMA is what nvcc does too. Never -ffast-math: it would drop NaN.
HOST_FLAGS = -std=c++17 $(OPT) -g1 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra -Wno-unknown-pragmas -Wno-maybe-uninitialized $(WERROR) \
             -Illmc/host -I. $(if $(COV),--coverage -fprofile-update=atomic) $(EXTRA)
SAN_FLAGS  = $(if $(SAN),-fsanitize=$(SAN) -fno-omit-frame-pointer) $(if $(filter undefined,$(SAN)),-fno-sanitize-recover=all)
SAN_DEFS   = $(if $(filter address,$(SAN)),-DHOST_ASAN) $(if $(filter thread,$(SAN)),-DHOST_TSAN)
HOST_LIBS  = -ldnnl -lgomp -lz -lpthread
CUDA_FLAGS = -std=c++17 -O3 -lineinfo -gencode arch=compute_$(ARCH),code=sm_$(ARCH) -Werror all-warnings -I. --threads 2 $(MPI_FLAGS) $(NCCL_FLAGS)
CUDA_LIBS  = -lcublasLt -lz $(NCCL_LIBS)
DEFS       = -DGIT_COMMIT='"$(COMMIT)"'

HOST_OBJ  := $(patsubst llmc/%.cpp,$(O)/%.o,$(wildcard llmc/host/*.cpp))
comma     := ,
empty     :=

.PHONY: all alone tests test test-orders test-124m test-nvcc mutations coverage bench fuzz help clean FORCE
.DELETE_ON_ERROR:
.SECONDARY:
all: train_gpt2_cpu

# ---- MPI and NCCL --------------------------------------------------------------------------
ifneq ($(NCCL),0)
# The flags of MPI's compiler wrapper; those of Open MPI, MPICH and Intel all understand -show. Asked once, if needed.
ifdef MPI_HOME
MPI_SHOW  := -I$(MPI_HOME)/include -L$(MPI_HOME)/lib -Wl,-rpath,$(MPI_HOME)/lib -lmpi
else
MPI_SHOW   = $(eval MPI_SHOW := $(shell $(MPICC) -show 2> /dev/null | sed 's/-Xlinker  */-Wl,/g'))$(MPI_SHOW)
endif
# MPI's old C++ interface would want a library of its own.
MPI_FLAGS  = -DWITH_NCCL -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX $(filter -I% -D%,$(MPI_SHOW))
MPI_LIBS   = $(filter -L% -l% -Wl%,$(MPI_SHOW))
NCCL_FLAGS = $(if $(NCCL_HOME),-I$(NCCL_HOME)/include)
NCCL_LIBS  = $(if $(NCCL_HOME),-L$(NCCL_HOME)/lib -Xlinker -rpath=$(NCCL_HOME)/lib) -lnccl \
             $(patsubst -Wl$(comma)%,-Xlinker %,$(MPI_LIBS)) -lpthread
HOST_LINK := $(O)/link
CUDA_LINK := $(CUDA_O)/link
$(HOST_LINK): FORCE
	@scripts/try_link.sh $@ "$(CXX) $(MPI_FLAGS)" "$(MPI_LIBS)" "$(MAKECMDGOALS)"
$(CUDA_LINK): FORCE
	@scripts/try_link.sh $@ "$(NVCC) $(MPI_FLAGS) $(NCCL_FLAGS)" "$(NCCL_LIBS)" "$(MAKECMDGOALS)"
endif

train_gpt2_cpu: $(O)/train_gpt2_cpu FORCE      ## the trainer on the CPU, running the CUDA kernels on the host layer
	@cmp -s $< $@ || cp $< $@
train_gpt2: $(CUDA_O)/train_gpt2 FORCE      ## the trainer for NVIDIA GPUs (nvcc, cuBLASLt, NCCL, MPI)
	@cmp -s $< $@ || cp $< $@
build/test_%: $(O)/test_% FORCE
	@cmp -s $< $@ || cp $< $@

# ---- host build ----------------------------------------------------------------------------
$(O)/host/%.o: llmc/host/%.cpp $(HOST_LINK)
	@mkdir -p $(@D)
	$(CXX) $(HOST_FLAGS) $(MPI_FLAGS) $(SAN_DEFS) -MMD -MP -c $< -o $@
$(O)/train_gpt2_cpu: train_gpt2.cu $(HOST_OBJ) $(HOST_LINK) $(O)/commit
	$(CXX) $(HOST_FLAGS) $(MPI_FLAGS) $(SAN_FLAGS) $(SAN_DEFS) $(DEFS) -DPRECISION_$(call UP,$(HOST_PREC)) -MMD -MP -MF $@.d \
	    -x c++ $< -x none $(HOST_OBJ) $(HOST_LIBS) $(MPI_LIBS) -o $@
# These two judge the model and its ranks, test_kernels and test_golden the kernels as they ship: half the time to compile.
$(O)/test_model $(O)/test_zero: private OPT := $(if $(SAN),-O1,-O2 -march=native)
# The tests include the trainer without its main: what only main calls is unused there.
$(O)/%: test/%.cu $(HOST_OBJ) $(HOST_LINK)
	$(CXX) $(HOST_FLAGS) $(MPI_FLAGS) -Wno-unused-function $(SAN_FLAGS) $(SAN_DEFS) -DPRECISION_$(call UP,$(HOST_PREC)) -MMD -MP -MF $@.d \
	    -x c++ $< -x none $(HOST_OBJ) $(HOST_LIBS) $(MPI_LIBS) -o $@
$(O)/%: dev/%.cu $(HOST_OBJ) $(HOST_LINK)
	$(CXX) $(HOST_FLAGS) $(MPI_FLAGS) -Wno-unused-function $(SAN_FLAGS) $(SAN_DEFS) -DPRECISION_$(call UP,$(HOST_PREC)) -MMD -MP -MF $@.d \
	    -x c++ $< -x none $(HOST_OBJ) $(HOST_LIBS) $(MPI_LIBS) -o $@
$(O)/test_ranks: test/test_ranks.c $(HOST_LINK)
	$(CXX) $(HOST_FLAGS) $(MPI_FLAGS) $(SAN_FLAGS) -MMD -MP -MF $@.d -x c++ $< -x none -lpthread $(MPI_LIBS) -o $@
# Mutated input is for both sanitizers at once.
$(O)/test_loader $(O)/test_tokenizer $(O)/test_checkpoint: SAN_FLAGS += $(if $(filter address,$(SAN)),-fsanitize=undefined -fno-sanitize-recover=undefined)
$(O)/test_tokenizer $(O)/test_checkpoint: $(O)/%: test/%.c
	@mkdir -p $(@D)
	$(CXX) $(HOST_FLAGS) $(SAN_FLAGS) -MMD -MP -MF $@.d -x c++ $< -x none -lz -lpthread -o $@
# Stands before the C library's calls on files in a program that is tested: never with a sanitizer's own.
$(O)/faulty_files.so: test/faulty_files.c
	@mkdir -p $(@D)
	$(CXX) $(HOST_FLAGS) -shared -fPIC -MMD -MP -MF $@.d -x c++ $< -o $@
$(O)/tokenize: dev/tokenize.c
	@mkdir -p $(@D)
	$(CXX) $(HOST_FLAGS) $(SAN_FLAGS) -MMD -MP -MF $@.d -x c++ $< -x none -lz -lpthread -o $@
$(O)/%: test/%.c
	@mkdir -p $(@D)
	$(CXX) $(HOST_FLAGS) $(SAN_FLAGS) -MMD -MP -MF $@.d -x c++ $< -x none -lpthread -o $@
$(O)/%: dev/%.c
	@mkdir -p $(@D)
	$(CXX) $(HOST_FLAGS) $(SAN_FLAGS) -MMD -MP -MF $@.d -x c++ $< -x none -lpthread -o $@
build/%: $(O)/%
	@cmp -s $< $@ || cp $< $@
# The commit's name goes into the log: relink when it changes, and only then.
$(O)/commit: FORCE
	@mkdir -p $(@D)
	@echo '$(COMMIT)' | cmp -s - $@ || echo '$(COMMIT)' > $@

# ---- CUDA build ----------------------------------------------------------------------------
$(CUDA_O)/train_gpt2: train_gpt2.cu $(CUDA_LINK)
	@mkdir -p $(@D)
	$(NVCC) $(CUDA_FLAGS) $(DEFS) -DPRECISION_$(call UP,$(CUDA_PREC)) -MMD -MP -MF $@.d -Xptxas -v $< -o $@ $(CUDA_LIBS) \
	    2> $(@D)/ptxas.txt || { cat $(@D)/ptxas.txt; false; }

# ---- tests ---------------------------------------------------------------------------------
GOLDEN := $(patsubst %/,%,$(sort $(dir $(wildcard test/golden/*/init.safetensors))))
list    = $(subst $(empty) $(empty),$(comma),$(strip $(1)))
# What runs in every build; what a sanitizer would take too long for or finds nothing in; what does not depend on the build.
# Of the kernels, the thread sanitizer gets those that have barriers or share memory; of the golden runs, the undefined one gets the
# recipes that have everything.
RUNS   := $(O)/test_host $(O)/test_kernels$(if $(filter thread,$(SAN)),$(comma)$(call list,attention loss fp8 gate normuon rmsnorm embedding ptx))
ifeq ($(SAN),thread)     # the smallest models of each recipe: the others launch no other kernel
RUNS   += $(O)/test_model,tiny
else
RUNS   += $(O)/test_model $(O)/test_golden,$(call list,$(if $(filter undefined,$(SAN)),$(filter %/r45_micro64 %/sub3_micro,$(GOLDEN)),$(GOLDEN))) test/cli.sh,$(O)/train_gpt2_cpu
endif
ifneq ($(filter $(HOST_PREC)$(SAN),fp32 fp32address bf16undefined),)
RUNS   += $(O)/test_services $(O)/test_roofline $(if $(filter undefined,$(SAN)),,beside:$(O)/test_tokenizer)
endif
ifneq ($(filter $(HOST_PREC)$(SAN),fp32 fp32address fp32thread bf16undefined),)
RUNS   += $(O)/test_loader
endif
ifneq ($(filter $(HOST_PREC)$(SAN),fp32 fp32address fp32thread),)
RUNS   += $(O)/test_checkpoint
endif
ifeq ($(HOST_PREC)$(SAN),fp32)
RUNS   += $(O)/test_oracle beside:test/download.sh,$(O)/http_server beside:test/compare_logs.sh,$(O)/compare_logs test/generate.sh,$(O)/train_gpt2_cpu
RUNS   += test/checkpoint_py.sh,$(O)/train_gpt2_cpu
endif
# Under mpirun: np=N:PROGRAM is N ranks of it. 3 divides no bucket of eight layers, 8 divides them all.
ifneq ($(NCCL),0)
ranks   = $(foreach np,$(1),np=$(np):$(O)/$(2))
# Late streams and another order: in fp32 test/ranks.sh does that.
LAZY   := np=2:env,HOST_STREAMS=lazy,HOST_SCHED=12345,$(O)/test_zero,modern
ifeq ($(HOST_PREC)$(SAN),fp32)
RUNS   += beside:$(O)/test_ranks $(O)/test_nccl $(call ranks,2 3 4 8,test_nccl) $(O)/test_trace $(O)/test_zero $(call ranks,2 8,test_zero)
RUNS   += $(call ranks,3,test_zero$(comma)modern$(comma)unet$(comma)evaluation$(comma)file) $(call ranks,4,test_zero$(comma)modern)
RUNS   += $(call ranks,2,test_golden$(comma)$(call list,$(GOLDEN))) test/resume.sh,$(O)/train_gpt2_cpu beside:test/nonfinite.sh,$(O)/train_gpt2_cpu
RUNS   += test/ranks.sh,$(O)/train_gpt2_cpu,$(O)/check_trace beside:test/faults.sh,$(O)/train_gpt2_cpu beside:test/cli_launch.sh,$(O)/train_gpt2_cpu
RUNS   += beside:test/soak.sh,$(O)/train_gpt2_cpu,8 beside:test/save_faults.sh,$(O)/train_gpt2_cpu,30
else ifeq ($(HOST_PREC)$(SAN),bf16)
RUNS   += $(call ranks,2,test_zero) $(call ranks,8,test_zero$(comma)modern$(comma)sub3$(comma)normuon) $(LAZY) $(call ranks,2,test_golden$(comma)$(call list,$(GOLDEN)))
RUNS   += test/resume.sh,$(O)/train_gpt2_cpu,short
else
RUNS   += $(if $(filter thread,$(SAN)),beside:$(O)/test_ranks beside:test/faults.sh$(comma)$(O)/train_gpt2_cpu) $(call ranks,2 3,test_nccl) $(if $(filter undefined,$(SAN)),,$(call ranks,2,test_zero$(comma)$(if $(filter thread,$(SAN)),file,modern)))
endif
endif
TOOLS     := $(O)/train_gpt2_cpu $(O)/text_to_shards $(if $(findstring test/ranks.sh,$(RUNS)),$(O)/check_trace alone) $(if $(findstring test/download.sh,$(RUNS)),$(O)/http_server $(O)/compare_logs $(O)/tokenize $(O)/train_bpe) \
             $(if $(findstring test/soak.sh,$(RUNS)),$(O)/faulty_files.so)
RUN_FILES  = $(foreach run,$(RUNS),$(filter build/%,$(firstword $(subst $(comma), ,$(lastword $(subst :, ,$(run)))))))
# With much randomness in the addresses (vm.mmap_rnd_bits = 32) the sanitizers of g++ 12 find no room for their shadow.
STILL      = $(if $(SAN),$(shell setarch -R true 2> /dev/null && echo setarch -R))
# Orders in which CUDA promises nothing: of threads, blocks and streams, and when asynchronous copies land.
ORDERS    := HOST_SCHED=reverse HOST_SCHED=breadth HOST_SCHED=7 HOST_STREAMS=lazy HOST_ASYNC=early HOST_SCHED=12345,HOST_STREAMS=lazy

# The tools first: the trainer takes longest to compile.
tests: $(TOOLS) $(RUN_FILES)     ## compiles the tests of one build
test: tests     ## runs them; scripts/test.sh does in every build
	RUN_UNDER="$(STILL)" test/run.sh $(RUNS)
alone:                   # built with NCCL=0, for test/ranks.sh
	@$(MAKE) --no-print-directory NCCL=0 PRECISION=$(HOST_PREC) build/$(HOST_PREC)-alone/train_gpt2_cpu
test-orders: $(O)/test_kernels $(O)/test_model     ## the kernels and the model with threads, blocks and streams in other orders
	test/run.sh $(foreach order,$(ORDERS),env,$(order),$(O)/test_kernels) $(foreach order,$(filter HOST_STREAMS%,$(ORDERS)) $(lastword $(ORDERS)),env,$(order),$(O)/test_model)
test-124m: $(TOOLS)      ## three steps at the full size on the CPU: loss, memory, time (takes 2.7 GiB)
	test/full_size.sh $(O)/train_gpt2_cpu
test-nvcc:               ## compiles and links for three GPU architectures, compares dev/kernels.txt
	test/nvcc.sh
FUZZ_SECONDS ?= 30
fuzz: $(O)/test_loader $(O)/test_tokenizer     ## half a minute each of mutated shards, vocabularies and texts; best with SAN=address
	RUN_UNDER="$(STILL)" test/fuzz.sh $(FUZZ_SECONDS) $^
mutations:               ## breaks the kernels one way after another and expects red tests (minutes)
	test/mutate.sh
bench: $(O)/bench        ## ns per element and GFLOP/s of each kernel, time of the 124M step by kernel
	$(O)/bench
coverage:                ## line coverage of llmc/ and train_gpt2.cu by the tests
	dev/coverage.sh
help:                    ## this list
	@sed -nE 's/^([a-z_0-9-]+):[^#]*## *(.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@echo '  next: ./scripts/quickstart.sh'
clean:                   ## removes build/ and the programs
	rm -rf build train_gpt2 train_gpt2_cpu

# Of this build alone: another make may be writing those of its own.
-include $(wildcard $(O)/*.d $(O)/host/*.d $(CUDA_O)/*.d)
