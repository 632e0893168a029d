// q.k of 16 resident tokens (kept for a whole loop) with 8 kTiles passing ones (a chunk of it), for one warp. Whatever
// the input type, results are distributed over the lanes as the accumulator of mma.m16n8k16 is.
//
//   lane = 4 row + column;  c[tile][i] belongs to the resident token row + 8 (i / 2)
//                           and to the passing token 8 tile + 2 column + i % 2
//
// The head dimension may be summed in any order that both operands share. A lane therefore reads 16 consecutive bytes of
// a token and uses them as elements 2c, 2c+1, 2c+8, 2c+9 of two instructions (c its column): fragments come from global
// memory in 16-byte loads, with neither shared memory nor shuffles between.
//
// float32, which tensor cores do not multiply in full precision, and unaligned input run on CUDA cores.
//
// Tokens past `last` are read as `last`: no load leaves the range, the caller masks their products, nothing branches.
#pragma once

#include <cstdint>
#include <type_traits>

#include "launch.h"
#include "rhythm/inputs.h"

namespace rhythm {

constexpr int kResident = 16;
constexpr int kPassing = 8; // a tile of them

// Storage alone: no arithmetic is done in 16 bits.
struct BFloat16 {
  unsigned short bits;
};
struct Float16 {
  unsigned short bits;
};

struct Lane {
  int row, column;
  __device__ explicit Lane(int lane) : row(lane >> 2), column(lane & 3) {}
};

// Tokens of one head in a batch row of q or k. Token t begins t * stride bytes after the base; with an unsigned t the
// address takes two instructions.
template <typename T>
struct Tokens {
  const char* base;
  uint64_t stride; // bytes
  int last;        // the last one that may be read
  int head_dim;
  __device__ const T* operator[](int token) const {
    return reinterpret_cast<const T*>(base + static_cast<unsigned>(token < last ? token : last) * stride);
  }
};

// c += a b on tensor cores: a is 16 x 16, b is 16 x 8, the fragments as in the PTX manual.
template <typename T>
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
#ifdef RHYTHM_EMULATE
  emulation::mma_m16n8k16(c, a, b, kBFloat16);
#else
  if constexpr (kBFloat16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// A lane's sixteen bytes of a token's 32 elements from `chunk` on, zero past the head.
template <typename T>
__device__ inline uint4 load_sixteen(const T* token, int chunk, Lane lane, int head_dim) {
  const uint4* const from = reinterpret_cast<const uint4*>(token) + lane.column;
  return 32 * chunk + 8 * lane.column < head_dim ? __ldg(from + 4 * chunk) : make_uint4(0, 0, 0, 0);
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float to_float(Float16 x) {
#ifdef RHYTHM_EMULATE
  return emulation::from_float16(x.bits);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#endif
}

// Tensor cores: 16-bit elements, aligned to 16 bytes, of heads up to 32 kChunks of them (and multiples of 8).
template <typename T, int kChunks>
struct Resident {
  unsigned fragment[kChunks][2][4]; // [32 dimensions, instruction, register of its A], as mma wants them

  // Tokens past the last are zeros. (Were they anything else, the fragments would be copies of what was loaded, and
  // ptxas would put the copying where they are used, four instructions a product.)
  __device__ void load(const Tokens<T>& tokens, int first, Lane lane) {
    const int low_token = first + lane.row, high_token = low_token + 8;
    const T* const low_from = tokens[low_token];
    const T* const high_from = tokens[high_token];
    const unsigned low_live = low_token <= tokens.last ? ~0u : 0u, high_live = high_token <= tokens.last ? ~0u : 0u;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const uint4 low = load_sixteen(low_from, i, lane, tokens.head_dim);
      const uint4 high = load_sixteen(high_from, i, lane, tokens.head_dim);
      const unsigned a[8] = {low.x, high.x, low.y, high.y, low.z, high.z, low.w, high.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) fragment[i][j / 4][j % 4] = a[j] & (j % 2 ? high_live : low_live);
    }
  }
};

template <typename T, int kChunks, int kTiles>
struct Passing {
  uint4 part[kTiles][kChunks]; // [tile, 32 dimensions]: a lane's 8 elements, B of two instructions

  __device__ void load(const Tokens<T>& tokens, int first, Lane lane) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const T* const token = tokens[first + kPassing * tile + lane.row];
#pragma unroll
      for (int i = 0; i < kChunks; ++i) part[tile][i] = load_sixteen(token, i, lane, tokens.head_dim);
    }
  }
};

// c [tile, fragment element] = resident . passing.
template <typename T, int kChunks, int kTiles>
__device__ inline void products(const Resident<T, kChunks>& resident, const Passing<T, kChunks, kTiles>& passing,
                                int, float (&c)[kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) c[tile][0] = c[tile][1] = c[tile][2] = c[tile][3] = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 other = passing.part[tile][i];
      const unsigned b[2][2] = {{other.x, other.y}, {other.z, other.w}};
      mma<T>(c[tile], resident.fragment[i][0], b[0]);
      mma<T>(c[tile], resident.fragment[i][1], b[1]);
    }
  }
}

// CUDA cores, in float32: float32 elements kAligned to 16 bytes, and any type and head at any address. Operands stay
// where they are and are read as the sum goes along.
constexpr int kAligned = 0, kUnaligned = -1;

template <typename T>
struct ResidentPointers {
  const T* token[2]; // [half]

  __device__ void load(const Tokens<T>& tokens, int first, Lane lane) {
    token[0] = tokens[first + lane.row], token[1] = tokens[first + lane.row + 8];
  }
};

template <typename T, int kTiles>
struct PassingPointers {
  const T* token[kTiles][2]; // [tile, i % 2]

  __device__ void load(const Tokens<T>& tokens, int first, Lane lane) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i) token[tile][i] = tokens[first + kPassing * tile + 2 * lane.column + i];
  }
};

template <>
struct Resident<float, kAligned> : ResidentPointers<float> {};
template <typename T>
struct Resident<T, kUnaligned> : ResidentPointers<T> {};
template <int kTiles>
struct Passing<float, kAligned, kTiles> : PassingPointers<float, kTiles> {};
template <typename T, int kTiles>
struct Passing<T, kUnaligned, kTiles> : PassingPointers<T, kTiles> {};

template <int kTiles>
__device__ inline void products(const Resident<float, kAligned>& resident,
                                const Passing<float, kAligned, kTiles>& passing, int head_dim,
                                float (&c)[kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) c[tile][0] = c[tile][1] = c[tile][2] = c[tile][3] = 0.0f;
#pragma unroll 1
  for (int d = 0; d < head_dim; d += 4) {
    float4 a[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) a[half] = __ldg(reinterpret_cast<const float4*>(resident.token[half] + d));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 b = __ldg(reinterpret_cast<const float4*>(passing.token[tile][i & 1] + d));
        const float4 e = a[i >> 1];
        float& sum = c[tile][i];
        sum = fmaf(e.x, b.x, sum), sum = fmaf(e.y, b.y, sum), sum = fmaf(e.z, b.z, sum), sum = fmaf(e.w, b.w, sum);
      }
  }
}

template <typename T, int kTiles>
__device__ inline void products(const Resident<T, kUnaligned>& resident, const Passing<T, kUnaligned, kTiles>& passing,
                                int head_dim, float (&c)[kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) c[tile][0] = c[tile][1] = c[tile][2] = c[tile][3] = 0.0f;
#pragma unroll 1
  for (int d = 0; d < head_dim; ++d) {
    const float a[2] = {to_float(resident.token[0][d]), to_float(resident.token[1][d])};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[tile][i] = fmaf(a[i >> 1], to_float(passing.token[tile][i & 1][d]), c[tile][i]);
  }
}

} // namespace rhythm
