// Credit of one response on the CPU: every set by radix selection, O(n) where `neighbors` is small.
#include "rhythm/credit.h"

#include <algorithm>

namespace rhythm {
namespace {

// The tokens that hold the largest `wanted` keys: those above `key`, and the first `ties` that equal it.
template <typename Key>
struct Cut {
  Key key;
  int64_t ties;
};

template <typename Key>
Cut<Key> largest(const Key* keys, int64_t n, int64_t wanted) {
  Key found = 0, known = 0; // digits found so far, and a mask of them
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    int64_t count[256] = {};
    for (int64_t i = 0; i < n; ++i)
      if ((keys[i] & known) == found) ++count[keys[i] >> shift & 255];
    int digit = 255;
    while (count[digit] < wanted) wanted -= count[digit--];
    found |= Key(digit) << shift;
    known |= Key(255) << shift;
  }
  return {found, wanted};
}

template <typename T>
class Response {
  typedef typename Ordered<T>::Key Key;

 public:
  Response(const CreditInputs& p, int64_t batch_row, void* scratch)
      : p_(p),
        first_(batch_row * p.tokens),
        waad_(static_cast<Key*>(scratch)),
        delta_(waad_ + p.tokens),
        rank_(delta_ + p.tokens),
        token_(reinterpret_cast<int32_t*>(rank_ + p.tokens)),
        role_(reinterpret_cast<uint8_t*>(token_ + p.tokens)),
        intro_(role_ + p.tokens) {}

  void run() {
    float* const out = p_.out + first_;
    std::fill_n(out, p_.tokens, 1.0f);
    if (!gather()) return;
    choose();
    std::fill_n(intro_, n_, uint8_t(0));
    if (p_.mode == CreditMode::kCoupled) hand_on();
    for (int64_t i = 0; i < n_; ++i) out[token_[i]] = p_.levels[level(role_[i], intro_[i] != 0)];
  }

 private:
  // Collect the masked tokens and their keys; false where there are none, or a measure is not finite.
  bool gather() {
    const bool* const mask = p_.mask + first_;
    for (int64_t t = 0; t < p_.tokens; ++t)
      if (mask[t]) token_[n_++] = int32_t(t);
    const T* const waad = static_cast<const T*>(p_.waad) + first_;
    const T* const fai = static_cast<const T*>(p_.fai) + first_;
    const T* const score = p_.score == nullptr ? fai : static_cast<const T*>(p_.score) + first_;
    bool finite = true;
    for (int64_t i = 0; i < n_; ++i) {
      const int32_t t = token_[i];
      finite &= is_finite(waad[t]) & is_finite(fai[t]) & is_finite(score[t]);
      waad_[i] = key_of(waad[t]);
      rank_[i] = key_of(score[t]);
    }
    return finite && n_ > 0;
  }

  // Eqs. 14 and 16: the roles kAnchor and kOutside.
  void choose() {
    const bool by_fai = p_.mode == CreditMode::kGlobal || p_.mode == CreditMode::kCoupled;
    if (p_.mode == CreditMode::kLocal || p_.mode == CreditMode::kCoupled) {
      for (int64_t i = 0; i + 1 < n_; ++i)
        delta_[i] = key_of(std::abs(value_of<T>(waad_[i]) - value_of<T>(waad_[i + 1])));
      delta_[n_ - 1] = key_of(T(0));
    }
    int64_t candidates = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const Key key = p_.mode == CreditMode::kLocal ? delta_[i] : rank_[i];
      const bool may = !by_fai || key > key_of(T(0));
      rank_[i] = may ? rank_of(key, p_.lowest) : 0;
      candidates += may;
    }
    const int64_t wanted = std::min(set_size(p_.top, n_), candidates);
    std::fill_n(role_, n_, uint8_t(kOutside));
    if (wanted <= 0) return;
    Cut<Key> cut = largest(rank_, n_, wanted);
    for (int64_t i = 0; i < n_; ++i)
      if (rank_[i] > cut.key || (rank_[i] == cut.key && cut.ties-- > 0)) role_[i] = kAnchor;
  }

  // Eq. 18: the role kDominated, and the intro tokens.
  void hand_on() {
    const int64_t size = set_size(p_.top, n_);
    if (size <= 0) return;
    const Key low = p_.given_tau_waad ? key_of(T(p_.tau_waad)) : largest(waad_, n_, median_rank(n_)).key;
    const Key high = p_.given_tau_delta ? key_of(T(p_.tau_delta)) : largest(delta_, n_, size).key;
    for (int64_t i = 1; i < n_; ++i) {
      if (role_[i] != kAnchor || waad_[i] > low) continue;
      const int64_t farthest = i > p_.neighbors ? i - p_.neighbors : 0;
      int64_t best = i - 1;
      for (int64_t u = i - 2; u >= farthest; --u)
        if (delta_[u] > delta_[best]) best = u;
      if (delta_[best] < high) continue;
      role_[i] = kDominated;
      intro_[best] = 1;
    }
  }

  const CreditInputs& p_;
  const int64_t first_;
  int64_t n_ = 0;
  // [n_], by place in the response (the masked tokens alone):
  Key* const waad_;
  Key* const delta_;
  Key* const rank_;
  int32_t* const token_;
  uint8_t* const role_;
  uint8_t* const intro_;
};

} // namespace

void credit_response(const CreditInputs& p, int64_t batch_row, void* scratch) {
  if (p.wide)
    Response<double>(p, batch_row, scratch).run();
  else
    Response<float>(p, batch_row, scratch).run();
}

} // namespace rhythm
