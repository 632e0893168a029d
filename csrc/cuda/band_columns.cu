// band_columns: FAI of each key from the rows at distance lo .. hi after it, the log-sum-exp given.
//
//   FAI[s] = mean over s + lo <= t <= min(end - 1, s + hi) of A[t, s],   A = exp(x - lse)
//
// The count, for lo = 10, hi = 50, D = 128, bfloat16, a key and one of the G query heads that read it:
//   bytes that must move   256 of q, 256 / G of k, 4 of lse              516 (G = 1), 324 (G = 4)
//   operations of the band 41 rows x 128 multiply-adds                   10,496:  20 and 32 a byte
//   operations done        64 rows, the 16-key slab's 56 in pairs of 8   16,384:  32 and 51 a byte
// CUDA cores of an H100 have 20 operations for each byte of memory, tensor cores 295 (band_rows.cu): the band is at or
// past the first and far below the second, so 16-bit inputs go by mma.sync. float32 (10 to 16 operations of the band a
// byte, 16 to 25 done) stays on CUDA cores, about even with memory.
// The halo: a slab of 16 keys reads 56 rows of q, 3.5 times its own; the four slabs of a block read 104, 1.6 times,
// and find each other's in the L1 cache.
#include "band.cuh"
#include "score.cuh"

namespace rhythm {
namespace {

// Keys are resident, rows pass: a slab of 16 keys meets 16 + hi - lo rows of each head, and stays in registers for all
// query heads that follow each other in the table and read its kv head.
template <typename T, int kChunks, int kTiles, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) band_columns_kernel(const Band band) {
  const DeviceProblem& p = band.p;
  Work work;
  if (!locate(band, work)) return;
  const Lane lane(threadIdx.x % 32);
  float total[2] = {0.0f, 0.0f};
  if (work.first < work.seq.end) {
    const int head_dim = static_cast<int>(p.head_dim), lo = static_cast<int>(p.lo);
    const int far = visible_far(p.hi, p), end = work.seq.end;
    const int last_key = work.first + kResident < end ? work.first + kResident - 1 : end - 1;
    const int64_t rows_from = int64_t(work.first) + lo, reach = int64_t(work.first) + kResident - 1 + far;
    // Rows after a key of the response are rows of the response.
    const int last = reach < end - 1 ? static_cast<int>(reach) : end - 1;
    const bool any = far >= lo && rows_from <= last;
    const int key[2] = {work.first + lane.row, work.first + lane.row + 8};
    float rows[2]; // of each key's horizon, by position: the window takes none out
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t to = key[half] + p.hi < end - 1 ? key[half] + p.hi : end - 1;
      rows[half] = static_cast<float>(to - (key[half] + p.lo) + 1);
    }

    Resident<T, kChunks> keys;
    Passing<T, kChunks, kTiles> queries;
    int held = -1; // whose keys `keys` has
    for (int entry = work.heads_from; entry < work.heads_to; ++entry) {
      const Head head = p.heads[entry];
      const int kv_head = head.query / static_cast<int>(p.kv_group);
      const Tokens<T> q = tokens_of<T>(p.q, work.seq.row, p.q_row, head.query, p.q_head, p.q_token, last, p.head_dim);
      const Tokens<T> k = tokens_of<T>(p.k, work.seq.row, p.k_row, kv_head, p.k_head, p.k_token, last_key, p.head_dim);
      const float* const lse_row = p.lse + work.seq.row * p.lse_row + head.lse_row * p.lse_head;
      float sum[2] = {0.0f, 0.0f};
      if (any && kv_head != held) keys.load(k, work.first, lane);
      held = kv_head;

      for (int t0 = static_cast<int>(rows_from); any && t0 <= last; t0 += kPassing * kTiles) {
        queries.load(q, t0, lane);
        float x[kTiles][4], lse[kTiles][2];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int t = t0 + kPassing * tile + 2 * lane.column + i;
            lse[tile][i] = __ldg(lse_row + (t < last ? t : last) * p.lse_token);
          }
        products(keys, queries, head_dim, x);
        logits(x, p);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int t = t0 + kPassing * tile + 2 * lane.column + i % 2;
            const bool inside = static_cast<unsigned>(t - key[i / 2] - lo) <= static_cast<unsigned>(far - lo);
            const float a = weight(x[tile][i], lse[tile][i % 2]);
            sum[i / 2] += inside && t <= last ? a : 0.0f;
          }
        }
      }

      float value[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float all = over_columns(sum[half]);
        value[half] = rows[half] > 0.0f ? all / rows[half] : 0.0f;
        total[half] += value[half];
      }
      if (p.per_head) store_head(band, work, lane, entry, value);
    }
  }
  if (!p.per_head) store_mean(band, work, lane, total);
}

template <typename T, int kChunks>
struct BandColumns {
  static constexpr int kWarps = kChunks == 2 || kChunks == 4 ? 16 : 8;
  static constexpr int kTiles = 2;
  static constexpr int kBlocks = kChunks > 0 ? 1 : 2; // a multiprocessor: bounds the registers
  static auto kernel() { return band_columns_kernel<T, kChunks, kTiles, 32 * kWarps, kBlocks>; }
};

} // namespace
} // namespace rhythm

extern "C" int rhythm_cuda_band_columns(const rhythm::DeviceProblem* problem, void* stream) {
  return rhythm::launch_band<rhythm::BandColumns>(*problem, stream);
}
