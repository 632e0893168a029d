// band_columns: FAI of each key from the rows at distance lo .. hi after it, the log-sum-exp given.
//
//   FAI[s] = mean over s + lo <= t <= min(end - 1, s + hi) of A[t, s],   A = exp(x - lse)
//
// The count, for the paper's horizon, lo = 10 and hi = 100, D = 128, bfloat16, a key and one of the G query heads that
// read it:
//   bytes that must move   256 of q, 256 / G of k, 4 of lse              516 (G = 1), 324 (G = 4)
//   operations of the band 91 rows x 128 multiply-adds                   23,296: 45 and 72 a byte
//   operations done        128 rows, the 32-key slab's 122 in chunks     32,768: 64 and 101 a byte
// CUDA cores of an H100 have 20 operations for each byte of memory, tensor cores 295 (band_rows.cu): the band is past
// the first and below the second, so 16-bit inputs go by mma.sync. float32 stays on CUDA cores and waits for them: 23
// to 36 operations of the band a byte, 28 to 44 done.
//
// Instructions and loads are scarce too: slabs of 32 keys halve what is loaded for a pair. At most 168 registers leave 12
// warps a multiprocessor, each with a chunk of 4 KB (16 rows) under way: 48 KB. (Counts, not measurements.)
// The halo: a slab of 32 keys reads 122 rows of q, 3.8 times its own; the four slabs of a block read 218, 1.7 times,
// and find each other's in the L1 cache, where three heads at a time take 167 KB. Where few tokens make narrow blocks
// (8K: two slabs, six heads at a time) they read 154, 2.4 times, from the L2 cache.
#include "band.cuh"

namespace rhythm {
namespace {

// Keys are resident, rows pass: a slab of 16 kKeySets keys meets its own number and hi - lo rows of each head, a chunk
// of 8 kTiles at a time, and stays in registers for all query heads that follow each other in the table and read its
// kv head.
//
// Once a chunk is multiplied its registers are free: the loads of the next chunk, or of the next head's first one, are
// issued there and are under way while this warp takes the exponentials and others multiply.
template <typename Variant, typename T, int kChunks, bool kWhole, int kKeySets, int kTiles, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) band_columns_kernel(const Band band) {
  constexpr int kHalves = 2 * kKeySets, kStep = kPassing * kTiles;
  const CudaInputs& p = band.p;
  Work work;
  if (!locate<kHalves>(band, work)) return;
  const Lane lane(threadIdx.x % 32);
  float sum[kHalves] = {}; // [half]: A of each of the lane's keys over its rows, of one head with per_head, else of all
  // Turn sums into means over the rows of the horizon by position: those that a sliding window hides count, with A = 0.
  const auto finish = [&] {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int64_t key = work.first + lane.row + 8 * half, final = work.seq.end - 1;
      const float rows = static_cast<float>((key + p.hi < final ? key + p.hi : final) - (key + p.lo) + 1);
      const float all = over_columns(sum[half]);
      sum[half] = rows > 0.0f ? all / rows : 0.0f;
    }
  };
  if (work.first < work.seq.end) {
    const int head_dim = kWhole ? 32 * kChunks : static_cast<int>(p.head_dim);
    const int lo = static_cast<int>(p.lo), far = visible_far(p.hi, p.score), end = work.seq.end;
    const int last_key = work.first + kSlab<kHalves> < end ? work.first + kSlab<kHalves> - 1 : end - 1;
    const int64_t reach = int64_t(work.first) + kSlab<kHalves> - 1 + far;
    // Rows after a key of the response are of the response. An empty horizon is the range from 0 to -1.
    const int64_t final = reach < end - 1 ? reach : end - 1;
    const bool any = far >= lo && int64_t(work.first) + lo <= final;
    const int rows_from = any ? work.first + lo : 0, last = any ? static_cast<int>(final) : -1;
    Resident<T, kChunks> keys[kKeySets]; // of 16 keys each
    Passing<T, kChunks, kTiles> queries;
    float lse[kTiles][2]; // [tile of rows, one of the lane's two]
    const auto kv_head = [&](Head head) { return head.query / static_cast<int>(p.queries_per_kv); };
    const auto load_keys = [&](int kv) {
      const Tokens<T> k = tokens_of<T>(p.k, work.seq.batch_row, p.k_batch, kv, p.k_head, p.k_token, last_key, head_dim);
#pragma unroll
      for (int set = 0; set < kKeySets; ++set) keys[set].load(k, work.first + kResident * set, lane);
    };
    const auto rows_of = [&](Head head) {
      return tokens_of<T>(p.q, work.seq.batch_row, p.q_batch, head.query, p.q_head, p.q_token, last, head_dim);
    };
    const Head first = p.heads[work.heads_from];
    Tokens<T> q = rows_of(first);
    Tokens<float> q_lse = lse_of(p, work, first, last);
    const auto load_rows = [&](int t0) {
      queries.load(q, t0, lane);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i)
        lse[i / 2][i % 2] = __ldg(q_lse[t0 + kPassing * (i / 2) + 2 * lane.column + i % 2]);
    };

    if (any) load_rows(rows_from);
    int kv = kv_head(first), held = -1; // kv heads: of this query head, and whose keys `keys` has
    for (int entry = work.heads_from; entry < work.heads_to; ++entry) {
      const bool last_head = entry + 1 == work.heads_to;
      const Head next = p.heads[last_head ? entry : entry + 1];
      const HeadRule rule = rule_of<Variant>(p.score, work.sequence, p.heads[entry].query);
      const float zero = nothing(rule);
      if (any && kv != held) load_keys(kv);
      held = kv, kv = kv_head(next);
      for (int t0 = rows_from; t0 <= last; t0 += kStep) {
        float x[kKeySets][kTiles][4], row_lse[kTiles][2]; // x: [set, tile of rows, fragment element]
#pragma unroll
        for (int set = 0; set < kKeySets; ++set) products(keys[set], queries, head_dim, x[set]);
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) row_lse[i / 2][i % 2] = known(lse[i / 2][i % 2], zero);
        const bool last_chunk = last - t0 < kStep;
        if (last_chunk && !last_head) {
          q.base = rows_of(next).base, q_lse.base = lse_of(p, work, next, last).base;
        }
        if (!last_chunk || !last_head) load_rows(last_chunk ? rows_from : t0 + kStep);
#pragma unroll
        for (int set = 0; set < kKeySets; ++set) {
          const int apart = t0 - (work.first + kResident * set); // the first row from the first key
          if (apart - far >= kResident || lo - apart >= kStep) continue;
          const auto row = [&](int tile, int i) { return kPassing * tile + 2 * lane.column + i % 2; };
          const auto distance = [&](int tile, int i) { return apart + row(tile, i) - (lane.row + 8 * (i / 2)); };
          exponents<Variant>(x[set], rule, p.score, distance, [&](int tile, int i) { return row_lse[tile][i % 2]; });
          if (apart - lo >= kResident - 1 && far - apart >= kStep - 1 && last - t0 >= kStep - 1) { // all pairs in it
#pragma unroll
            for (int i = 0; i < 4 * kTiles; ++i) sum[2 * set + i % 4 / 2] += exp_of(x[set][i / 4][i % 4]);
          } else {
#pragma unroll
            for (int i = 0; i < 4 * kTiles; ++i) {
              const int past_lo = distance(i / 4, i % 4) - lo;
              const bool inside = static_cast<unsigned>(past_lo) <= static_cast<unsigned>(far - lo);
              const bool there = row(i / 4, i % 4) <= last - t0;
              sum[2 * set + i % 4 / 2] += inside && there ? exp_of(x[set][i / 4][i % 4]) : 0.0f;
            }
          }
        }
      }
      if (p.per_head) {
        finish();
        store_head(band, work, lane, entry, sum);
#pragma unroll
        for (int half = 0; half < kHalves; ++half) sum[half] = 0.0f;
      }
    }
  }
  if (p.per_head) return;
  finish();
  store_mean(band, work, lane, sum);
}

template <typename Variant, typename T, int kChunks, bool kWhole>
struct BandColumns {
  static constexpr int kKeySets = kChunks == 2 || kChunks == 4 ? 2 : 1;
  static constexpr int kHalves = 2 * kKeySets;
  // As many as have the registers.
  static constexpr bool kFits = kChunks == 2 || (kChunks == 4 && kWhole && std::is_same_v<Variant, Plain>);
  static constexpr int kWarps = kFits ? 12 : 8;
  static constexpr int kTiles = 2;
  static constexpr int kBlocks = kChunks > 0 ? 1 : 2; // a multiprocessor: bounds the registers
  static auto kernel() {
    return band_columns_kernel<Variant, T, kChunks, kWhole, kKeySets, kTiles, 32 * kWarps, kBlocks>;
  }
};

} // namespace
} // namespace rhythm

extern "C" int rhythm_cuda_band_columns(const rhythm::CudaInputs* inputs, void* stream) {
  return rhythm::launch_band<rhythm::BandColumns>(*inputs, stream);
}
