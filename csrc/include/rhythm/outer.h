// The register-tiled product of the two passes over all pairs. `columns` is transposed, [head_dim, width], a lane a
// token; `tokens` [count, head_dim] is read a number at a time.
#pragma once

#include "rhythm/vec.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

// Dense blocks of Q K^T: out[n * ld_out + c] = sum_d columns[d * ld + c] * tokens[n * dim + d] for n < count (a multiple
// of kOuterTokens) and c < width (whole vectors).
constexpr int kOuterVecs = kAccumulators >= 24 ? 4 : 2;
constexpr int kOuterTokens = 6;

template <int Vecs>
static void outer_block(const float* columns, int64_t ld, const float* tokens, int64_t dim, float* out,
                        int64_t ld_out) {
  Vec sum[kOuterTokens][Vecs];
#pragma GCC unroll 16
  for (int n = 0; n < kOuterTokens; ++n)
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) sum[n][v] = Vec{};
  for (int64_t d = 0; d < dim; ++d, columns += ld) {
    Vec column[Vecs];
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) column[v] = load(columns + v * kLanes);
#pragma GCC unroll 16
    for (int n = 0; n < kOuterTokens; ++n) {
      Vec token = splat(tokens[n * dim + d]);
      keep_in_register(token);
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) sum[n][v] = sum[n][v] + column[v] * token;
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < kOuterTokens; ++n)
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) store(out + n * ld_out + v * kLanes, sum[n][v]);
}

static void outer_product(const float* columns, int64_t ld, int64_t width, const float* tokens, int64_t count,
                          int64_t dim, float* out, int64_t ld_out) {
  int64_t c = 0;
  for (; c + kOuterVecs * kLanes <= width; c += kOuterVecs * kLanes)
    for (int64_t n = 0; n < count; n += kOuterTokens)
      outer_block<kOuterVecs>(columns + c, ld, tokens + n * dim, dim, out + n * ld_out + c, ld_out);
  for (; c + 2 * kLanes <= width; c += 2 * kLanes)
    for (int64_t n = 0; n < count; n += kOuterTokens)
      outer_block<2>(columns + c, ld, tokens + n * dim, dim, out + n * ld_out + c, ld_out);
  for (; c < width; c += kLanes)
    for (int64_t n = 0; n < count; n += kOuterTokens)
      outer_block<1>(columns + c, ld, tokens + n * dim, dim, out + n * ld_out + c, ld_out);
}

} // namespace RHYTHM_CAPABILITY
} // namespace rhythm
