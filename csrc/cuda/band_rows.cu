// band_rows: WAAD of each row from the last W keys before it, the log-sum-exp given.
//
//   WAAD[t] = W rowsum[t] - sum over t - W < s <= t of A[t, s] (W - (t - s)),   A = exp(x - lse)
//
// The count, for W = 10, D = 128, bfloat16, a row of one head, G query heads a kv head:
//   bytes that must move   256 of q, 256 / G of k, 4 of lse             516 (G = 1), 324 (G = 4)
//   operations of the band 10 keys x 128 multiply-adds                  2,560:   5.0 and  7.9 a byte
//   operations done        32 keys, the 16-row slab's 25 in tiles of 8  8,192:  15.9 and 25.3 a byte
// An H100 has 20 float32 operations of CUDA cores (67 T/s) and 295 of tensor cores (989 T/s) for each byte of memory
// (3.35 TB/s). CUDA cores would have to unpack 16-bit numbers besides, and only the band itself would fit below their
// 20; on tensor cores the whole slab takes under a tenth of the time of its bytes. So 16-bit inputs go by mma.sync, and
// memory is what the kernel waits for: a lane has 8 loads of q and at most 16 of k, 16 bytes each, under way at once.
// float32 moves twice the bytes (8 to 13 operations a byte) and stays on CUDA cores.
// The halo: a slab of 16 rows reads 25 keys, 1.6 times its own, from caches where slabs are neighbours.
#include "band.cuh"

namespace rhythm {
namespace {

// Rows are resident, keys pass: a slab of 16 rows meets 16 + W - 1 keys. Query heads that follow each other in the
// table and share a kv head find its keys still in registers, where the band fits one chunk of 8 kTiles keys.
template <typename Variant, typename T, int kChunks, bool kWhole, int kTiles, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) band_rows_kernel(const Band band) {
  const CudaInputs& p = band.p;
  Work work;
  if (!locate<2>(band, work)) return;
  const Lane lane(threadIdx.x % 32);
  float total[2] = {0.0f, 0.0f}; // [half]: WAAD of the lane's two rows, summed over its heads
  if (work.first < work.seq.end) {
    const int head_dim = kWhole ? 32 * kChunks : static_cast<int>(p.head_dim);
    const int window = static_cast<int>(p.window), b = work.seq.batch_row;
    const int far = visible_far(p.window - 1, p.score);
    const int last = work.first + kResident < work.seq.end ? work.first + kResident - 1 : work.seq.end - 1;
    const int keys_from = work.first - far > work.seq.start ? work.first - far : work.seq.start;
    const bool one_chunk = last - keys_from < kPassing * kTiles;
    const int row[2] = {work.first + lane.row, work.first + lane.row + 8};

    Resident<T, kChunks> queries;
    Passing<T, kChunks, kTiles> keys;
    int held = -1; // the kv head whose keys `keys` has, where one chunk is all
    for (int entry = work.heads_from; entry < work.heads_to; ++entry) {
      const Head head = p.heads[entry];
      const HeadRule rule = rule_of<Variant>(p.score, work.sequence, head.query);
      const int kv_head = head.query / static_cast<int>(p.queries_per_kv);
      const Tokens<T> q = tokens_of<T>(p.q, b, p.q_batch, head.query, p.q_head, p.q_token, last, head_dim);
      const Tokens<T> k = tokens_of<T>(p.k, b, p.k_batch, kv_head, p.k_head, p.k_token, last, head_dim);
      // All loads are issued before the first is waited for, where queries become fragments: so keys come first.
      if (kv_head != held) keys.load(k, keys_from, lane);
      held = one_chunk ? kv_head : -1;
      const Tokens<float> row_lse = lse_of(p, work, head, last);
      float lse[2], sum[2] = {0.0f, 0.0f}; // [half]
#pragma unroll
      for (int half = 0; half < 2; ++half) lse[half] = __ldg(row_lse[row[half]]);
      queries.load(q, work.first, lane);
      const float zero = nothing(rule);
#pragma unroll
      for (int half = 0; half < 2; ++half) lse[half] = known(lse[half], zero);

      for (int s0 = keys_from; s0 <= last; s0 += kPassing * kTiles) {
        if (s0 > keys_from) keys.load(k, s0, lane);
        float x[kTiles][4]; // [tile of keys, fragment element], products.cuh
        products(queries, keys, head_dim, x);
        const auto distance = [&](int tile, int i) {
          return row[i / 2] - (s0 + kPassing * tile + 2 * lane.column + i % 2);
        };
        exponents<Variant>(x, rule, p.score, distance, [&](int, int i) { return lse[i / 2]; });
        // A chunk is summed first: one by one its pairs would vanish beside a key that has nearly all of a row.
        float part[2] = {0.0f, 0.0f}; // [half]
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int apart = distance(tile, i);
            const bool near = static_cast<unsigned>(apart) <= static_cast<unsigned>(far);
            part[i / 2] += near ? exp_of(x[tile][i]) * static_cast<float>(window - apart) : 0.0f;
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) sum[half] += part[half];
      }

      float value[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float width = static_cast<float>(window);
        float waad = width * row_sum(lse[half], rule) - over_columns(sum[half]);
        // Into [0, W] against rounding; NaN fails both comparisons and stays.
        waad = waad < 0.0f ? 0.0f : waad;
        value[half] = waad > width ? width : waad;
        total[half] += value[half];
      }
      if (p.per_head) store_head(band, work, lane, entry, value);
    }
  }
  if (!p.per_head) store_mean(band, work, lane, total);
}

template <typename Variant, typename T, int kChunks, bool kWhole>
struct BandRows {
  static constexpr int kHalves = 2;
  static constexpr int kWarps = 4;
  // Registers: a lane holds 16 kTiles bytes of keys for each chunk of the head.
  static constexpr int kTiles = kChunks > 4 ? 2 : 4;
  static constexpr int kBlocks = kChunks > 4 ? 2 : kChunks == 2 ? 4 : 3; // a multiprocessor: bounds the registers
  static auto kernel() { return band_rows_kernel<Variant, T, kChunks, kWhole, kTiles, 32 * kWarps, kBlocks>; }
};

} // namespace
} // namespace rhythm

extern "C" int rhythm_cuda_band_rows(const rhythm::CudaInputs* inputs, void* stream) {
  return rhythm::launch_band<rhythm::BandRows>(*inputs, stream);
}
