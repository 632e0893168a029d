// Tests only: what nvcc and the CUDA runtime give to a kernel, for a host compiler.
//
//   g++ -x c++ -std=c++17 -DRHYTHM_EMULATE -include emulation.h kernel.cu        (and emulation.cpp once)
//
// Blocks run one after the other, and a block's threads as fibers on one thread of the host: each runs until it waits
// for others, in an order that the tests choose. A kernel whose result depends on the order lacks a barrier. Waits
// that no order can end, barriers reached at different places and shuffles that lanes are missing from are errors with
// the place in the source; they end the launch, never hang it.
//
// Not modelled: the memory model (a store is seen at once), clocks, parallel blocks, dynamic shared memory. Static
// shared memory is filled with 0xff before each block: what a block does not write itself it does not find.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static // blocks run one after the other
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the thread that runs.
extern dim3 gridDim, blockDim;
extern uint3 blockIdx, threadIdx;

typedef int cudaError_t;
const char* cudaGetErrorString(cudaError_t code); // the last launch's error in full

namespace emulation_detail {

// Where a thread waits: default arguments `Site site = Site()` hold the caller's line.
struct Site {
  const char* file;
  int line;
  Site(const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE()) : file(file_), line(line_) {}
};

// Wait until every lane of `mask` has called the same `operation` from the same site. The last to come runs
// `resolve(payloads, mask)`, payloads[lane] being what each lane handed in.
typedef void (*Resolve)(void* const* payloads, unsigned mask);
void meet(const char* operation, unsigned mask, void* payload, Resolve resolve, const Site& site);
void barrier(const Site& site);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
unsigned lane();

template <typename T>
struct Shuffle {
  T value;
  int source; // lane
};

template <typename T>
T shuffle(const char* operation, unsigned mask, T value, int source, const Site& site) {
  Shuffle<T> payload{value, source};
  meet(operation, mask, &payload, [](void* const* payloads, unsigned lanes) {
    T from[32];
    for (int i = 0; i < 32; ++i)
      if (lanes >> i & 1) from[i] = static_cast<Shuffle<T>*>(payloads[i])->value;
    for (int i = 0; i < 32; ++i) {
      if (!(lanes >> i & 1)) continue;
      Shuffle<T>& own = *static_cast<Shuffle<T>*>(payloads[i]);
      if (!(lanes >> own.source & 1))
        fail("lane %d shuffles from lane %d, which its mask %#x lacks", i, own.source, lanes);
      own.value = from[own.source];
    }
  }, site);
  return payload.value;
}

inline unsigned ballot(const char* operation, unsigned mask, bool predicate, const Site& site) {
  unsigned payload = predicate;
  meet(operation, mask, &payload, [](void* const* payloads, unsigned lanes) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i)
      if (lanes >> i & 1) votes |= *static_cast<unsigned*>(payloads[i]) << i;
    for (int i = 0; i < 32; ++i)
      if (lanes >> i & 1) *static_cast<unsigned*>(payloads[i]) = votes;
  }, site);
  return payload;
}

} // namespace emulation_detail

using emulation_detail::Site;

inline void __syncthreads(Site site = Site()) { emulation_detail::barrier(site); }
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, Site site = Site()) {
  return emulation_detail::shuffle("__shfl_sync", mask, value, source & 31, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, Site site = Site()) {
  return emulation_detail::shuffle("__shfl_xor_sync", mask, value, int(emulation_detail::lane()) ^ lanes, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, Site site = Site()) {
  const int lane = int(emulation_detail::lane()), source = lane - int(delta);
  return emulation_detail::shuffle("__shfl_up_sync", mask, value, source < 0 ? lane : source, site);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, Site site = Site()) {
  return emulation_detail::ballot("__ballot_sync", mask, predicate, site);
}

// Integers only: the kernels promise the same bits every time.
template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(T(0.5f) == T(0), "no float atomics");
  const T old = *address;
  *address = old + value;
  return old;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __fdividef(float x, float y) { return x / y; }
template <typename T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T))
    emulation_detail::fail("a %zu-byte load from the misaligned address %p", sizeof(T), (const void*)address);
  return *address;
}

namespace rhythm {
namespace emulation {

int launch(dim3 grid, dim3 block, void* stream, const std::function<void()>& kernel);

// mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32: c += a b, the fragments as in the PTX manual.
float from_float16(unsigned bits);
void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool bfloat16, Site site = Site());

} // namespace emulation
} // namespace rhythm
