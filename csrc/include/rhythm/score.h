// The score rule, for a vector of pairs: the one place where an attention variant is taught to the C++ kernels.
//
//   x = scale * (q . k);  x = softcap * tanh(x / softcap) if softcap > 0;  A = exp(x - lse)
//
// Visibility is a range of distances t - s, [0, window_left], and s >= start: the passes cut their loops to it and
// mask what is left.
#pragma once

#include "rhythm/problem.h"
#include "rhythm/vec.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

RHYTHM_INLINE Vec logit(Vec dot, const ScoreRule& rule) {
  const Vec x = dot * rule.scale;
  if (rule.softcap > 0) return rule.softcap * tanh(x * (1.0f / rule.softcap));
  return x;
}

// The share of a row's softmax that its keys get: 1, or what a sink leaves.
RHYTHM_INLINE Vec row_sum(Vec lse, const ScoreRule& rule, int32_t query_head) {
  if (rule.sinks == nullptr) return splat(1.0f);
  return 1.0f - exp(rule.sinks[query_head] - lse);
}

// WAAD = W * rowsum - sum over the band of A (W - distance), kept in [0, W] against rounding; NaN stays NaN.
RHYTHM_INLINE Vec waad_from_band(Vec rowsum, Vec band, float window) {
  Vec value = window * rowsum - band;
  value = select(value < splat(0.0f), splat(0.0f), value);
  return select(value > splat(window), splat(window), value);
}

} // namespace RHYTHM_CAPABILITY
} // namespace rhythm
