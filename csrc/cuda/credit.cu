// credit: gamma (eqs. 14 to 19) of a batch of jagged responses in one launch, the reference's bits.
//
// A block owns a response of any length: it packs the masked tokens together, finds every threshold by radix selection
// (on integer keys ordered as the floats, eight bits at a time), and gives ties to the earlier token by a scan. Scratch is
// global memory (cached: 21 bytes a token); atomics count integers in shared memory alone.
#include "launch.h"
#include "rhythm/credit.h"

namespace rhythm {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kItems = 8; // consecutive tokens that a thread takes where their order matters
constexpr unsigned kWarp = 0xffffffffu;

struct Scan {
  int before; // the sum over the threads before this one
  int all;
};

// The sum over the lanes up to and with this one.
__device__ inline int warp_scan(int count) {
  const int lane = threadIdx.x % 32;
  for (int step = 1; step < 32; step *= 2) {
    const int lower = __shfl_up_sync(kWarp, count, step);
    if (lane >= step) count += lower;
  }
  return count;
}

// Called by every thread of the block; it is a barrier for their memory too.
__device__ inline Scan block_scan(int count) {
  __shared__ int sums[kMaxThreads / 32];
  const int upto = warp_scan(count), warp = threadIdx.x / 32;
  __syncthreads(); // the sums of the scan before have been read
  if (threadIdx.x % 32 == 31) sums[warp] = upto;
  __syncthreads();
  Scan scan = {upto - count, 0};
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
    if (w < warp) scan.before += sums[w];
    scan.all += sums[w];
  }
  return scan;
}

// Of the `wanted` largest keys: those above `key`, and the first `ties` that equal it.
template <typename Key>
struct Cut {
  Key key;
  int ties;
};

// 1 <= wanted <= n. Called by every thread of the block, which all get the same.
template <typename Key>
__device__ Cut<Key> largest(const Key* keys, int n, int wanted) {
  __shared__ int count[256];
  __shared__ int digit_found, rest;
  const int lane = threadIdx.x % 32;
  Key found = 0, known = 0; // digits found so far, and a mask of them
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < 256; bin += blockDim.x) count[bin] = 0;
    __syncthreads();
    for (int64_t first = 0; first < n; first += blockDim.x) {
      const int64_t i = first + threadIdx.x;
      const Key key = i < n ? keys[i] : 0;
      const bool counts = i < n && (key & known) == found;
      const int digit = static_cast<int>(key >> shift & 255);
      // Most keys share the exponent's digits: one atomic counts the lanes with the first one's digit, the others their own.
      const unsigned counting = __ballot_sync(kWarp, counts);
      if (counting == 0) continue;
      const int leader = __ffs(static_cast<int>(counting)) - 1;
      const int common = __shfl_sync(kWarp, digit, leader);
      const unsigned same = __ballot_sync(kWarp, counts && digit == common);
      if (lane == leader) atomicAdd(&count[common], __popc(same));
      if (counts && digit != common) atomicAdd(&count[digit], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) { // each lane has eight bins, the first the highest
      const int highest = 255 - 8 * lane;
      int own = 0;
      for (int bin = 0; bin < 8; ++bin) own += count[highest - bin];
      const int upto = warp_scan(own);
      int left = wanted - (upto - own);
      if (left > 0 && left <= own) {
        int digit = highest;
        while (count[digit] < left) left -= count[digit--];
        digit_found = digit, rest = left;
      }
    }
    __syncthreads();
    found |= static_cast<Key>(digit_found) << shift;
    known |= static_cast<Key>(255) << shift;
    wanted = rest;
  }
  return {found, wanted};
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) credit_kernel(const CreditInputs p, unsigned char* const all_scratch) {
  typedef typename Ordered<T>::Key Key;
  const int64_t batch_row = blockIdx.x, start = batch_row * p.tokens;
  const int64_t step = blockDim.x, chunk = step * kItems;
  const bool by_fai = p.mode == CreditMode::kGlobal || p.mode == CreditMode::kCoupled;
  const bool by_delta = p.mode == CreditMode::kLocal || p.mode == CreditMode::kCoupled;

  // [n], by place in the response (the masked tokens alone).
  Key* const waad = reinterpret_cast<Key*>(all_scratch + batch_row * credit_scratch(p));
  Key* const delta = waad + p.tokens;
  Key* const rank = delta + p.tokens;
  int32_t* const token = reinterpret_cast<int32_t*>(rank + p.tokens);
  int32_t* const intro = token + p.tokens; // of a dominated token, else -1
  uint8_t* const chosen = reinterpret_cast<uint8_t*>(intro + p.tokens);
  float* const out = p.out + start;

  // The response's tokens, their WAAD and what they are chosen by.
  int n = 0;
  bool finite = true;
  {
    const bool* const mask = p.mask + start;
    const T* const waads = static_cast<const T*>(p.waad) + start;
    const T* const fais = static_cast<const T*>(p.fai) + start;
    const T* const scores = p.score == nullptr ? fais : static_cast<const T*>(p.score) + start;
    for (int64_t base = 0; base < p.tokens; base += chunk) {
      const int64_t first = base + threadIdx.x * kItems;
      unsigned masked = 0;
      for (int j = 0; j < kItems; ++j)
        if (first + j < p.tokens && mask[first + j]) masked |= 1u << j;
      const Scan scan = block_scan(__popc(masked));
      int place = n + scan.before;
      for (int j = 0; j < kItems && first + j < p.tokens; ++j) {
        const int64_t t = first + j;
        if (!(masked >> j & 1)) {
          out[t] = 1.0f;
          continue;
        }
        const T w = waads[t], s = scores[t];
        finite = finite && is_finite(w) && is_finite(fais[t]) && is_finite(s);
        token[place] = static_cast<int32_t>(t);
        waad[place] = key_of(w);
        rank[place] = key_of(s);
        ++place;
      }
      n += scan.all;
    }
  }
  if (block_scan(finite ? 0 : 1).all > 0) {
    for (int64_t i = threadIdx.x; i < n; i += step) out[token[i]] = 1.0f;
    return;
  }

  // Eqs. 14 and 16. Ranks: 0 for tokens that may not be chosen.
  const Key zero = key_of(T(0));
  int candidates = 0;
  for (int64_t i = threadIdx.x; i < n; i += step) {
    if (by_delta) {
      const T change = i + 1 < n ? value_of<T>(waad[i]) - value_of<T>(waad[i + 1]) : T(0);
      delta[i] = key_of(change < T(0) ? -change : change);
    }
    const Key key = p.mode == CreditMode::kLocal ? delta[i] : rank[i];
    const bool may = !by_fai || key > zero;
    rank[i] = may ? rank_of(key, p.lowest) : 0;
    candidates += may;
  }
  candidates = block_scan(candidates).all;
  const int size = static_cast<int>(set_size(p.top, n));
  const int wanted = size < candidates ? size : candidates;
  Cut<Key> cut = {static_cast<Key>(~Key(0)), 0}; // above every rank: none
  if (wanted > 0) cut = largest(rank, n, wanted);
  int ties = 0;
  for (int64_t base = 0; base < n; base += chunk) {
    const int64_t first = base + threadIdx.x * kItems;
    unsigned equal = 0;
    for (int j = 0; j < kItems; ++j)
      if (first + j < n && rank[first + j] == cut.key) equal |= 1u << j;
    const Scan scan = block_scan(__popc(equal));
    int tie = ties + scan.before;
    for (int j = 0; j < kItems && first + j < n; ++j) {
      const bool wins = equal >> j & 1 ? tie++ < cut.ties : rank[first + j] > cut.key;
      chosen[first + j] = wins;
    }
    ties += scan.all;
  }
  __syncthreads();

  // Eq. 18, each dominated token its own intro.
  const bool coupled = p.mode == CreditMode::kCoupled && wanted > 0;
  const int neighbors = p.neighbors < n ? static_cast<int>(p.neighbors) : n;
  if (coupled) {
    const Key low = p.given_tau_waad ? key_of(static_cast<T>(p.tau_waad))
                                     : largest(waad, n, static_cast<int>(median_rank(n))).key;
    const Key high = p.given_tau_delta ? key_of(static_cast<T>(p.tau_delta)) : largest(delta, n, size).key;
    for (int64_t i = threadIdx.x; i < n; i += step) {
      int best = -1;
      if (i > 0 && chosen[i] && waad[i] <= low) {
        const int nearest = static_cast<int>(i) - 1;
        const int farthest = nearest + 1 > neighbors ? nearest + 1 - neighbors : 0;
        best = nearest;
        for (int u = nearest - 1; u >= farthest; --u)
          if (delta[u] > delta[best]) best = u;
        if (delta[best] < high) best = -1;
      }
      intro[i] = best;
    }
    __syncthreads();
  }

  // Eq. 19. A token looks for those that it introduces, so that no two threads write one place.
  for (int64_t i = threadIdx.x; i < n; i += step) {
    int role = chosen[i] ? kAnchor : kOutside;
    bool introduces = false;
    if (coupled) {
      if (intro[i] >= 0) role = kDominated;
      const int64_t last = i + neighbors < n - 1 ? i + neighbors : n - 1;
      for (int64_t later = i + 1; later <= last && !introduces; ++later) introduces = intro[later] == i;
    }
    // Selections, not p.levels[index]: nvcc copies parameters that are indexed to the stack.
    const float alone = role == kOutside ? p.levels[0] : role == kAnchor ? p.levels[1] : p.levels[2];
    const float both = role == kOutside ? p.levels[3] : role == kAnchor ? p.levels[4] : p.levels[5];
    out[token[i]] = introduces ? both : alone;
  }
}

} // namespace
} // namespace rhythm

extern "C" int rhythm_cuda_credit(const rhythm::CreditInputs* inputs, void* scratch, void* stream) {
  using namespace rhythm;
  const CreditInputs& p = *inputs;
  if (p.batch == 0) return 0;
  int threads = 128;
  while (threads < kMaxThreads && threads * kItems < p.tokens) threads *= 2;
  const dim3 grid(static_cast<unsigned>(p.batch)), block(threads);
  unsigned char* const bytes = static_cast<unsigned char*>(scratch);
  return p.wide ? launch(credit_kernel<double>, grid, block, stream, p, bytes)
                : launch(credit_kernel<float>, grid, block, stream, p, bytes);
}
