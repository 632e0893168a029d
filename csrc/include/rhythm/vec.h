// Vectors of RHYTHM_LANES floats, written once over GCC's vector extensions (GCC 9, Clang 10 or later).
//
// A translation unit is compiled once for each capability, with RHYTHM_CAPABILITY naming the namespace that keeps its
// code apart from the others'. Nothing here may become an inline symbol outside that namespace: the linker would be
// free to keep the AVX-512 copy for all of them. Hence no standard library templates in the kernels.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef RHYTHM_LANES
#error "compile with -DRHYTHM_CAPABILITY=<name> -DRHYTHM_LANES=<4, 8 or 16>"
#endif

#define RHYTHM_INLINE static inline __attribute__((always_inline))

namespace rhythm {
namespace RHYTHM_CAPABILITY {

constexpr int kLanes = RHYTHM_LANES;
static_assert(kLanes == 4 || kLanes == 8 || kLanes == 16, "transpose() knows these widths");
// Accumulators that fit the register file beside the operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif

typedef float Vec __attribute__((vector_size(4 * RHYTHM_LANES)));
typedef int32_t Int __attribute__((vector_size(4 * RHYTHM_LANES)));
typedef uint32_t UInt __attribute__((vector_size(4 * RHYTHM_LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * RHYTHM_LANES)));

RHYTHM_INLINE Vec splat(float x) { return x - Vec{}; } // x - 0 is x for every x, NaN and -0 included
RHYTHM_INLINE Int splat_int(int32_t x) { return x - Int{}; }

RHYTHM_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
RHYTHM_INLINE Int load_int(const int32_t* p) {
  Int v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
RHYTHM_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

// Keep a loaded vector in a register: left alone, GCC loads it again as the operand of every multiply-add, and the
// products are then bound by loads at half their speed.
RHYTHM_INLINE void keep_in_register(Vec& v) {
#if (defined(__AVX512F__) && RHYTHM_LANES == 16) || (defined(__AVX2__) && RHYTHM_LANES == 8)
  __asm__("" : "+v"(v));
#else
  (void)v;
#endif
}

RHYTHM_INLINE Int bits(Vec v) { return (Int)v; }
RHYTHM_INLINE Vec from_bits(Int v) { return (Vec)v; }

// mask lanes are all ones or all zeros, as comparisons make them.
RHYTHM_INLINE Vec select(Int mask, Vec yes, Vec no) { return mask ? yes : no; }
RHYTHM_INLINE Vec keep(Int mask, Vec v) { return from_bits(mask & bits(v)); } // v, or +0 where masked out
RHYTHM_INLINE Vec max_or_nan(Vec a, Vec b) { return a > b ? a : b; }          // b's NaN wins

// sum += term, `lost` carrying the rounding errors (Kahan): sums of thousands of terms, or of one term far above the
// others, are then as exact as a sum of two. An infinite sum stays infinite.
RHYTHM_INLINE void add_to(Vec& sum, Vec& lost, Vec term) {
  const Vec owed = term - lost, next = sum + owed;
  lost = keep(next - next == Vec{}, (next - sum) - owed);
  sum = next;
}
RHYTHM_INLINE void add_to(float* sum, float* lost, Vec term) {
  Vec total = load(sum), owing = load(lost);
  add_to(total, owing, term);
  store(sum, total);
  store(lost, owing);
}

RHYTHM_INLINE Int lane_index() {
  Int v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}
RHYTHM_INLINE Vec number(Int v) { return __builtin_convertvector(v, Vec); }
RHYTHM_INLINE Vec lane_number() { return number(lane_index()); }

template <int... I>
struct Lanes {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Lanes<I...> type;
};

#if defined(__clang__)
#define RHYTHM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RHYTHM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int{__VA_ARGS__})
#endif

// Interleaving inside each quarter of four lanes: one instruction on x86, without an index register.
template <int Width, int High, int... I>
RHYTHM_INLINE Vec interleave(Vec a, Vec b, Lanes<I...>) {
  return RHYTHM_SHUFFLE(a, b, ((I & ~3) + (High ? 2 : 0) + (I & (Width - 1)) +
                               (Width == 1 ? (I & 3) / 2 : 0) + ((I / Width) & 1) * kLanes)...);
}
// The quarters 0, 2 (Odd: 1, 3) of a, each followed by the same quarter of b.
template <int Odd, int... I>
RHYTHM_INLINE Vec paired_quarters(Vec a, Vec b, Lanes<I...>) {
  return RHYTHM_SHUFFLE(a, b, ((I & 4 ? kLanes + I - 4 : I) + 4 * Odd)...);
}

// exp(x) for x up to 88, relative error below 1e-7; 0 below -87.3 (no denormals), NaN for NaN.
RHYTHM_INLINE Vec exp_to_88(Vec x) {
  const float kMagic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
  const Vec shifted = x * 1.44269504f + kMagic;
  const Vec n = shifted - kMagic;
  // ln 2 in two parts, the first with trailing zeros, so that n * part is exact without a fused multiply-add too.
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const UInt exponent = ((UInt)shifted << 23) + (127u << 23); // the magic number's own bits are shifted out
  return keep(~(x < splat(-87.3f)), p * (Vec)exponent);
}
// The same for any x, inf above 88.
RHYTHM_INLINE Vec exp(Vec x) { return select(x > splat(88.0f), splat(__builtin_inff()), exp_to_88(x)); }

// tanh(x): relative error below 1e-6. Near 0 the exponential would leave an absolute 1e-7, which a softcap of 1e4 turns
// into 1e-3 of a logit: there the odd series, whose next term is below 1e-8 of the sum.
RHYTHM_INLINE Vec tanh(Vec x) {
  const Vec u = x * x;
  Vec p = u * 2.1869488e-2f - 5.3968254e-2f;
  p = p * u + 1.3333333e-1f;
  p = p * u - 3.3333333e-1f;
  const Vec series = x + x * u * p;
  return select(u < splat(0.0625f), series, 1.0f - 2.0f / (exp(2.0f * x) + 1.0f));
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

RHYTHM_INLINE Vec widened(Half h, BFloat16) { return (Vec)(__builtin_convertvector(h, UInt) << 16); }

RHYTHM_INLINE Vec widened(Half h, Float16) {
#if defined(__AVX512F__) && RHYTHM_LANES == 16
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif defined(__F16C__) && RHYTHM_LANES == 8
  return (Vec)_mm256_cvtph_ps((__m128i)h);
#else
  const UInt wide = __builtin_convertvector(h, UInt);
  const UInt magnitude = (wide & 0x7fffu) << 13;
  const Vec finite = (Vec)magnitude * 0x1p112f; // moves the exponent's bias, normal or not
  const Vec special = (Vec)(magnitude | 0x7f800000u);
  const Vec value = ((Int)(wide & 0x7c00u) == 0x7c00) ? special : finite;
  return (Vec)((UInt)value | ((wide & 0x8000u) << 16));
#endif
}

// kLanes consecutive numbers as float32.
RHYTHM_INLINE Vec widen(const float* p) { return load(p); }
template <typename T>
RHYTHM_INLINE Vec widen(const T* p) {
  Half h;
  __builtin_memcpy(&h, p, sizeof(h));
  return widened(h, T());
}

// The first `n` <= kLanes numbers of a row, zeros behind them; reads nothing past them.
template <typename T>
RHYTHM_INLINE Vec widen_tail(const T* p, int64_t n) {
  T padded_row[kLanes];
  __builtin_memset(padded_row, 0, sizeof(padded_row));
  __builtin_memcpy(padded_row, p, n * sizeof(T));
  return widen(padded_row);
}

// kLanes / 2 consecutive numbers from `low`, then as many from `high`: what a transpose wants to start from, since
// joining two loads is cheaper than exchanging halves of registers later. Through memory it would be a stall instead.
#if defined(__AVX512F__) && RHYTHM_LANES == 16
RHYTHM_INLINE Vec widen_halves(const float* low, const float* high) {
  const __m512d first = _mm512_castpd256_pd512(_mm256_loadu_pd((const double*)low));
  return (Vec)_mm512_maskz_insertf64x4(0xff, first, _mm256_loadu_pd((const double*)high), 1);
}
RHYTHM_INLINE Half joined(const void* low, const void* high) {
  return (Half)_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)low)),
                                       _mm_loadu_si128((const __m128i*)high), 1);
}
#elif defined(__AVX2__) && RHYTHM_LANES == 8
RHYTHM_INLINE Vec widen_halves(const float* low, const float* high) {
  return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}
RHYTHM_INLINE Half joined(const void* low, const void* high) {
  return (Half)_mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)low), _mm_loadl_epi64((const __m128i*)high));
}
#else
RHYTHM_INLINE Vec widen_halves(const float* low, const float* high) {
  Vec v;
  __builtin_memcpy(&v, low, sizeof(v) / 2);
  __builtin_memcpy((char*)&v + sizeof(v) / 2, high, sizeof(v) / 2);
  return v;
}
RHYTHM_INLINE Half joined(const void* low, const void* high) {
  Half h;
  __builtin_memcpy(&h, low, sizeof(h) / 2);
  __builtin_memcpy((char*)&h + sizeof(h) / 2, high, sizeof(h) / 2);
  return h;
}
#endif
template <typename T>
RHYTHM_INLINE Vec widen_halves(const T* low, const T* high) {
  return widened(joined(low, high), T());
}

} // namespace RHYTHM_CAPABILITY
} // namespace rhythm
