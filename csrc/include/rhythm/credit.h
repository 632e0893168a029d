// Credit (eqs. 14 to 19) as the kernels see it: the inputs of one call, and the arithmetic that CPU and CUDA share, so
// that both give the reference's bits. No LibTorch here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define RHYTHM_ANYWHERE __host__ __device__
#else
#define RHYTHM_ANYWHERE
#endif

namespace rhythm {

// What tokens are chosen by: delta; FAI above 0; FAI above 0 and handed on to intro tokens; the score that is given.
enum class CreditMode : int { kLocal, kGlobal, kCoupled, kScore };

// (B, T) contiguous; measures are float32, or float64 where `wide`. A response is the masked tokens of a batch row.
struct CreditInputs {
  bool wide;
  const void* waad;
  const void* fai;
  const void* score; // kScore alone, else null
  const bool* mask;
  int64_t batch, tokens; // tokens < 2^31

  CreditMode mode;
  double top;        // the share of tokens a set holds
  int64_t neighbors; // how far before a dominated token its intro token lies at most
  bool lowest;       // the lowest instead of the highest
  bool given_tau_waad, given_tau_delta;
  double tau_waad, tau_delta;

  float levels[6]; // gamma of a token by `level()`
  float* out;      // (B, T), all of it written
};

// Index into `levels`: outside the set, in it, dominated; the same and an intro token too.
constexpr int kOutside = 0, kAnchor = 1, kDominated = 2;
RHYTHM_ANYWHERE inline int level(int role, bool intro) { return role + (intro ? 3 : 0); }

// Unsigned integers in the order of the floats: 0.0 and -0.0 have one key, and no number has key 0 or ~0.
template <typename T>
struct Ordered;

template <>
struct Ordered<float> {
  typedef uint32_t Key;
};

template <>
struct Ordered<double> {
  typedef uint64_t Key;
};

template <typename T>
RHYTHM_ANYWHERE inline typename Ordered<T>::Key key_of(T x) {
  typedef typename Ordered<T>::Key Key;
  constexpr Key sign = Key(1) << (8 * sizeof(T) - 1);
  if (x == T(0)) return sign;
  Key bits;
  memcpy(&bits, &x, sizeof(T));
  return bits & sign ? ~bits : bits | sign;
}

template <typename T>
RHYTHM_ANYWHERE inline T value_of(typename Ordered<T>::Key key) {
  typedef typename Ordered<T>::Key Key;
  constexpr Key sign = Key(1) << (8 * sizeof(T) - 1);
  const Key bits = key & sign ? key ^ sign : ~key;
  T x;
  memcpy(&x, &bits, sizeof(T));
  return x;
}

// A key by which the largest are chosen; tokens that may not be chosen have 0, below every other.
template <typename Key>
RHYTHM_ANYWHERE inline Key rank_of(Key key, bool lowest) {
  return lowest ? Key(~key) : key;
}

template <typename T>
RHYTHM_ANYWHERE inline bool is_finite(T x) {
  return x - x == T(0);
}

// m = ceil(top n - 1e-9) in double. A compiler that fused the product and the difference would count differently.
RHYTHM_ANYWHERE inline int64_t set_size(double top, int64_t n) {
#if defined(__CUDA_ARCH__)
  return static_cast<int64_t>(ceil(__dsub_rn(__dmul_rn(top, static_cast<double>(n)), 1e-9)));
#else
  volatile const double product = top * static_cast<double>(n);
  return static_cast<int64_t>(std::ceil(product - 1e-9));
#endif
}

// Rank of the lower median, counted from the largest: 1 .. n.
RHYTHM_ANYWHERE inline int64_t median_rank(int64_t n) { return n - (n - 1) / 2; }

// Bytes of scratch of one response: by place in it, three keys, two indices and a role.
RHYTHM_ANYWHERE inline int64_t credit_scratch(const CreditInputs& p) {
  const int64_t key = p.wide ? 8 : 4;
  return (p.tokens * (3 * key + 2 * 4 + 1) + 63) / 64 * 64;
}

// csrc/cpu: gamma of one response, with scratch aligned to 8 bytes.
void credit_response(const CreditInputs& p, int64_t batch_row, void* scratch);

} // namespace rhythm

// csrc/cuda: gamma of all responses in one launch, every pointer on the device, `scratch` of batch * credit_scratch
// bytes, aligned to 8; 0, or the cudaError_t of a launch that failed. Devices and streams as in cuda.h.
extern "C" int rhythm_cuda_credit(const rhythm::CreditInputs* inputs, void* scratch, void* stream);
