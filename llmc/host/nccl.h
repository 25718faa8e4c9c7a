/*
The part of NCCL that the trainer uses, for a machine without a GPU: ranks are processes, MPI moves
the data (nccl.cpp). Names, argument orders and enum values are those of NCCL 2.28.

sums        In the order of NCCL's ring: chunk r of a reduce-scatter is x[r+1] + x[r+2] + ... +
            x[r], from left to right, ranks modulo N; bf16 is rounded at every +. Bits are equal on
            every run. ncclMax and ncclMin pass over NaN, as NCCL's do. Reduce ends at its root.
            AllReduce is a reduce-scatter of chunks of ceil(count / N) and an all-gather: the bits
            are equal on all ranks.
traffic     Bytes that a rank sends, counted where they are handed to MPI:
                ReduceScatter   (N-1) recvcount size
                AllGather       (N-1) sendcount size
                AllReduce       2 (N-1) ceil(count / N) size    (the last chunk is filled up)
                Reduce          count size, root 0
                Broadcast       root (N-1) count size, others 0
                Send            count size; to itself 0
streams     A call is done when its stream comes to it. With HOST_STREAMS=lazy that is when
            something waits for it, so a missing event is a wrong number. NCCL orders the calls of
            one communicator, whatever their streams; here that holds for all communicators
            together (as NCCL_LAUNCH_ORDER_IMPLICIT=1), so that ranks cannot wait in a circle.
            In lazy mode a rank that must not keep others waiting synchronises before it waits for
            them by other means (a barrier, a file).
groups      The calls of a group are one piece of work and make progress together, so sends and
            receives cannot block each other. They may not use each other's results.
strictness  What NCCL assumes is checked. Each call first exchanges a header with every rank that
            it involves: ranks whose calls do not match end with exit code 70 and a message that
            names both, so also a ncclCommDestroy that meets a collective. Buffers must lie in
            memory of cudaMalloc or cudaMallocHost, to their last byte, and may overlap only where
            NCCL's in place calls have it so.
errors      Wrong arguments: ncclInvalidArgument, wrong use: ncclInvalidUsage, MPI's:
            ncclSystemError, and ncclGetLastError has the text. ncclCommAbort may be called by any
            thread; a call that waits then returns ncclSystemError, and the communicator is of no
            more use; calls of other ranks in it end by HOST_NCCL_TIMEOUT at the latest.
threads     MPI is called by the main thread only: so must be NCCL, but for ncclCommAbort,
            ncclCommGetAsyncError and the functions that return texts.
one rank    A communicator of one rank needs no MPI, started or not.

HOST_NCCL_FAIL=rank:call        call number `call` (from 1, of the process) of MPI rank `rank`
                                returns ncclSystemError and does nothing
HOST_NCCL_FAIL=rank:call:async  it never ends, and ncclCommGetAsyncError reports ncclSystemError
HOST_NCCL_TIMEOUT=seconds       a call that has waited so long for other ranks names them and ends
                                the program; default 600
Test: test/test_nccl.cu
*/
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime.h>

// ---- constants: values of the real header ---------------------------------------------------

#define NCCL_MAJOR 2
#define NCCL_MINOR 28
#define NCCL_PATCH 9
#define NCCL_VERSION(X, Y, Z) ((X)*10000 + (Y)*100 + (Z))
#define NCCL_VERSION_CODE 22809
#define NCCL_UNIQUE_ID_BYTES 128
#define NCCL_SPLIT_NOCOLOR -1

typedef enum {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6,
    ncclInProgress = 7,
    ncclNumResults = 8,
} ncclResult_t;

typedef enum {
    ncclUint8 = 1,
    ncclInt32 = 2,
    ncclInt64 = 4,
    ncclFloat32 = 7,
    ncclFloat = 7,
    ncclFloat64 = 8,
    ncclDouble = 8,
    ncclBfloat16 = 9,
} ncclDataType_t;

typedef enum { ncclSum = 0, ncclMax = 2, ncclMin = 3 } ncclRedOp_t;

typedef struct ncclComm* ncclComm_t;
typedef struct ncclConfig_v22800 ncclConfig_t;      // nobody can make one: only NULL is a config

typedef struct {
    char internal[NCCL_UNIQUE_ID_BYTES];
} ncclUniqueId;

// ---- functions ------------------------------------------------------------------------------

extern "C" {

ncclResult_t ncclGetVersion(int* version);
ncclResult_t ncclGetUniqueId(ncclUniqueId* id);
const char* ncclGetErrorString(ncclResult_t result);
const char* ncclGetLastError(ncclComm_t comm);      // of the process; comm may be NULL

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank);
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* split,
                           ncclConfig_t* config);
ncclResult_t ncclCommFinalize(ncclComm_t comm);
ncclResult_t ncclCommDestroy(ncclComm_t comm);
ncclResult_t ncclCommAbort(ncclComm_t comm);
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error);
ncclResult_t ncclCommCount(const ncclComm_t comm, int* count);
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank);
ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device);

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclReduce(const void* send, void* recv, size_t count, ncclDataType_t type,
                        ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t recvcount, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclAllGather(const void* send, void* recv, size_t sendcount, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type,
                           int root, ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream);
ncclResult_t ncclGroupStart(void);
ncclResult_t ncclGroupEnd(void);
}

// ---- traffic of this rank, over all communicators -------------------------------------------

enum HostNcclKind {
    HOST_NCCL_ALL_REDUCE,
    HOST_NCCL_REDUCE,
    HOST_NCCL_REDUCE_SCATTER,
    HOST_NCCL_ALL_GATHER,
    HOST_NCCL_BROADCAST,
    HOST_NCCL_SEND,
    HOST_NCCL_RECV,
    HOST_NCCL_KINDS,
};

struct HostNcclTraffic {
    uint64_t bytes, calls;                  // the sums of the rows below
    uint64_t kind_bytes[HOST_NCCL_KINDS], kind_calls[HOST_NCCL_KINDS];
};

const char* host_nccl_kind_name(int kind);
void host_nccl_traffic(HostNcclTraffic* out);       // finishes the calls made before
void host_nccl_traffic_reset(void);
