// Kernels that try the emulation itself: right ones, and each kind of wrong one.
#include "launch.h"
#include "products.cuh"
#include "score.cuh"

using namespace rhythm;

// out[block] = sum over the block's threads of in, by shuffles and one exchange through shared memory.
__global__ void block_sum(const int* in, int* out) {
  __shared__ int partial[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int value = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < int(blockDim.x / 32); ++i) sum += partial[i];
    out[blockIdx.x] = sum;
  }
}

// out[i] = in[the other end], with or without the barrier that this needs.
template <bool kBarrier>
__global__ void reversed(const int* in, int* out) {
  __shared__ int held[64];
  held[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}

// out[i] = 0 + 1 + 2 + 3: a word is passed round four times. Without the second barrier a warp that has read a round may
// write the next one before the others have read; the shuffle keeps threads of one warp together meanwhile.
template <bool kBarrier>
__global__ void rounds(int* out) {
  __shared__ int word;
  int sum = 0;
  for (int round = 0; round < 4; ++round) {
    const int written = __shfl_sync(0xffffffffu, round, 0);
    if (threadIdx.x == 0) word = written;
    __syncthreads();
    sum += word;
    if (kBarrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

__global__ void early_exit(int n) {
  if (int(threadIdx.x) >= n) return;
  __syncthreads();
}

__global__ void two_barriers(int n) {
  if (int(threadIdx.x) < n)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void shuffle_without_lanes(int n, int* out) {
  if (int(threadIdx.x) < n) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, int(threadIdx.x), 1);
}

__global__ void shuffle_from_outside_the_mask(int* out) {
  if (threadIdx.x < 8) out[threadIdx.x] = __shfl_sync(0xffu, int(threadIdx.x), 8);
}

__global__ void warp_against_block(int* out) {
  if (threadIdx.x < 16) __ballot_sync(0xffffffffu, true);
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void mask_beyond_the_block(int* out) { out[threadIdx.x] = __ballot_sync(0xffffffffu, true); }

__global__ void misaligned_load(int* out) { out[0] = __ldg(reinterpret_cast<const uint4*>(out + 1)).x; }

__global__ void past_the_end(int* out, int n) {
  for (int i = threadIdx.x; i <= n; i += blockDim.x) out[i] = i;
}

__global__ void past_shared(int* out) {
  __shared__ int held[64];
  held[threadIdx.x + 1] = 1;
  out[threadIdx.x] = held[threadIdx.x];
}

extern "C" {
int probe_block_sum(const int* in, int* out, int blocks, int block) {
  return launch(block_sum, blocks, block, nullptr, in, out);
}
int probe_reversed(const int* in, int* out, int n) {
  return launch(reversed<true>, 1, n, nullptr, in, out);
}
int probe_reversed_without_barrier(const int* in, int* out, int n) {
  return launch(reversed<false>, 1, n, nullptr, in, out);
}
int probe_rounds(int* out) { return launch(rounds<true>, 1, 64, nullptr, out); }
int probe_rounds_without_barrier(int* out) { return launch(rounds<false>, 1, 64, nullptr, out); }
int probe_early_exit(int n) { return launch(early_exit, 1, 64, nullptr, n); }
int probe_two_barriers(int n) { return launch(two_barriers, 1, 64, nullptr, n); }
int probe_shuffle_without_lanes(int n, int* out) { return launch(shuffle_without_lanes, 1, 32, nullptr, n, out); }
int probe_shuffle_from_outside_the_mask(int* out) {
  return launch(shuffle_from_outside_the_mask, 1, 32, nullptr, out);
}
int probe_warp_against_block(int* out) { return launch(warp_against_block, 1, 32, nullptr, out); }
int probe_mask_beyond_the_block(int* out) { return launch(mask_beyond_the_block, 1, 16, nullptr, out); }
int probe_misaligned_load(int* out) { return launch(misaligned_load, 1, 1, nullptr, out); }
int probe_too_many_threads(int* out) { return launch(misaligned_load, 1, 1025, nullptr, out); }
int probe_past_the_end(int* out, int n) { return launch(past_the_end, 1, 32, nullptr, out, n); }
int probe_past_shared(int* out, int n) { return launch(past_shared, 1, n, nullptr, out); }
}

// One mma.sync of a warp, each lane's registers as the caller has laid them out.
template <typename T>
__global__ void one_mma(const unsigned* a, const unsigned* b, float* c) {
  const int lane = threadIdx.x;
  unsigned a_part[4], b_part[2];
  float c_part[4];
  for (int i = 0; i < 4; ++i) a_part[i] = a[4 * lane + i], c_part[i] = c[4 * lane + i];
  for (int i = 0; i < 2; ++i) b_part[i] = b[2 * lane + i];
  mma<T>(c_part, a_part, b_part);
  for (int i = 0; i < 4; ++i) c[4 * lane + i] = c_part[i];
}

__global__ void tanh_of_all(const float* x, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = tanh_of(x[i]);
}

extern "C" int probe_mma(const unsigned* a, const unsigned* b, float* c, bool bfloat16) {
  return launch(bfloat16 ? one_mma<BFloat16> : one_mma<Float16>, 1, 32, nullptr, a, b, c);
}
extern "C" int probe_tanh(const float* x, float* out, int blocks) {
  return launch(tanh_of_all, blocks, 32, nullptr, x, out);
}
