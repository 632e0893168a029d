// Bringing a few tokens of one head into scratch as float32: transposed (lanes run over tokens) or as rows.
#pragma once

#include "rhythm/problem.h"
#include "rhythm/score.h"
#include "rhythm/vec.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

// Dimensions that transpose_block turns at a time.
constexpr int kBlockDims = kLanes == 4 ? 4 : kLanes / 2;

// out[d * ld + i] = source[i * stride + d] for d < kBlockDims, i < kLanes.
template <typename T>
RHYTHM_INLINE void transpose_block(const T* source, int64_t stride, float* out, int64_t ld) {
  typedef typename Count<kLanes>::type All;
  // Row i holds token i, and behind it token kBlockDims + i.
  Vec rows[kBlockDims];
#pragma GCC unroll 8
  for (int i = 0; i < kBlockDims; ++i) {
    if constexpr (kLanes == 4)
      rows[i] = widen(source + i * stride);
    else
      rows[i] = widen_halves(source + i * stride, source + (kBlockDims + i) * stride);
  }
  // 4 x 4 blocks inside every quarter.
#pragma GCC unroll 2
  for (int i = 0; i < kBlockDims; i += 4) {
    const Vec a = interleave<1, 0>(rows[i], rows[i + 1], All()), b = interleave<1, 1>(rows[i], rows[i + 1], All());
    const Vec c = interleave<1, 0>(rows[i + 2], rows[i + 3], All());
    const Vec d = interleave<1, 1>(rows[i + 2], rows[i + 3], All());
    rows[i] = interleave<2, 0>(a, c, All()), rows[i + 1] = interleave<2, 1>(a, c, All());
    rows[i + 2] = interleave<2, 0>(b, d, All()), rows[i + 3] = interleave<2, 1>(b, d, All());
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    if constexpr (kLanes == 16) {
      // Quarters of rows[j]: dimension j of tokens 0 .. 3, dimension 4 + j of the same, both again for tokens 8 .. 11.
      store(out + j * ld, paired_quarters<0>(rows[j], rows[4 + j], All()));
      store(out + (4 + j) * ld, paired_quarters<1>(rows[j], rows[4 + j], All()));
    } else {
      store(out + j * ld, rows[j]);
    }
  }
}

// The same at an edge: only the tokens begin <= i < end and the first `width` dimensions are there.
template <typename T>
__attribute__((noinline)) static void transpose_edge(const T* source, int64_t stride, int64_t begin, int64_t end,
                                                     int64_t width, float* out, int64_t ld) {
  for (int i = 0; i < kLanes; ++i) {
    const Vec row = i >= begin && i < end ? widen_tail(source + i * stride, width) : Vec{};
    for (int d = 0; d < width; ++d) out[d * ld + i] = row[d];
  }
}

// out[d * ld + c] = source[(first + c) * stride + d] for c < columns, 0 where first + c is outside [begin, end).
// `source` is token 0 of the head; columns is rounded up to whole vectors, which `out` must have room for.
template <typename T>
static void load_transposed(const T* source, int64_t stride, int64_t dim, int64_t first, int64_t columns,
                            int64_t begin, int64_t end, float* out, int64_t ld) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t token = first + c;
    const T* const rows = source + token * stride;
    int64_t d = 0;
    if (token >= begin && token + kLanes <= end)
      for (; d + kBlockDims <= dim; d += kBlockDims) transpose_block(rows + d, stride, out + d * ld + c, ld);
    for (; d < dim; d += kLanes)
      transpose_edge(rows + d, stride, begin - token, end - token, dim - d < kLanes ? dim - d : kLanes,
                     out + d * ld + c, ld);
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

// out[c] = lse of token first + c, as known() has it, 0 outside [begin, end): a lane that no one reads.
RHYTHM_INLINE void load_lse(const Problem& p, int64_t row, Head head, int64_t first, int64_t count, int64_t begin,
                            int64_t end, float* out) {
  const float* source = p.lse + row * p.lse_row + head.lse_row * p.lse_head;
  const float zero = nothing(p.score, head.query);
  for (int64_t c = 0; c < count; ++c) {
    const int64_t token = first + c;
    out[c] = token >= begin && token < end ? known(source[token * p.lse_token], zero) : 0.0f;
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
