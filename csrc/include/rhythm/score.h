// The score rule, for a vector of pairs: the one place where an attention variant is taught to the C++ kernels.
//
//   x = scale * (q . k);  x = softcap * tanh(x / softcap) if softcap > 0;  x -= slope * (t - s);  A = exp(x - lse)
//
// Visibility is a range of distances t - s, [0, window_left], and s >= start: the passes cut their loops to it and
// mask what is left.
#pragma once

#include "rhythm/inputs.h"
#include "rhythm/vec.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

// The rule's numbers of one query head in the sequences of a tile, looked up once, so that loops over pairs load nothing.
struct HeadRule {
  float sink;  // -inf: none
  float slope; // 0 without slopes
};

// (Sequences that differ in slopes share no tile.)
RHYTHM_INLINE HeadRule rule_of(const CpuInputs& p, const Tile& tile, int32_t query_head) {
  const ScoreRule& rule = p.score;
  const int64_t sequence = tile.sequences - p.seqs;
  return {rule.sinks == nullptr ? -__builtin_inff() : rule.sinks[query_head],
          rule.slopes == nullptr ? 0.0f : rule.slopes[sequence * rule.slope_stride + query_head]};
}

// x of pairs whose rows come `distance` after their keys.
RHYTHM_INLINE Vec logit(Vec product, Vec distance, const HeadRule& head, const ScoreRule& rule) {
  Vec x = product * rule.scale;
  if (rule.softcap > 0) x = rule.softcap * tanh(x * (1.0f / rule.softcap));
  if (rule.slopes != nullptr) x -= head.slope * distance;
  return x;
}

// 0, or NaN where the sink of this head is +inf or NaN, so that A has no value. A sink of -inf is none.
RHYTHM_INLINE float nothing(const HeadRule& head) {
  return head.sink == -__builtin_inff() ? 0.0f : 0.0f * head.sink;
}

// lse, or NaN where it is not finite or `zero` (from nothing()) is NaN: results then are NaN, not a plausible number.
RHYTHM_INLINE float known(float lse, float zero) { return lse + lse * zero; }

// The share of a row's softmax that its keys get: 1, or what a sink leaves.
RHYTHM_INLINE Vec row_sum(Vec lse, const HeadRule& head) {
  if (head.sink == -__builtin_inff()) return splat(1.0f);
  return 1.0f - exp(head.sink - lse);
}

// WAAD = W * rowsum - sum over the band of A (W - distance), kept in [0, W] against rounding; NaN stays NaN.
RHYTHM_INLINE Vec waad_from_band(Vec rowsum, Vec band, float window) {
  Vec value = window * rowsum - band;
  value = select(value < splat(0.0f), splat(0.0f), value);
  return select(value > splat(window), splat(window), value);
}

} // namespace RHYTHM_CAPABILITY
} // namespace rhythm
