// The score rule of the CUDA kernels: the one place where an attention variant is taught to them.
//
//   x = scale (q . k);  x = softcap tanh(x / softcap) if softcap > 0;  x -= slope (t - s);  A = exp(x - lse)
//
// Visibility is a range of distances t - s, [0, window_left], and s >= start: the passes cut their loops to it and mask
// what is left. Everything is float32; exponentials are taken base 2, which is what the chip has.
#pragma once

#include <type_traits>

#include "launch.h"
#include "rhythm/cuda.h"

namespace rhythm {

// 2^x by one instruction, 0 below 2^-126. exp2f() takes four more to keep those numbers, although A, which is at most 1
// and summed to 1e-7, does not need 1e-38.
__device__ inline float exp2_of(float x) {
#ifdef RHYTHM_EMULATE
  const float value = exp2f(x);
  return value < 1.17549435e-38f ? 0.0f : value; // a NaN stays
#else
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#endif
}

__device__ inline float exp_of(float x) { return exp2_of(x * 1.4426950408889634f); }

// tanh to 2e-7 relative: a polynomial near 0, where 1 - exp(-2|x|) cancels; no overflow anywhere.
__device__ inline float tanh_of(float x) {
  const float size = fabsf(x), e = exp_of(-2.0f * size), y = x * x;
  const float far = __fdividef(1.0f - e, 1.0f + e);
  const float near =
      x * (1.0f + y * (-0.33333333f + y * (0.13333333f + y * (-0.053968254f + y * 0.021869488f))));
  return size < 0.3f ? near : copysignf(far, x); // a NaN goes through `far`
}

// Kernels are compiled once for each variant, so that the registers that slopes take do not cost calls without them.
struct Plain {};
struct Alibi {};

// launch(the variant of a call).
template <typename Launch>
int for_variant(const ScoreRule& rule, const Launch& launch) {
  return rule.slopes == nullptr ? launch(Plain()) : launch(Alibi());
}

// The rule's numbers of one query head in a sequence of the table, looked up once.
struct HeadRule {
  float sink;  // -inf: none
  float slope; // Alibi
};

template <typename Variant>
__device__ inline HeadRule rule_of(const ScoreRule& rule, int sequence, int query_head) {
  HeadRule head{rule.sinks == nullptr ? -INFINITY : rule.sinks[query_head], 0.0f};
  if constexpr (std::is_same_v<Variant, Alibi>) head.slope = rule.slopes[sequence * rule.slope_stride + query_head];
  return head;
}

// Turn products q.k into x - lse = log A in place. It stays in nats: multiplied by log2(e) before the subtraction, x and
// lse would each be rounded at their own size. `lse(tile, i)` is that of the row of x[tile][i] ([kTiles, 4], products.cuh),
// which comes `distance(tile, i)` after its key.
template <typename Variant, int kTiles, typename Distance, typename Lse>
__device__ inline void exponents(float (&x)[kTiles][4], const HeadRule& head, const ScoreRule& rule, Distance distance,
                                 Lse lse) {
  if (rule.softcap > 0.0f) {
    const float inner = rule.scale / rule.softcap;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i)
      x[i / 4][i % 4] = fmaf(rule.softcap, tanh_of(x[i / 4][i % 4] * inner), -lse(i / 4, i % 4));
  } else {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) x[i / 4][i % 4] = fmaf(x[i / 4][i % 4], rule.scale, -lse(i / 4, i % 4));
  }
  if constexpr (std::is_same_v<Variant, Alibi>) {
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i)
      x[i / 4][i % 4] = fmaf(-head.slope, static_cast<float>(distance(i / 4, i % 4)), x[i / 4][i % 4]);
  }
}

// 0, or NaN where the sink of this head is +inf or NaN, so that A has no value. A sink of -inf is none.
__device__ inline float nothing(const HeadRule& head) {
  return head.sink == -INFINITY ? 0.0f : 0.0f * head.sink;
}

// lse, or NaN where it is not finite or `zero` (from nothing()) is NaN: results then are NaN, not a plausible number.
__device__ inline float known(float lse, float zero) { return fmaf(lse, zero, lse); }

// The share of a row's softmax that its keys get: 1, or what the sink leaves (lse has the sink in it).
__device__ inline float row_sum(float lse, const HeadRule& head) {
  return head.sink == -INFINITY ? 1.0f : 1.0f - exp_of(head.sink - lse);
}

// The farthest key that a row sees, at most `far`.
__device__ inline int visible_far(int64_t far, const ScoreRule& rule) {
  return static_cast<int>(far < rule.window_left ? far : rule.window_left);
}

} // namespace rhythm
