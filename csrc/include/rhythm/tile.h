// Bringing a few tokens of one head into scratch as float32: transposed (lanes run over tokens) or as rows.
#pragma once

#include "rhythm/problem.h"
#include "rhythm/vec.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

// out[d * ld + c] = source[(first + c) * stride + d] for c < columns, 0 where first + c is outside [begin, end).
// `source` is token 0 of the head; columns is rounded up to whole vectors, which `out` must have room for.
template <typename T>
static void load_transposed(const T* source, int64_t stride, int64_t dim, int64_t first, int64_t columns,
                            int64_t begin, int64_t end, float* out, int64_t ld) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t token = first + c;
    const bool inside = token >= begin && token + kLanes <= end;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t width = dim - d < kLanes ? dim - d : kLanes;
      Vec block[kLanes];
      if (inside && width == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = widen(source + (token + i) * stride + d);
      } else {
        for (int i = 0; i < kLanes; ++i) {
          const bool valid = token + i >= begin && token + i < end;
          block[i] = valid ? widen_tail(source + (token + i) * stride + d, width) : Vec{};
        }
      }
      transpose(block);
      if (width == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(out + (d + i) * ld + c, block[i]);
      } else {
        for (int i = 0; i < width; ++i) store(out + (d + i) * ld + c, block[i]);
      }
    }
  }
}

// out[r * dim + d] = source[(first + r) * stride + d] for r < rows, 0 for tokens at or past `end`.
template <typename T>
static void load_rows(const T* source, int64_t stride, int64_t dim, int64_t first, int64_t rows, int64_t end,
                      float* out) {
  for (int64_t r = 0; r < rows; ++r, out += dim) {
    const T* row = source + (first + r) * stride;
    if (first + r >= end) {
      __builtin_memset(out, 0, dim * sizeof(float));
      continue;
    }
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(out + d, widen(row + d));
    if (d < dim) {
      const Vec tail = widen_tail(row + d, dim - d);
      __builtin_memcpy(out + d, &tail, (dim - d) * sizeof(float));
    }
  }
}

// out[c] = lse of token first + c, 0 outside [begin, end): a lane that no one reads.
RHYTHM_INLINE void load_lse(const Problem& p, int64_t row, int64_t lse_head, int64_t first, int64_t count,
                            int64_t begin, int64_t end, float* out) {
  const float* source = p.lse + row * p.lse_row + lse_head * p.lse_head;
  for (int64_t c = 0; c < count; ++c) {
    const int64_t token = first + c;
    out[c] = token >= begin && token < end ? source[token * p.lse_token] : 0.0f;
  }
}

template <typename T>
RHYTHM_INLINE const T* head_of(const void* base, int64_t row, int64_t row_stride, int64_t head,
                               int64_t head_stride) {
  return (const T*)base + row * row_stride + head * head_stride;
}

RHYTHM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
RHYTHM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
RHYTHM_INLINE int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

} // namespace RHYTHM_CAPABILITY
} // namespace rhythm
