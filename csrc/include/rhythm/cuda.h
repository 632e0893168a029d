// Between the bindings and the CUDA kernels: the inputs of a pass on a GPU, and the functions that launch it.
// No LibTorch and no CUDA here, so that either side compiles without the other.
//
// Memory: the band passes need no scratch, as partial sums over heads stay in a block's shared memory; a binding
// allocates the output alone.
// Devices: a launch goes to the current device and to `stream` (a cudaStream_t; null: the default one). The caller makes
// the tensors' device current. Nothing here synchronises or reads device memory on the host: CUDA graphs capture it.
#pragma once

#include "rhythm/inputs.h"

namespace rhythm {

// One call of a band pass; head_dim is 1 .. 256. The tables lie within q, k and lse: whoever made them has checked or
// clamped them. Every batch row has a sequence, be it empty; what lies beyond max_seqlen is not computed.
//
// Every position of `out` is written, those outside the responses with 0; without sequences or tokens (n_seqs or
// max_seqlen 0) nothing is launched and nothing written. (tests/cuda/passes.py mirrors this struct.)
struct CudaInputs : Inputs {
  int64_t queries_per_kv; // H / H_kv
  int64_t out_batch, out_head;
};

} // namespace rhythm

// Each returns 0, or the cudaError_t of a launch that failed.
extern "C" int rhythm_cuda_band_rows(const rhythm::CudaInputs* inputs, void* stream);
extern "C" int rhythm_cuda_band_columns(const rhythm::CudaInputs* inputs, void* stream);

// The CUDA runtime's words for a value returned above.
extern "C" const char* rhythm_cuda_error(int code);
