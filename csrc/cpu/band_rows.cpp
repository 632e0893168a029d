// band_rows: WAAD of each row from the last W keys before it, the log-sum-exp given.
//
// Lanes are rows. A tile of query tokens is transposed once a head, its keys once a kv head. q.k of kLanes rows with the
// keys at one distance is then a product of the two, shifted by the distance: a row costs W * D multiply-adds a head and
// nothing is summed across lanes.
#include "rhythm/diagonal.h"
#include "rhythm/passes.h"
#include "rhythm/score.h"
#include "rhythm/tile.h"

namespace rhythm {
namespace RHYTHM_CAPABILITY {

// Add sum A (W - distance) over the distances [near, far] to band [count, kMaxStrip], rounding errors to lost, for the
// rows t .. t + kLanes - 1 of `count` heads. rows: q [count, head_dim, kLanes], `step` a head; lse [count, kMaxStrip];
// keys [head_dim, ld_keys], column 0 being token t - far. starts: of each row's sequence, before which it sees no key.
static void add_band(const CpuInputs& p, const HeadRule* rules, int64_t t, Int starts, int64_t near, int64_t far,
                     const float* rows, int64_t step, const float* keys, int64_t ld_keys, const float* lse, int count,
                     float* band, float* lost) {
  const Int lanes = lane_index();
  Vec dots[kAccumulators]; // [fixed head, moved distance], a lane a row
  for (int g = 0; g < count; g += kMaxFixed) {
    const int fixed = count - g < kMaxFixed ? count - g : kMaxFixed;
    Vec sums[kMaxFixed];
    for (int f = 0; f < fixed; ++f) sums[f] = Vec{};
    int moved = 0;
    for (int64_t distance = far; distance >= near; distance -= moved) {
      moved = (int)smaller(moved_for(fixed), distance - near + 1);
      // At moved position m the rows t + lane meet the keys at distance - m.
      diagonal(fixed, moved)(rows + g * step, step, kLanes, keys + (far - distance), ld_keys, p.head_dim, dots);
      for (int m = 0; m < moved; ++m) {
        const float weight = (float)(p.window - (distance - m));
        const Vec apart = splat((float)(distance - m));
        const Int visible = lanes + (int32_t)(t - (distance - m)) >= starts;
        for (int f = 0; f < fixed; ++f) {
          const Vec a = exp(logit(dots[f * moved + m], apart, rules[g + f], p.score) - load(lse + (g + f) * kMaxStrip));
          sums[f] += keep(visible, a) * weight;
        }
      }
    }
    for (int f = 0; f < fixed; ++f) add_to(band + (g + f) * kMaxStrip, lost + (g + f) * kMaxStrip, sums[f]);
  }
}

// WAAD of the rows [t0, last), a strip of at most kMaxStrip, for all heads; starts [rows]: of each row's sequence.
//
// All heads of a short strip come before the next strip: its tokens' heads lie side by side in memory, a stream a token,
// which prefetchers follow better than the same head of many tokens (measured: 0.35% of SDPA became 0.31%).
template <typename T>
static void run_strip(const CpuInputs& p, const Tile& tile, int64_t t0, int64_t last, int64_t reach,
                      const int32_t* starts, float* scratch) {
  const int64_t rows = last - t0, batch_row = tile.seq.batch_row, width = whole_vectors(rows);
  const int64_t step = p.head_dim * kLanes, ld_keys = band_rows_key_columns(p);
  float* const queries = scratch;                                 // [kMaxGroup, head_dim, kLanes], transposed
  float* const keys = queries + kMaxGroup * p.head_dim * kMaxLanes; // [head_dim, ld_keys], transposed
  float* const lse = keys + p.head_dim * ld_keys;                 // [kMaxGroup, kMaxStrip], as band and lost
  float* const band = lse + kMaxGroup * kMaxStrip;
  float* const lost = band + kMaxGroup * kMaxStrip; // rounding errors of band (add_to)
  float* const mean = lost + kMaxGroup * kMaxStrip; // [kMaxStrip], the sum over heads
  __builtin_memset(mean, 0, kMaxStrip * sizeof(float));

  const int64_t farthest = smaller(reach, last - 1 - tile.seq.start);
  int64_t loaded_head = -1; // whose keys `keys` holds, where one chunk of distances is all
  for (int64_t i = 0; i < p.n_kv_groups; ++i) {
    const KvGroup& group = p.kv_groups[i];
    const T* const kv = head_of<T>(p.k, batch_row, p.k_batch, group.kv_head, p.k_head);
    __builtin_memset(band, 0, group.count * kMaxStrip * sizeof(float));
    __builtin_memset(lost, 0, group.count * kMaxStrip * sizeof(float));
    HeadRule rules[kMaxGroup];
    for (int g = 0; g < group.count; ++g) {
      const Head head = p.heads[group.entry[g]];
      rules[g] = rule_of(p, tile, head.query);
      load_lse(p, batch_row, head, rules[g], t0, width, t0, last, lse + g * kMaxStrip);
    }
    for (int64_t near = 0; near <= farthest; near += kBandChunk) {
      const int64_t far = smaller(near + kBandChunk - 1, farthest);
      if (group.kv_head != loaded_head || farthest >= kBandChunk)
        load_transposed(kv, p.k_token, p.head_dim, t0 - far, whole_vectors(width + far - near), 0, p.tokens, keys,
                        ld_keys);
      loaded_head = group.kv_head;
      for (int64_t r = 0; r < rows; r += kLanes) {
        for (int g = 0; g < group.count; ++g)
          load_transposed(head_of<T>(p.q, batch_row, p.q_batch, p.heads[group.entry[g]].query, p.q_head), p.q_token,
                          p.head_dim, t0 + r, kLanes, 0, p.tokens, queries + g * step, kLanes);
        add_band(p, rules, t0 + r, load_int(starts + r), near, far, queries, step, keys + r, ld_keys, lse + r,
                 group.count, band + r, lost + r);
      }
    }
    for (int g = 0; g < group.count; ++g) {
      float* const value = band + g * kMaxStrip;
      for (int64_t r = 0; r < rows; r += kLanes) {
        const Vec rowsum = row_sum(load(lse + g * kMaxStrip + r), rules[g]);
        const Vec waad = waad_from_band(rowsum, load(value + r), (float)p.window);
        store(value + r, waad);
        store(mean + r, load(mean + r) + waad);
      }
      if (p.per_head) {
        float* const out = p.out + (batch_row * p.n_heads + group.entry[g]) * p.tokens;
        for_each_live(tile, t0, last, [=](const Sequence&, int64_t from, int64_t to) {
          __builtin_memcpy(out + from, value + (from - t0), (to - from) * sizeof(float));
        });
      }
    }
  }
  if (!p.per_head)
    for_each_live(tile, t0, last, [=](const Sequence&, int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) p.out[batch_row * p.tokens + t] = mean[t - t0] / (float)p.n_heads;
    });
}

template <typename T>
static void run(const CpuInputs& p, const Tile& tile, float* scratch) {
  const int64_t strip = band_rows_strip(p);
  const int64_t reach = smaller(smaller(p.window - 1, p.score.window_left), reach_of(tile));
  int32_t starts[kBandTile];
  spread(tile, kBandTile, INT32_MAX, starts, [](const Sequence& seq) { return seq.start; });
  for (int64_t t = tile.first; t < tile.last; t += strip)
    run_strip<T>(p, tile, t, smaller(t + strip, tile.last), reach, starts + (t - tile.first), scratch);
}

RHYTHM_DEFINE(band_rows)

} // namespace RHYTHM_CAPABILITY
} // namespace rhythm
