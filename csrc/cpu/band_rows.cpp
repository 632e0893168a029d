// band_rows: WAAD of each row from the last W keys before it, the log-sum-exp given.
//
// Lanes are rows. A tile of rows is transposed once a head, its keys once a kv head; the score of distance delta for
// kLanes rows is then one column-shifted product, so that a row costs W * D multiply-adds a head and no reduction
// across lanes.
#include "rhythm/diagonal.h"
#include "rhythm/passes.h"
#include "rhythm/score.h"
#include "rhythm/tile.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

// Add A (W - distance) of the distances [near, far] to band[g][row] for `count` heads whose rows lie transposed in
// `rows` (head g at g * step); column 0 of `keys` is token t0 - far.
static void add_band(const Problem& p, int64_t t0, int64_t start, int64_t near, int64_t far, const float* rows,
                     int64_t step, int64_t ld_rows, const float* keys, int64_t ld_keys, const float* lse,
                     int count, int64_t n_rows, float* band) {
  const Int lanes = lane_index();
  Vec dots[kAccumulators];
  for (int64_t r = 0; r < n_rows; r += kLanes) {
    for (int g = 0; g < count; g += kMaxFixed) {
      const int fixed = count - g < kMaxFixed ? count - g : kMaxFixed;
      Vec sums[kMaxFixed];
      for (int f = 0; f < fixed; ++f) sums[f] = load(band + (g + f) * kRowTile + r);
      int moved = 0;
      for (int64_t distance = far; distance >= near; distance -= moved) {
        moved = (int)smaller(moved_for(fixed), distance - near + 1);
        // At moved position m the rows t0 + r + lane meet the keys at distance - m.
        diagonal(fixed, moved)(rows + (g * step + r), step, ld_rows, keys + (far - distance + r), ld_keys,
                               p.head_dim, dots);
        for (int m = 0; m < moved; ++m) {
          const float weight = (float)(p.window - (distance - m));
          const Int visible = lanes + (int32_t)(t0 + r - (distance - m)) >= splat_int((int32_t)start);
          for (int f = 0; f < fixed; ++f) {
            const Vec a = exp(logit(dots[f * moved + m], p.score) - load(lse + (g + f) * kRowTile + r));
            sums[f] += keep(visible, a) * weight;
          }
        }
      }
      for (int f = 0; f < fixed; ++f) store(band + (g + f) * kRowTile + r, sums[f]);
    }
  }
}

template <typename T>
static void run(const Problem& p, const Tile& tile, float* scratch) {
  const int64_t t0 = tile.first, rows = tile.last - tile.first, row = tile.seq.row;
  const int64_t ld_rows = padded(kRowTile), step = p.head_dim * ld_rows;
  const int64_t ld_keys = padded(kRowTile + band_width(p) + kMaxLanes);
  float* const queries = scratch;
  float* const keys = queries + kMaxGroup * step;
  float* const lse = keys + p.head_dim * ld_keys;
  float* const band = lse + kMaxGroup * kRowTile;
  float* const mean = band + kMaxGroup * kRowTile;
  __builtin_memset(mean, 0, kRowTile * sizeof(float));

  const int64_t farthest = smaller(smaller(p.window - 1, p.score.window_left), tile.last - 1 - tile.seq.start);
  int64_t loaded_head = -1; // whose keys `keys` holds, where one chunk of distances is all
  for (int64_t i = 0; i < p.n_groups; ++i) {
    const HeadGroup& group = p.groups[i];
    for (int g = 0; g < group.count; ++g) {
      const Head head = p.heads[group.entry[g]];
      load_transposed(head_of<T>(p.q, row, p.q_row, head.query, p.q_head), p.q_token, p.head_dim, t0,
                      whole_vectors(rows), t0, tile.last, queries + g * step, ld_rows);
      load_lse(p, row, head.lse_row, t0, kRowTile, t0, tile.last, lse + g * kRowTile);
    }
    __builtin_memset(band, 0, group.count * kRowTile * sizeof(float));
    const T* const kv = head_of<T>(p.k, row, p.k_row, group.kv_head, p.k_head);
    for (int64_t near = 0; near <= farthest; near += kBandChunk) {
      const int64_t far = smaller(near + kBandChunk - 1, farthest);
      if (group.kv_head != loaded_head || farthest >= kBandChunk)
        load_transposed(kv, p.k_token, p.head_dim, t0 - far, whole_vectors(whole_vectors(rows) + far - near), tile.seq.start,
                        tile.last, keys, ld_keys);
      loaded_head = group.kv_head;
      add_band(p, t0, tile.seq.start, near, far, queries, step, ld_rows, keys, ld_keys, lse, group.count, rows, band);
    }
    for (int g = 0; g < group.count; ++g) {
      const int32_t query_head = p.heads[group.entry[g]].query;
      float value[kRowTile];
      for (int64_t r = 0; r < kRowTile; r += kLanes) {
        const Vec rowsum = row_sum(load(lse + g * kRowTile + r), p.score, query_head);
        const Vec waad = waad_from_band(rowsum, load(band + g * kRowTile + r), (float)p.window);
        store(value + r, waad);
        store(mean + r, load(mean + r) + waad);
      }
      if (p.per_head)
        __builtin_memcpy(p.out + (row * p.n_heads + group.entry[g]) * p.tokens + t0, value, rows * sizeof(float));
    }
  }
  if (!p.per_head)
    for (int64_t r = 0; r < rows; ++r) p.out[row * p.tokens + t0 + r] = mean[r] / (float)p.n_heads;
}

RHYTHM_DEFINE(band_rows)

} // namespace RHYTHM_CAPABILITY
} // namespace rhythm
