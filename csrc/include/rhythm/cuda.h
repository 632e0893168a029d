// Between the bindings and the CUDA kernels: what a pass on a device is about, and the functions that launch it.
// No LibTorch and no CUDA here, so that either side compiles without the other.
//
// Memory: the kernels need no scratch. Partial sums over heads stay in a block's shared memory, so that whoever binds a
// pass allocates its output and nothing else.
// Devices: a launch goes to the current device and to `stream` (a cudaStream_t; null: the default one). The caller makes
// the tensors' device current. Nothing here synchronises or reads device memory on the host: CUDA graphs capture it.
#pragma once

#include "rhythm/problem.h"

namespace rhythm {

// One call of a band pass. The canonical form of problem.h with every pointer on the device; strides count elements.
struct DeviceProblem {
  Dtype dtype;
  const void* q; // (B, T, H, D), the last dimension contiguous
  const void* k; // (B, T, H_kv, D)
  int64_t q_row, q_token, q_head;
  int64_t k_row, k_token, k_head;
  int64_t head_dim; // 1 .. 256
  int64_t batch, tokens;

  const float* lse; // (B, X, T)
  int64_t lse_row, lse_head, lse_token;

  // The tables lie within q, k and lse: whoever made them has checked or clamped them. Sequences are in the order of
  // their tokens, apart from each other, and every row of the batch has one, be it empty.
  const Sequence* seqs;
  int64_t n_seqs, max_seqlen; // max_seqlen: no sequence is longer; what lies beyond it is not computed
  const Head* heads;
  int64_t n_heads;
  int64_t kv_group; // query heads a kv head

  // The score rule.
  float scale;
  float softcap;       // 0: none
  int64_t window_left; // -1: none
  const float* sinks;  // (H,) or null

  int64_t window; // W of band_rows
  int64_t lo, hi; // the horizon of band_columns, 0 <= lo <= hi
  bool per_head;

  // (B, T) float32, the mean over the heads, or (B, n_heads, T) with per_head. Every position is written, those outside
  // the responses with 0; without sequences or tokens (n_seqs or max_seqlen 0) nothing is launched and nothing written.
  float* out;
  int64_t out_row, out_head;
};

} // namespace rhythm

// Each returns 0, or the cudaError_t of a launch that failed.
extern "C" int rhythm_cuda_band_rows(const rhythm::DeviceProblem* problem, void* stream);
extern "C" int rhythm_cuda_band_columns(const rhythm::DeviceProblem* problem, void* stream);

// The CUDA runtime's words for a value returned above.
extern "C" const char* rhythm_cuda_error(int code);
