// Tokens of one head copied to scratch as float32: transposed, [head_dim, tokens], or as they are, [tokens, head_dim].
#pragma once

#include "rhythm/inputs.h"
#include "rhythm/score.h"
#include "rhythm/vec.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

// Dimensions that transpose_block turns at a time.
constexpr int kBlockDims = kLanes == 4 ? 4 : kLanes / 2;

// Move to the next token. Without the asm GCC computes the addresses of all of a block's tokens beforehand, runs out of
// registers and spills them: that took longer than the transposition itself.
template <typename T>
RHYTHM_INLINE void advance(const T*& token, int64_t stride) {
  token += stride;
  __asm__("" : "+r"(token));
}

// kBlockDims dimensions of kLanes tokens: block[i] is token i, and behind it token kBlockDims + i.
template <typename T>
RHYTHM_INLINE void load_block(const T* source, int64_t stride, Vec (&block)[kBlockDims]) {
  const T* second = source + kBlockDims * stride;
#pragma GCC unroll 8
  for (int i = 0; i < kBlockDims; ++i, advance(source, stride), advance(second, stride)) {
    if constexpr (kLanes == 4)
      block[i] = widen(source);
    else
      block[i] = widen_halves(source, second);
  }
}
template <typename T>
RHYTHM_INLINE void load_block(const T* const* tokens, int64_t d, Vec (&block)[kBlockDims]) {
#pragma GCC unroll 8
  for (int i = 0; i < kBlockDims; ++i) {
    if constexpr (kLanes == 4)
      block[i] = widen(tokens[i] + d);
    else
      block[i] = widen_halves(tokens[i] + d, tokens[kBlockDims + i] + d);
  }
}

// Prefetch kLanes tokens that come next, into the L2 cache alone: tokens often lie a multiple of 4 KB apart, where L1
// holds eight of them at most, and the next block's would evict this one's.
template <typename T>
RHYTHM_INLINE void ask_for(const T* source, int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i, advance(source, stride)) __builtin_prefetch(source, 0, 2);
}

// out[d * ld + i] = dimension d of token i, from what load_block made.
RHYTHM_INLINE void transpose_block(Vec (&block)[kBlockDims], float* out, int64_t ld) {
  typedef typename Count<kLanes>::type All;
  // 4 x 4 blocks inside every quarter.
#pragma GCC unroll 2
  for (int i = 0; i < kBlockDims; i += 4) {
    const Vec a = interleave<1, 0>(block[i], block[i + 1], All()), b = interleave<1, 1>(block[i], block[i + 1], All());
    const Vec c = interleave<1, 0>(block[i + 2], block[i + 3], All());
    const Vec d = interleave<1, 1>(block[i + 2], block[i + 3], All());
    block[i] = interleave<2, 0>(a, c, All()), block[i + 1] = interleave<2, 1>(a, c, All());
    block[i + 2] = interleave<2, 0>(b, d, All()), block[i + 3] = interleave<2, 1>(b, d, All());
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    if constexpr (kLanes == 16) {
      // Quarters of block[j]: dimension j of tokens 0 .. 3, dimension 4 + j of the same, both again for tokens 8 .. 11.
      store(out + j * ld, paired_quarters<0>(block[j], block[4 + j], All()));
      store(out + (4 + j) * ld, paired_quarters<1>(block[j], block[4 + j], All()));
    } else {
      store(out + j * ld, block[j]);
    }
  }
}

// The dimensions from `d` on of kLanes tokens that lie anywhere: out[d * ld + i] = tokens[i][d].
template <typename T>
__attribute__((noinline)) static void transpose_scattered(const T* const* tokens, int64_t d, int64_t dim, float* out,
                                                          int64_t ld) {
  Vec block[kBlockDims];
  for (; d + kBlockDims <= dim; d += kBlockDims) {
    load_block(tokens, d, block);
    transpose_block(block, out + d * ld, ld);
  }
  for (; d < dim; d += kLanes) {
    const int64_t width = dim - d < kLanes ? dim - d : kLanes;
    for (int i = 0; i < kLanes; ++i) {
      const Vec token = widen_tail(tokens[i] + d, width);
      for (int e = 0; e < width; ++e) out[(d + e) * ld + i] = token[e];
    }
  }
}

// out[d * ld + c] = source[(first + c) * stride + d] for c < columns; where first + c is outside [begin, end), which is
// not empty, the nearest token inside fills a lane that nobody reads.
// `source` is token 0 of the head; columns is rounded up to whole vectors, which `out` must have room for.
template <typename T>
static void load_transposed(const T* source, int64_t stride, int64_t dim, int64_t first, int64_t columns,
                            int64_t begin, int64_t end, float* out, int64_t ld) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t token = first + c;
    int64_t d = 0;
    if (token >= begin && token + kLanes <= end) {
      const T* const here = source + token * stride;
      const bool more = token + 2 * kLanes <= end; // tiles and strips mostly go on with the next tokens
      Vec block[kBlockDims];
      for (; d + kBlockDims <= dim; d += kBlockDims) {
        if (more && d * int64_t(sizeof(T)) % 64 == 0) ask_for(here + kLanes * stride + d, stride);
        load_block(here + d, stride, block);
        transpose_block(block, out + d * ld + c, ld);
      }
    }
    if (d == dim) continue;
    const T* tokens[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t inside = token + i < begin ? begin : token + i < end ? token + i : end - 1;
      tokens[i] = source + inside * stride;
    }
    transpose_scattered(tokens, d, dim, out + c, ld);
  }
}

// out[i * dim + d] = source[(first + i) * stride + d] for i < count, 0 for tokens at or past `end`.
template <typename T>
static void load_tokens(const T* source, int64_t stride, int64_t dim, int64_t first, int64_t count, int64_t end,
                        float* out) {
  for (int64_t i = 0; i < count; ++i, out += dim) {
    const T* token = source + (first + i) * stride;
    if (first + i >= end) {
      __builtin_memset(out, 0, dim * sizeof(float));
      continue;
    }
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(out + d, widen(token + d));
    if (d < dim) {
      const Vec tail = widen_tail(token + d, dim - d);
      __builtin_memcpy(out + d, &tail, (dim - d) * sizeof(float));
    }
  }
}

// out[c] = known(lse) of token first + c; 0 outside [begin, end), lanes that nobody reads.
RHYTHM_INLINE void load_lse(const CpuInputs& p, int64_t batch_row, Head head, const HeadRule& rule, int64_t first,
                            int64_t count, int64_t begin, int64_t end, float* out) {
  const float* source = p.lse + batch_row * p.lse_batch + head.lse_index * p.lse_head;
  const float zero = nothing(rule);
  for (int64_t c = 0; c < count; ++c) {
    const int64_t token = first + c;
    out[c] = token >= begin && token < end ? known(source[token * p.lse_token], zero) : 0.0f;
  }
}

template <typename T>
RHYTHM_INLINE const T* head_of(const void* base, int64_t batch_row, int64_t batch_stride, int64_t head,
                               int64_t head_stride) {
  return (const T*)base + batch_row * batch_stride + head * head_stride;
}

// Give each lane a number of its sequence: table[c] = of(sequence) where token tile.first + c is in its response, else
// `none`, for c < count.
template <typename Of>
RHYTHM_INLINE void spread(const Tile& tile, int64_t count, int32_t none, int32_t* table, const Of& of) {
  for (int64_t c = 0; c < count; ++c) table[c] = none;
  for_each_live(tile, tile.first, tile.last, [&](const Sequence& seq, int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) table[t - tile.first] = of(seq);
  });
}

RHYTHM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
RHYTHM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
RHYTHM_INLINE int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

} // namespace RHYTHM_CAPABILITY
} // namespace rhythm
