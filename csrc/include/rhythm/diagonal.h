// The register-tiled product of the two band passes. Both operands are transposed, [head_dim, tokens], so that a
// lane is a token and nothing is ever summed across lanes.
#pragma once

#include "rhythm/vec.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

// Diagonals of Q K^T: out[f * moved + m][lane] = sum_d fixed[f * step + d * ld_fixed + lane]
//                                                      * moving[d * ld_moving + m + lane].
// fixed: kLanes rows of several heads (band_rows) or several vectors of keys (band_columns); moving: the other operand, at
// `moved` consecutive positions, so that only pairs at the wanted distances are multiplied.
template <int Fixed, int Moved>
static void diagonal_block(const float* fixed, int64_t step, int64_t ld_fixed, const float* moving,
                           int64_t ld_moving, int64_t dim, Vec* out) {
  Vec sum[Fixed][Moved];
#pragma GCC unroll 16
  for (int f = 0; f < Fixed; ++f)
#pragma GCC unroll 16
    for (int m = 0; m < Moved; ++m) sum[f][m] = Vec{};
  for (int64_t d = 0; d < dim; ++d, fixed += ld_fixed, moving += ld_moving) {
    Vec left[Fixed];
#pragma GCC unroll 16
    for (int f = 0; f < Fixed; ++f) left[f] = load(fixed + f * step);
#pragma GCC unroll 16
    for (int m = 0; m < Moved; ++m) {
      Vec right = load(moving + m);
      keep_in_register(right);
#pragma GCC unroll 16
      for (int f = 0; f < Fixed; ++f) sum[f][m] = sum[f][m] + left[f] * right;
    }
  }
#pragma GCC unroll 16
  for (int f = 0; f < Fixed; ++f)
#pragma GCC unroll 16
    for (int m = 0; m < Moved; ++m) out[f * Moved + m] = sum[f][m];
}

#if defined(__AVX512F__) && RHYTHM_LANES == 16
// Lanes M .. M + 15 of a and, behind it, b.
template <int M>
RHYTHM_INLINE Vec shifted(Vec a, Vec b) {
  return (Vec)_mm512_maskz_alignr_epi32(0xffff, (__m512i)b, (__m512i)a, M);
}
template <int... M>
RHYTHM_INLINE void add_shifted(Vec* sum, Vec left, Vec a, Vec b, Lanes<M...>) {
  ((sum[M] = sum[M] + left * shifted<M>(a, b)), ...);
}

// With one fixed vector each load of `moving` would serve one multiply-add, and unaligned 64 bytes take two cache lines:
// so two neighbouring vectors are loaded once, and shifted in registers.
template <int Moved>
static void diagonal_of_one(const float* fixed, int64_t, int64_t ld_fixed, const float* moving, int64_t ld_moving,
                            int64_t dim, Vec* out) {
  static_assert(Moved < kLanes, "two vectors must hold all positions");
  Vec sum[Moved];
#pragma GCC unroll 16
  for (int m = 0; m < Moved; ++m) sum[m] = Vec{};
  for (int64_t d = 0; d < dim; ++d, fixed += ld_fixed, moving += ld_moving)
    add_shifted(sum, load(fixed), load(moving), load(moving + kLanes), typename Count<Moved>::type());
#pragma GCC unroll 16
  for (int m = 0; m < Moved; ++m) out[m] = sum[m];
}
#endif

typedef void (*DiagonalBlock)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, Vec*);

constexpr int kMaxFixed = kAccumulators >= 24 ? 4 : 3;
constexpr int kMaxMoved = kAccumulators >= 24 ? 12 : 8;

// How many positions one block moves over, for a number of fixed vectors.
constexpr int moved_for(int fixed) {
  return kAccumulators / fixed < kMaxMoved ? kAccumulators / fixed : kMaxMoved;
}

template <int Fixed, int Moved>
RHYTHM_INLINE DiagonalBlock pick_moved(int moved) {
  DiagonalBlock block = diagonal_block<Fixed, Moved>;
#if defined(__AVX512F__) && RHYTHM_LANES == 16
  if constexpr (Fixed == 1) block = diagonal_of_one<Moved>;
#endif
  if constexpr (Moved == 1) {
    return block;
  } else {
    return moved == Moved ? block : pick_moved<Fixed, Moved - 1>(moved);
  }
}

// The block for `fixed` <= kMaxFixed vectors and `moved` <= moved_for(fixed) positions.
static DiagonalBlock diagonal(int fixed, int moved) {
  switch (fixed) {
    case 1: return pick_moved<1, moved_for(1)>(moved);
    case 2: return pick_moved<2, moved_for(2)>(moved);
    case 3: return pick_moved<3, moved_for(3)>(moved);
    default: return pick_moved<kMaxFixed, moved_for(kMaxFixed)>(moved);
  }
}

} // namespace RHYTHM_CAPABILITY
} // namespace rhythm
