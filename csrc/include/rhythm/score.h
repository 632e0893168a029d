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

// 0; NaN where the sink of this head is +inf or NaN, beside which no key has a share. One of -inf is no sink.
RHYTHM_INLINE float nothing(const ScoreRule& rule, int32_t query_head) {
  const float sink = rule.sinks == nullptr ? 0.0f : rule.sinks[query_head];
  return sink == -__builtin_inff() ? 0.0f : 0.0f * sink;
}

// A log-sum-exp as it was given, NaN where it is not finite, or where `zero`, of nothing(), is NaN.
RHYTHM_INLINE float known(float lse, float zero) { return lse + lse * zero; }

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
